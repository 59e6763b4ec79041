"""Energy at equal attainment: what a policy's settings, and mixes of them, cost where a reference is."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fuel_ray.stats import Interval, over_trainings
from fuel_ray.tuning.runs import least_energy
from fuel_ray.tuning.search import SLACK

REACHED = 0.001  # of attainment: who falls short by no more is compared at the nearest setting, with a mark
ROOM = 0.02  # of energy: what a bound has to leave below a rule before a share of it means anything
Mark = Literal["", "short", "not reached"]
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Sweep:
    """A policy at several settings on the same seeds, the one as tuned first: (settings, seeds)."""

    energy_j: np.ndarray
    requests: np.ndarray
    met: np.ndarray  # requests that met the SLO; where its means count, requests less their penalty
    enough: float = math.inf  # attainment above which more is worth nothing

    @property
    def seeds(self) -> np.ndarray:
        """Their places, 0 .. n - 1."""
        return np.arange(self.energy_j.shape[1])

    def first(self, n: int) -> "Sweep":
        """On the first seeds alone."""
        return Sweep(self.energy_j[:, :n], self.requests[:, :n], self.met[:, :n], self.enough)

    def attained(self, seeds: np.ndarray) -> np.ndarray:
        """Of each setting, pooled over these seeds."""
        return np.asarray(self.met[:, seeds].sum(axis=1) / self.requests[:, seeds].sum(axis=1))

    def energy_at(self, attained: float, seeds: np.ndarray) -> float:
        """Least energy per request at this attainment; of the setting nearest to it where none reaches it."""
        energy_j = self.energy_j[:, seeds].sum(axis=1) / self.requests[:, seeds].sum(axis=1)
        points = list(zip(self.attained(seeds).tolist(), energy_j.tolist(), strict=True))
        found = least_energy(points, attained)
        return max(points)[1] if found is None else found


@dataclass(frozen=True, slots=True)
class Iso:
    """Energy over a reference's at the attainment that this reached as tuned, or that is enough."""

    ratio: Interval | None  # None where it is not reached
    mark: Mark = ""


def enough(share: float, *, of_means: bool) -> float:
    """Attainment above which more is worth nothing where ``share`` is asked, as it is counted in ``met``.

    Room for luck on held-out seeds is left. Of means, it is of penalty that at most ``share`` is allowed.
    """
    return (1.0 - share if of_means else share) + SLACK


def sweep_of(settings: Iterable[Mapping[str, Any]], *, enough: float = math.inf) -> Sweep:
    """From ``energy_j``, ``requests`` and ``met`` of each setting, one value per seed."""
    columns = [(s["energy_j"], s["requests"], s["met"]) for s in settings]
    energy_j, requests, met = (np.array(column, float) for column in zip(*columns, strict=True))
    return Sweep(energy_j, requests, met, enough)


def setting_of(rows: Rows) -> dict[str, list[float]]:
    """One setting from its rows, one per seed."""
    return {name: [row[name] for row in rows] for name in ("energy_j", "requests", "met")}


def iso(
    trainings: Sequence[Sweep], reference: Sweep, *, reached: float = REACHED, interval: bool = True
) -> Iso:
    """A policy, in each of its trainings, against a reference.

    The interval, which takes most of the time, resamples the whole construction: the attainment, pooling
    over seeds, and the mixes. Who misses the attainment by more than ``reached`` in any training is not
    compared.
    """
    everyone = reference.seeds
    short = max(_at(reference, everyone) - float(own.attained(everyone).max()) for own in trainings)
    if short > reached:
        return Iso(None, "not reached")

    def ratio_of(own: Sweep, seeds: np.ndarray) -> float:
        attained = _at(reference, seeds)
        return own.energy_at(attained, seeds) / reference.energy_at(attained, seeds)

    mark: Mark = "short" if short > 1e-12 else ""
    if not interval:
        return Iso(Interval(float(np.mean([ratio_of(own, everyone) for own in trainings])), None, None), mark)
    statistics = [lambda seeds, own=own: ratio_of(own, seeds) for own in trainings]
    return Iso(over_trainings(statistics, len(everyone)), mark)


def raw(trainings: Sequence[Sweep], reference: Sweep) -> Interval:
    """Energy over the reference's, both as tuned, whatever they attain."""

    def ratio_of(own: Sweep, seeds: np.ndarray) -> float:
        return float(own.energy_j[0, seeds].sum() / reference.energy_j[0, seeds].sum())

    statistics = [lambda seeds, own=own: ratio_of(own, seeds) for own in trainings]
    return over_trainings(statistics, len(reference.seeds))


def captured(trainings: Sequence[Sweep], rule: Sweep, bound: Sweep) -> float | None:
    """Share of what a bound leaves below a rule that a policy gets, at the rule's attainment.

    The mean over trainings; None where the bound is less than ``ROOM`` below, or one of them not reached.
    """
    seeds = rule.seeds
    attained = _at(rule, seeds)
    if any(float(own.attained(seeds).max()) < attained - REACHED for own in (*trainings, bound)):
        return None
    best_j, bound_j = (sweep.energy_at(attained, seeds) for sweep in (rule, bound))
    if bound_j > (1.0 - ROOM) * best_j:
        return None
    means_j = float(np.mean([own.energy_at(attained, seeds) for own in trainings]))
    return (best_j - means_j) / (best_j - bound_j)


def _at(reference: Sweep, seeds: np.ndarray) -> float:
    """What is asked of others: what the reference attained as tuned, less what of that is more than enough.

    This is as much for some seeds as for all, so that what seeds have in common stays out of the spread.
    """
    spare = max(float(reference.attained(reference.seeds)[0]) - reference.enough, 0.0)
    return float(reference.attained(seeds)[0]) - spare
