"""The control loop on a real vLLM (CPU build) with a fake GPU; FUEL_RAY_VLLM is its bin folder."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest

from fuel_ray.cli import main
from fuel_ray.control import ControlLoop
from fuel_ray.live.gpu.nvml import Gpus
from fuel_ray.live.load.loadgen import LoadGenerator
from fuel_ray.live.load.prompts import TokenPrompts
from fuel_ray.live.node import GpuNode
from fuel_ray.live.vllm.kv_monitor import KVCacheMonitor, MetricsClient
from fuel_ray.live.vllm.limiter import BatchLimiter
from fuel_ray.objective import Energy
from fuel_ray.sim.recorded import read_trace
from fuel_ray.types import Knobs, NodeSpec, Requests, Slo
from tests.conftest import RAY_SETTINGS
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.ray_hosts import Hosts
from tests.real_vllm import BIN, FLAGS, pytestmark  # noqa: F401  (the marks)
from tests.test_lease import FAKE_PYNVML, ROOT


@pytest.fixture
def node(real_server, monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu(uuid="GPU-0")))
    spec = NodeSpec("cpu", "fake", ("GPU-0",), "tiny", 32, 100, (1, 32), (1980,))
    n = 400
    work = Requests(
        np.arange(n) * 0.04, np.full(n, 32), np.full(n, 32), np.full(n, -1), np.zeros(n, np.int64)
    )

    def start_load(seed):
        prompts = TokenPrompts(work, vocab_size=500, rng=np.random.default_rng(seed))
        return LoadGenerator(real_server.url, work, prompts=prompts, model="tiny")

    made = GpuNode(
        spec,
        Gpus(["GPU-0"]),
        MetricsClient(real_server.url),
        limiter=BatchLimiter(real_server.limit_file),
        start_load=start_load,
    )
    yield made
    made.close()


def test_the_control_loop_drives_a_real_server(node):
    loop = ControlLoop(node, Energy(Slo(1.0), 0.2, 200.0, 400.0))
    loop.reset(seed=0)
    running = {}
    for limit in (32, 4, 16):
        windows = [loop.step(Knobs(limit, 1980)).metrics for _ in range(5)]
        running[limit] = [window.running for window in windows[2:]]  # lowering it drains first
        assert all(window.knobs == Knobs(limit, 1980) for window in windows)
        assert sum(window.output_tokens for window in windows) > 0
        assert all(window.duration_s == pytest.approx(1.0, abs=0.3) for window in windows)
    assert max(running[4]) <= 4 < max(running[16]) <= 16
    records = node.take_records()
    assert len(records) > 20 and np.isfinite(records.finished_s).all()


def test_the_monitor_and_the_benchmark_work_on_a_real_server(real_server, tmp_path, monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(driver=False))
    with KVCacheMonitor(real_server.url, interval=0.2) as monitor:
        code = main(
            [
                *(
                    "benchmark",
                    "--model",
                    "tiny",
                    "--port",
                    str(real_server.server.port),
                    "--num-prompts",
                    "40",
                ),
                *("--request-rate", "10", "--random-input-len", "32", "--random-output-len", "16"),
                *("--vocab-size", "500", "--monitor-cpu", "--enable-kv-trace", "--save-result"),
                *("--result-dir", str(tmp_path)),
            ]
        )
        state = monitor.get_current_state()
    assert code == 0 and 0 <= state["kv_cache_usage"] <= 1
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert result["completed"] == 40 and result["total_output_tokens"] == 640
    kv = result["kv_cache_monitoring_stats"]
    assert kv["detailed_stats"]["static_config"]["block_size"] == 32
    assert max(kv["trace"]["requests_running"]) > 0 and kv["samples_collected"] >= 6


def test_a_benchmarks_trace_knows_the_server_and_is_validated(real_server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu(energy_mj=None)))
    code = main(
        [
            *("benchmark", "--model", "tiny", "--base-url", real_server.url, "--num-prompts", "30"),
            *("--request-rate", "10", "--random-input-len", "32", "--random-output-len", "16"),
            *("--vocab-size", "500", "--save-trace", "--result-dir", str(tmp_path)),
        ]
    )
    (path,) = tmp_path.glob("tiny-trace-*.json")
    run = read_trace(str(path))
    assert code == 0 and len(run.requests) == 30 and run.requests.prompt_tokens.tolist() == [32] * 30
    assert run.kv_block_size == 32 and not run.prefix_caching and run.max_num_seqs == 32
    assert run.info["said_by"]["max_num_seqs"] == "its flags"
    assert run.info["said_by"]["prefix_caching"] == "/metrics"
    assert run.energy_j == pytest.approx(400.0 * run.duration_s, rel=0.1)
    assert run.info["failed"] == run.info["foreign_requests"] == 0
    assert run.info["engine"].startswith("vLLM 0.")
    capsys.readouterr()
    assert main(["validate", str(path)]) == 0
    assert "verdict: " in capsys.readouterr().out


def test_policies_are_evaluated_on_a_live_node_that_skips_unsupported_block_sizes(
    model,
    tmp_path,
    monkeypatch,
    capsys,
):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu(uuid="GPU-0")))
    flags = [flag for flag in FLAGS if flag not in ("--max-num-seqs", "32")]
    code = main(
        [
            *("evaluate", "--node", "live", "--live.model", str(model), "--live.vllm", f"{BIN}/vllm"),
            *("--live.flags=" + " ".join(flags), "--live.clock-control", "off", "--live.vocab-size", "500"),
            *("--max-num-seqs", "32", "--kv-tokens", "65536", "--block-sizes", "8", "32"),
            *("--workload", "steady:rate_rps=4,lengths=fixed,prompt_mean=32,output_mean=16"),
            *("--seconds", "6", "--seeds", "1"),
            *("--static", "max", "2", "--out", str(tmp_path)),
        ]
    )
    assert code == 0
    (folder,) = tmp_path.glob("evaluate-*")
    for path in folder.glob("traces/*.json"):
        trace = read_trace(str(path))
        assert trace.info["said_by"]["max_num_seqs"] == "--max-num-seqs" and trace.info["failed"] == 0
        assert trace.limit_schedule[0] == (0.0, 32) and trace.limit_schedule[-1][1] in {32, 2}
    names = [f"block32-{policy}-seed0.json" for policy in ("max_performance", "static-2")]
    assert sorted(path.name for path in folder.glob("traces/*.json")) == names
    run = json.loads((folder / "run.json").read_text())
    assert list(run["unsupported"]) == ["8"] and run["origin"] == "measured" and not run["partial"]
    rows = (folder / "summary.csv").read_text().splitlines()
    assert len(rows) == 1 + 2
    assert "measured on a live node" in capsys.readouterr().out


@pytest.fixture(params=[pytest.param("live", marks=pytest.mark.slow), "ray"])
def sweep_flags(request, tmp_path, monkeypatch):
    """The flags for a node here, or on a host of a cluster whose actors have the same fake pynvml."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'lib'}:{ROOT}")
    monkeypatch.setenv("FAKE_NVML_LOG", str(tmp_path / "nvml.log"))
    monkeypatch.setenv("FUEL_RAY_STATE_DIR", str(tmp_path / "state"))
    if request.param == "live":
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        yield ["--node", "live", "--block-sizes", "32"]
        return
    for name, value in RAY_SETTINGS.items():
        monkeypatch.setenv(name, value)
    with Hosts(0) as hosts:
        hosts.add(gpus=1)
        monkeypatch.setenv("RAY_ADDRESS", hosts.address)
        yield ["--node", "ray", "--backend", "live", "--block-sizes", "8", "32"]


