"""A policy on trial in random blocks."""

from dataclasses import replace

import numpy as np
import pytest

from fuel_ray.deploy.canary import Canary
from fuel_ray.policies.static import Static
from fuel_ray.types import Knobs, Slo
from tests.test_codec import WINDOW
from tests.test_histogram import window as counted_window

LOW, HIGH = Knobs(8, 990), Knobs(32, 1980)
SLO = Slo(ttft_s=1.0)


def trial(*, windows, effect, seed=0, share=0.1, missed=0.0, block_s=30.0):
    """Energy per token of a noisy load falls by ``effect`` where the policy rules."""
    rng = np.random.default_rng(seed)
    canary = Canary(share=share, block_s=block_s, slo=SLO, rng=rng).over(Static(LOW), HIGH)
    canary.reset()
    knobs, chosen = HIGH, []
    load = np.random.default_rng(seed + 1)
    for _ in range(windows):
        tokens = int(load.integers(400, 1600))
        energy_j = tokens * 0.3 * load.normal(1.0, 0.1) * (1.0 - effect * (knobs == LOW))
        ttft_s = 2.0 if knobs == LOW and load.random() < missed else 0.1
        window = replace(WINDOW, duration_s=1.0, energy_j=energy_j, output_tokens=tokens, ttfts_s=(ttft_s,))
        knobs = canary.decide(replace(window, knobs=knobs))
        chosen.append(knobs)
    return canary, chosen


@pytest.mark.parametrize("share", [0.4, 0.29])
def test_no_more_of_the_time_is_the_policys_than_was_given(share):
    _, chosen = trial(windows=6000, effect=0.0, share=share)
    assert share - 0.1 < np.mean([knobs == LOW for knobs in chosen]) <= share + 0.01


def test_a_tenth_of_the_windows_is_the_policys_in_whole_blocks():
    _, chosen = trial(windows=6000, effect=0.0)
    blocks = [set(chosen[i : i + 30]) for i in range(29, 5969, 30)]
    assert all(len(block) == 1 for block in blocks)
    on_trial = [block == {LOW} for block in blocks]
    assert sum(on_trial) == pytest.approx(0.1 * len(blocks), abs=1)
    places = [i % 10 for i, on in enumerate(on_trial) if on]
    assert len(set(places)) > 4, "which block it is in a group of ten is drawn by chance"


def test_a_real_saving_is_found_with_an_interval_that_holds_it():
    canary, _ = trial(windows=12_000, effect=0.2)
    found = canary.difference()
    assert found.blocks == (40, 360)
    assert found.energy.low < -0.2 < found.energy.high < 0
    assert found.energy.high - found.energy.low < 0.05


def test_no_effect_is_not_called_one():
    held = 0
    for seed in range(20):
        energy = trial(windows=3000, effect=0.0, seed=seed)[0].difference(resamples=500).energy
        held += energy.low <= 0.0 <= energy.high
    assert held >= 15  # of 20 intervals of nominally 95 % over ten blocks


def test_a_loss_of_attainment_is_found():
    found = trial(windows=12_000, effect=0.2, missed=0.1)[0].difference()
    assert found.attainment.high < 0 and found.attainment.mean == pytest.approx(-0.1, abs=0.03)


def test_before_both_sides_have_blocks_there_is_no_difference():
    assert trial(windows=20, effect=0.2)[0].difference().energy is None


def test_the_begin_of_a_block_is_left_out():
    """Windows that are still the other side's would dilute the effect."""
    canary, _ = trial(windows=4000, effect=0.5, block_s=6.0)
    assert canary.difference().energy.mean == pytest.approx(-0.5, abs=0.03)


def test_a_policy_sees_every_window():
    class Counting(Static):
        seen = 0

        def decide(self, window):
            Counting.seen += 1
            return LOW

    rng = np.random.default_rng(0)
    canary = Canary(share=0.1, block_s=30.0, slo=SLO, rng=rng).over(Counting(LOW), HIGH)
    for _ in range(100):
        canary.decide(WINDOW)
    assert Counting.seen == 100


def judged(*, summed, without=False, values_s=(0.016,) * 8):
    """A canary whose limit lies within a bucket that all requests are in."""
    rng = np.random.default_rng(0)
    canary = Canary(share=0.5, block_s=10.0, slo=Slo(tpot_s=0.02), rng=rng).over(Static(LOW), HIGH)
    canary.reset()
    seen = counted_window("tpot", values_s, summed=summed)
    if without:
        seen = replace(seen, histograms={}, ttfts_s=(), tpots_s=(), e2es_s=())
    for _ in range(400):
        canary.decide(seen)
    return canary.difference()


def test_of_limits_within_a_bucket_the_interval_is_what_is_certain():
    found = judged(summed=True).attainment
    assert (found.mean, found.low, found.high) == pytest.approx((0.0, -0.5, 0.5))
    found = judged(summed=False).attainment
    assert (found.low, found.high) == pytest.approx((-1.0, 1.0))
    found = judged(summed=True, values_s=(0.0249,) * 8).attainment
    assert found.high < 0.2 and found.low > -0.2


def test_windows_whose_attainment_is_unknown_are_left_out():
    found = judged(summed=True, without=True)
    assert found.attainment is None and found.energy is not None and min(found.blocks) > 1
