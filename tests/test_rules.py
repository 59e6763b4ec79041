"""Simple rules that look at their node: as data, compiled, tuned, and as policy folders."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

from fuel_ray.build.nodes import build_loop, build_spec
from fuel_ray.codec import ActionGrid, Codec
from fuel_ray.config import PRESETS
from fuel_ray.policies.anchor import Anchor, at_work, rule_of
from fuel_ray.policies.catalogue import CATALOGUE, LOAD_TABLE, PREDICTIVE, REQUESTS_TABLE, contender, untuned
from fuel_ray.policies.learned import LearnedPolicy, Manifest, load_policy, save_rule
from fuel_ray.policies.rules import Rule, RulePolicy
from fuel_ray.policies.static import LoadTable
from fuel_ray.sim.pack import load_pack
from fuel_ray.tuning import rules
from fuel_ray.tuning.evolution import evolved
from fuel_ray.tuning.runs import Runs
from fuel_ray.tuning.tuned import Tuned, tune_on, tuned_case, with_rules
from fuel_ray.types import Knobs, Slo

SPEC, SLO = build_spec(PRESETS["default"], 16), Slo(1.0, 0.014)
PERF = load_pack("h100-qwen3-8b").perf
TABLE = LoadTable([4.0], [Knobs(40, 1200), Knobs(40, 1600)])
TRIM = (10.0, 300.0, 200.0, 500.0, 90.0, 70.0, 400.0, 30.0, 250.0)
KINDS = {
    "requests": Rule(40, ("in_system",), ((0.0, 8.0, 20.0),), ((990.0,), (1300.0,), (1900.0,))),
    "rates": Rule(40, ("fast_arrival_rate",), ((2.0, 9.0),), ((1100.0,), (1500.0,))),
    "two keys": Rule(
        *(40, ("arrival_rate", "in_system"), ((2.0, 9.0), (1.0, 10.0, 30.0))),
        ((1000.0, 1200.0, 1500.0), (1100.0, 1400.0, 1980.0)),
    ),
    "prediction": Rule(40, perf=PERF, stretch=0.9),
}
KINDS["trimmed table"] = replace(KINDS["requests"], trim_mhz=TRIM, shift_mhz=-60.0)
KINDS["trimmed prediction"] = replace(KINDS["prediction"], trim_mhz=TRIM, shift_mhz=40.0)


def runs_of(seconds=240, seeds=(1000,), workload="steady:rate_rps=9", slo=SLO, clock_axis="nominal"):
    loop = build_loop(
        replace(PRESETS["default"], clock_axis=clock_axis), 16, horizon_s=float(seconds), workload=workload
    )
    return Runs(loop, seeds=seeds, seconds=seconds, slos={"a": slo})


def near(rule, weight=0.05):
    """A random network near a rule."""
    rng = np.random.default_rng(1)
    grid = ActionGrid((16, 40, 64), (990, 1200, 1400, 1600, 1800, 1980))
    features = ("running_of_capacity", "waiting_of_capacity", "kv_usage", "arrival_rate_ewma", "token_gap")
    shapes = {
        "trunk.0": (16, len(features)),
        "trunk.2": (16, 16),
        "value": (1, 16),
        "limit_advantage": (3, 16),
        "clock_advantage": (6, 16),
    }
    arrays = {}
    for name, shape in shapes.items():
        arrays[f"{name}.weight"] = rng.normal(size=shape).astype(np.float32)
        arrays[f"{name}.bias"] = rng.normal(size=shape[0]).astype(np.float32)
    codec = Codec(features, grid, SLO)
    return LearnedPolicy(arrays, codec, SPEC, head="additive", anchor=Anchor(rule, weight))


POLICIES = {
    **{name: RulePolicy(rule, SPEC, SLO) for name, rule in KINDS.items()},
    "network near a table": near(TABLE),
    "network near a prediction": near(KINDS["prediction"]),
}


def assert_alike(fast, slow):
    assert fast.energy_j.tobytes() == slow.energy_j.tobytes()
    assert fast.arrivals.tolist() == slow.arrivals.tolist()
    assert fast.schedule.tolist() == slow.schedule.tolist()
    assert (fast.preemptions, fast.output_tokens) == (slow.preemptions, slow.output_tokens)
    assert fast.records.tpot_s.tobytes() == slow.records.tpot_s.tobytes()


@pytest.mark.parametrize("name", POLICIES)
def test_a_compiled_episode_is_that_of_the_loop_byte_for_byte(name):
    runs = runs_of()
    assert_alike(runs.fast(POLICIES[name], 7), runs._slow(POLICIES[name], 7))
    windows = runs.episode(POLICIES[name], 7).windows
    assert len({window.knobs.gpu_clock_mhz for window in windows[1:]}) > 1  # it does something


@pytest.mark.parametrize("name", ["prediction", "trimmed prediction", "network near a prediction"])
def test_a_prediction_does_not_know_the_clock_axis_of_its_server(name):
    runs = runs_of(clock_axis="clocked")
    fast = runs.fast(POLICIES[name], 7)
    assert_alike(fast, runs._slow(POLICIES[name], 7))
    assert fast.energy_j.tobytes() != runs_of().fast(POLICIES[name], 7).energy_j.tobytes()


@pytest.mark.parametrize("name", KINDS)
def test_a_rule_is_plain_data(name):
    rule = KINDS[name]
    assert rule_of(json.loads(json.dumps(rule.to_dict()))) == rule == pickle.loads(pickle.dumps(rule))
    assert Anchor.from_dict(json.loads(json.dumps(Anchor(rule, 0.06).to_dict()))) == Anchor(rule, 0.06)


@pytest.mark.parametrize(
    "damage",
    [
        {"batch_limit": 0},
        {"keys": ("queue",)},
        {"keys": ("in_system",) * 3},
        {"knots": ((0.0, 20.0, 8.0),)},
        {"knots": ((0.0, 20.0),)},
        {"knots": ()},
        {"clocks_mhz": ((990.0, 1300.0, 1900.0),)},
        {"clocks_mhz": ((990.0,), (float("nan"),), (1900.0,))},
        {"perf": PERF},
        {"keys": (), "knots": (), "clocks_mhz": ()},
        {"trim_mhz": (0.0,)},
        {"shift_mhz": float("inf")},
    ],
)
def test_a_malformed_rule_is_refused(damage):
    with pytest.raises(ValueError, match="no rule"):
        replace(KINDS["requests"], **damage)


def test_more_careful_takes_more_energy_by_every_kind():
    runs = runs_of()
    for rule in (KINDS["requests"], KINDS["prediction"], KINDS["trimmed prediction"]):
        by = 0.3 if rule.predicts else 200.0
        low, own, high = (
            runs.score(RulePolicy(rule.moved(x), SPEC, SLO), "a", share=0.9) for x in (-by, 0.0, by)
        )
        assert low.energy_j_per_request < own.energy_j_per_request < high.energy_j_per_request


def manifest_of(spec):
    made_for = (spec.model, spec.gpu_name, "vLLM 0.32.0", "p", "0", "energy", "w", "d", "additive", "0")
    return Manifest((16,), *made_for, tuned_static=Knobs(40, 1500))


@pytest.mark.parametrize("rule", [TABLE, *KINDS.values()], ids=["load table", *KINDS])
def test_a_rule_in_a_folder_decides_as_by_itself(rule, tmp_path):
    save_rule(tmp_path / "p", rule, manifest_of(SPEC), slo=SLO, clock_mhz=1980)
    runs, own = runs_of(seconds=60), at_work(rule, SPEC, SLO)
    loaded = load_policy(tmp_path / "p", SPEC)
    alike = [[w.knobs for w in runs.episode(policy, 3).windows] for policy in (own, loaded)]
    assert alike[0] == alike[1]
    assert runs.fast(loaded, 3).energy_j.tobytes() == runs.played(own, 3).energy_j.tobytes()


def test_the_search_finds_the_middle_of_a_noisy_bowl_and_always_the_same():
    noise = np.random.default_rng(0).normal(scale=0.01, size=400).tolist()
    goal = np.array([30.0, -20.0, 10.0])

    def found():
        costs = iter(noise)
        return evolved(
            lambda x: float(((x - goal) ** 2).mean() / 1e3) + next(costs),
            np.zeros(3),
            spread=20.0,
            evaluations=160,
        )

    np.testing.assert_allclose(found(), goal, atol=8.0)
    assert found().tobytes() == found().tobytes()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(rules, "_EVALUATIONS", 20)


def test_every_rule_of_a_load_meets_what_is_asked_and_the_best_is_known(quick):
    runs = runs_of(workload="diurnal:period_s=240", slo=Slo(1.0, 0.014))
    tuned = tune_on(runs, "a", share=0.9, limits=(40,), perf=PERF)
    assert set(tuned.rules) == set(rules.RULES)
    everyone = {LOAD_TABLE: tuned.table, **tuned.rules}
    scores = {
        name: runs.score(at_work(own, SPEC, runs.slos["a"]), "a", share=0.9) for name, own in everyone.items()
    }
    assert all(score.slo_attainment >= tuned.share for score in scores.values())
    assert tuned.best_rule == min(scores, key=lambda name: scores[name].energy_j_per_request)
    case = tuned_case(PRESETS["default"], SPEC, tuned, slo=runs.slos["a"])
    for name in rules.RULES:
        made = contender(name, case)
        assert made.monotone and runs.score(made.make(0.0), "a", share=0.9) == scores[name]
    assert (
        Tuned.from_dict(json.loads(json.dumps(tuned.to_dict()))).rules[PREDICTIVE] == tuned.rules[PREDICTIVE]
    )


def test_rules_that_are_there_are_not_tuned_again(quick, monkeypatch):
    runs, rule = runs_of(seconds=60), KINDS["requests"]
    tuned = Tuned(Knobs(40, 1500), TABLE, 0.5, {REQUESTS_TABLE: rule}, REQUESTS_TABLE)
    assert with_rules(tuned, [REQUESTS_TABLE], runs, "a", perf=PERF) is tuned and tuned.rule is rule


def test_baselines_of_older_runs_have_the_load_table_for_their_best_rule():
    raw = Tuned(Knobs(40, 1500), TABLE, 0.97).to_dict()
    old = {name: raw[name] for name in ("tuned_static", "load_table", "share")}
    tuned = Tuned.from_dict(old)
    assert tuned.best_rule == LOAD_TABLE and tuned.rule is tuned.table


def test_a_rule_that_was_not_tuned_is_tuned_static():
    case = untuned(SPEC, SLO, None)
    for name in rules.RULES:
        assert CATALOGUE[name].simple and contender(name, case).make(0.0).knobs == SPEC.max_performance


def test_a_load_table_moved_beyond_the_gpu_takes_the_clocks_that_there_are():
    moved = at_work(LoadTable((), (Knobs(40, SPEC.gpu_clocks_mhz[-1]),)).moved(500.0), SPEC, SLO)
    assert isinstance(moved, LoadTable) and moved.knobs[0].gpu_clock_mhz == SPEC.gpu_clocks_mhz[-1]
