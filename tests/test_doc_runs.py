"""Every command that README and docs show runs, made short, and leaves what it promises."""

import contextlib
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest

from fuel_ray.cli import main
from fuel_ray.deploy.exporter import Exporter
from fuel_ray.live.vllm.server import free_port
from tests.doc_commands import ROOT, commands
from tests.doc_short import LEAVES, NOT_RUN, is_live, left_by, shortened, why_not
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.policy_folders import SLO
from tests.serving_stub import ServingStub
from tests.stub_vllm import serving
from tests.traffic_stub import TrafficStub

COMMANDS = [command for command in commands() if why_not(command) is None]
MADE = (  # what the commands name, by the first commands that a reader runs
    ("train-1", "train"),
    ("sweep-1", "sweep"),
    ("profile-1", "profile"),
    ("onboard-1", "onboard", "--node", "sim"),
)


def test_what_is_not_run_is_covered_by_a_test_that_exists():
    shown = [" ".join(command.words) for command in commands()]
    for begin, (why, test) in NOT_RUN.items():
        assert any(f"{words} ".startswith(f"{begin} ") for words in shown) and why
        file, name = test.split("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text()
    assert len(COMMANDS) > 0.8 * len(shown)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A working directory in which the first commands were run."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "results").mkdir()
    for run, *words in MADE:
        out = folder / "made" / run
        more = {"--out": str(out)} | ({"--traces": ""} if run == "profile-1" else {})
        with contextlib.chdir(folder):
            assert main(shortened(tuple(words), more)) == 0
        (made,) = out.iterdir()
        made.rename(folder / "results" / run)
    for name in ("FOLDER", "P"):
        (folder / name).symlink_to(folder / "results" / "profile-1")
    (folder / "benchmark_results").mkdir()
    shutil.copy(ROOT / "tests/data/h100_trace_16_open5.json", folder / "benchmark_results/1-trace-1.json")
    *_, last = sorted((folder / "results/profile-1/traces").iterdir())
    last.rename(folder / "loads.json")
    return folder


@pytest.fixture
def gpu(monkeypatch):
    """A card whose energy is that of its power, and which this process may control."""
    fake = FakeGpu(uuid="GPU-0", energy_mj=None)
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(fake, FakeGpu("GPU-1", energy_mj=None)))
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.holds_sys_admin", lambda proc: True)
    return fake


@pytest.fixture
def place(command, desk, gpu, tmp_path, monkeypatch):
    """The working directory, and the flags that say where a command's servers and results are."""
    monkeypatch.chdir(desk)
    monkeypatch.syspath_prepend(str(desk))
    verb, shown = command.words[0], " ".join(command.words)
    with contextlib.ExitStack() as opened:
        if verb == "deploy":
            stub = opened.enter_context(serving(TrafficStub(model="Qwen3-8B", capacity=128)))
            yield {"--server": stub.url, "--out": str(tmp_path), **_files(stub, shown, tmp_path)}
        elif verb == "benchmark":
            stub = opened.enter_context(serving(_server(command.words)))
            yield {"--base-url": stub.url, "--result-dir": str(tmp_path)}
        elif is_live(command.words):
            stub = opened.enter_context(serving(_server(command.words)))
            onboards = verb == "onboard"
            flag = "--server" if onboards else "--live.server"
            more = {"--observe-server": opened.enter_context(serving(TrafficStub())).url}
            observed = {"--observe-minutes": "0.05", **more} if "--observe-minutes" in shown else {}
            yield {
                flag: stub.url,
                "--out": str(tmp_path),
                **observed,
                **_files(stub, shown, tmp_path, started=not onboards),
            }
        elif verb == "watch":
            yield {"--urls": _exporter(opened)}
        elif verb == "calibrate":
            yield {"--out": str(tmp_path / "mine.json")}
        elif verb == "clock-helper":
            yield {"--users": "root", "--socket": str(tmp_path / "clocks.sock")}
        else:
            yield {"--out": str(tmp_path)} if verb in LEAVES else {}


def _files(stub, shown, tmp_path, *, started=False):
    """The limit file of a server, where the command names one or would start the server itself."""
    if not started and "--limit-file" not in shown:
        return {}
    stub.limit_file = tmp_path / "limit"
    return {"--live.limit-file" if started else "--limit-file": str(stub.limit_file)}


def _server(words):
    flags = ("--model", "--live.model")
    model = next((words[words.index(flag) + 1] for flag in flags if flag in words), "tiny")
    return ServingStub(model=model, token_delay_s=0.01, max_model_len=16384, capacity=128)


def _exporter(opened):
    port = free_port()
    exporter = Exporter(port, SLO, host="127.0.0.1", info={"policy": "p", "mode": "control"})
    opened.callback(exporter.close)
    return f"http://127.0.0.1:{port}"


def _resumed(words, desk, tmp_path):
    """The words with a copy of the folder that is gone on with."""
    at = words.index("--resume") + 1
    copy = tmp_path / Path(words[at]).name
    shutil.copytree(desk / "results" / copy.name, copy)
    return [*words[:at], str(copy), *words[at + 1 :]]


def _expanded(words):
    """The words with the traces that a shell would find."""
    for word in words:
        yield from (
            map(str, sorted(Path(word).parent.glob("*.json"))) if word.endswith("/traces/1.json") else [word]
        )


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_that_is_shown_runs(command, desk, place, tmp_path, capsys):
    words, verb = shortened(command.words, place), command.words[0]
    words = list(_expanded(words))
    if "--resume" in words:
        words = _resumed(words, desk, tmp_path)
    code = _code(words)
    said = capsys.readouterr()
    assert code == (143 if verb == "clock-helper" else 0), said.out + said.err
    assert said.out
    if "--help" not in words and verb in LEAVES:
        assert left_by(verb, tmp_path), said.out
    _check(words, said.out, tmp_path)


def _code(words):
    """What the command ends with; one that serves is ended by a signal."""
    if words[0] == "clock-helper":
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    try:
        return main(words)
    except SystemExit as stop:
        return stop.code or 0


def _check(words, said, out):
    """What else the pages promise."""
    verb = words[0]
    if verb in ("evaluate", "demo", "arena", "sweep") and "--help" not in words:
        assert "max" in said and "%" in said
    if verb == "recommend":
        assert "Recommended: " in said
    if "--save-result" in words or "--save-trace" in words:
        assert list(out.glob("*.json"))
    if verb == "calibrate":
        assert (out / "mine.json").is_file()
