"""Percentile bootstrap intervals over the few seeds of an evaluation, and the one paired comparison."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fuel_ray.errors import FuelRayError

Values = Sequence[float] | np.ndarray
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % percentile bootstrap interval."""

    mean: float
    low: float | None  # None where a single value says nothing about the spread
    high: float | None

    def excludes(self, value: float) -> bool:
        """True when the interval is known and ``value`` lies outside it."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


def relative_energy(own_j: Mapping[int, float], reference_j: Mapping[int, float]) -> Interval | None:
    """Energy of one policy over that of another, by seed, paired by those that both have.

    None if there are none, or if the other's was not measured.

    With the same resamples for every interval, so that a run has one report.
    """
    seeds = sorted(own_j.keys() & reference_j.keys())
    if not any(reference_j[seed] for seed in seeds):
        return None
    own, reference = ([by_seed[seed] for seed in seeds] for by_seed in (own_j, reference_j))
    return paired_ratio(own, reference, rng=np.random.default_rng(0))


def bootstrap_mean(values: Values, *, rng: np.random.Generator) -> Interval:
    """Mean of ``values``, one per seed, and its interval."""
    return paired_ratio(values, np.ones(len(values)), rng=rng)


def paired_ratio(numerators: Values, denominators: Values, *, rng: np.random.Generator) -> Interval:
    """sum(numerators) / sum(denominators) and its interval; pairs that share a seed are resampled together.

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13: the percentile interval.

    Raises:
        FuelRayError: the two differ in length, or are empty.
    """
    if len(numerators) != len(denominators) or not len(numerators):
        raise FuelRayError(f"a bootstrap needs pairs, got {len(numerators)} and {len(denominators)} values")
    pairs = np.column_stack((numerators, denominators)).astype(float)
    estimate = _ratio(pairs.sum(axis=0))
    if len(pairs) == 1:
        return Interval(float(estimate), None, None)
    picks = rng.integers(len(pairs), size=(_RESAMPLES, len(pairs)))
    low, high = np.percentile(_ratio(pairs[picks].sum(axis=1)), (2.5, 97.5))
    return Interval(float(estimate), float(low), float(high))


def _ratio(sums: np.ndarray) -> np.ndarray:
    return np.asarray(sums[..., 0] / sums[..., 1])
