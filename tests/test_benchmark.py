"""The benchmark verb against a real HTTP server and a fake NVML: every key of the result, and the check."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pynvml
import pytest

from fuel_ray.cli import main
from fuel_ray.errors import TelemetryError
from fuel_ray.live.cpu import CpuMeter
from fuel_ray.live.load.prompts import TokenPrompts
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
    out = capsys.readouterr().out
    assert out.count("no GPU is recorded: no NVIDIA driver on this host") == 1 == out.count("recorded")


def test_without_gpus_asked_for_that_is_the_reason(stub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(driver=False))
    assert benchmark(stub, tmp_path, "--gpu-ids")[0] == 0
    out = capsys.readouterr().out
    assert "GPU        no samples: none was asked for" in out and "missing" not in out


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
    assert "is excluded by CUDA_VISIBLE_DEVICES=GPU-1" in capsys.readouterr().err
    assert main([*flags, "--gpu-ids", "1", "GPU-1"]) == 2
    assert "--gpu-ids: GPU 1 (GPU-1) is given twice" in capsys.readouterr().err


def test_a_server_on_a_card_that_is_not_recorded_is_said(stub, tmp_path, monkeypatch, capsys):
    cards = FakeGpu("GPU-0", pids=(1,)), FakeGpu("GPU-1", pids=(os.getpid(),))
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(*cards))
    assert benchmark(stub, tmp_path)[0] == 0
    assert (
        "runs on GPU GPU-1, but GPU GPU-0 would be measured: give --gpu-ids GPU-1" in capsys.readouterr().out
    )


def test_a_server_whose_card_cannot_be_checked_is_said_beside_its_energy(stub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu("GPU-0", pids=(1,))))
    monkeypatch.setattr("fuel_ray.live.gpu.placement.is_local", lambda host: False)
    _, result = benchmark(stub, tmp_path)
    (line,) = result["missing"]
    assert (
        "whether the server runs on GPU GPU-0: 127.0.0.1 is another host; the energy is that of this" in line
    )
    assert capsys.readouterr().out.count(line) == 2  # before the load and beside its figures


def test_a_model_that_the_server_does_not_list_is_said_before_a_request(stub, capsys):
    flags = ["--base-url", stub.url, "--num-prompts", "2", "--request-rate", "inf", "--gpu-ids"]
    assert main(["benchmark", "--model", "tinny", *flags]) == 2
    assert "the server has no model tinny; it has tiny" in capsys.readouterr().err and not stub.bodies
    stub.models_list = [{"id": "tiny", "root": "/models/tinny"}]
    assert main(["benchmark", "--model", "/models/tinny", *flags]) == 0
    assert {body["model"] for body in stub.bodies} == {"tiny"}


def test_failed_requests_are_counted(stub, tmp_path, monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(driver=False))
    stub.completion = "short"
    _, result = benchmark(stub, tmp_path)
    assert result["failed"] == 30 == len(result["errors"]) and result["mean_e2el_ms"] is None


def test_a_server_that_is_not_there_is_said_at_once(capsys, tmp_path):
    assert main(["benchmark", "--model", "tiny", "--port", "9", "--result-dir", str(tmp_path / "r")]) == 2
    assert ":9/metrics" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_gpu_lost_in_the_run_costs_its_energy_alone(stub, tmp_path, monkeypatch, capsys):
    gpu = FakeGpu()
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(gpu))
    threading.Timer(0.4, setattr, (gpu, "lost", True)).start()
    code, result = benchmark(stub, tmp_path, "--enable-kv-trace", "--monitor-cpu")
    stats = result["gpu_power_stats"]["0"]
    assert code == 0 and result["completed"] == 30 and result["p50_tpot_ms"] > 0
    assert stats["energy_j"] is None and result["gpu_energy_per_request_j"] is None
    assert stats["power_trace"] and 0.2 < stats["power_known_s"] < 0.95 * result["duration"]
    assert result["cpu_power_stats"]["avg_power_w"] > 0 and result["kv_cache_monitoring_stats"]
    said = "\n".join(result["missing"])
    assert "GPU 0: its energy counter could not be read at the end" in said and "the GPU is lost" in said
    assert "readings failed, the first at 0." in said and "avg_power is of those" in said
    assert "missing    GPU 0" in capsys.readouterr().out


@pytest.mark.parametrize("first", [True, False])
def test_a_gpu_that_cannot_be_read_at_all_costs_only_itself(first, stub, tmp_path, monkeypatch):
    gpus = FakeGpu(), FakeGpu("GPU-1", energy_mj=None)
    fake = FakeNvml(*gpus)
    power = fake.nvmlDeviceGetPowerUsage

    def read(gpu):
        if gpu is gpus[1]:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return power(gpu)

    fake.nvmlDeviceGetPowerUsage = read
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", fake)
    code, result = benchmark(stub, tmp_path, "--gpu-ids", *(("0", "1") if first else ("1", "0")))
    assert code == 0
    assert result["gpu_power_stats"]["0"]["energy_j"] is not None
    assert result["gpu_power_stats"]["1"]["energy_j"] is None
    assert result["gpu_energy_j"] is None and result["gpu_energy_per_request_j"] is None
    assert any("they would lack the energy of GPU 1" in line for line in result["missing"])


def test_a_gpu_that_is_not_there_is_not_left_out_of_a_sum(stub, tmp_path, monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu()))
    _, result = benchmark(stub, tmp_path, "--gpu-ids", "0", "1")
    assert result["gpu_energy_per_request_j"] is None
    assert any("GPU 1 is not recorded" in line for line in result["missing"])


def test_gpus_may_be_named_with_commas_between_them(stub, tmp_path, monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu(), FakeGpu("GPU-1")))
    code, result = benchmark(stub, tmp_path, "--gpu-ids", "0,1")
    assert code == 0 and set(result["gpu_power_stats"]) == {"0", "1"}


def test_a_counter_that_was_reset_is_not_believed(stub, tmp_path, monkeypatch):
    gpu = FakeGpu()
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(gpu))
    threading.Timer(0.4, setattr, (gpu, "energy_mj", 100)).start()
    code, result = benchmark(stub, tmp_path)
    stats = result["gpu_power_stats"]["0"]
    assert code == 0 and stats["energy_source"] == "integrated power"
    assert stats["energy_j"] == pytest.approx(400.0 * result["duration"], rel=0.2)
    assert any("it was reset in the run" in line for line in result["missing"])


def test_an_nvml_that_does_not_end_well_costs_nothing(stub, tmp_path, monkeypatch):
    fake = FakeNvml(FakeGpu())

    def shutdown():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    fake.nvmlShutdown = shutdown
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", fake)
    assert benchmark(stub, tmp_path)[1]["completed"] == 30


def test_a_server_that_is_gone_in_the_middle_leaves_what_came_before(stub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu()))
    threading.Timer(0.5, stub.stop).start()
    code, result = benchmark(stub, tmp_path, "--enable-kv-trace", "--kv-monitor-interval", "0.1")
    assert code == 0 and 5 < result["completed"] < 25 and result["completed"] + result["failed"] == 30
    assert result["p50_ttft_ms"] > 0 and result["kv_cache_monitoring_stats"]["samples_collected"] >= 3
    assert any(line.startswith("KV cache: ") and "readings failed" in line for line in result["missing"])
    assert any("energy of the" in line and "failed requests too" in line for line in result["missing"])
    out = capsys.readouterr().out
    assert "failed     " in out and "ClientConnectorError" in out


@pytest.mark.parametrize("page", ["", "# nothing of vLLM\nx 1\n", "vllm:num_requests_running{} nan\n"])
def test_a_metrics_page_that_changes_in_the_run_is_said(page, stub, tmp_path, monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(driver=False))
    threading.Timer(0.5, setattr, (stub, "page", page)).start()
    code, result = benchmark(stub, tmp_path, "--enable-kv-trace", "--kv-monitor-interval", "0.1")
    assert code == 0 and result["completed"] == 30
    assert result["kv_cache_monitoring_stats"]["samples_collected"] >= 1


def test_rapl_that_is_gone_in_the_middle_is_said(stub, tmp_path, monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(driver=False))
    read, began_s = CpuMeter.read, time.monotonic()

    def lost(meter):
        if time.monotonic() - began_s > 0.6:
            raise TelemetryError("energy_uj cannot be read: No such device")
        return read(meter)

    monkeypatch.setattr(CpuMeter, "read", lost)
    code, result = benchmark(stub, tmp_path, "--monitor-cpu")
    assert code == 0 and result["cpu_power_stats"]["avg_power_w"] > 0
    assert any("energy_uj cannot be read: No such device" in line for line in result["missing"])
    assert any("avg_power_w is of those" in line for line in result["missing"])


def test_requests_that_are_all_refused_are_a_failure_in_the_servers_words(
    stub, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu()))
    stub.completion = "refuse"
    code, result = benchmark(stub, tmp_path)
    assert code == 1 and result["completed"] == 0 and result["failed"] == 30
    assert result["gpu_energy_per_request_j"] is None and result["total_input_tokens"] == 0
    found = capsys.readouterr()
    assert "all 30 requests failed" in found.err and "too long" in found.err
    assert "30 with " in found.out and "HTTP 400" in found.out


def test_some_that_are_refused_are_counted_and_the_others_kept(stub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu()))
    threading.Timer(0.5, setattr, (stub, "completion", "refuse")).start()
    code, result = benchmark(stub, tmp_path)
    assert code == 0 and 0 < result["completed"] < 30 and result["p99_e2el_ms"] > 0
    assert f"{result['failed']} with ValueError: HTTP 400" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("completion", "words"),
    [("short", "4 tokens came, 5 were asked for"), ("silent", "timed out after 0.3 s"), ("die", "")],
)
def test_answers_that_are_not_whole_are_no_latencies(completion, words, stub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu()))
    stub.completion = completion
    code, result = benchmark(stub, tmp_path, "--timeout-s", "0.3")
    assert code == 1 and result["failed"] == 30 and words in capsys.readouterr().err
    assert result["p50_ttft_ms"] is None and result["p50_itl_ms"] is None


def test_a_load_that_fails_itself_leaves_what_it_measured(stub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu()))
    draw = TokenPrompts.__getitem__

    def broken(prompts, index):
        if index == 15:
            raise IndexError("no such prompt")
        return draw(prompts, index)

    monkeypatch.setattr(TokenPrompts, "__getitem__", broken)
    code, result = benchmark(stub, tmp_path)
    assert code == 1 and result["partial"] and result["completed"] >= 10
    assert "no such prompt" in result["missing"][0] and "of 30 requests" in result["missing"][0]


def benchmark_process(stub, *flags):
    words = ["--model", "tiny", "--port", stub.url.rsplit(":", 1)[1], "--num-prompts", "2000"]
    lengths = ["--request-rate", "20", "--random-input-len", "8", "--random-output-len", "5"]
    command = [sys.executable, "-m", "fuel_ray", "benchmark", *words, *lengths, "--save-result", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_benchmark_writes_what_it_has(number, stub, tmp_path):
    process = benchmark_process(stub, "--result-dir", str(tmp_path))
    assert "finished" in [line := process.stdout.readline(), line + process.stdout.readline()][1]
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert (
        result["partial"] and result["completed"] > 5 and result["missing"][0].startswith("interrupted after")
    )
    assert "requests   " in out and "Traceback" not in err


def test_a_result_that_finds_no_room_goes_elsewhere(stub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu()))
    folder, other = tmp_path / "full", tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(other))
    replace = os.replace

    def full(source, target):
        if folder in Path(target).parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr("fuel_ray.disk.os.replace", full)
    port = stub.url.rsplit(":", 1)[1]
    words = ["--model", "tiny", "--port", port, "--num-prompts", "5", "--request-rate", "50"]
    assert main(["benchmark", *words, "--save-result", "--result-dir", str(folder)]) == 1
    (path,) = other.glob("full/tiny-benchmark-*.json")
    assert json.loads(path.read_text())["completed"] == 5
    found = capsys.readouterr()
    assert "J/request" in found.out and f"it was written to {path.parent} instead" in found.err
    assert "No space left on device" in found.err and not list(folder.iterdir())


def test_a_folder_that_takes_nothing_is_said_before_anything_is_sent(stub, capsys, monkeypatch):
    code = main(["benchmark", "--model", "tiny", "--save-result", "--result-dir", "/sys/fuel-ray"])
    assert code == 1 and "/sys/fuel-ray" in capsys.readouterr().err and not stub.bodies


def test_a_server_that_is_restarted_in_the_middle_is_said(stub, tmp_path, monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(driver=False))
    threading.Timer(0.5, stub.__dict__.update, [{"prompts": 0, "tokens": 0}]).start()
    _, result = benchmark(stub, tmp_path, "--enable-kv-trace", "--kv-monitor-interval", "0.1")
    assert any("the server was restarted before 0." in line for line in result["missing"])


def test_a_result_folder_that_is_removed_in_the_run_is_made_again(stub, tmp_path, monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(driver=False))
    folder = tmp_path / "results"
    threading.Timer(0.5, folder.rmdir).start()
    flags = ["--port", stub.url.rsplit(":", 1)[1], "--num-prompts", "20", "--request-rate", "20"]
    stub.model = long_name = "m" * 300
    assert (
        main(["benchmark", "--model", long_name, *flags, "--save-result", "--result-dir", str(folder)]) == 0
    )
    assert len(list(folder.glob("m*.json"))) == 1


def test_a_log_without_room_does_not_end_a_benchmark(stub, tmp_path):
    flags = ["--model", "tiny", "--port", stub.url.rsplit(":", 1)[1], "--num-prompts", "60"]
    save = ["--request-rate", "20", "--save-result", "--result-dir", str(tmp_path)]
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "fuel_ray", "benchmark", *flags, *save]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1 and "the printed output is incomplete" in done.stderr
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["completed"] == 60
