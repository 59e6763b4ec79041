"""A real vLLM (CPU build) behind --api-key and --root-path; FUEL_RAY_VLLM is its bin folder."""

import json
from pathlib import Path

import pytest

from fuel_ray.cli import main
from fuel_ray.live.vllm.server import VllmServer, server_version
from fuel_ray.types import Knobs
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.policy_folders import write_policy
from tests.real_vllm import BIN, FLAGS, ROOT, pytestmark  # noqa: F401  (the marks)
from tests.test_deploy_real import GRID
from tests.test_secrets import KEY, LOAD, around, unseen  # noqa: F401  (a fixture)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    started = VllmServer(
        str(model),
        log_path=folder / "vllm.log",
        kv_block_size=32,
        executable=f"{BIN}/vllm",
        flags=(*FLAGS, "--api-key", KEY, "--root-path", "/x"),
        env={"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": str(ROOT)},
        limit_file=folder / "limit",
        start_timeout_s=300.0,
    )
    with started:
        words = [Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in started.pids()]
        unseen(folder, *words)
        yield started, folder / "limit"


def test_a_benchmark_of_a_server_behind_a_key_and_a_path(server, monkeypatch, capsys):
    started, _ = server
    given = ["benchmark", "--model", "tiny", "--vocab-size", "500", *LOAD, "--base-url"]
    for url in (started.url, f"{started.url}/x/v1"):
        monkeypatch.delenv("MY_KEY", raising=False)
        assert main([*given, url]) == 2
        assert "HTTP 401" in (err := capsys.readouterr().err) and "--api-key-env" in err
        monkeypatch.setenv("MY_KEY", KEY)
        assert main([*given, url, "--api-key-env", "MY_KEY"]) == 0
        assert "10 completed, 0 failed" in capsys.readouterr().out


def test_a_deployment_before_a_server_behind_a_key_and_a_path(server, tmp_path, monkeypatch, capfd):
    started, limit_file = server
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu(uuid="GPU-0")))
    engine = f"vLLM {server_version(started.url)}"
    policy = write_policy(tmp_path / "policy", sizes=(32,), grid=GRID, best=Knobs(4, 1980), engine=engine)
    given = [
        "deploy",
        "--policy",
        str(policy),
        "--server",
        f"{started.url}/x",
        "--out",
        str(tmp_path / "out"),
    ]
    given += ["--limit-file", str(limit_file), "--max-steps", "3", "--max-num-seqs", "32"]
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    assert main([*given, "--clock-control", "off"]) == 0
    assert main([*given, "--shadow"]) == 0
    runs = [json.loads(path.read_text()) for path in tmp_path.glob("out/deploy-*/run.json")]
    assert [run["summary"]["lost_windows"] for run in runs] == [0, 0]
    unseen(tmp_path, *capfd.readouterr())


@pytest.mark.slow
def test_an_evaluation_starts_a_server_with_its_key(model, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu(uuid="GPU-0")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    flags = [flag for flag in FLAGS if flag not in ("--max-num-seqs", "32")]
    given = [
        *("evaluate", "--node", "live", "--live.model", str(model), "--live.vllm", f"{BIN}/vllm"),
        *(f"--live.flags={' '.join(flags)} --api-key {KEY} --root-path /x", "--live.clock-control", "off"),
        *("--live.vocab-size", "500", "--max-num-seqs", "32", "--kv-tokens", "65536", "--block-sizes", "32"),
        *("--workload", "steady:rate_rps=4,lengths=fixed,prompt_mean=32,output_mean=16"),
        *("--seconds", "5", "--seeds", "1", "--static", "max", "--out", str(tmp_path / "out")),
    ]
    monkeypatch.setattr("sys.argv", ["fuel-ray", *given])
    assert main(given) == 0
    unseen(tmp_path, *capfd.readouterr())
