"""What every node keeps, simulated or real."""

import numpy as np
import pytest

from fuel_ray.errors import NodeError
from fuel_ray.sim.node import SimulatedNode
from fuel_ray.sim.perf_model import load_pack
from fuel_ray.types import Knobs
from fuel_ray.workload import parse_workload


def simulated():
    workload = parse_workload("steady:rate_rps=6")
    return SimulatedNode(
        load_pack("h100-qwen3-8b"), workload, kv_block_size=16, horizon_s=40.0, kv_tokens=26_000
    )


@pytest.fixture(params=[simulated])
def node(request):
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


def test_closing_twice_is_safe_and_a_closed_node_cannot_be_measured(node):
    node.close()
    node.close()
    with pytest.raises(NodeError):
        node.measure(1.0)
