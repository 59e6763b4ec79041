"""A copy of an engine goes on exactly as the original would have, and its misses are those of its records."""

import pickle

import numpy as np
import pytest

from fuel_ray.sim import scheduler as rules
from fuel_ray.sim.node import SimulatedNode
from fuel_ray.sim.pack import load_pack
from fuel_ray.sim.scheduler import AtClock, advance
from fuel_ray.sim.snapshot import copy_state, limits_of, met, missed, new_copy
from fuel_ray.types import Slo
from fuel_ray.workload.spec import parse_workload

PACK = load_pack("h100-qwen3-8b")
LOADS = {
    "steady:rate_rps=14": {"kv_tokens": 14_000},  # preempts
    "steady:rate_rps=8": {"kv_tokens": 14_000, "prefix_caching": False},
    "chat-prefix:low_rps=14,high_rps=15": {"kv_tokens": 14_000},
    "mmpp": {"kv_tokens": None},
}
OUTCOMES = (rules.TTFTS, rules.TPOTS, rules.FINISHED)


def started(workload, seed=3):
    node = SimulatedNode(PACK, parse_workload(workload), kv_block_size=16, horizon_s=120.0, **LOADS[workload])
    node.reset(seed=seed)
    return node.inside


def go_on(s, inside, knobs):
    """The windows' energies and counts under (clock, limit) each."""
    seen = []
    for clock, limit in knobs:
        at = AtClock(*inside.clock_table[clock])
        advance(s, inside.engine, inside.constants, at, s.clock[rules.NOW] + 1.0, limit)
        seen.append((s.clock.tolist(), s.count.tolist()))
    return seen


def drawn_knobs(rng, windows):
    return [(int(rng.integers(40)), int(rng.choice([8, 24, 64, 128]))) for _ in range(windows)]


@pytest.mark.parametrize("workload", LOADS)
def test_a_copy_goes_on_byte_for_byte_wherever_it_was_before(workload):
    inside, rng = started(workload), np.random.default_rng(0)
    s, branch = inside.state, new_copy(inside.state)
    preempted = 0
    for _ in range(8):
        first = copy_state(branch, s)
        go_on(branch, inside, drawn_knobs(rng, 25))  # leaves it in another place
        assert copy_state(branch, s) == first
        knobs = drawn_knobs(rng, 12)
        begun = s.count[list(OUTCOMES)]
        windows = go_on(s, inside, knobs)
        assert go_on(branch, inside, knobs) == windows
        preempted += sum(count[rules.PREEMPTIONS] for _, count in windows)
        for name in ("request", "time_s"):
            assert np.array_equal(getattr(branch, name)[first:], getattr(s, name)[first:]), name
        for name in ("slot", "block", "prefix_block", "event", "step"):
            assert np.array_equal(getattr(branch, name), getattr(s, name)), name
        for row, begin, end in zip(range(3), begun, s.count[list(OUTCOMES)], strict=True):
            assert np.array_equal(branch.sample[row, begin:end], s.sample[row, begin:end])
    assert not workload.startswith("steady:rate_rps=14") or preempted > 0


@pytest.mark.parametrize(
    "slo",
    [Slo(1.0, 0.02), Slo(0.2, None), Slo(None, 0.016), Slo(None, None, 5.0), Slo(0.5, 0.02, 4.0)],
    ids=str,
)
@pytest.mark.parametrize("workload", ["steady:rate_rps=14", "mmpp"])
def test_misses_are_those_of_the_records_and_each_is_certain_once_it_counts(workload, slo):
    node = SimulatedNode(PACK, parse_workload(workload), kv_block_size=16, horizon_s=60.0, **LOADS[workload])
    node.reset(seed=1)
    inside, limits, counted = node.inside, limits_of(slo), []
    for _ in range(40):
        go_on(inside.state, inside, [(5, 32)] * 5)
        counted.append(missed(inside.state, 0, limits))
    records = node.take_records()
    assert len(records) == inside.state.count[rules.ARRIVED]
    assert counted[-1] == int((~records.meets(slo)).sum())
    assert counted[-1] > 0 or workload == "mmpp"
    assert met(inside.state, limits) == int(records.meets(slo).sum())
    assert counted == sorted(counted)


def test_a_miss_counts_when_its_limit_passes():
    inside = started("steady:rate_rps=14")
    s, limits = inside.state, limits_of(Slo(0.5))
    go_on(s, inside, [(0, 1)] * 10)  # one at a time: nearly everybody waits
    waiting = s.time_s[: s.count[rules.ARRIVED]]
    late = (waiting[:, rules.FIRST_TOKEN] < 0) & (s.clock[rules.NOW] - waiting[:, rules.ARRIVAL] > 0.5)
    assert missed(s, 0, limits) >= late.sum() > 50


def test_a_node_that_was_used_is_sent_and_comes_back_to_each_seed_with_the_same_requests():
    def arrivals(node, seed):
        node.reset(seed=seed)
        return node.inside.state.time_s[:, rules.ARRIVAL].tolist()

    node = SimulatedNode(PACK, parse_workload("steady:rate_rps=2"), kv_block_size=16, horizon_s=30.0)
    first = [arrivals(node, seed) for seed in range(50)]
    sent = pickle.loads(pickle.dumps(node))
    assert [arrivals(sent, seed) for seed in range(50)] == first
    assert len({tuple(times) for times in first}) == 50
