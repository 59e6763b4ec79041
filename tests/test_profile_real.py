"""Profiling a server in real time: a stub over HTTP. A real vLLM's profile is in test_onboard_real.py."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from fuel_ray.cli import main
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.serving_stub import ServingStub
from tests.stub_vllm import serving
from tests.test_lease import FAKE_PYNVML, ROOT

pytestmark = pytest.mark.slow
SHORT = ("--contexts", "64", "--prompts", "128", "--windows", "1", "--no-traces", "--live.model", "tiny")


@pytest.fixture
def gpu(monkeypatch):
    gpu = FakeGpu(uuid="GPU-0", energy_mj=None)
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(gpu))
    return gpu


def _profile(stub, tmp_path, *flags):
    server = ("--live.server", stub.url, "--live.clock-control", "off")
    return main(["profile", "--node", "live", *server, *SHORT, "--out", str(tmp_path), *flags])


def test_a_server_that_goes_in_mid_profile_costs_what_is_missing(gpu, tmp_path, capsys):
    with serving(ServingStub(token_delay_s=0.005, dies_after=12)) as stub:
        assert _profile(stub, tmp_path, "--batches", "1", "2") == 2
        said = capsys.readouterr()
        assert "ended early, 3 points are kept" in said.out and said.err.count("\n") == 1
        stub.dies_after = None
        (folder,) = tmp_path.glob("profile-*")
        assert main(["profile", "--resume", str(folder)]) == 0
    assert "3 points more than the 3 that are there at 1 clock" in capsys.readouterr().out


def test_requests_of_somebody_else_on_a_server_are_said(gpu, tmp_path, capsys):
    with serving(ServingStub(token_delay_s=0.005, foreign=4)) as stub:
        assert _profile(stub, tmp_path, "--batches", "1") == 2
    assert re.search("another client uses the server: at least [1-4] requests", capsys.readouterr().err)


def test_a_short_model_is_refused_and_requests_that_fail_are_said(gpu, tmp_path, capsys):
    with serving(ServingStub(max_model_len=128)) as stub:
        assert _profile(stub, tmp_path) == 2
    assert "a profile needs at least 256 tokens of each" in capsys.readouterr().err
    with serving(ServingStub(completion="refuse")) as stub:
        assert _profile(stub, tmp_path, "--batches", "2") == 2
    said = capsys.readouterr()
    assert "skipped: 2 of 2 requests failed: ValueError: " in said.out
    assert "no decode point could be measured" in said.err


def test_a_clock_that_something_else_holds_is_said(gpu, tmp_path, capsys):
    gpu.sm_clock_mhz = 1500
    with serving(ServingStub(token_delay_s=0.005)) as stub:
        assert _profile(stub, tmp_path, "--batches", "1") == 0
    assert "throttled: 1500 MHz instead of 1980 at 400 W of 700" in capsys.readouterr().out


@pytest.mark.parametrize(("by", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_profile_that_is_ended_gives_the_clocks_back(tmp_path, by, code):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "pynvml.py").write_text(FAKE_PYNVML)
    env = {
        "PYTHONPATH": f"{tmp_path / 'lib'}:{ROOT}",
        "FAKE_NVML_LOG": str(tmp_path / "nvml.log"),
        "FUEL_RAY_STATE_DIR": str(tmp_path / "state"),
    }
    with serving(ServingStub(token_delay_s=0.005)) as stub:
        words = [
            *("profile", "--node", "live", "--live.server", stub.url, *SHORT, "--out", str(tmp_path)),
            *("--clocks-mhz", "990", "--batches", "1", "2"),
        ]
        process = subprocess.Popen(
            [sys.executable, "-m", "fuel_ray", *words],
            env=os.environ | env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for line in process.stdout:
            if line.startswith("2/"):
                break
        time.sleep(2.0)  # the next point is at its clock
        process.send_signal(by)
        said = process.communicate(timeout=20)[0]
    assert process.returncode == code
    assert re.search(r"1 points were saved in .*\nto continue: fuel-ray profile --resume", said)
    assert [line.split()[2] for line in (tmp_path / "nvml.log").read_text().splitlines()][-1] == "reset"
