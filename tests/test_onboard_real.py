"""Onboarding a real vLLM (CPU build) with a fake GPU, end to end; FUEL_RAY_VLLM is its bin folder."""

import json
import shlex

import pytest

from fuel_ray.cli import main
from fuel_ray.commands import deploy
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.test_vllm_real import BIN, FLAGS, model, pytestmark, vllm_server  # noqa: F401  (a fixture and the marks)

LOAD = "steady:rate_rps=1,lengths=fixed,prompt_mean=32,output_mean=16"
SHORT = [
    *("--clocks-mhz", "1980", "--batches", "1", "2", "4", "--contexts", "32", "64", "--prompts", "64"),
    *("--windows", "2", "--validate-seconds", "10", "--accept-fidelity"),
    *("--workload", LOAD, "--live.vocab-size", "500", "--max-num-seqs", "32", "--seeds", "2"),
    *("--slo-ttft-s", "20", "--slo-tpot-s", "5", "--steps", "24", "--train.iterations", "2"),
    *("--no-traces", "--train.episode-steps", "8", "--train.fragment-steps", "5", "--train.batch-size", "4"),
]


@pytest.fixture
def gpu(monkeypatch):
    """A card whose energy is that of its power."""
    found = FakeGpu(uuid="GPU-0", energy_mj=None)
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(found))
    return found


def stages(folder):
    return json.loads((folder / "onboard.json").read_text())["stages"]


def test_a_server_that_is_started_is_onboarded_and_stopped(model, gpu, tmp_path, capsys):  # noqa: F811
    flags = [flag for flag in FLAGS if flag not in ("--max-num-seqs", "32")]
    words = ["--model", str(model), "--live.vllm", f"{BIN}/vllm", "--live.flags=" + " ".join(flags)]
    words += ["--block-sizes", "32", "--live.clock-control", "off", "--out", str(tmp_path)]
    assert main(["onboard", *words, *SHORT]) == 0
    (folder,) = tmp_path.glob("onboard-*")
    found = stages(folder)
    assert all(stage["state"] == "done" for stage in found.values()) and len(found) == 9
    assert found["server"]["found"]["origin"] == "measured"
    log = (folder / "vllm-block-32.log").read_text()
    assert log.count("Starting vLLM server on") == 1  # one start for all that is measured
    said = capsys.readouterr().out
    assert "Nothing can be saved without the privilege" in said and "clock-helper" in said
    for line in (folder / "commands.sh").read_text().splitlines():
        if line.startswith("fuel-ray deploy"):
            assert deploy.parse(shlex.split(line)[2:], prog="deploy").gpu_ids == ("GPU-0",)
    assert "Nothing can be saved" in (folder / "report.html").read_text()


def test_a_running_server_is_onboarded_and_its_shadow_command_works(model, gpu, tmp_path):  # noqa: F811
    with vllm_server(model, tmp_path, kv_block_size=32) as server:
        words = ["--server", server.url, "--out", str(tmp_path)]
        assert main(["onboard", *words, *SHORT]) == 0
        (folder,) = tmp_path.glob("onboard-*")
        assert stages(folder)["server"]["found"]["kv_block_size"] == 32
        assert gpu.locked_mhz is None and "reset" in gpu.calls  # clocks were set, and given back
        lines = (folder / "commands.sh").read_text().splitlines()
        (shadow,) = (line for line in lines if line.endswith("--shadow"))
        assert main([*shlex.split(shadow)[1:], "--max-steps", "2"]) == 0
