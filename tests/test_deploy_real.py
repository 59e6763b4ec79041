"""fuel-ray deploy in front of a real vLLM (CPU build) with a fake GPU; FUEL_RAY_VLLM is its bin folder."""

import json
import time

from fuel_ray.cli import main
from fuel_ray.codec import ActionGrid
from fuel_ray.live.vllm.server import server_version
from fuel_ray.types import Knobs
from fuel_ray.vllm_plugin import create_file, read_file
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.policy_folders import write_policy
from tests.real_vllm import Load, pytestmark  # noqa: F401  (the marks)

GRID = ActionGrid((4, 32), (1980,))


def test_a_deployment_limits_a_real_server_under_load_and_lets_it_go(
    real_server, tmp_path, monkeypatch, capsys
):
    limit_file = real_server.limit_file
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu(uuid="GPU-0")))
    version = server_version(real_server.url)
    policy = write_policy(
        tmp_path / "policy", sizes=(32,), grid=GRID, best=Knobs(4, 1980), engine=f"vLLM {version}"
    )
    flags = ["--limit-file", str(limit_file), "--clock-control", "off", "--max-steps", "18"]
    out = tmp_path / "out"
    with Load(real_server.url, clients=16) as load:
        began_s = time.monotonic()
        arguments = ["--policy", str(policy), "--server", real_server.url, "--out", str(out), *flags]
        code = main(["deploy", *arguments, "--guard.max-wait-s", "1000", "--guard.no-latency"])
        assert code == 0 and time.monotonic() - began_s < 60
        assert not limit_file.exists() and load.failures == []
        _runs_freely_again(limit_file)
    assert load.failures == [] and load.completed > 20
    (steps,) = out.glob("deploy-*/steps.jsonl")
    lines = [json.loads(line) for line in steps.read_text().splitlines()]
    with capsys.disabled():
        print(f"\nrunning {[line.get('running') for line in lines]}, vLLM {version}")
        print(f"waiting {[line.get('waiting') for line in lines]}")
        print(f"oldest wait {[line.get('oldest_wait_s') for line in lines]}")
    assert [line["step"] for line in lines] == list(range(18)) and not any("error" in line for line in lines)
    assert {line["applied"]["batch_limit"] for line in lines} == {4}
    assert all(line["running"] <= 4 for line in lines[8:]) and all(line["waiting"] > 4 for line in lines[8:])
    assert (
        sum(line["completed"] for line in lines) > 10 and sum(line["output_tokens"] for line in lines) > 500
    )


def _runs_freely_again(limit_file):
    """Within two seconds: a file that is made anew has the scheduler's reports and no limit."""
    create_file(str(limit_file))
    deadline_s = time.monotonic() + 2.0
    while True:
        _, report = read_file(str(limit_file))
        if report.running > 4 and report.batch_limit == report.capacity == 32:
            return
        assert time.monotonic() < deadline_s, report
        time.sleep(0.05)


def test_a_guard_that_sees_the_queue_overrules_the_policy_on_a_real_server(
    real_server, tmp_path, monkeypatch
):
    limit_file = real_server.limit_file
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu(uuid="GPU-0")))
    policy = write_policy(
        tmp_path / "policy",
        **{"sizes": (32,), "grid": GRID, "best": Knobs(4, 1980)},
        engine=f"vLLM {server_version(real_server.url)}",
    )
    flags = ["--limit-file", str(limit_file), "--clock-control", "off", "--max-steps", "14"]
    arguments = ["--policy", str(policy), "--server", real_server.url, "--out", str(tmp_path / "out"), *flags]
    with Load(real_server.url, clients=16):
        assert main(["deploy", *arguments, "--guard.max-waiting", "8"]) == 0
    (steps,) = (tmp_path / "out").glob("deploy-*/steps.jsonl")
    lines = [json.loads(line) for line in steps.read_text().splitlines()]
    shielded = [
        line for line in lines if line["overruled"] and line["overruled"][0] in ("queue", "wait", "latency")
    ]
    assert shielded and all(line["applied"]["batch_limit"] == 32 for line in shielded)
    assert max(line["running"] for line in shielded) > 4
