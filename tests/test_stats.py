import numpy as np
import pytest
from scipy.special import stdtrit

from fuel_ray.errors import FuelRayError
from fuel_ray.stats import Interval, mean_of, over_seeds, over_trainings, paired_ratio, relative_energy


def test_mean_and_interval_of_a_known_sample():
    values = np.random.default_rng(1).normal(50.0, 2.0, size=12)
    interval = mean_of(values)
    half_width = stdtrit(11, 0.975) * values.std(ddof=1) / np.sqrt(12)
    assert interval.mean == pytest.approx(values.mean())
    assert (interval.low, interval.high) == pytest.approx(
        (values.mean() - half_width, values.mean() + half_width)
    )


def ten_pairs(rng, count):
    """Energies of two policies on ten loads, the first takes 0.9 of the second on average."""
    loads = rng.uniform(30.0, 90.0, size=(count, 10))
    return 0.9 * loads * np.exp(rng.normal(0.0, 0.03, size=loads.shape)), loads


def test_intervals_of_ten_pairs_cover_the_truth_as_often_as_they_say():
    """The percentile bootstrap, which was here before, covers it in nine of ten."""
    rng = np.random.default_rng(2)
    own, other = ten_pairs(rng, 1000)
    truth = 0.9 * np.exp(0.03**2 / 2)
    hits = [not paired_ratio(*pairs).excludes(truth) for pairs in zip(own, other, strict=True)]
    assert 0.93 <= np.mean(hits) <= 0.97
    picks = rng.integers(10, size=(600, 10))
    ratios = own[:, picks].sum(axis=2) / other[:, picks].sum(axis=2)
    low, high = np.percentile(ratios, (2.5, 97.5), axis=1)
    assert np.mean((low <= truth) & (truth <= high)) < 0.925


def test_pairing_removes_what_the_seeds_have_in_common():
    load = np.random.default_rng(3).uniform(30.0, 90.0, size=10)
    paired = paired_ratio(0.9 * load, load)
    shuffled = paired_ratio(0.9 * load, load[::-1])
    assert (paired.mean, paired.low, paired.high) == pytest.approx((0.9, 0.9, 0.9))
    assert shuffled.excludes(0.9) is False
    assert shuffled.high - shuffled.low > 0.05


def test_ratio_is_that_of_the_sums():
    assert paired_ratio([1.0, 3.0], [2.0, 2.0]).mean == 1.0


@pytest.mark.parametrize("values", [[7.0], [7.0, 9.0]])
def test_too_few_seeds_give_no_interval_and_exclude_nothing(values):
    interval = mean_of(values)
    assert interval == Interval(np.mean(values), None, None)
    assert not interval.excludes(0.0)


def test_the_jackknife_is_that_of_the_whole_construction():
    """Against one that is written out, for a statistic that is neither a mean nor a ratio."""
    values = np.random.default_rng(4).gamma(2.0, size=8)
    found = over_seeds(lambda seeds: float(np.median(values[seeds]) * values[seeds].max()), 8)
    left = []
    for out in range(8):
        rest = np.array([value for place, value in enumerate(values) if place != out])
        left.append(np.median(rest) * rest.max())
    variance = 7 / 8 * sum((x - np.mean(left)) ** 2 for x in left)
    assert found.mean == pytest.approx(np.median(values) * values.max())
    assert found.high - found.mean == pytest.approx(stdtrit(7, 0.975) * np.sqrt(variance))


def of_training(values):
    return lambda seeds: float(values[seeds].mean())


def test_an_interval_over_trainings_is_wider_by_how_much_they_differ():
    noise = np.random.default_rng(5).normal(0.0, 0.1, size=10)
    same = [of_training(noise), of_training(noise), of_training(noise)]
    differ = [of_training(noise + shift) for shift in (-2.0, 0.0, 2.0)]
    alone, one = over_trainings(same, 10), over_seeds(same[0], 10)
    nested = over_trainings(differ, 10)
    assert (alone.low, alone.high) == pytest.approx((one.low, one.high))
    assert nested.mean == pytest.approx(one.mean)
    # Nearly all is between trainings, so there are two degrees of freedom: 4.30 x 2 / sqrt(3)
    assert nested.high - nested.mean == pytest.approx(4.30 * 2.0 / np.sqrt(3), rel=0.02)


@pytest.mark.parametrize(("numerators", "denominators"), [([], []), ([1.0, 2.0], [1.0])])
def test_values_that_do_not_pair_up_are_refused(numerators, denominators):
    with pytest.raises(FuelRayError, match="needs pairs"):
        paired_ratio(numerators, denominators)


@pytest.mark.parametrize("reference", [{}, {3: 5.0}, {1: 0.0, 2: 0.0}])
def test_energy_against_what_is_not_there_or_was_not_measured_is_none(reference):
    assert relative_energy({1: 2.0, 2: 4.0}, reference) is None
    assert relative_energy({1: 2.0, 2: 4.0}, {1: 4.0, 2: 8.0}).mean == 0.5
