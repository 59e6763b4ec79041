"""What every node keeps, simulated or real."""

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import UnionType
from typing import get_args, get_origin, get_type_hints

import numpy as np
import pytest

from fuel_ray.errors import NodeError
from fuel_ray.types import Knobs, WindowMetrics
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.simulated import simulated, simulated_with_a_crowded_pool
from tests.stub_vllm import serving
from tests.test_deploy_faults import QuietWatchdog
from tests.test_live_node import CLOCKS, CountingStub, ListLimiter, live_node


@dataclass(frozen=True)
class Pace:
    """How long a test's second is, and how far apart two clocks in real time may be."""

    second: float = 1.0
    late_s: float = 0.0
    requests: int = 0  # that the server's counters and ours may differ by: they are read one after the other


REAL_TIME = Pace(0.05, late_s=0.5, requests=3)


@contextlib.contextmanager
def live(monkeypatch):
    """A GpuNode over a fake NVML and a real HTTP server; 120 requests come within 40 of its seconds."""
    gpu = FakeGpu(clocks_mhz=CLOCKS[::-1], energy_mj=None)
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(gpu))
    monkeypatch.setattr("fuel_ray.live.gpu.lease._Watchdog", QuietWatchdog)
    monkeypatch.setattr("fuel_ray.live.node.GPU_INTERVAL_S", REAL_TIME.second / 10)
    with serving(CountingStub()) as stub:
        yield live_node(stub, limiter=ListLimiter(), n=120, every_s=REAL_TIME.second / 3)


@contextlib.contextmanager
def remote(two_hosts):
    from fuel_ray.cluster.node import RemoteNode

    yield RemoteNode(lambda server: simulated())


@pytest.fixture(params=["simulated", "crowded", "live", pytest.param("remote", marks=[pytest.mark.ray])])
def made(request):
    """A node, and the pace of its time."""
    pace = REAL_TIME if request.param == "live" else Pace()
    with {
        "simulated": lambda: contextlib.nullcontext(simulated()),
        "crowded": lambda: contextlib.nullcontext(simulated_with_a_crowded_pool()),
        "live": lambda: live(request.getfixturevalue("monkeypatch")),
        "remote": lambda: remote(request.getfixturevalue("two_hosts")),
    }[request.param]() as node:
        node.reset(seed=1)
        yield node, pace
        node.close()


@pytest.fixture
def node(made):
    return made[0]


@pytest.fixture
def pace(made):
    return made[1]


@pytest.fixture
def measure(node, pace):
    """Windows in the node's own seconds."""
    return lambda seconds=1.0: node.measure(seconds * pace.second)


def test_what_is_in_force_is_supported(node, measure):
    clocks, (lowest, highest) = node.spec.gpu_clocks_mhz, node.spec.batch_limits
    for knobs in (Knobs(-3, 1), Knobs(10**6, 10**6), Knobs(8, clocks[0] + 1)):
        applied = node.apply(knobs)
        assert applied.gpu_clock_mhz in clocks and lowest <= applied.batch_limit <= highest
        assert measure(0.5).knobs == applied