def test_a_sweep_learns_and_evaluates_on_a_live_node(model, sweep_flags, tmp_path):
    """In processes of its own and of Ray's, whose pynvml is a fake that logs who sets clocks."""
    (tmp_path / "lib").mkdir()
    without_counter = FAKE_PYNVML.replace('FakeGpu("GPU-0")', 'FakeGpu("GPU-0", energy_mj=None)')
    (tmp_path / "lib" / "pynvml.py").write_text(without_counter)
    flags = [flag for flag in FLAGS if flag not in ("--max-num-seqs", "32")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "fuel_ray", "sweep", *sweep_flags, "--live.model", str(model)),
            *("--live.vllm", f"{BIN}/vllm", "--live.flags=" + " ".join(flags), "--live.vocab-size", "500"),
            *("--max-num-seqs", "32", "--kv-tokens", "65536"),
            *("--workload", "steady:rate_rps=4,lengths=fixed,prompt_mean=32,output_mean=16"),
            *("--control-workload", "None", "--grid-batch-limits", "4", "16", "--steps", "10"),
            *("--train.iterations", "2", "--train.episode-steps", "4", "--train.fragment-steps", "5"),
            *("--train.batch-size", "4", "--seeds", "1", "--live-seconds", "3", "--out", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = tmp_path.glob("sweep-*")
    run = json.loads((folder / "run.json").read_text())
    assert list(run["unsupported"]) == [size for size in sweep_flags if size == "8"]
    assert run["engine"].startswith("vLLM 0.")
    rows = list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))
    assert {row["policy"] for row in rows} == {
        "max_performance",
        "tuned_static",
        "load_table",
        "best_rule",
        "dqn",
    }
    assert all(float(row["energy_j_per_request"]) > 0 for row in rows)
    manifest = json.loads((folder / "policies" / "block_32" / "manifest.json").read_text())
    assert (manifest["gpu_name"], manifest["engine"]) == ("NVIDIA H100 80GB HBM3", run["engine"])
    assert "Measured on hardware" in (folder / "report.html").read_text()
    logs = "".join(path.read_text() for path in tmp_path.rglob("vllm-block-32.log"))
    assert logs.count("Starting vLLM server on") == 1  # one start for question, training and evaluation
    actions = [line.split()[2] for line in (tmp_path / "nvml.log").read_text().splitlines()]
    assert "set" in actions and actions[-1] == "reset"
