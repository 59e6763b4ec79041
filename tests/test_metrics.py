"""One definition of every figure."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuel_ray.metrics import EpisodeTotals, Latency, latency, window_attainment
from fuel_ray.types import Knobs, RequestRecords, Slo
from tests.test_codec import WINDOW

NAN = float("nan")


def records(ttft_s, e2e_s, output_tokens):
    """Requests that all arrived at 100 s."""
    n = len(ttft_s)
    return RequestRecords(
        arrival_s=np.full(n, 100.0),
        admitted_s=np.full(n, 100.0),
        first_token_s=100.0 + np.array(ttft_s),
        finished_s=100.0 + np.array(e2e_s),
        prompt_tokens=np.full(n, 50),
        output_tokens=np.array(output_tokens),
        preemptions=np.zeros(n, np.int64),
    )


FOUR = records([0.5, 1.0, 1.5, 0.2], [2.5, 3.0, 2.0, 0.2], [41, 81, 11, 1])


def test_latencies_of_a_record():
    assert FOUR.ttft_s.tolist() == pytest.approx([0.5, 1.0, 1.5, 0.2])
    assert FOUR.e2e_s.tolist() == pytest.approx([2.5, 3.0, 2.0, 0.2])
    assert FOUR.tpot_s[:3].tolist() == pytest.approx([0.05, 0.025, 0.05])
    assert np.isnan(FOUR.tpot_s[3])  # one token has no time per token after the first


@pytest.mark.parametrize(
    ("slo", "kept"),
    [
        (Slo(ttft_s=1.001), [True, True, False, True]),
        (Slo(tpot_s=0.03), [False, True, False, True]),
        (Slo(e2e_s=2.25), [False, False, True, True]),
        (Slo(ttft_s=1.001, tpot_s=0.03, e2e_s=2.25), [False, False, False, True]),
    ],
)
def test_a_request_keeps_the_slo_if_it_keeps_every_limit(slo, kept):
    assert FOUR.meets(slo).tolist() == kept


def test_a_request_that_never_finished_keeps_nothing():
    assert records([0.1, NAN], [NAN, NAN], [10, 10]).meets(Slo(ttft_s=1.0)).tolist() == [False, False]


def test_percentiles_are_interpolated_and_unknown_values_left_out():
    assert latency(np.array([3.0, NAN, 1.0, 2.0])) == Latency(2.0, 2.0, pytest.approx(2.98))
    assert latency(np.array([NAN])) == Latency(None, None, None)


def windows():
    return [
        replace(WINDOW, duration_s=1.0, energy_j=100.0, arrivals=2, output_tokens=50, knobs=Knobs(8, 990)),
        replace(WINDOW, duration_s=3.0, energy_j=500.0, arrivals=3, output_tokens=150, knobs=Knobs(16, 1980)),
        replace(WINDOW, duration_s=1.0, energy_j=100.0, arrivals=0, output_tokens=0, knobs=Knobs(16, 1980)),
    ]


def test_an_episode_is_the_sum_of_its_windows():
    totals = EpisodeTotals()
    for window in windows():
        totals.add(window)
    summary = totals.summary(FOUR, Slo(ttft_s=1.001, share=0.6))
    assert (summary.energy_j, summary.requests) == (700.0, 5)
    assert summary.energy_j_per_request == 140.0
    assert summary.energy_j_per_output_token == 3.5
    assert summary.mean_gpu_clock_mhz == pytest.approx((990 + 4 * 1980) / 5)
    assert summary.mean_batch_limit == pytest.approx((8 + 4 * 16) / 5)
    assert summary.clock_switches == 1
    assert summary.slo_attainment == pytest.approx(3 / 5)  # the fifth arrived and has no record
    assert summary.slo_met


def test_a_promise_on_means_is_kept_by_the_means():
    totals = EpisodeTotals()
    totals.add(replace(WINDOW, arrivals=4))
    for limit_s, met in ((2.0, True), (1.9, False)):
        assert totals.summary(FOUR, Slo(e2e_s=limit_s, share=None)).slo_met == met


def test_an_episode_without_requests_has_no_energy_per_request():
    totals = EpisodeTotals()
    totals.add(replace(WINDOW, arrivals=0, output_tokens=0))
    summary = totals.summary(records([], [], []), Slo(ttft_s=1.0))
    assert summary.energy_j_per_request is None and summary.energy_j_per_output_token is None
    assert (summary.slo_attainment, summary.ttft) == (1.0, Latency(None, None, None))


@pytest.mark.parametrize(
    ("slo", "expected"),
    [(Slo(ttft_s=1.0), 0.75), (Slo(tpot_s=0.015), 0.5), (Slo(1.0, 0.015, 9.0), 0.5), (Slo(e2e_s=3.0), 0.0)],
)
def test_a_windows_attainment_is_its_worst_limit(slo, expected):
    assert window_attainment(WINDOW, slo) == expected


def test_a_window_that_stalls_has_no_attainment_and_an_idle_one_all():
    empty = replace(WINDOW, completed=0, ttfts_s=(), tpots_s=(), e2es_s=())
    assert window_attainment(replace(empty, oldest_wait_s=1.5), Slo(ttft_s=1.0)) == 0.0
    assert window_attainment(replace(empty, oldest_wait_s=0.0), Slo(ttft_s=1.0)) == 1.0


@given(st.lists(st.floats(0.01, 5.0), min_size=1, max_size=30), st.floats(0.01, 5.0))
def test_samples_pool(ttfts_s, limit_s):
    half = len(ttfts_s) // 2
    parts = [replace(WINDOW, ttfts_s=tuple(part)) for part in (ttfts_s[:half], ttfts_s[half:])]
    pooled = replace(WINDOW, ttfts_s=tuple(ttfts_s))
    slo = Slo(ttft_s=limit_s)
    kept = sum(window_attainment(part, slo) * len(part.ttfts_s) for part in parts)
    assert window_attainment(pooled, slo) == pytest.approx(kept / len(ttfts_s))