def test_a_supported_clock_is_taken_as_it_is_and_any_other_snaps_to_the_nearest(node):
    clocks = node.spec.gpu_clocks_mhz
    assert list(clocks) == sorted(set(clocks))
    for clock in {clocks[0], clocks[len(clocks) // 2], clocks[-1]}:
        assert node.apply(Knobs(8, clock)) == Knobs(8, clock)
    for asked in range(clocks[0] - 20, clocks[-1] + 20, 7):
        applied = node.apply(Knobs(8, asked)).gpu_clock_mhz
        assert abs(applied - asked) == min(abs(clock - asked) for clock in clocks)


def test_a_window_has_the_types_it_says(measure):
    measure()
    window = measure()
    kinds = get_type_hints(WindowMetrics)
    for name, kind in kinds.items():
        value = getattr(window, name)
        options = get_args(kind) if get_origin(kind) is UnionType else (kind,)
        if any(get_origin(option) is Sequence for option in options):
            assert value is None or all(type(item) is float for item in value), name
        elif get_origin(kind) is tuple:
            assert type(value) is tuple and all(type(item) is float for item in value), name
        else:
            assert type(value) in options, f"{name} is {value!r}"


def test_windows_follow_each_other_without_a_gap(measure, pace):
    taken_s = sum(measure(seconds).duration_s for seconds in (0.5, 1.0, 2.5))
    assert taken_s == pytest.approx(4.0 * pace.second, rel=0.05, abs=pace.late_s)


def test_a_reset_starts_afresh(node, measure):
    for _ in range(10):
        measure()
    assert len(node.take_records()) > 0
    node.reset(seed=2)
    assert len(node.take_records()) == 0
    window = measure()
    assert window.completed <= window.arrivals and window.running + window.waiting <= window.arrivals
    assert window.knobs == node.spec.max_performance
    completed = window.completed + sum(measure().completed for _ in range(9))
    assert len(node.take_records()) == completed > 0


def test_records_are_in_order_of_finish_and_their_times_in_order(node, measure):
    for _ in range(20):
        measure()
    records = node.take_records()
    assert (np.diff(records.finished_s) >= 0).all()
    times = [records.arrival_s, records.admitted_s, records.first_token_s, records.finished_s]
    known = [column for column in times if not np.isnan(column).all()]  # a client sees no admissions
    assert len(known) >= 3
    for earlier, later in itertools.pairwise(known):
        assert (earlier <= later).all()


def test_a_window_is_within_range(measure, pace):
    for _ in range(20):
        window = measure()
        assert window.duration_s == pytest.approx(pace.second, rel=0.2, abs=pace.late_s)
        assert window.energy_j > 0
        for share in (window.gpu_util, window.gpu_mem_util, window.cpu_util, window.kv_usage):
            assert share is None or 0 <= share <= 1
        assert window.prefix_hit_rate is None or 0 <= window.prefix_hit_rate <= 1
        assert min(window.arrivals, window.completed, window.running, window.waiting, window.preemptions) >= 0
        assert window.oldest_wait_s >= 0
        assert len(window.e2es_s) == window.completed >= len(window.tpots_s)


def test_window_samples_are_those_of_the_records(node, measure):
    windows = [measure() for _ in range(60)]
    records = node.take_records()
    assert len(records) > 100

    def pooled(name):
        return sorted(value for window in windows for value in getattr(window, name))

    for name, column in (("ttfts_s", records.ttft_s), ("tpots_s", records.tpot_s), ("e2es_s", records.e2e_s)):
        assert pooled(name) == pytest.approx(sorted(column[np.isfinite(column)].tolist()), abs=1e-9)
    assert sum(window.output_tokens for window in windows) == records.output_tokens.sum()
    for limit_s in np.quantile(
        records.ttft_s, (0.0, 0.5, 0.9)
    ):  # each miss in one window, be it an early one
        missed = sum(window.misses("ttft", limit_s)[0] + window.newly_overdue(limit_s) for window in windows)
        assert missed == (records.ttft_s > limit_s).sum()
    assert len(node.take_records()) == 0


def test_every_arrival_is_running_waiting_or_finished(measure, pace):
    windows = [measure() for _ in range(30)]
    arrived = sum(window.arrivals for window in windows)
    finished = sum(window.completed for window in windows)
    there = windows[-1].running + windows[-1].waiting
    assert arrived == pytest.approx(finished + there, abs=pace.requests)


def test_a_crowded_pool_preempts():
    node = simulated_with_a_crowded_pool()
    node.reset(seed=1)
    windows = [node.measure(1.0) for _ in range(60)]
    records = node.take_records()
    assert sum(window.preemptions for window in windows) == records.preemptions.sum() > 0
    assert max(window.kv_usage for window in windows) > 0.95


def test_closing_twice_is_safe_and_a_closed_node_cannot_be_measured(node, measure):
    node.close()
    node.close()
    with pytest.raises(NodeError):
        measure()
