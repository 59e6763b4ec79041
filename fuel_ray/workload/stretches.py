"""A recorded trace that is judged on: each seed begins at another stretch, so that no two are the same."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fuel_ray.types import Requests

ENOUGH = 3  # different episodes, from which an interval can be told
SHORTEST_S = 240  # that an episode may last, to have so many


class Recorded(Protocol):
    """What is repeated with this period, the same for every random generator."""

    @property
    def name(self) -> str: ...

    @property
    def period_s(self) -> float | None: ...

    @property
    def mean_rate_rps(self) -> float: ...

    def generate(self, duration_s: float, *, rng: np.random.Generator, start_s: float = 0.0) -> Requests: ...

    def digest(self) -> str: ...


@dataclass(frozen=True, slots=True, eq=False)
class Stretches:
    """A recorded workload cut into as many disjoint stretches as there is room for, one after the other."""

    recorded: Recorded
    halves: None = None

    @property
    def name(self) -> str:
        return self.recorded.name

    @property
    def period_s(self) -> float | None:
        return self.recorded.period_s

    @property
    def mean_rate_rps(self) -> float:
        return self.recorded.mean_rate_rps

    def start_s(self, duration_s: float, *, seed: int) -> float:
        """Where the stretch of a seed begins; as many seeds in a row as there are stretches differ."""
        count = _count(self.period_s, duration_s)
        return (self.period_s or 0.0) * (seed % count) / count

    def generate(self, duration_s: float, *, rng: np.random.Generator, start_s: float = 0.0) -> Requests:
        return self.recorded.generate(duration_s, rng=rng, start_s=start_s)

    def digest(self) -> str:
        return self.recorded.digest()


def different(recorded: Recorded, *, seeds: int, seconds: int) -> tuple[int, int]:
    """How many episodes, and of how many seconds, hold different requests.

    Of ``seconds`` each if as many as asked or ``ENOUGH`` fit, else ``ENOUGH`` shorter ones if these still
    have ``SHORTEST_S``, else as many as fit, and at least one.
    """
    if recorded.period_s is None:
        return seeds, seconds
    fit = _count(recorded.period_s, seconds)
    shorter_s = int(recorded.period_s // ENOUGH)
    if fit < min(ENOUGH, seeds) and shorter_s >= SHORTEST_S:
        return min(seeds, ENOUGH), shorter_s
    return min(seeds, fit), seconds


def _count(period_s: float | None, duration_s: float) -> int:
    return max(1, int((period_s or 0.0) / duration_s + 1e-9))
