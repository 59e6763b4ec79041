"""Onboarding a real vLLM (CPU build) with a fake GPU, end to end; FUEL_RAY_VLLM is its bin folder."""

import json
import shlex

import pytest

from fuel_ray.cli import main
from fuel_ray.commands import deploy
from fuel_ray.sim.loads import TRACES
from fuel_ray.sim.recorded import read_trace
from fuel_ray.sim.replay import measured_figures
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.real_vllm import BIN, FLAGS, pytestmark  # noqa: F401  (the marks)

LOAD = "steady:rate_rps=1,lengths=fixed,prompt_mean=32,output_mean=16"
SHORT = [
    *("--clocks-mhz", "1980", "--batches", "1", "2", "4", "--contexts", "32", "64"),
    *("--windows", "1", "--validate-seconds", "10", "--accept-fidelity"),
    *("--workload", LOAD, "--live.vocab-size", "500", "--max-num-seqs", "32", "--seeds", "2"),
    *("--slo-ttft-s", "20", "--slo-tpot-s", "5", "--steps", "24", "--train.iterations", "2"),
    *("--train.episode-steps", "8", "--train.fragment-steps", "5", "--train.batch-size", "4"),
]


@pytest.fixture
def gpu(monkeypatch):
    """A card whose energy is that of its power."""
    found = FakeGpu(uuid="GPU-0", energy_mj=None)
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(found))
    return found


def stages(folder):
    return json.loads((folder / "onboard.json").read_text())["stages"]


def test_a_server_that_is_started_is_onboarded_and_stopped(model, gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fuel_ray.sim.loads.LOAD_S", 10.0)
    flags = [flag for flag in FLAGS if flag not in ("--max-num-seqs", "32")]
    words = ["--model", str(model), "--live.vllm", f"{BIN}/vllm", "--live.flags=" + " ".join(flags)]
    words += ["--block-sizes", "32", "--live.clock-control", "off", "--out", str(tmp_path)]
    words += ["--prompts", "64", "512", "4096"]
    assert main(["onboard", *words, *SHORT]) == 0
    (folder,) = tmp_path.glob("onboard-*")
    found = stages(folder)
    assert all(stage["state"] == "done" for stage in found.values()) and len(found) == 9
    assert found["server"]["found"]["origin"] == "measured"
    log = (folder / "vllm-block-32.log").read_text()
    assert log.count("Starting vLLM server on") == 1  # one start for all that is measured
    said = capsys.readouterr().out
    assert "skipped: prompts of 4096 tokens (the server accepts 2048 tokens with the output)" in said
    _has_traces(folder / "profile")
    assert "Nothing can be saved without the privilege" in said and "clock-helper" in said
    for line in (folder / "commands.sh").read_text().splitlines():
        if line.startswith("fuel-ray deploy"):
            assert deploy.parse(shlex.split(line)[2:], prog="deploy").gpu_ids == ("GPU-0",)
    assert "Nothing can be saved" in (folder / "report.html").read_text()


def _has_traces(profile):
    traces = sorted((profile / "traces").iterdir())
    assert {trace.stem.rpartition("-")[0] for trace in traces} == set(TRACES)
    for trace in traces:
        info, run = json.loads(trace.read_text())["info"], read_trace(str(trace))
        assert info["origin"] == "measured" and info["engine"].startswith("vLLM 0.")
        assert info["client_busy"] < 1
        assert measured_figures(run)["mean_power"] == pytest.approx(400, rel=0.05)


def test_a_running_server_is_onboarded_and_its_shadow_command_works(real_server, gpu, tmp_path):
    words = ["--server", real_server.url, "--prompts", "64", "--no-traces", "--out", str(tmp_path)]
    assert main(["onboard", *words, *SHORT]) == 0
    (folder,) = tmp_path.glob("onboard-*")
    assert stages(folder)["server"]["found"]["kv_block_size"] == 32
    assert gpu.locked_mhz is None and "reset" in gpu.calls  # clocks were set, and given back
    lines = (folder / "commands.sh").read_text().splitlines()
    (shadow,) = (line for line in lines if line.endswith("--shadow"))
    assert main([*shlex.split(shadow)[1:], "--max-steps", "2"]) == 0
