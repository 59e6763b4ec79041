"""Whether a real vLLM (CPU build) heeds the batch limit is said as it is; FUEL_RAY_VLLM is its bin folder."""

import json
from contextlib import contextmanager

import pytest

from fuel_ray.cli import main
from fuel_ray.live.vllm.server import VllmServer, server_version
from fuel_ray.types import Knobs
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.policy_folders import write_policy
from tests.real_vllm import BIN, FLAGS, ROOT, Load, pytestmark  # noqa: F401  (the marks)
from tests.test_deploy_real import GRID

OWN_SCHEDULERS = """
from pathlib import Path

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from fuel_ray import vllm_plugin

schedule = Scheduler.schedule
Path(__file__).with_name("plugin").write_text(vllm_plugin.__file__)


class Heeding(AsyncScheduler):
    def schedule(self, *args, **kwargs):
        return schedule(self, *args, **kwargs)


class Greedy(AsyncScheduler):
    def schedule(self, *args, **kwargs):
        self.max_num_active_reqs = self.max_num_running_reqs
        return schedule(self, *args, **kwargs)
"""


@contextmanager
def limited(model, folder, *, flags=(), **env):
    (folder / "own_schedulers.py").write_text(OWN_SCHEDULERS)
    limit_file = folder / "limit"
    own = {"PYTHONPATH": f"{folder}:{ROOT}", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with VllmServer(
        str(model),
        log_path=folder / "vllm.log",
        executable=f"{BIN}/vllm",
        flags=(*FLAGS, *flags),
        env={**own, **env},
        kv_block_size=32,
        limit_file=limit_file,
    ) as server:
        yield server, limit_file


def deployed(server, limit_file, folder, *, steps):
    policy = write_policy(
        folder / "policy",
        **{"sizes": (32,), "grid": GRID, "best": Knobs(4, 1980)},
        engine=f"vLLM {server_version(server.url)}",
    )
    arguments = ["--policy", str(policy), "--server", server.url, "--out", str(folder / "out")]
    arguments += ["--limit-file", str(limit_file), "--clock-control", "off", "--max-steps", str(steps)]
    with Load(server.url, clients=16) as load:
        code = main(["deploy", *arguments, "--guard.max-wait-s", "1000", "--guard.no-latency"])
    assert load.failures == [] and not limit_file.exists()
    (path,) = (folder / "out").glob("deploy-*/steps.jsonl")
    return code, [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu(uuid="GPU-0")))


def test_a_scheduler_of_ones_own_that_heeds_the_limit_is_limited(model, tmp_path):
    flags = ["--scheduler-cls", "own_schedulers.Heeding"]
    with limited(model, tmp_path, flags=flags) as (server, limit_file):
        code, lines = deployed(server, limit_file, tmp_path, steps=14)
    assert (tmp_path / "plugin").read_text() == str(ROOT / "fuel_ray" / "vllm_plugin.py")
    assert code == 0 and {line["applied"]["batch_limit"] for line in lines[3:]} == {4}
    assert all(line["limit_acknowledged"] for line in lines[3:])
    assert all(line["running"] <= 4 < line["waiting"] for line in lines[8:])


GREEDY = ("--scheduler-cls", "own_schedulers.Greedy")
WITHOUT = [
    pytest.param((), "none", "no vLLM scheduler has read ", marks=pytest.mark.slow, id="no plug-in"),
    pytest.param(GREEDY, "fuel_ray", "the scheduler kept 32 ", id="own schedule"),
]


@pytest.mark.parametrize(("flags", "plugins", "words"), WITHOUT)
def test_a_limit_that_is_not_heeded_is_not_said_to_be_in_force(
    model, tmp_path, capsys, flags, plugins, words
):
    with limited(model, tmp_path, flags=flags, VLLM_PLUGINS=plugins) as (server, limit_file):
        _stays_at_32(server, limit_file, tmp_path, capsys, words)


def test_a_limit_in_another_file_is_not_said_to_be_in_force(real_server, tmp_path, capsys):
    _stays_at_32(real_server, tmp_path / "another", tmp_path, capsys, "no vLLM scheduler has read ")


def _stays_at_32(server, limit_file, tmp_path, capsys, words):
    code, lines = deployed(server, limit_file, tmp_path, steps=60)
    assert code == 2 and len(lines) < 30
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fuel-ray: ")]
    assert len(err) == 1 and f"fuel-ray: batch limit 4 is not in force: {words}" in err[0]
    assert {line["applied"]["batch_limit"] for line in lines} == {32}
    assert not any(line["limit_acknowledged"] for line in lines)
    assert max(line["running"] for line in lines) > 4
