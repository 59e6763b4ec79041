"""The search in hindsight is a bound: it begins at what policies chose and never leaves it for worse."""

import json
from itertools import pairwise

import numpy as np
import pytest

from fuel_ray.arena.cell import _hindsight, held_out_rows
from fuel_ray.build.nodes import build_loop
from fuel_ray.config import PRESETS
from fuel_ray.errors import ConfigError
from fuel_ray.policies.catalogue import LOAD_TABLE
from fuel_ray.policies.clipper import Clipper
from fuel_ray.policies.static import LoadTable, Static
from fuel_ray.tuning import hindsight
from fuel_ray.tuning.hindsight import Hindsight, below, hindsight_points, next_price
from fuel_ray.tuning.runs import held_out, plays_of
from fuel_ray.types import Knobs, Slo

TIGHT = Slo(ttft_s=0.5, tpot_s=0.014)
POLICIES = {
    "fastest": Static(Knobs(128, 1980)),
    "slow": Static(Knobs(24, 1200)),
    LOAD_TABLE: LoadTable([4.0, 8.0], [Knobs(32, 1200), Knobs(48, 1500), Knobs(64, 1980)]),
}


def schedules_of(policy, alone):
    return [own.schedule for own in plays_of(policy, alone)]


@pytest.fixture(scope="module")
def alone():
    loop = build_loop(PRESETS["default"], 16, horizon_s=40.0, workload="mmpp:low_rps=2,high_rps=12")
    slos = {"tight": TIGHT, "mean": Slo(e2e_s=3.0, share=None)}
    return held_out(loop, 2, seconds=40.0, slos=slos)


@pytest.mark.parametrize("policy", [*POLICIES.values(), None])
def test_a_schedule_does_what_the_policy_did_that_chose_it(alone, policy):
    policy = policy or Clipper(alone[0].loop.node.spec, TIGHT)  # which looks at windows
    for runs, schedule in zip(alone, schedules_of(policy, alone), strict=True):
        found = Hindsight(runs, TIGHT).chosen(schedule)
        episode = runs.episode(policy, runs.seeds[0])
        assert found.energy_j == pytest.approx(episode.totals.energy_j, rel=1e-12)
        assert found.requests == episode.totals.arrivals
        assert found.met == episode.records.meets(TIGHT).sum()


def test_every_pass_that_is_kept_lowers_the_lagrangian(alone, monkeypatch):
    seed = Hindsight(alone[0], TIGHT)
    start, kept = seed.chosen(schedules_of(POLICIES["slow"], alone)[0]), []
    improved = Hindsight._improved

    def watched(self, found, price_j, **more):
        kept.append(found.lagrangian(price_j))
        return improved(self, found, price_j, **more)

    monkeypatch.setattr(Hindsight, "_improved", watched)
    best = seed.cheapest(100.0, [start])
    kept.append(best.lagrangian(100.0))
    assert kept[0] == start.lagrangian(100.0)
    assert all(later <= earlier for earlier, later in pairwise(kept))
    assert kept[-1] < 0.95 * kept[0]


def test_a_pass_that_makes_it_worse_is_thrown_away(alone, monkeypatch):
    seed = Hindsight(alone[0], TIGHT)
    start = seed.chosen(schedules_of(POLICIES[LOAD_TABLE], alone)[0])
    worst = seed.chosen(np.array([[1, 1980]]))
    monkeypatch.setattr(Hindsight, "_improved", lambda self, *args, **more: worst)
    assert seed.cheapest(1_000.0, [start]) is start


def test_no_policy_is_below_the_bound_and_whoever_were_is_named(alone, monkeypatch):
    monkeypatch.setattr(hindsight, "_PASSES", 3)
    plays = {name: plays_of(policy, alone) for name, policy in POLICIES.items()}
    rows = [row for name, own in plays.items() for row in held_out_rows(name, own, alone, "tight")]
    points = _hindsight(alone, "tight", plays, rows, LOAD_TABLE)
    assert points == json.loads(json.dumps(points))
    searched = [point for point in points if point["price_j"] is not None]
    assert len(searched) == hindsight.PRICES
    assert [len(point["energy_j"]) for point in points] == [2] * (len(searched) + len(POLICIES))
    assert below(points, rows) == []
    cheated = [{**row, "policy": "cheat", "energy_j": 0.5 * row["energy_j"]} for row in rows[-2:]]
    assert below(points, [*rows, *cheated]) == ["cheat"]
    missed = [sum(point["requests"]) - sum(point["met"]) for point in searched]
    energy_j = [sum(point["energy_j"]) for point in searched]
    assert missed == sorted(missed, reverse=True)  # the higher the price, the fewer
    assert energy_j == sorted(energy_j)


def test_means_have_no_bound(alone):
    schedules = {"slow": schedules_of(POLICIES["slow"], alone)}
    assert hindsight_points(alone, "mean", schedules, (0.9, 0.95)) == []


def test_prices_bracket_the_range_and_then_fill_it():
    attained, tried = (0.96, 0.97), {100.0: 0.965}
    while (price_j := next_price(tried, attained)) is not None:
        tried[price_j] = 1.0 - 0.35 / price_j**0.5  # 0.965 at 100 J
    assert min(tried.values()) <= 0.96
    assert max(tried.values()) >= 0.97
    assert len(tried) == hindsight.PRICES
    assert any(0.96 < share < 0.97 for share in tried.values())


def test_an_attainment_that_no_price_buys_ends_the_search():
    tried = {100.0: 0.8}
    while (price_j := next_price(tried, (0.96, 0.97))) is not None:
        tried[price_j] = 0.8
    assert len(tried) == hindsight.PRICES


def test_only_a_simulated_node_is_searched(alone):
    class Live:
        loop = type("Loop", (), {"node": type("Node", (), {"spec": alone[0].loop.node.spec})})
        seeds = (1,)

    with pytest.raises(ConfigError, match="only a simulated node"):
        Hindsight(Live(), TIGHT)
