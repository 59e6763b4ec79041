"""Branches of an episode: what another action would have been worth, as a replay by hand has it."""

from functools import cache

import numpy as np
import pytest

from fuel_ray.codec import PRICED_FEATURES, Codec, node_grid
from fuel_ray.policies.anchor import REACH_MHZ, Anchor, at_work
from fuel_ray.policies.learned import LearnedPolicy
from fuel_ray.policies.rules import Rule
from fuel_ray.policies.static import LoadTable
from fuel_ray.sim import scheduler as rules
from fuel_ray.sim.branches import Plan, Samples, collect, soft_missed, start
from fuel_ray.sim.node import SimulatedNode
from fuel_ray.sim.pack import load_pack
from fuel_ray.sim.program import base_alone
from fuel_ray.sim.snapshot import limits_of, missed
from fuel_ray.types import Knobs, Slo
from fuel_ray.workload.spec import parse_workload

SLO = Slo(1.0, 0.014)
LIMITS = limits_of(SLO)
PLAN = Plan(
    every=4, tries=3, hold=3, horizon=12, within_mhz=REACH_MHZ, other_limit=0.3, soft=1e-9, noise_mhz=0.0
)
WINDOWS, NEVER = 60, 10_000
RULES = {
    "table": LoadTable([8.0], [Knobs(40, 1200), Knobs(40, 1500)]),
    "trimmed table": Rule(
        *(40, ("in_system",), ((0.0, 10.0, 40.0),), ((1000.0,), (1300.0,), (1900.0,))),
        trim_mhz=(10.0, 300.0, 200.0, 500.0, 90.0, 70.0, 400.0, 30.0, 250.0),
    ),
}


def node_of(seed=5):
    workload = parse_workload("mmpp:low_rps=4,high_rps=16,dwell_s=8")
    found = SimulatedNode(
        load_pack("h100-qwen3-8b"), workload, kv_block_size=16, horizon_s=90.0, kv_tokens=26_000
    )
    found.reset(seed=seed)
    return found


def silent(spec, rule, *, lower=False):
    """A network that says nothing, near a rule: it does what the rule does, and knows what is seen."""
    grid = node_grid(spec, clock_step_mhz=15, lowest_clock_share=0.45, batch_limits=(32, 40, 128))
    shapes = {"trunk.0": (8, len(PRICED_FEATURES)), "trunk.2": (8, 8), "value": (1, 8)}
    shapes |= {"limit_costs": (2 * len(grid.batch_limits), 8), "clock_costs": (20, 8)}
    arrays = {}
    for name, shape in shapes.items():
        arrays |= {f"{name}.weight": np.zeros(shape, np.float32), f"{name}.bias": np.zeros(shape[0], "f4")}
    codec = Codec(PRICED_FEATURES, grid, SLO)
    return LearnedPolicy(arrays, codec, spec, head="priced", anchor=Anchor(rule, 0.03, REACH_MHZ, lower))


def room(n):
    ints, floats = (lambda: np.zeros(n, np.int64)), (lambda: np.zeros(n))
    seen = np.zeros((n, len(PRICED_FEATURES)), np.float32)
    return Samples(seen, ints(), ints(), floats(), floats())


def programs(policy, node):
    """What plays, what sees, and the server."""
    seen, server = policy.compiled(node.spec)
    return base_alone(seen), seen, server


def branched(rule, *, random=None, lower=False, **changes):
    """An episode and its branches: the node, the policy, what was found, the totals."""
    node = node_of()
    policy = silent(node.spec, rule, lower=lower)
    random = np.random.default_rng(0).random(400) if random is None else random
    found, totals = room(500), np.zeros(3)
    plan = PLAN._replace(**changes)
    n = collect(*start(node.inside), *programs(policy, node), LIMITS, plan, WINDOWS, random, found, totals)
    return node, policy, Samples(*(column[:n] for column in found)), totals


def by_hand(rule, *, at=NEVER, knobs=None, windows=WINDOWS):
    """The same arrivals window by window: after window ``at`` these knobs are held, then the rule goes on.

    Energy per window, misses in the end, the windows and what the rule wanted after each.
    """
    node = node_of()
    policy = at_work(rule, node.spec, SLO)
    chosen, energy_j, seen, wanted = node.spec.max_performance, [], [], []
    for k in range(windows):
        if at < k <= at + PLAN.hold:
            chosen = knobs
        node.apply(chosen)
        seen.append(node.measure(1.0))
        energy_j.append(seen[-1].energy_j)
        chosen = policy.decide(seen[-1])
        wanted.append(chosen)
    return np.array(energy_j), missed(node.inside.state, 0, LIMITS), seen, wanted


@cache
def episode(name):
    return branched(RULES[name])


