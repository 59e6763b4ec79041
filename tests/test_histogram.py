"""What a server's histogram leaves no doubt of."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuel_ray.config import GuardConfig
from fuel_ray.guard import Guard, Rules
from fuel_ray.histogram import Histogram
from fuel_ray.metrics import attainment_bounds, window_attainment
from fuel_ray.types import Knobs, Slo
from tests.test_codec import SPEC, WINDOW

TPOT_S = (0.01, 0.025, 0.05, 0.075, 0.1, 1.0, 80.0, math.inf)  # some of vLLM's bounds
TTFT_S = (0.001, 0.25, 0.5, 0.75, 1.0, 2.5, math.inf)
LOW = Knobs(8, 990)


def counted(values_s, bounds_s=TPOT_S, *, summed=True):
    counts = tuple(sum(value_s <= bound_s for value_s in values_s) for bound_s in bounds_s)
    return Histogram(bounds_s, counts, len(values_s), sum(values_s) if summed else None)


def window(name="tpot", values_s=(), bounds_s=TPOT_S, *, summed=True):
    """A second of requests that a server has counted, all of whose other latencies are good."""
    of = {other: counted([0.001] * len(values_s)) for other in ("ttft", "tpot", "e2e")}
    of[name] = counted(values_s, bounds_s, summed=summed)
    samples = {f"{other}s_s": histogram.samples_s() for other, histogram in of.items()}
    calm = replace(WINDOW, duration_s=1.0, oldest_wait_s=0.0, waiting=0, completed=len(values_s))
    return replace(calm, histograms=of, **samples)


latencies = st.lists(st.floats(0.0005, 120.0), max_size=12)


@given(latencies, st.floats(0.0005, 200.0), st.booleans())
def test_the_true_number_of_misses_is_within_its_bounds_and_so_is_the_estimate(values_s, limit_s, summed):
    histogram = counted(values_s, summed=summed)
    fewest, most = histogram.misses(limit_s)
    assert fewest <= sum(value_s > limit_s for value_s in values_s) <= most
    assert fewest <= sum(value_s > limit_s for value_s in histogram.samples_s()) <= most
    if limit_s in TPOT_S:
        assert fewest == most


@given(latencies, st.booleans())
def test_estimates_are_exact_to_the_bucket_and_have_the_mean_that_is_known(values_s, summed):
    histogram = counted(values_s, summed=summed)
    samples_s = histogram.samples_s()
    assert counted(samples_s).cumulative_counts == histogram.cumulative_counts
    if summed and values_s:
        assert histogram.mean_s == pytest.approx(np.mean(values_s)) == pytest.approx(np.mean(samples_s))
    low_s, high_s = histogram.mean_bounds_s()
    assert not values_s or low_s * (1 - 1e-9) <= np.mean(values_s) <= high_s * (1 + 1e-9)


@given(latencies, st.floats(0.0, 1.0))
def test_a_quantile_is_within_its_bucket(values_s, share):
    found = counted(values_s).quantile_s(share)
    if not values_s:
        assert found is None
        return
    value_s, low_s, high_s = found
    true_s = np.quantile(values_s, share, method="inverted_cdf")
    assert low_s <= value_s <= high_s and low_s < true_s <= high_s


@given(latencies, latencies)
def test_histograms_add_up_at_the_bounds_that_both_have(mine_s, others_s):
    bounds_s = (0.025, 0.1, 7.0, math.inf)
    both = counted(mine_s) + counted(others_s, bounds_s)
    assert both.upper_bounds_s == (0.025, 0.1, math.inf)
    assert both.cumulative_counts == counted(mine_s + others_s, both.upper_bounds_s).cumulative_counts
    assert both.sum_s == pytest.approx(sum(mine_s) + sum(others_s))
    assert Histogram((), (), 0, 0.0) + both == both == both + Histogram((), (), 0, 0.0)


def test_a_sum_that_the_counts_cannot_have_is_not_believed():
    """A page that was read between two updates."""
    torn = replace(counted([0.016] * 8), sum_s=9 * 0.024)
    assert torn.mean_s is None and torn.misses(0.02) == (0, 8)


def test_counts_that_fell_are_no_window():
    assert counted([0.016] * 3) - counted([0.016] * 8) is None
    assert counted([0.016]) - Histogram((), (), 0, 0.0) == counted([0.016])


def test_differences_of_large_sums_make_no_misses():
    before = Histogram((0.5, math.inf), (10**9, 10**9), 10**9, 3.3e8)
    after = replace(before, cumulative_counts=(10**9 + 8,) * 2, count=10**9 + 8, sum_s=3.3e8 + 8 * 0.4)
    assert (after - before).misses(0.4)[0] == 0


MET, MISSED = 0, 8
CASES = [  # limit, latencies, whether the shield is up at the end, fewest and most misses of 8
    (0.020, [0.016] * 8, False, (0, 4)),  # at 80 % of a limit within a bucket
    (0.024, [0.0249] * 8, True, (8, 8)),  # all miss it
    (0.025, [0.016] * 8, False, (0, 0)),  # a bound
    (0.010, [0.016] * 8, True, (8, 8)),
    (0.020, [0.015] * 4 + [0.060] * 4, True, (4, 8)),  # half miss it by another bucket
    (0.0195, [0.0156] * 8, False, (0, 4)),
    (0.0101, [0.008] * 8, False, (0, 0)),
    (100.0, [85.0] * 8, False, (0, 2)),  # above the last bound
    (100.0, [120.0] * 8, True, (1, 8)),
    (0.020, [], False, (0, 0)),
]


@pytest.mark.parametrize(("limit_s", "values_s", "up", "misses"), CASES)
def test_the_shield_acts_on_misses_that_are_certain(limit_s, values_s, up, misses):
    slo = Slo(1.0, limit_s)
    guard = Guard(GuardConfig(latency=True).rules(slo, SPEC))
    seen = window("tpot", values_s)
    verdicts = [guard.check(LOW, last=seen, spec=SPEC) for _ in range(120)]
    assert ("latency" in verdicts[-1].reasons) == up
    assert seen.misses("tpot", limit_s) == misses
    assert up or all(verdict.reasons == () for verdict in verdicts)


@pytest.mark.parametrize("name", ["ttft", "e2e"])
@pytest.mark.parametrize(("value_s", "up"), [(0.32, False), (0.49, True)])
def test_other_limits_are_judged_likewise(name, value_s, up):
    guard = Guard(Rules(slo=Slo(**{f"{name}_s": 0.4})))
    seen = window(name, [value_s] * 8, TTFT_S)
    verdicts = [guard.check(LOW, last=seen, spec=SPEC) for _ in range(60)]
    assert (verdicts[-1].reasons == ("latency",)) == up


def test_without_sums_only_whole_buckets_are_certain():
    slo, seen = Slo(tpot_s=0.024), window("tpot", [0.0249] * 8, summed=False)
    assert seen.misses("tpot", 0.024) == (0, 8) and attainment_bounds(seen, slo) == (0.0, 1.0)
    guard = Guard(Rules(slo=slo))
    assert all(guard.check(LOW, last=seen, spec=SPEC).reasons == () for _ in range(60))
    assert seen.mean_s("tpot") is None


@pytest.mark.parametrize(("value_s", "up"), [(0.016, False), (0.0205, True)])
def test_a_limit_on_the_mean_is_judged_by_the_sum(value_s, up):
    slo = Slo(tpot_s=0.02, share=None)
    guard = Guard(Rules(slo=slo))
    verdicts = [guard.check(LOW, last=window("tpot", [value_s] * 30), spec=SPEC) for _ in range(60)]
    assert ("latency" in verdicts[-1].reasons) == up


def without(name, seen):
    left = {other: histogram for other, histogram in seen.histograms.items() if other != name}
    return replace(seen, histograms=left, **{f"{name}s_s": ()})


@pytest.mark.parametrize("name", ["ttft", "tpot", "e2e"])
def test_a_latency_that_is_not_measured_is_unknown_and_the_fallback_rules(name):
    seen = without(name, window("tpot", [0.5] * 8))
    limited, other = Slo(**{f"{name}_s": 0.3}), Slo(**{"e2e_s" if name != "e2e" else "ttft_s": 9.0})
    assert window_attainment(seen, limited) is None and attainment_bounds(seen, limited) is None
    assert window_attainment(seen, other) is not None
    guard = Guard(Rules(slo=limited, fallback=Knobs(48, 1350)))
    verdicts = [guard.check(LOW, last=seen, spec=SPEC) for _ in range(3)]
    assert {(v.knobs, v.reasons) for v in verdicts} == {(Knobs(48, 1350), ("stale",))}
    assert Guard(Rules(slo=other)).check(LOW, last=seen, spec=SPEC).reasons == ()


def test_what_is_known_still_raises_the_shield():
    seen = replace(without("tpot", window("tpot", [0.5] * 8)), oldest_wait_s=2.0)
    guard = Guard(Rules(slo=Slo(1.0, 0.05), max_wait_s=1.0, fallback=Knobs(48, 1350)))
    verdict = guard.check(LOW, last=seen, spec=SPEC)
    assert (verdict.knobs, verdict.reasons) == (SPEC.max_performance, ("wait",))


def test_a_window_without_requests_meets_its_limits():
    assert window_attainment(window(), Slo(1.0, 0.02)) == 1.0
    assert attainment_bounds(window(), Slo(1.0, 0.02)) == (1.0, 1.0)


def test_the_attainment_of_a_stalled_window_is_certain():
    stalled = replace(window(), oldest_wait_s=3.0)
    assert attainment_bounds(stalled, Slo(1.0, 0.02)) == (0.0, 0.0)
