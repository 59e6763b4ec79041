"""The benchmark verb against a real HTTP server and a fake NVML: every key of the result, and the check."""

import json
import os

import pynvml
import pytest

from fuel_ray.cli import main
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.stub_vllm import serving
from tests.test_live_node import CountingStub

KV = {
    "avg_stats": {
        *("avg_cache_usage_perc", "avg_used_blocks", "avg_free_blocks", "avg_used_tokens"),
        *("avg_requests_running", "avg_requests_waiting"),
    },
    "detailed_stats": {"cache_usage", "static_config"},
    "trace": {
        *("cache_usage", "used_blocks", "free_blocks", "used_tokens"),
        *("requests_running", "requests_waiting", "time"),
    },
}
STATIC = {
    *("total_gpu_blocks", "block_size", "tokens_per_block", "total_kv_cache_tokens"),
    *("num_layers", "num_kv_heads", "head_size"),
}
SERVING = {
    *("request_throughput", "output_throughput", "mean_ttft_ms", "p99_ttft_ms", "median_tpot_ms"),
    *("p99_itl_ms", "mean_e2el_ms", "completed", "failed", "duration", "total_output_tokens"),
}


def benchmark(stub, tmp_path, *flags):
    port = stub.url.rsplit(":", 1)[1]
    fixed = ["--model", "tiny", "--port", port, "--num-prompts", "30", "--request-rate", "30"]
    lengths = ["--random-input-len", "8", "--random-output-len", "5"]
    save = ["--save-result", "--result-dir", str(tmp_path)]
    code = main(["benchmark", *fixed, *lengths, *save, *flags])
    (path,) = tmp_path.glob("*.json")
    return code, json.loads(path.read_text())


@pytest.fixture
def stub():
    with serving(CountingStub()) as served:
        yield served


def test_every_key_of_the_result_is_there(stub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu()))
    code, result = benchmark(
        stub, tmp_path, "--enable-kv-trace", "--monitor-cpu", "--kv-monitor-interval", "0.1"
    )
    assert code == 0 and result["completed"] == 30 and result["partial"] is False
    assert result["total_output_tokens"] == 150 and set(result) >= SERVING
    gpu = result["gpu_power_stats"]["0"]
    assert gpu["avg_power"] == pytest.approx(400_000) and gpu["avg_gpu_util"] == pytest.approx(90)
    assert gpu["avg_mem_util"] == pytest.approx(40) and len(gpu["power_trace"]) > 10
    assert len(gpu["time_trace"]) == len(gpu["power_trace"]) and gpu["energy_source"] == "energy counter"
    assert result["gpu_energy_j"] == 0.0  # the fake's counter stands still
    assert result["cpu_power_stats"]["avg_power_w"] > 0
    kv = result["kv_cache_monitoring_stats"]
    for key, names in KV.items():
        assert set(kv[key]) == names
    assert set(kv["detailed_stats"]["cache_usage"]) == {"min", "p25", "median", "p75", "p95", "max", "std"}
    assert set(kv["detailed_stats"]["static_config"]) == STATIC
    assert kv["monitoring_interval_seconds"] == 0.1
    assert len(kv["trace"]["cache_usage"]) == kv["samples_collected"] > 5
    assert 0 <= kv["avg_stats"]["avg_cache_usage_perc"] <= 100
    assert "ratio" in capsys.readouterr().out


def test_without_a_counter_the_energy_is_the_integrated_power(stub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu(), FakeGpu("GPU-1", energy_mj=None))
    )
    code, result = benchmark(stub, tmp_path, "--gpu-ids", "1")
    assert code == 0
    gpu = result["gpu_power_stats"]["1"]
    assert gpu["energy_source"] == "integrated power"
    assert gpu["energy_j"] == pytest.approx(400.0 * result["duration"], rel=0.2)
    assert result["gpu_energy_per_request_j"] == gpu["energy_j"] / 30
    assert result["gpu_energy_per_output_token_j"] == gpu["energy_j"] / 150
    assert f"{gpu['energy_j'] / 30:.2f} J/request" in capsys.readouterr().out


def test_without_nvml_the_rest_is_recorded_and_that_is_said(stub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(driver=False))
    code, result = benchmark(stub, tmp_path)
    assert code == 0 and result["gpu_power_stats"] == {}
    assert result["cpu_power_stats"] is None and result["kv_cache_monitoring_stats"] is None
    assert "not recorded" in capsys.readouterr().out


def test_the_visible_gpu_is_recorded_and_what_it_lacks_is_unknown(stub, tmp_path, monkeypatch, capsys):
    card = FakeGpu("GPU-1", faults={"nvmlDeviceGetUtilizationRates": pynvml.NVML_ERROR_NOT_SUPPORTED})
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu(), card))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1")
    code, result = benchmark(stub, tmp_path)
    assert code == 0 and set(result["gpu_power_stats"]) == {"1"}
    gpu = result["gpu_power_stats"]["1"]
    assert gpu["avg_gpu_util"] is None and gpu["avg_power"] == pytest.approx(400_000)
    flags = ["benchmark", "--model", "tiny", "--port", stub.url.rsplit(":", 1)[1]]
    assert main([*flags, "--gpu-ids", "0"]) == 2
    assert "CUDA_VISIBLE_DEVICES=GPU-1 leaves GPU 0 out" in capsys.readouterr().err
    assert main([*flags, "--gpu-ids", "1", "GPU-1"]) == 2
    assert "--gpu-ids name GPU 1 twice" in capsys.readouterr().err


def test_a_server_on_a_card_that_is_not_recorded_is_said(stub, tmp_path, monkeypatch, capsys):
    cards = FakeGpu("GPU-0", pids=(1,)), FakeGpu("GPU-1", pids=(os.getpid(),))
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(*cards))
    assert benchmark(stub, tmp_path)[0] == 0
    assert (
        "runs on GPU GPU-1, and GPU GPU-0 would be measured: give --gpu-ids GPU-1" in capsys.readouterr().out
    )


def test_failed_requests_are_counted(stub, tmp_path, monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(driver=False))
    stub.completion = "short"
    _, result = benchmark(stub, tmp_path)
    assert result["failed"] == 30 == len(result["errors"]) and result["mean_e2el_ms"] is None


def test_a_server_that_is_not_there_is_said_at_once(capsys, tmp_path):
    assert main(["benchmark", "--model", "tiny", "--port", "9", "--result-dir", str(tmp_path / "r")]) == 2
    assert ":9/metrics" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
