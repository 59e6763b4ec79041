"""Every command that README and docs show parses; test_doc_runs.py runs them."""

import functools
import importlib

import pytest

from fuel_ray.cli import VERBS, main
from fuel_ray.sim.pack import load_pack
from tests.doc_commands import ROOT, SCRIPTS, commands, ours
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.policy_folders import write_policy

COMMANDS = commands()


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A working directory with what the commands name: policies, an interrupted run, the examples."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "cluster.yaml").symlink_to(ROOT / "cluster.yaml")
    pack = load_pack("h100-qwen3-8b")
    facts = {"model": pack.model, "engine": pack.engine, "pack": pack.name, "pack_sha256": pack.sha256}
    for run in ("sweep", "train"):
        for size in (8, 16, 32, 64):
            path = folder / f"results/{run}-1/policies/block_{size}"
            write_policy(path, sizes=(size,), **facts)
    return folder


@pytest.fixture
def parsed(monkeypatch, desk):
    """What a verb would be run with: the command line up to there, and nothing of the verb."""
    monkeypatch.chdir(desk)
    monkeypatch.syspath_prepend(str(desk))
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu()))

    def parse(words):
        found = []
        module = importlib.import_module(f"fuel_ray.commands.{words[0].replace('-', '_')}")

        @functools.wraps(module.run)
        def run(config):
            found.append(config)
            return 0

        monkeypatch.setattr(module, "run", run)
        code = main(list(words))
        return code, found

    return parse


def begun(words):
    """The words of a resumed run as those that it began with: without --resume DIR, whose run is not here."""
    at = words.index("--resume")
    return (*words[:at], *words[at + 2 :], *(("--node", "sim") if words[0] == "onboard" else ()))


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_that_is_shown_parses(command, parsed, capsys):
    words = begun(command.words) if "--resume" in command.words else command.words
    if "--help" in words:
        with pytest.raises(SystemExit) as stop:
            parsed(words)
        assert not stop.value.code
        return
    code, found = parsed(words)
    assert code == 0, capsys.readouterr().err
    assert len(found) == 1
    assert "--resume" not in command.words or hasattr(found[0], "resume")


def test_a_flag_that_is_not_there_is_found(parsed, capsys):
    assert parsed(("sweep", "--no-such-flag", "1"))[0] == 2
    assert "--no-such-flag" in capsys.readouterr().err


def test_a_command_that_nobody_knows_is_found():
    with pytest.raises(ValueError, match="ELSEWHERE"):
        list(ours("frobnicate --now"))
    assert list(ours("ray exec cluster.yaml 'fuel-ray doctor --cluster'")) == [("doctor", "--cluster")]
    assert list(ours("pip install x && python experiments/sweep_block_size.py --seeds 2")) == [
        ("sweep", "--seeds", "2")
    ]


def test_scripts_are_the_verbs_that_they_say():
    for script, verb in SCRIPTS.items():
        assert f'main(["{verb}", *sys.argv[1:]])' in (ROOT / f"experiments/{script}.py").read_text()


def test_most_verbs_are_shown_with_a_command():
    shown = {command.words[0] for command in COMMANDS}
    assert shown <= set(VERBS)
    assert {"onboard", "sweep", "evaluate", "arena", "recommend", "deploy", "benchmark", "doctor"} <= shown
