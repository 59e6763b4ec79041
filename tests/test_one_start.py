"""A live server is started once per block size and run: counted on a stub that takes a second to start."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import RAY_SETTINGS
from tests.test_lease import FAKE_PYNVML, ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STUB = f"{sys.executable} {ROOT / 'tests/tools/stub_vllm.py'}"
FLAGS = [
    *("--live.model", "tiny", "--live.vllm", STUB, "--block-sizes", "8", "16", "32"),
    *("--workload", "steady:rate_rps=4,lengths=fixed,prompt_mean=32,output_mean=16"),
    *("--grid-batch-limits", "4", "16", "--steps", "24", "--train.iterations", "2"),
    *("--train.episode-steps", "8", "--train.fragment-steps", "5", "--train.batch-size", "4"),
]
EVALUATED = ["--control-workload", "None", "--seeds", "1", "--live-seconds", "4"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Processes below this one have a fake pynvml and leave a line per server that they start."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "pynvml.py").write_text(FAKE_PYNVML)
    for name, value in RAY_SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'lib'}:{ROOT}")
    monkeypatch.setenv("FAKE_NVML_LOG", str(tmp_path / "nvml.log"))
    monkeypatch.setenv("STUB_STARTS", str(tmp_path / "starts"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


def started(folder):
    """(block size, pid) of each start so far."""
    path = folder / "starts"
    lines = path.read_text().splitlines() if path.exists() else []
    return [tuple(map(int, line.split())) for line in lines]


def run(folder, *flags):
    command = [sys.executable, "-m", "fuel_ray", *flags, "--out", str(folder / "results")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def lives(pid):
    try:
        return b"stub_vllm" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def ended(folder):
    """Whether no server is left within a while."""
    deadline_s = time.monotonic() + 20
    while any(lives(pid) for _, pid in started(folder)) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return not any(lives(pid) for _, pid in started(folder))


@pytest.mark.parametrize("kind", ["live", "ray"])
def test_a_sweep_starts_each_server_once_and_says_so(folder, kind):
    node = ["--node", "live"] if kind == "live" else ["--node", "ray", "--backend", "live"]
    if kind == "ray":
        pytest.importorskip("ray")
        from tests.ray_hosts import Hosts

        with Hosts(0) as hosts:
            hosts.add(nodes=2, gpus=2)
            os.environ["RAY_ADDRESS"] = hosts.address
            try:
                text = run(folder, "sweep", *node, *FLAGS, *EVALUATED)
            finally:
                del os.environ["RAY_ADDRESS"]
    else:
        text = run(folder, "sweep", *node, *FLAGS, *EVALUATED)
    assert sorted(size for size, _ in started(folder)) == [8, 16, 32]
    assert ended(folder)
    assert "serve  block" in text and "starting" in text
    (run_dir,) = folder.glob("results/sweep-*")
    facts = json.loads((run_dir / "run.json").read_text())
    assert list(facts["unsupported"]) == ["8"] and facts["engine"] == "vLLM 0.32.0"
    rows = list(csv.DictReader((run_dir / "summary.csv").read_text().splitlines()))
    assert {row["block_size"] for row in rows} == {"16", "32"} and len(rows) == 8


def test_a_killed_run_leaves_no_server_and_goes_on_where_it_was(folder):
    log = folder / "log"
    command = [sys.executable, "-m", "fuel_ray", "sweep", "--node", "live", *FLAGS, *EVALUATED]
    with log.open("w") as out:
        process = subprocess.Popen([*command, "--out", "results"], stdout=out, stderr=out, cwd=folder)
    deadline_s = time.monotonic() + 300
    while "train  block  32" not in log.read_text():  # so that block size 16 is finished
        assert process.poll() is None and time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert ended(folder)
    (run_dir,) = folder.glob("results/sweep-*")
    run(folder, "sweep", "--resume", str(run_dir))
    assert [size for size, _ in started(folder)] == [8, 16, 32, 32]
    rows = list(csv.DictReader((run_dir / "summary.csv").read_text().splitlines()))
    assert len(rows) == 8
