"""A policy folder whose pack is another file here is refused with the reason, unless that is allowed."""

import json
from dataclasses import replace
from importlib import resources

import pytest

from fuel_ray import __version__
from fuel_ray.arena.config import ArenaConfig
from fuel_ray.build.codec import build_codec
from fuel_ray.build.nodes import build_spec
from fuel_ray.cli import main
from fuel_ray.commands import arena, evaluate, recommend, sweep, train
from fuel_ray.config import PRESETS, SweepConfig, to_dict
from fuel_ray.errors import PolicyError
from fuel_ray.policies.learned import load_policy
from fuel_ray.sim.pack import load_pack
from fuel_ray.training.run import running
from tests.policy_folders import write_policy

PACK = load_pack("h100-qwen3-8b")
CONFIG = replace(SweepConfig(), train=replace(PRESETS["default"].train, head="joint"))
CODEC = build_codec(CONFIG, build_spec(CONFIG, 16))
REASON = "was trained on an older version of calibration pack h100-qwen3-8b"
VERBS = {"evaluate": evaluate, "recommend": recommend, "arena": arena, "sweep": sweep}


def policy(folder, **facts):
    """One for the node of the shipped pack, by default trained on another file of its name."""
    known = {"model": PACK.model, "pack": PACK.name, "pack_sha256": "0" * 64}
    return write_policy(folder, grid=CODEC.grid, features=CODEC.features, **{**known, **facts})


@pytest.fixture(autouse=True)
def no_run(monkeypatch):
    """A policy that is taken by mistake fails here rather than in a run."""
    for verb in (evaluate, recommend, arena, sweep, train):
        monkeypatch.setattr(verb, "run", lambda config: pytest.fail("it was run"))


@pytest.fixture
def old(tmp_path):
    return policy(tmp_path / "old")


def flags(verb, folder):
    return ["--block-sizes", "16", "--policies", str(folder)]


@pytest.mark.parametrize("verb", VERBS)
def test_a_policy_of_another_file_of_the_pack_does_not_play(verb, old, capsys, tmp_path):
    assert main([verb, *flags(verb, old), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{old} {REASON}" in error and "--allow-mismatch" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_with_allow_mismatch_it_is_a_warning(verb, old, caplog):
    VERBS[verb].parse([*flags(verb, old), "--allow-mismatch"], prog="x")
    assert [record.message for record in caplog.records if REASON in record.message]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("facts", [{"pack_sha256": PACK.sha256}, {"pack": "a pack that is elsewhere"}])
def test_the_same_pack_and_one_that_is_not_here_are_taken(verb, facts, tmp_path, caplog):
    VERBS[verb].parse(flags(verb, policy(tmp_path / "new", **facts)), prog="x")
    assert REASON not in caplog.text


def test_the_pack_that_is_named_counts_rather_than_the_shipped_one_of_its_name(tmp_path):
    shipped = resources.files("fuel_ray.sim") / "packs" / f"{PACK.name}.json"
    raw = {**json.loads(shipped.read_text()), "max_model_len": 4096}
    (tmp_path / "own.json").write_text(json.dumps(raw))
    folder = policy(tmp_path / "mine", pack_sha256=load_pack(str(tmp_path / "own.json")).sha256)
    evaluate.parse([*flags("evaluate", folder), "--pack", str(tmp_path / "own.json")], prog="x")
    with pytest.raises(PolicyError, match=REASON):
        evaluate.parse(flags("evaluate", folder), prog="x")


def test_training_starts_from_it_where_that_is_allowed(old, caplog, tmp_path):
    flags = {"block_sizes": (16,), "start_from": old, "out": tmp_path / "out", "allow_mismatch": True}
    with running(replace(CONFIG, **flags), "train", [CONFIG.workload], held_out=()):
        pass
    assert REASON in caplog.text


def test_it_is_said_before_anything_is_written(old, tmp_path):
    config = replace(CONFIG, block_sizes=(16,), start_from=old, out=tmp_path / "out")
    with (
        pytest.raises(PolicyError, match=f"--start-from .*{REASON}"),
        running(config, "train", [config.workload], held_out=()),
    ):
        pass
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("version", ["0.1.0", __version__])
def test_a_policy_of_an_older_version_of_fuel_ray_is_taken(version, tmp_path, caplog):
    folder = policy(tmp_path / "mine", pack_sha256=PACK.sha256, fuel_ray_version=version)
    evaluate.parse(flags("evaluate", folder), prog="x")
    load_policy(folder, build_spec(CONFIG, 16))
    assert not caplog.records


def test_an_arena_is_not_resumed_with_another_pack(capsys, tmp_path):
    facts = {"config": to_dict(ArenaConfig()), "pack_sha256": "0"}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    assert main(["arena", "--resume", str(tmp_path)]) == 2
    assert "has changed since that arena began" in capsys.readouterr().err
