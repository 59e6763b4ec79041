"""Student's t intervals over the few seeds of an evaluation, and the one paired comparison."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from fuel_ray.errors import FuelRayError

Values = Sequence[float] | np.ndarray
FEWEST = 3  # episodes below which nothing is said of their spread


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % interval."""

    mean: float
    low: float | None  # None where too few values say nothing about the spread
    high: float | None

    def excludes(self, value: float) -> bool:
        """True when the interval is known and ``value`` lies outside it."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


def relative_energy(own_j: Mapping[int, float], reference_j: Mapping[int, float]) -> Interval | None:
    """Energy of one policy over that of another, by seed, paired by those that both have.

    None if there are none, or if the other's was not measured.
    """
    seeds = sorted(own_j.keys() & reference_j.keys())
    if not any(reference_j[seed] for seed in seeds):
        return None
    own, reference = ([by_seed[seed] for seed in seeds] for by_seed in (own_j, reference_j))
    return paired_ratio(own, reference)


def mean_of(values: Values) -> Interval:
    """Mean of ``values``, one per seed, and its interval."""
    return paired_ratio(values, np.ones(len(values)))


def paired_ratio(numerators: Values, denominators: Values) -> Interval:
    """sum(numerators) / sum(denominators) and its interval; pairs share a seed.

    Raises:
        FuelRayError: the two differ in length, or are empty.
    """
    if len(numerators) != len(denominators) or not len(numerators):
        raise FuelRayError(f"an interval needs pairs, got {len(numerators)} and {len(denominators)} values")
    pairs = np.column_stack((numerators, denominators)).astype(float)

    def ratio(seeds: np.ndarray) -> float:
        own, other = pairs[seeds].sum(axis=0)
        return float(own / other)

    return over_seeds(ratio, len(pairs))


def over_seeds(statistic: Callable[[np.ndarray], float], n: int) -> Interval:
    """A statistic of the seeds 0 .. n - 1, given as an array of them, and its interval over seeds."""
    return over_trainings([statistic], n)


def over_trainings(statistics: Sequence[Callable[[np.ndarray], float]], n: int) -> Interval:
    """The mean of the same statistic of several trainings on the same n seeds, and its interval over both.

    The variance is that of the seeds, by the jackknife of the mean over trainings, and that between trainings
    over their number; degrees of freedom by Satterthwaite (Biometrics Bulletin 2, 1946). With one training it
    is that of the seeds alone. The jackknife: Efron and Tibshirani, An Introduction to the Bootstrap (1993),
    chapter 11.
    """
    everyone = np.arange(n)
    of_trainings = np.array([statistic(everyone) for statistic in statistics])
    mean, k = float(of_trainings.mean()), len(statistics)
    if n < FEWEST:
        return Interval(mean, None, None)
    left_out = [np.mean([s(np.delete(everyone, seed)) for s in statistics]) for seed in everyone]
    parts = [((n - 1) ** 2 / n * float(np.var(left_out, ddof=1)), n - 1)]
    if k > 1:
        parts.append((float(of_trainings.var(ddof=1)) / k, k - 1))
    half = _half_width(parts)
    return Interval(mean, mean - half, mean + half)


def _half_width(parts: Sequence[tuple[float, int]]) -> float:
    """Of the 95 % interval of what has variances with these degrees of freedom."""
    variance = sum(part for part, _ in parts)
    if variance == 0.0:
        return 0.0
    freedom = variance**2 / sum(part**2 / own for part, own in parts)
    return float(stdtrit(freedom, 0.975)) * math.sqrt(variance)
