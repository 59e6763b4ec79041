"""Policies by name and from outside the package, played by every verb that plays policies."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from fuel_ray.arena.evaluation import evaluate_block_size
from fuel_ray.build.nodes import build_loop, build_spec
from fuel_ray.cli import main
from fuel_ray.config import PRESETS
from fuel_ray.errors import ConfigError
from fuel_ray.policies.catalogue import CATALOGUE, PLAYABLE, PUBLISHED, SIMPLE, contender, untuned
from fuel_ray.policies.learned import read_policy
from fuel_ray.policies.static import LoadTable
from fuel_ray.sim.pack import load_pack
from fuel_ray.tuning import rules, tuned
from fuel_ray.tuning.contenders import names_of, resolve
from fuel_ray.tuning.rules import tuned_rules
from fuel_ray.tuning.runs import Runs
from fuel_ray.tuning.tuned import Tuned
from fuel_ray.types import Knobs, Slo
from tests.policy_folders import write_policy
from tests.test_arena import a_priced_policy
from tests.test_codec import WINDOW

MINE = "examples.outside.policies:Mine"
CONFIG = replace(PRESETS["default"], block_sizes=(16,))
SPEC = build_spec(CONFIG, 16)
CASE = untuned(SPEC, CONFIG.slo, load_pack(CONFIG.pack))
SHORT = ["--seeds", "1", "--seconds", "60", "--block-sizes", "16", "--workload", "steady:rate_rps=4"]


@pytest.fixture(autouse=True)
def from_the_repository(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)


@pytest.fixture
def few_tuning_seeds(monkeypatch):
    monkeypatch.setattr(tuned, "TUNING_SEEDS", (1000,))
    monkeypatch.setattr(tuned, "EPISODE_S", 60)
    monkeypatch.setattr(rules, "_EVALUATIONS", 10)


def played(folder, file="summary.csv"):
    with next(folder.glob(f"*/{file}")).open() as lines:
        return list(dict.fromkeys(row["policy"] for row in csv.DictReader(lines)))


@pytest.mark.parametrize("name", PLAYABLE)
def test_every_policy_of_the_catalogue_can_be_made_and_decides(name):
    for setting in contender(name, CASE).settings:
        policy = contender(name, CASE).make(setting)
        policy.reset()
        assert policy.decide(WINDOW).gpu_clock_mhz in SPEC.gpu_clocks_mhz


def test_the_table_at_four_seconds_is_tuned_for_itself():
    loop = build_loop(PRESETS["default"], 16, horizon_s=60.0)
    runs = Runs(loop, seeds=[1000], seconds=60, slos={"a": Slo(1.0, 0.012)})
    tens = LoadTable((), (Knobs(48, 1500),))
    table = tuned_rules(["load_table_4s"], runs, "a", share=0.9, table=tens, perf=CASE.pack.perf)[
        "load_table_4s"
    ]
    assert table.ewma_s == 4.0 and {knobs.batch_limit for knobs in table.knobs} == {48}
    assert len(table.knobs) == 10 and len({knobs.gpu_clock_mhz for knobs in table.knobs}) > 1


def test_labels_and_colours_tell_the_policies_apart():
    for part in ("label", "color"):
        assert len({getattr(CATALOGUE[name], part) for name in (*PLAYABLE, "dqn")}) == len(PLAYABLE) + 1


def test_evaluate_plays_folders_names_and_classes_from_outside(tmp_path, capsys):
    folder = a_priced_policy(tmp_path / "block_16")
    flags = ["evaluate", *SHORT, "--out", str(tmp_path / "out"), "--static", "max", "48@1350"]
    assert main([*flags, "--policies", str(folder), "clipper", MINE]) == 0
    assert played(tmp_path / "out") == ["max_performance", "static 48@1350", "block_16", "clipper", MINE]
    assert "Clipper" in capsys.readouterr().out


def test_what_a_rule_needs_is_tuned_first_and_that_is_said(tmp_path, capsys, few_tuning_seeds):
    names = ["tuned_static", "feedback", "agft", "requests_table"]
    assert main(["evaluate", *SHORT, "--out", str(tmp_path), "--policies", *names]) == 0
    assert played(tmp_path) == ["max_performance", *names]
    assert (
        "tune  block  16  tuned_static, feedback, agft, requests_table: on the tuning seeds"
        in capsys.readouterr().out
    )


def test_the_arena_plays_a_class_from_outside(tmp_path, few_tuning_seeds):
    flags = ["--scenarios", "steady-30", "--seeds", "1", "--tuning-seeds", "1", "--seconds", "60"]
    more = ["--no-peers", "--no-oracle", "--policies", MINE, "clipper", "--out", str(tmp_path)]
    assert main(["arena", *flags, *more]) == 0
    assert played(tmp_path) == ["max_performance", "tuned_static", *SIMPLE, MINE, "clipper"]
    assert "| Clipper |" in next(tmp_path.glob("*/arena.md")).read_text()


def test_recommend_compares_rules_too(tmp_path, capsys, few_tuning_seeds):
    flags = [*SHORT, "--seeds", "2", "--tuning-seeds", "1", "--workers", "1", "--save", str(tmp_path)]
    assert main(["recommend", *flags, "--policies", "clipper", MINE]) == 0
    said = capsys.readouterr().out.splitlines()
    rows = [line for line in said if line.startswith("recommend  block size")]
    assert all(" to 100.0]" in line for line in rows[:3])  # over the clock axes
    for name in ("tuned static", "load table  ", "predictive  ", "Clipper", MINE):
        assert sum(line.startswith(f"recommend  block size  16  {name}") for line in said) == 1
    assert said[-1].startswith(f"wrote {tmp_path}")
    saved = read_policy(tmp_path).manifest
    assert saved.algorithm in ("tuned_static", *SIMPLE) and saved.anchor is not None
    assert saved.tuned_static is not None and saved.feature_ranges["arrival_rate_ewma"][1] > 0.0


def test_a_sweep_evaluates_others_beside_its_own(tmp_path, few_tuning_seeds, monkeypatch):
    monkeypatch.setattr("fuel_ray.arena.evaluation.EPISODE_S", 60)
    config = replace(CONFIG, seeds=1, policies=("clipper", "feedback", MINE))
    own = Tuned(Knobs(48, 1500), LoadTable((), (Knobs(48, 1500),)), 0.97)
    folder = a_priced_policy(tmp_path / "p")
    rows = evaluate_block_size(config, 16, {"steady:rate_rps=4": own}, folder).rows
    alone = evaluate_block_size(replace(config, policies=()), 16, {"steady:rate_rps=4": own}, folder).rows
    assert rows[:5] == alone and [row["policy"] for row in rows[5:]] == list(config.policies)


def test_a_policy_that_learns_while_it_serves_has_played_the_tuning_seeds(few_tuning_seeds):
    (policy,) = tuned.tuned_policies(CONFIG, "steady:rate_rps=4", SPEC, {"agft": "agft"}, share=0.97).values()
    policy.reset()
    fresh = contender("agft", CASE).make(0.0)
    assert policy._tries.sum() > 50 and fresh._tries.sum() == 0


@pytest.mark.parametrize(
    "entry",
    [
        "storm", "dqn", "examples.outside.policies:Nobody", "examples.nowhere:Mine", "json:loads",
        "fuel_ray.types:Slo", "collections:Counter",
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["evaluate --policies", "sweep --policies", "arena --policies"])
def test_what_is_no_policy_is_said_in_one_line_before_anything_is_run(entry, verb, capsys, tmp_path):
    assert main([*verb.split(), entry, "--block-sizes", "16", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert entry in error and verb.split()[1] in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["evaluate", "arena"])
def test_a_folder_of_another_block_size_is_not_left_out_without_a_word(verb, capsys, tmp_path):
    folder = str(write_policy(tmp_path / "of_16"))
    out = tmp_path / "out"
    assert main([verb, "--policies", folder, "--block-sizes", "32", "--out", str(out)]) == 2
    assert "--policies of_16: not trained for block size 32" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("slo", [Slo(ttft_s=1.0), Slo(tpot_s=0.05)])
def test_eais_needs_to_know_how_long_a_request_may_take(slo):
    with pytest.raises(ConfigError, match="eais needs --slo-e2e-s"):
        contender("eais", replace(CASE, slo=slo)).make(0.0)


def test_an_unknown_name_lists_the_catalogue():
    with pytest.raises(ConfigError, match=", ".join(PUBLISHED)):
        resolve("storm", CASE)


def test_a_folder_that_has_the_name_of_a_rule_is_told_apart_from_it(tmp_path):
    folder = str(write_policy(tmp_path / "clipper"))
    assert names_of([folder, "clipper", MINE]) == [folder, "clipper", MINE]


def test_settings_with_policies_survive_json(tmp_path):
    assert main(["evaluate", *SHORT, "--out", str(tmp_path), "--policies", MINE]) == 0
    facts = json.loads(next(tmp_path.glob("*/run.json")).read_text())
    assert facts["config"]["policies"] == [MINE]


def test_a_folder_that_has_the_name_of_the_learned_policy_is_told_apart_from_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert names_of([str(write_policy(Path("dqn")))]) == ["./dqn"]
