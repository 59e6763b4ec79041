"""When requests arrive: each process is a value that samples a span of its own time."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np


class Arrivals(Protocol):
    """A process of arrivals; ``period_s`` is None for a stationary one, which ignores ``start_s``."""

    @property
    def period_s(self) -> float | None: ...

    @property
    def mean_rate_rps(self) -> float: ...

    def sample(self, duration_s: float, *, rng: np.random.Generator, start_s: float) -> np.ndarray:
        """Ascending arrival times in [0, duration_s), counted from ``start_s`` of the process's own time."""


@dataclass(frozen=True, slots=True)
class Piecewise:
    """Poisson arrivals whose rate steps through a repeating list; a single step is a steady load."""

    steps: tuple[tuple[float, float], ...]  # (req/s, how many s)

    @property
    def period_s(self) -> float | None:
        return sum(seconds for _, seconds in self.steps) if len(self.steps) > 1 else None

    @property
    def mean_rate_rps(self) -> float:
        return sum(rate * seconds for rate, seconds in self.steps) / sum(seconds for _, seconds in self.steps)

    def sample(self, duration_s: float, *, rng: np.random.Generator, start_s: float) -> np.ndarray:
        rates_rps, seconds = np.array(self.steps).T
        ends_s = np.cumsum(seconds)

        def rate_rps(t_s: np.ndarray) -> np.ndarray:
            step: np.ndarray = np.searchsorted(ends_s[:-1], (start_s + t_s) % ends_s[-1], side="right")
            return np.take(rates_rps, step)

        return _thinned(rate_rps, rates_rps.max(), duration_s, rng=rng)


@dataclass(frozen=True, slots=True)
class Gamma:
    """Renewal arrivals with gamma gaps; ``cv`` is their standard deviation over their mean, 1 is Poisson."""

    rate_rps: float
    cv: float
    period_s: ClassVar[None] = None

    @property
    def mean_rate_rps(self) -> float:
        return self.rate_rps

    def sample(self, duration_s: float, *, rng: np.random.Generator, start_s: float) -> np.ndarray:
        shape, scale_s = self.cv**-2, self.cv**2 / self.rate_rps
        expected = self.rate_rps * duration_s
        batch = int(expected + 4 * self.cv * math.sqrt(expected)) + 16
        # The process is stationary if it is entered at a uniform point of a length-biased gap.
        times_s = np.array([rng.gamma(shape + 1, scale_s) * rng.random()])
        while times_s[-1] < duration_s:
            times_s = np.append(times_s, times_s[-1] + np.cumsum(rng.gamma(shape, scale_s, size=batch)))
        return times_s[: np.searchsorted(times_s, duration_s)]


@dataclass(frozen=True, slots=True)
class Diurnal:
    """Poisson arrivals whose rate is a sinusoid that starts at its lowest point."""

    low_rps: float
    high_rps: float
    period_s: float

    @property
    def mean_rate_rps(self) -> float:
        return (self.low_rps + self.high_rps) / 2

    def sample(self, duration_s: float, *, rng: np.random.Generator, start_s: float) -> np.ndarray:
        def rate_rps(t_s: np.ndarray) -> np.ndarray:
            swing = np.cos((start_s + t_s) * (2 * np.pi / self.period_s))
            return self.mean_rate_rps - (self.high_rps - self.low_rps) / 2 * swing

        return _thinned(rate_rps, self.high_rps, duration_s, rng=rng)


@dataclass(frozen=True, slots=True)
class Mmpp:
    """Poisson arrivals that switch between two rates after exponential dwells of the same mean."""

    low_rps: float
    high_rps: float
    dwell_s: float
    period_s: ClassVar[None] = None

    @property
    def mean_rate_rps(self) -> float:
        return (self.low_rps + self.high_rps) / 2

    def sample(self, duration_s: float, *, rng: np.random.Generator, start_s: float) -> np.ndarray:
        state = rng.integers(2)
        switches_s = np.sort(rng.random(rng.poisson(duration_s / self.dwell_s)) * duration_s)
        rates_rps = np.array([self.low_rps, self.high_rps])

        def rate_rps(t_s: np.ndarray) -> np.ndarray:
            return np.take(rates_rps, (state + np.searchsorted(switches_s, t_s)) % 2)

        return _thinned(rate_rps, self.high_rps, duration_s, rng=rng)


@dataclass(frozen=True, slots=True)
class Evenly:
    """A whole number of requests in each second, evenly spaced from its start, as in GreenDLS."""

    speeds_rps: tuple[int, ...]

    @property
    def period_s(self) -> float:
        return float(len(self.speeds_rps))

    @property
    def mean_rate_rps(self) -> float:
        return sum(self.speeds_rps) / len(self.speeds_rps)

    def sample(self, duration_s: float, *, rng: np.random.Generator, start_s: float) -> np.ndarray:
        speeds = np.array(self.speeds_rps)
        second = np.repeat(np.arange(len(speeds)), speeds)
        nth_in_second = np.arange(len(second)) - np.repeat(np.cumsum(speeds) - speeds, speeds)
        times_s = second + nth_in_second / speeds[second]
        return repeated(times_s, self.period_s, duration_s=duration_s, start_s=start_s)[0]


@dataclass(frozen=True, slots=True)
class Burst:
    """``count`` requests, the first ``after_s`` from the start, the others ``every_s`` apart; then none."""

    count: int
    every_s: float
    after_s: float
    period_s: ClassVar[None] = None

    @property
    def mean_rate_rps(self) -> float:
        return self.count / max(1.0, self.count * self.every_s)

    def sample(self, duration_s: float, *, rng: np.random.Generator, start_s: float) -> np.ndarray:
        times_s = self.after_s + np.arange(self.count) * self.every_s
        return times_s[times_s < duration_s]


def repeated(
    times_s: np.ndarray, period_s: float, *, duration_s: float, start_s: float
) -> tuple[np.ndarray, np.ndarray]:
    """A span of a repeating schedule: times counted from ``start_s``, and their indices in ``times_s``."""
    start_s %= period_s
    rounds, slack_s = int((start_s + duration_s) // period_s), 1e-6 * period_s
    first = np.searchsorted(times_s, start_s - slack_s)
    last = np.searchsorted(times_s, start_s + duration_s - rounds * period_s + slack_s)
    index = np.arange(first, rounds * len(times_s) + last)  # of a long trace, only what is needed
    unrolled_s = index // len(times_s) * period_s + times_s[index % len(times_s)] - start_s
    within = slice(*np.searchsorted(unrolled_s, (0.0, duration_s)))
    return unrolled_s[within], index[within] % len(times_s)


def _thinned(
    rate_rps: Callable[[np.ndarray], np.ndarray],
    peak_rps: float,
    duration_s: float,
    *,
    rng: np.random.Generator,
) -> np.ndarray:
    """Arrivals of the non-homogeneous Poisson process of this rate (Lewis and Shedler 1979)."""
    times_s = rng.random(rng.poisson(peak_rps * duration_s)) * duration_s
    kept = rng.random(len(times_s)) * peak_rps < rate_rps(times_s)
    return np.sort(times_s[kept])
