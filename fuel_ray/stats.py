"""Percentile bootstrap intervals over the few seeds of an evaluation, and the one paired comparison."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fuel_ray.errors import FuelRayError


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % percentile bootstrap interval."""

    mean: float
    low: float | None  # None where a single value says nothing about the spread
    high: float | None

    def excludes(self, value: float) -> bool:
        """True when the interval is known and ``value`` lies outside it."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


Energies = Mapping[tuple[int, int], float]  # of a policy, by (block size, seed); one block size is 0 for all


def relative_energy(own_j: Energies, reference_j: Energies) -> Interval | None:
    """Energy of one policy over that of another, paired by what both have; None if that is nothing.

    Averaged over block sizes first, so that seeds are what is resampled; with the same resamples for every
    interval, so that a run has one report.
    """
    pairs: dict[int, list[tuple[float, float]]] = {}
    for key in sorted(own_j.keys() & reference_j.keys(), key=lambda key: key[1]):
        pairs.setdefault(key[1], []).append((own_j[key], reference_j[key]))
    if not pairs:
        return None
    means = np.array([np.mean(of_seed, axis=0) for of_seed in pairs.values()])
    return paired_ratio(*means.T, rng=np.random.default_rng(0))


def bootstrap_mean(
    values: Sequence[float] | np.ndarray, *, rng: np.random.Generator, resamples: int = 2000
) -> Interval:
    """Mean of ``values``, one per seed, and its interval."""
    return paired_ratio(values, np.ones(len(values)), rng=rng, resamples=resamples)


def paired_ratio(
    numerators: Sequence[float] | np.ndarray,
    denominators: Sequence[float] | np.ndarray,
    *,
    rng: np.random.Generator,
    resamples: int = 2000,
) -> Interval:
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
    picks = rng.integers(len(pairs), size=(resamples, len(pairs)))
    low, high = np.percentile(_ratio(pairs[picks].sum(axis=1)), (2.5, 97.5))
    return Interval(float(estimate), float(low), float(high))


def _ratio(sums: np.ndarray) -> np.ndarray:
    return np.asarray(sums[..., 0] / sums[..., 1])