@pytest.mark.parametrize("name", RULES)
def test_a_branch_is_what_a_replay_by_hand_gives(name):
    rule, (_, policy, found, _) = RULES[name], episode(name)
    _, _, seen, wanted = by_hand(rule)
    observations = [policy.observe(window) for window in seen]
    places = [k for k in range(WINDOWS) if k % PLAN.every == 0 and k > 5]
    rows = np.random.default_rng(1).choice(len(found.action), 12, replace=False)
    changed = set()
    for row in sorted(rows):
        (k,) = (k for k in places if np.allclose(observations[k], found.observation[row], atol=1e-6))
        base, tried = (policy.codec.grid.decode(a[row]) for a in (found.base, found.action))
        assert base == wanted[k]
        windows = k + 1 + PLAN.horizon
        own_j, own_missed, *_ = by_hand(rule, at=k, knobs=base, windows=windows)  # held as long
        other_j, other_missed, *_ = by_hand(rule, at=k, knobs=tried, windows=windows)
        assert found.energy_j[row] == pytest.approx(other_j.sum() - own_j.sum(), rel=1e-9, abs=1e-6)
        assert found.misses[row] == pytest.approx(other_missed - own_missed, abs=1e-6)
        changed |= {("misses", other_missed != own_missed), ("limit", tried.batch_limit != base.batch_limit)}
    assert ("limit", True) in changed
    assert np.abs(found.misses).max() > 0.9 and np.abs(found.energy_j).min() > 0.0


def test_the_episode_is_not_disturbed_by_its_branches():
    """Constant draws, since branches draw too: the episode then leaves its program alike in both."""
    draws = np.full(100, 0.7)
    node, _, found, totals = branched(RULES["trimmed table"], random=draws, noise_mhz=150.0)
    alone, _, none, own_totals = branched(RULES["trimmed table"], random=draws, noise_mhz=150.0, every=NEVER)
    assert len(found.action) > 10 and len(none.action) == 0
    assert totals.tolist() == own_totals.tolist()
    for column, own in zip(node.inside.state, alone.inside.state, strict=True):
        assert np.array_equal(column, own)
    _, _, seen, _ = by_hand(RULES["trimmed table"])
    mhz = np.mean([window.knobs.gpu_clock_mhz for window in seen])
    assert totals[2] / WINDOWS - mhz > 15.0, "the episode itself is 60 MHz above its rule"


def test_without_noise_the_episode_is_the_rules():
    energy_j, *_, wanted = by_hand(RULES["trimmed table"])
    *_, totals = episode("trimmed table")
    assert totals[0] == pytest.approx(energy_j.sum(), rel=1e-12)
    assert totals[2] == 1980 + sum(knobs.gpu_clock_mhz for knobs in wanted[:-1])


@pytest.mark.parametrize("name", RULES)
def test_what_is_tried_is_within_reach_and_never_at_a_lower_limit(name):
    _, policy, found, _ = episode(name)
    grid = policy.codec.grid
    limits, clocks = (np.array(v) for v in (grid.batch_limits, grid.gpu_clocks_mhz))
    (limit, clock), (own_limit, own_clock) = (np.divmod(a, len(clocks)) for a in (found.action, found.base))
    away_mhz = np.abs(clocks[clock] - clocks[own_clock])
    assert away_mhz.max() <= REACH_MHZ and away_mhz.max() > 0.8 * REACH_MHZ
    assert (limits[limit] >= limits[own_limit]).all() and set(limits[limit]) == {40, 128}
    assert (found.action != found.base).all(), "the program's own action is no other one"


def test_lower_limits_are_tried_where_they_may_be_taken():
    _, policy, found, _ = branched(RULES["table"], lower=True)
    grid = policy.codec.grid
    tried = np.array(grid.batch_limits)[found.action // len(grid.gpu_clocks_mhz)]
    assert set(tried) == {32, 40, 128}


def test_an_action_that_is_held_for_no_window_makes_no_difference():
    _, _, found, _ = branched(RULES["table"], hold=0)
    assert len(found.action) > 10
    assert not found.energy_j.any() and not found.misses.any()


def test_when_there_is_no_more_room_the_episode_ends():
    node = node_of()
    program = programs(silent(node.spec, RULES["table"]), node)
    found = room(4)
    draws = np.random.default_rng(0).random(400)
    assert collect(*start(node.inside), *program, LIMITS, PLAN, WINDOWS, draws, found, np.zeros(3)) == 4
    assert (found.action != found.base).all()


@pytest.mark.parametrize("slo", [SLO, Slo(0.1), Slo(None, 0.0135), Slo(None, None, 3.0)], ids=str)
def test_a_soft_miss_becomes_a_miss_as_it_hardens(slo):
    node, limits = node_of(), limits_of(slo)
    node.apply(Knobs(32, 1200))
    for _ in range(6):
        for _ in range(15):
            node.measure(1.0)
        s = node.inside.state
        assert soft_missed(s, 0, limits, 1e-12) == missed(s, 0, limits)
    assert s.count[rules.FINISHED] > 500 and 0 < missed(s, 0, limits) < s.count[rules.ARRIVED]
    stricter, looser = (type(limits)(*(x * by for x in limits)) for by in (0.95, 1.05))
    assert missed(s, 0, looser) <= soft_missed(s, 0, limits, 0.05) <= missed(s, 0, stricter)
    assert soft_missed(s, 0, limits, 0.05) != missed(s, 0, limits), "some are near"
