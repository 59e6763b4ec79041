"""What a package outside can add without editing this one; it is the one of examples/outside."""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from fuel_ray.build.codec import build_codec, build_manifest
from fuel_ray.build.nodes import build_loop, build_node, build_spec
from fuel_ray.cli import main
from fuel_ray.config import PRESETS, SweepConfig, to_dict
from fuel_ray.errors import ConfigError, PolicyError
from fuel_ray.flags import parse_serving, resumed
from fuel_ray.outside import load, made, reference
from fuel_ray.policies.learned import read_policy, save_policy
from fuel_ray.policies.static import Static
from fuel_ray.training.envs import learning_settings, make_env
from fuel_ray.tuning.episodes import run_episode
from fuel_ray.types import Knobs
from tests.policy_folders import write_policy

ROOT = Path(__file__).parent.parent
REWARD = "examples.outside.rewards:EnergyDelay"
EXTRA = "examples.outside.features:FEATURES"
WORKLOAD = "examples.outside.workloads:classes:students=30,every_s=20"
FLAGS = ["--reward", REWARD, "--extra-features", EXTRA, "--workload", WORKLOAD]
FEATURES = ("running", "full_batch", "tokens_per_joule")


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def parse(*flags, preset="plain"):
    flags = ["--preset", preset, "--block-sizes", "16", *flags]
    return parse_serving(SweepConfig, flags, prog="fuel-ray sweep")


CONFIG = replace(
    PRESETS["plain"],
    block_sizes=(16,),
    reward=REWARD,
    extra_features=(EXTRA,),
    workload=WORKLOAD,
    features=FEATURES,
)


def first_steps(settings):
    """What a worker process sees and is rewarded with."""
    env = make_env(settings)
    seen = [env.reset(seed=1)[0]]
    rewards = []
    for _ in range(30):
        observation, reward, *_ = env.step(np.int64(len(env.codec.grid) - 1))
        seen.append(observation)
        rewards.append(reward)
    return np.array(seen), rewards


def test_a_reward_features_and_a_workload_from_outside_are_trained_with_in_another_process():
    config = parse(*FLAGS, "--features", *FEATURES)
    assert config == CONFIG
    settings = {"config": learning_settings(config), "block_sizes": [16]}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        seen, rewards = pool.submit(first_steps, json.loads(json.dumps(settings))).result(timeout=60)
    assert seen.shape == (31, 3) and seen[:, 1].max() > 0.05 and seen[:, 2].max() > 0.05
    assert max(rewards) <= 0.0 and min(rewards) < -0.1


def test_a_workload_from_outside_is_served():
    loop = build_loop(CONFIG, 16, horizon_s=60.0)
    records = run_episode(loop, Static(Knobs(64, 1500)), seed=3, seconds=60).records
    assert len(records) == 90
    assert all(within % 20 <= 5.0 for within in records.arrival_s)


