"""fuel-ray deploy against a stub server and fake GPUs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fuel_ray.cli import main
from fuel_ray.types import Knobs
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.policy_folders import write_policy
from tests.stub_vllm import serving
from tests.traffic_stub import TrafficStub

ROOT = Path(__file__).parent.parent
HEAVY = ("ray", "torch", "gymnasium", "numba", "pandas", "matplotlib")


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeGpu(uuid="GPU-0")
    monkeypatch.setattr("fuel_ray.live.nvml.pynvml", FakeNvml(fake))
    monkeypatch.setattr("fuel_ray.live.nvml._holds_sys_admin", lambda proc: True)
    return fake


@pytest.fixture
def stub():
    with serving(TrafficStub()) as served:
        yield served


@pytest.fixture
def policy(tmp_path):
    return write_policy(tmp_path / "policy", best=Knobs(4, 990))


def deploy(stub, policy, tmp_path, *flags):
    code = main(
        [
            *("deploy", "--policy", str(policy), "--server", stub.url, "--out", str(tmp_path / "out")),
            *("--interval", "0.1", "--max-steps", "4", *flags),
        ]
    )
    (folder,) = (tmp_path / "out").glob("deploy-*")
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return code, lines, json.loads((folder / "run.json").read_text())


def test_a_policy_controls_a_running_server_and_gives_everything_back(stub, gpu, policy, tmp_path):
    limit_file = tmp_path / "limit"
    code, lines, run = deploy(stub, policy, tmp_path, "--limit-file", str(limit_file))
    assert code == 0 and [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all(
        line["chosen"] == {"batch_limit": 4, "gpu_clock_mhz": 990} == line["applied"] for line in lines
    )
    assert sum(line["completed"] for line in lines) == pytest.approx(20 * 0.4, abs=3)
    assert gpu.locked_mhz is None and "reset" in gpu.calls and not limit_file.exists()
    summary = run["summary"]
    assert (summary["windows"], summary["lost_windows"], summary["lost_lines"]) == (4, 0, 0)
    assert 0.04 < summary["ttft"]["p50_s"] < 0.06 and 0.01 < summary["tpot"]["p50_s"] < 0.025
    assert run["spec"]["kv_block_size"] == 16 and run["policy"]["model"] == "tiny"


def test_shadow_mode_sets_nothing(stub, gpu, policy, tmp_path):
    limit_file = tmp_path / "limit"
    code, lines, _ = deploy(stub, policy, tmp_path, "--limit-file", str(limit_file), "--shadow")
    assert code == 0 and not limit_file.exists() and gpu.calls.count("reset") == 0 and gpu.locked_mhz is None
    assert lines[-1]["chosen"] == {"batch_limit": 4, "gpu_clock_mhz": 990}
    assert lines[-1]["applied"] == {"batch_limit": 32, "gpu_clock_mhz": 1980}


def test_without_clock_control_the_policy_chooses_among_limits_at_the_highest_clock(
    stub, gpu, policy, tmp_path
):
    flags = ("--limit-file", str(tmp_path / "limit"), "--clock-control", "off")
    _, lines, _ = deploy(stub, policy, tmp_path, *flags)
    assert {line["chosen"]["gpu_clock_mhz"] for line in lines} == {1980} and gpu.locked_mhz is None
    assert "reset" not in gpu.calls


PROBE = """
import sys
from fuel_ray.cli import main
from tests.fake_nvml import FakeGpu, FakeNvml
import fuel_ray.live.nvml
fuel_ray.live.nvml.pynvml = FakeNvml(FakeGpu(uuid="GPU-0"))
code = main(sys.argv[1:])
heavy = set({heavy!r}) & set(sys.modules)
rss_mb = int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
assert not heavy, heavy
assert rss_mb < 200, rss_mb
sys.exit(code)
"""


def test_deploying_imports_nothing_heavy_and_stays_below_200_mb(stub, policy, tmp_path):
    arguments = ["deploy", "--policy", str(policy), "--server", stub.url, "--out", str(tmp_path)]
    code = PROBE.replace("{heavy!r}", repr(HEAVY))
    subprocess.run(
        [sys.executable, "-c", code, *arguments, "--interval", "0.05", "--max-steps", "3"],
        cwd=ROOT,
        check=True,
        timeout=60,
    )
