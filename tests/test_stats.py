import numpy as np
import pytest

from fuel_ray.errors import FuelRayError
from fuel_ray.stats import Interval, bootstrap_mean, paired_ratio, relative_energy


def rng():
    return np.random.default_rng(0)


def test_mean_and_interval_of_a_known_sample():
    values = np.random.default_rng(1).normal(50.0, 2.0, size=400)
    interval = bootstrap_mean(values, rng=rng())
    half_width = 1.96 * values.std() / np.sqrt(400)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half_width, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + half_width, abs=0.03)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    draws = np.random.default_rng(2).normal(0.0, 1.0, size=(300, 20))
    hits = sum(not bootstrap_mean(draw, rng=rng()).excludes(0.0) for draw in draws)
    assert 0.88 <= hits / 300 <= 0.98


def test_pairing_removes_what_the_seeds_have_in_common():
    load = np.random.default_rng(3).uniform(30.0, 90.0, size=10)
    paired = paired_ratio(0.9 * load, load, rng=rng())
    shuffled = paired_ratio(0.9 * load, load[::-1], rng=rng())
    assert paired.mean == pytest.approx(0.9)
    assert paired.low == pytest.approx(0.9)
    assert paired.high == pytest.approx(0.9)
    assert shuffled.excludes(0.9) is False
    assert shuffled.high - shuffled.low > 0.05


def test_ratio_is_that_of_the_sums():
    assert paired_ratio([1.0, 3.0], [2.0, 2.0], rng=rng()).mean == 1.0


def test_one_seed_gives_no_interval_and_excludes_nothing():
    interval = bootstrap_mean([7.0], rng=rng())
    assert interval == Interval(7.0, None, None)
    assert not interval.excludes(0.0)


def test_same_generator_state_gives_the_same_interval():
    assert bootstrap_mean([1.0, 2.0, 4.0], rng=rng()) == bootstrap_mean([1.0, 2.0, 4.0], rng=rng())


@pytest.mark.parametrize(("numerators", "denominators"), [([], []), ([1.0, 2.0], [1.0])])
def test_values_that_do_not_pair_up_are_refused(numerators, denominators):
    with pytest.raises(FuelRayError, match="needs pairs"):
        paired_ratio(numerators, denominators, rng=rng())


@pytest.mark.parametrize("reference", [{}, {3: 5.0}, {1: 0.0, 2: 0.0}])
def test_energy_against_what_is_not_there_or_was_not_measured_is_none(reference):
    assert relative_energy({1: 2.0, 2: 4.0}, reference) is None
    assert relative_energy({1: 2.0, 2: 4.0}, {1: 4.0, 2: 8.0}).mean == 0.5