def test_a_policy_folder_says_which_features_it_needs_and_that_they_were_not_named(tmp_path):
    codec = build_codec(CONFIG, build_spec(CONFIG, 16))
    made_by_hand = read_policy(write_policy(tmp_path / "p", grid=codec.grid, features=("waiting",) * 3))
    manifest = build_manifest(CONFIG, build_spec(CONFIG, 16), block_sizes=(16,), engine="e")
    save_policy(
        tmp_path / "q",
        made_by_hand.arrays,
        codec,
        replace(manifest, head="joint"),
    )
    raw = json.loads((tmp_path / "q" / "manifest.json").read_text())
    assert raw["needs"] == [EXTRA] and raw["reward"] == REWARD and raw["workload"] == WORKLOAD
    with pytest.raises(PolicyError, match=f"add --extra-features {EXTRA}"):
        read_policy(tmp_path / "q")
    found = read_policy(tmp_path / "q", extra_features=[EXTRA])
    assert found.codec == codec and found.codec.high.tolist() == [1.0, 1.0, 1.0]


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module in the working directory that leaves a file when it is imported."""
    (tmp_path / "trap.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('sprung').touch()\n"
        "from examples.outside.features import FEATURES\n"
        "from examples.outside.rewards import EnergyDelay\n"
    )
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "sprung"


def test_a_policy_folder_or_settings_alone_never_load_code(trap, tmp_path, capsys):
    write_policy(tmp_path / "policy", needs=("trap:FEATURES",))
    with pytest.raises(PolicyError, match="add --extra-features trap:FEATURES"):
        read_policy(tmp_path / "policy")
    assert main(["evaluate", "--policies", str(tmp_path / "policy"), "--block-sizes", "16"]) == 2
    for change in (
        {"reward": "trap:EnergyDelay"},
        {"workload": "trap:classes:students=3"},
        {"control_workload": "trap:classes"},
        {"extra_features": ("trap:FEATURES",)},
    ):
        settings = to_dict(replace(PRESETS["plain"], **change))
        (tmp_path / "run.json").write_text(json.dumps({"config": settings}))
        ((flag, text),) = change.items()
        says = f"add --{flag.replace('_', '-')} {text if isinstance(text, str) else text[0]}"
        with pytest.raises(ConfigError, match=says):
            parse("--config", str(tmp_path / "run.json"))
        with pytest.raises(ConfigError, match=says):
            resumed(tmp_path, [], prog="p", base=SweepConfig(), may_change=())
    assert not trap.exists()


def test_an_export_loads_nothing_that_was_not_named(trap, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fuel_ray.commands.export.is_checkpoint", lambda path: True)
    settings = learning_settings(replace(PRESETS["plain"], extra_features=("trap:FEATURES",)))
    (tmp_path / "run.json").write_text("{}")
    trial = {"env_config": {"config": settings, "block_sizes": [16]}}
    (tmp_path / "params.json").write_text(json.dumps(trial))
    assert main(["export", "--checkpoint", str(tmp_path / "checkpoint")]) == 2
    assert "add --extra-features trap:FEATURES" in capsys.readouterr().err
    assert not trap.exists()


@pytest.mark.parametrize(
    ("verb", "settings"),
    [
        ("sweep", {"train": {"algorithm": "trap:x-y"}}),
        ("sweep", {"also": ["trap:-"]}),
        ("evaluate", {"extra_features": ["trap"]}),
        ("evaluate", {"extra_features": ["trap:"]}),
        ("evaluate", {"policies": ["trap:X.Y"]}),
    ],
)
def test_what_only_looks_like_a_name_loads_nothing_either(trap, tmp_path, capsys, verb, settings):
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert main([verb, "--config", str(tmp_path / "settings.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not trap.exists()


def test_an_export_has_no_use_for_the_algorithm(trap, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fuel_ray.commands.export.is_checkpoint", lambda path: True)
    train = replace(PRESETS["plain"].train, algorithm="trap:own")
    settings = learning_settings(replace(PRESETS["plain"], train=train))
    (tmp_path / "run.json").write_text("{}")
    trial = {"env_config": {"config": settings, "block_sizes": [16]}}
    (tmp_path / "params.json").write_text(json.dumps(trial))
    assert main(["export", "--checkpoint", str(tmp_path / "checkpoint")]) == 2
    assert "module_state.pkl" in capsys.readouterr().err and not trap.exists()


def test_all_of_several_names_are_to_be_named(trap, tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"also": ["trap:Mine", "clipper"]}))
    with pytest.raises(ConfigError, match=r"add --policies trap:Mine clipper$"):
        parse("--config", str(tmp_path / "settings.json"))


def test_code_that_fails_is_told_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "failing.py").write_text("def maker():\n    return 1 // 0\n")
    (tmp_path / "broken.py").write_text("undefined\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, says in (("failing:maker", "ZeroDivisionError"), ("broken:maker", "NameError")):
        with pytest.raises(ConfigError, match=f"{name}: {says}"):
            made(name, needs=())


def test_what_the_command_line_names_is_loaded(trap, tmp_path):
    settings = to_dict(replace(PRESETS["plain"], extra_features=("trap:FEATURES",)))
    (tmp_path / "run.json").write_text(json.dumps({"config": settings}))
    config = parse("--config", str(tmp_path / "run.json"), "--extra-features", "trap:FEATURES")
    assert config.extra_features == ("trap:FEATURES",) and trap.exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--reward", "nowhere.rewards:Profit"], "nowhere.rewards:Profit: No module named 'nowhere'"),
        (["--reward", "examples.outside.rewards:Profit"], "has no attribute 'Profit'"),
        (["--reward", "profit"], "or package.module:Class"),
        (["--reward", EXTRA], "not a callable object|not callable"),
        (["--reward", "fractions:Fraction"], "slo"),
        (["--extra-features", REWARD], "must be a mapping of names to Feature"),
        (["--extra-features", EXTRA, EXTRA], "a feature named tokens_per_joule, full_batch exists already"),
        (["--features", "full_batch"], "--features full_batch: give at least one, each one once, out of"),
        (["--workload", "examples.outside.workloads:classes:teachers=1"], "'teachers'"),
        (["--workload", "examples.outside.workloads:np"], "not a callable object|not callable"),
        (["--workload", "fuel_ray.guard:Rules"], "returns a Rules, which has no name, period_s"),
    ],
)
def test_what_is_wrong_with_code_from_outside_is_said_in_one_line(flags, says):
    with pytest.raises(ConfigError, match=says):
        build_node(parse(*flags), 16, horizon_s=1.0)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a.b:C", "a.b:C"),
        ("a:f:x=1,y=b", "a:f"),
        ("steady:rate_rps=5", None),
        ("azure:path=x.csv", None),
        ("http://host:80/a:b", None),
        ("s3://bucket", None),
        ("48@1350", None),
    ],
)
def test_what_is_a_name_from_outside(text, found):
    assert reference(text) == found


def test_names_from_outside_are_loaded_and_called():
    assert load("math:pi") == pytest.approx(3.14159, abs=1e-5)
    assert made("fractions:Fraction", needs=("limit_denominator",), numerator=1, denominator=2) == 0.5
