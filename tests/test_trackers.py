"""--callbacks: training results in W&B and MLflow, offline, and one line where a package is missing."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuel_ray.commands.train import TrainVerbConfig, parse
from fuel_ray.errors import ConfigError
from fuel_ray.flags import resumed
from fuel_ray.record import write_json
from fuel_ray.training import trackers
from fuel_ray.training.run import _MAY_CHANGE
from tests.conftest import RAY_SETTINGS

TRAINED = """
import sys
from dataclasses import replace
from pathlib import Path

from fuel_ray.build.codec import build_codec
from fuel_ray.build.nodes import build_spec
from fuel_ray.config import PRESETS
from fuel_ray.training.trackers import check_trackers
from fuel_ray.training.trials import run_trials, start_ray

config = PRESETS["plain"]
train = replace(config.train, num_envs=2, iterations=2, episode_steps=20, fragment_steps=10)
train = replace(train, learning_starts=10)
config = replace(config, block_sizes=(16,), steps=80, callbacks=tuple(sys.argv[2:]), train=train)
check_trackers(config.callbacks)
start_ray(config)
run_trials(config, Path(sys.argv[1]), build_codec(config, build_spec(config, 16)).grid, {})
"""


@pytest.fixture
def nothing_installed(monkeypatch):
    find = importlib.util.find_spec
    there = lambda name: None if name in ("wandb", "mlflow") else find(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", there)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_one_line_with_the_command(name, nothing_installed):
    with pytest.raises(
        ConfigError, match=f"^--callbacks {name} needs the package {name}: run pip install {name}$"
    ):
        trackers.check_trackers((name,))


def test_without_the_setting_no_package_is_looked_for(nothing_installed):
    assert parse([], prog="t").callbacks == ()
    assert trackers.trackers((), Path()) == []
    trackers.check_trackers(())


def test_a_run_may_be_resumed_with_others(tmp_path):
    write_json(tmp_path / "run.json", {"config": {"callbacks": ["wandb"]}})
    base = TrainVerbConfig()
    flags = ["--callbacks", "mlflow"]
    config = resumed(tmp_path, flags, prog="t", base=base, may_change=_MAY_CHANGE)
    assert config.callbacks == ("mlflow",)


def test_a_server_that_does_not_answer_is_known_before_the_run(monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match=r"^--callbacks mlflow: "):
        trackers.check_trackers(("mlflow",))


def test_wandb_without_a_login_is_known_before_the_run(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^--callbacks wandb: No WandB API key"):
        trackers.check_trackers(("wandb",))


def trained(run_dir, *names):
    """What a training of 80 windows leaves and says, without a network."""
    env = {**os.environ, **RAY_SETTINGS, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE", "RAY_ADDRESS", "WANDB_API_KEY"):
        env.pop(name, None)
    command = [sys.executable, "-c", TRAINED, str(run_dir), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("names", [("wandb",), ("mlflow",), ("wandb", "mlflow")], ids=" and ".join)
def test_without_a_server_results_are_in_the_folder_of_the_run(names, tmp_path):
    for name in names:
        pytest.importorskip(name)
    trained(tmp_path, *names)
    if "wandb" in names:
        (run,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
        assert b"energy_j_per_request" in run.read_bytes()
    if "mlflow" in names:
        (curve,) = tmp_path.glob("mlruns/*/*/metrics/env_runners/fuel/energy_j_per_request")
        assert [line.split()[-1] for line in curve.read_text().splitlines()] == ["1", "2"]  # results
