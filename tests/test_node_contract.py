"""What every node keeps, simulated or real."""

from types import UnionType
from typing import get_args, get_origin, get_type_hints

import numpy as np
import pytest

from fuel_ray.errors import NodeError
from fuel_ray.sim.node import SimulatedNode
from fuel_ray.sim.pack import load_pack
from fuel_ray.types import Knobs, WindowMetrics
from fuel_ray.workload.spec import parse_workload


def simulated():
    workload = parse_workload("steady:rate_rps=6")
    return SimulatedNode(
        load_pack("h100-qwen3-8b"), workload, kv_block_size=16, horizon_s=40.0, kv_tokens=26_000
    )


def simulated_with_a_crowded_pool():
    workload = parse_workload("steady:rate_rps=8")
    return SimulatedNode(
        load_pack("h100-qwen3-8b"), workload, kv_block_size=16, horizon_s=40.0, kv_tokens=9_000
    )


def remote():
    from fuel_ray.cluster.node import RemoteNode

    return RemoteNode(lambda server: simulated())


@pytest.fixture(
    params=[simulated, simulated_with_a_crowded_pool, pytest.param(remote, marks=[pytest.mark.ray])]
)
def node(request):
    if request.param is remote:
        request.getfixturevalue("two_hosts")
    made = request.param()
    made.reset(seed=1)
    yield made
    made.close()


def test_what_is_in_force_is_supported(node):
    clocks, (lowest, highest) = node.spec.gpu_clocks_mhz, node.spec.batch_limits
    for knobs in (Knobs(-3, 1), Knobs(10**6, 10**6), Knobs(8, clocks[0] + 1)):
        applied = node.apply(knobs)
        assert applied.gpu_clock_mhz in clocks and lowest <= applied.batch_limit <= highest
        assert node.measure(0.5).knobs == applied


def test_a_supported_clock_is_taken_as_it_is_and_any_other_snaps_to_the_nearest(node):
    clocks = node.spec.gpu_clocks_mhz
    assert list(clocks) == sorted(set(clocks))
    for clock in {clocks[0], clocks[len(clocks) // 2], clocks[-1]}:
        assert node.apply(Knobs(8, clock)) == Knobs(8, clock)
    for asked in range(clocks[0] - 20, clocks[-1] + 20, 7):
        applied = node.apply(Knobs(8, asked)).gpu_clock_mhz
        assert abs(applied - asked) == min(abs(clock - asked) for clock in clocks)


def test_a_window_has_the_types_it_says(node):
    node.measure(1.0)
    window = node.measure(1.0)
    kinds = get_type_hints(WindowMetrics)
    for name, kind in kinds.items():
        value = getattr(window, name)
        options = get_args(kind) if get_origin(kind) is UnionType else (kind,)
        if get_origin(kind) is tuple:
            assert type(value) is tuple and all(type(item) is float for item in value), name
        else:
            assert type(value) in options, f"{name} is {value!r}"


def test_windows_follow_each_other_without_a_gap(node):
    seconds = sum(node.measure(duration_s).duration_s for duration_s in (0.5, 1.0, 2.5))
    assert seconds == pytest.approx(4.0, rel=0.05)


def test_a_reset_starts_afresh(node):
    for _ in range(10):
        node.measure(1.0)
    assert len(node.take_records()) > 0
    node.reset(seed=2)
    assert len(node.take_records()) == 0
    window = node.measure(1.0)
    assert window.completed <= window.arrivals and window.running + window.waiting <= window.arrivals
    assert window.knobs == node.spec.max_performance
    completed = window.completed + sum(node.measure(1.0).completed for _ in range(9))
    assert len(node.take_records()) == completed > 0


def test_records_are_in_order_of_finish_and_their_times_in_order(node):
    for _ in range(20):
        node.measure(1.0)
    records = node.take_records()
    assert (np.diff(records.finished_s) >= 0).all()
    for earlier, later in (("arrival_s", "admitted_s"), ("admitted_s", "first_token_s"),
                           ("first_token_s", "finished_s")):  # fmt: skip
        assert (getattr(records, earlier) <= getattr(records, later)).all()


def test_a_window_is_within_range(node):
    for _ in range(20):
        window = node.measure(1.0)
        assert window.duration_s == pytest.approx(1.0, rel=0.2)
        assert window.energy_j > 0
        for share in (window.gpu_util, window.gpu_mem_util, window.cpu_util, window.kv_usage):
            assert share is None or 0 <= share <= 1
        assert window.prefix_hit_rate is None or 0 <= window.prefix_hit_rate <= 1
        assert min(window.arrivals, window.completed, window.running, window.waiting, window.preemptions) >= 0
        assert window.oldest_wait_s >= 0
        assert len(window.e2es_s) == window.completed >= len(window.tpots_s)


def test_window_samples_are_those_of_the_records(node):
    windows = [node.measure(1.0) for _ in range(60)]
    records = node.take_records()
    assert len(records) > 100

    def pooled(name):
        return sorted(value for window in windows for value in getattr(window, name))

    for name, column in (("ttfts_s", records.ttft_s), ("tpots_s", records.tpot_s), ("e2es_s", records.e2e_s)):
        assert pooled(name) == pytest.approx(sorted(column[np.isfinite(column)].tolist()), abs=1e-9)
    assert sum(window.output_tokens for window in windows) == records.output_tokens.sum()
    assert len(node.take_records()) == 0


def test_every_arrival_is_running_waiting_or_finished(node):
    windows = [node.measure(1.0) for _ in range(30)]
    arrived = sum(window.arrivals for window in windows)
    finished = sum(window.completed for window in windows)
    assert arrived == finished + windows[-1].running + windows[-1].waiting


def test_a_crowded_pool_preempts():
    node = simulated_with_a_crowded_pool()
    node.reset(seed=1)
    windows = [node.measure(1.0) for _ in range(60)]
    records = node.take_records()
    assert sum(window.preemptions for window in windows) == records.preemptions.sum() > 0
    assert max(window.kv_usage for window in windows) > 0.95


def test_closing_twice_is_safe_and_a_closed_node_cannot_be_measured(node):
    node.close()
    node.close()
    with pytest.raises(NodeError):
        node.measure(1.0)
