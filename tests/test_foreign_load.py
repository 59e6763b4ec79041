"""What is known of requests that somebody else sends."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuel_ray.build.nodes import build_node
from fuel_ray.config import PRESETS
from fuel_ray.live.foreign_load import ForeignLoad
from fuel_ray.live.vllm.metrics import Histogram, difference, parse_metrics
from fuel_ray.types import Knobs
from tests.traffic_stub import TrafficStub

BOUNDS_S = (0.1, 0.5, 1.0, math.inf)


def histogram(*counts):
    cumulative = tuple(sum(counts[: i + 1]) for i in range(len(counts)))
    return Histogram(BOUNDS_S, cumulative, cumulative[-1])


@given(st.tuples(*[st.integers(0, 9)] * 4))
def test_samples_of_a_histogram_are_as_many_as_counted_below_each_bound(counts):
    counted = histogram(*counts)
    samples_s = counted.samples_s()
    assert len(samples_s) == counted.count and list(samples_s) == sorted(samples_s)
    for bound_s, below in zip(BOUNDS_S[:2], counted.cumulative_counts, strict=False):
        assert sum(value <= bound_s for value in samples_s) == below


def page(*, running=0, waiting=0, served=0, first_tokens=None):
    """A snapshot of a server that has ``served`` requests and given ``first_tokens`` first tokens."""
    stub = TrafficStub(rate_rps=1.0, running=running, waiting=waiting)
    stub._value = _counting(stub._value, served, served if first_tokens is None else first_tokens)
    return parse_metrics(stub.now())


def _counting(value, served, first_tokens):
    def counted(name, labels):
        if "time_to_first_token" in name and "created" not in name:
            return first_tokens
        if name == "vllm:request_success_total":
            return served if 'finished_reason="length"' in labels else 0
        return 0 if name == "process_start_time_seconds" else value(name, labels)

    return counted


def windows(*pages):
    load, found = ForeignLoad(), []
    for index, (before, after) in enumerate(pairwise(pages), start=1):
        found.append(load.window(before, after, difference(before, after, 1.0), end_s=float(index)))
    return found


def test_arrivals_are_what_finished_and_what_the_queues_grew_by():
    (window,) = windows(page(running=2), page(running=4, waiting=1, served=3, first_tokens=7))
    assert (window.arrivals, window.completed, len(window.ttfts_s)) == (6, 3, 7)


def test_the_oldest_wait_grows_while_no_first_token_comes_and_ends_with_it():
    stuck = page(running=1, waiting=2, first_tokens=1)
    found = windows(page(running=1, first_tokens=1), stuck, stuck, stuck, page(running=3, first_tokens=3))
    assert [w.oldest_wait_s for w in found] == pytest.approx([0.75, 1.75, 2.75, 0.0])


def test_first_tokens_come_first_come_first_served():
    found = windows(
        page(),
        page(running=1, waiting=1, first_tokens=1),  # two come within second 0..1, the first is served
        page(running=1, waiting=3, first_tokens=1),  # two more within 1..2
        page(running=2, waiting=2, first_tokens=2),
    )
    assert [w.oldest_wait_s for w in found] == pytest.approx([0.25, 1.25, 1.75])


def test_a_request_that_was_given_up_in_the_queue_is_forgotten():
    found = windows(page(), page(waiting=2), page(waiting=2), page())
    assert [w.oldest_wait_s for w in found] == pytest.approx([0.75, 1.75, 0.0])


def test_the_oldest_wait_is_near_the_simulators_which_knows_it():
    """The same windows, once as the simulator knows them and once as a server's counters would tell them."""
    node = build_node(PRESETS["default"], 16, horizon_s=300.0, workload="steady:rate_rps=12")
    node.reset(seed=3)
    node.apply(Knobs(24, 990))  # too slow for the load: a queue grows, and is worked off later
    load, served, first, errors_s, waits_s = ForeignLoad(), 0, 0, [], []
    before = page()
    for second in range(1, 301):
        if second == 120:
            node.apply(Knobs(128, 1980))
        window = node.measure(1.0)
        served, first = served + window.completed, first + len(window.ttfts_s)
        after = page(running=window.running, waiting=window.waiting, served=served, first_tokens=first)
        found = load.window(before, after, difference(before, after, 1.0), end_s=float(second))
        before = after
        waits_s.append(window.oldest_wait_s)
        errors_s.append(abs(found.oldest_wait_s - window.oldest_wait_s))
    assert max(waits_s) > 5.0 and min(waits_s) == 0.0
    assert np.mean(errors_s) < 0.15 and np.percentile(errors_s, 95) < 0.5
