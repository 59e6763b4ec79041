"""Rules whose knobs are tuned beforehand: the same ones always, or by the load."""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fuel_ray.averages import ArrivalRate, smoothed_rates
from fuel_ray.sim.program import RATE_RPS, TABLE, Program, Server, program
from fuel_ray.types import Knobs, NodeSpec, WindowMetrics


@runtime_checkable
class Planned(Protocol):
    """A policy that looks only at arrivals, which no policy can change, so that it can be planned ahead."""

    def plan(self, arrivals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Batch limits and clocks for the windows of 1 s after each of those with these arrivals."""


Compiled = tuple[Program, Server]


@runtime_checkable
class Compilable(Protocol):
    """A policy that a twin may run compiled, at a third of the time."""

    def compiled(self, spec: NodeSpec) -> Compiled | None:
        """Its decisions on a node as a program; None where they cannot be one."""


@dataclass(frozen=True, slots=True)
class Static:
    """The same knobs in every window."""

    knobs: Knobs

    def reset(self) -> None:
        pass

    def decide(self, window: WindowMetrics) -> Knobs:
        return self.knobs

    def plan(self, arrivals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n = len(arrivals)
        return np.full(n, self.knobs.batch_limit), np.full(n, self.knobs.gpu_clock_mhz)


class LoadTable:
    """Knobs by the moving average of the arrival rate over the last ten seconds."""

    def __init__(self, rates_rps: Sequence[float], knobs: Sequence[Knobs]) -> None:
        """Use ``knobs[i]`` up to ``rates_rps[i]``, and the last knobs beyond the last rate."""
        self.rates_rps, self.knobs = tuple(rates_rps), tuple(knobs)
        self.reset()

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        knobs = [[k.batch_limit, k.gpu_clock_mhz] for k in self.knobs]
        return {"rates_rps": list(self.rates_rps), "knobs": knobs}

    @staticmethod
    def from_dict(raw: Any) -> "LoadTable":
        """The inverse of ``to_dict``; also reads the [rate, limit, clock] rows of older runs.

        Raises:
            ValueError: it is not a load table.
        """
        if isinstance(raw, list):
            raw = {"rates_rps": [row[0] for row in raw[:-1]], "knobs": [row[1:] for row in raw]}
        rates, knobs = raw["rates_rps"], [Knobs(*pair) for pair in raw["knobs"]]
        if not are_counts([value for k in knobs for value in (k.batch_limit, k.gpu_clock_mhz)]):
            raise ValueError("the load table's knobs are not knobs")
        if len(knobs) != len(rates) + 1 or rates != sorted(rates) or not np.isfinite(rates).all():
            raise ValueError("the load table's rates are malformed")
        return LoadTable(rates, knobs)

    def moved(self, offset_mhz: float, nearest: Callable[[int], int] = lambda mhz: mhz) -> "LoadTable":
        """The same with all clocks higher by this, each the ``nearest`` that there is."""
        clocks_mhz = (nearest(round(own.gpu_clock_mhz + offset_mhz)) for own in self.knobs)
        pairs = zip(self.knobs, clocks_mhz, strict=True)
        return LoadTable(self.rates_rps, [Knobs(own.batch_limit, mhz) for own, mhz in pairs])

    def reset(self) -> None:
        self._arrival_rate = ArrivalRate()

    def decide(self, window: WindowMetrics) -> Knobs:
        row = bisect_left(self.rates_rps, self._arrival_rate.update(window))
        return self.knobs[min(row, len(self.knobs) - 1)]

    def compiled(self, spec: NodeSpec) -> Compiled | None:
        limits = {knobs.batch_limit for knobs in self.knobs}
        if len(limits) > 1:
            return None
        capacity, highest_mhz = float(spec.batch_limits[-1]), float(spec.gpu_clocks_mhz[-1])
        server = Server(capacity, 0.0, math.inf, math.inf, highest_mhz)  # it looks at nothing but arrivals
        mhz = np.array([[float(knobs.gpu_clock_mhz)] for knobs in self.knobs])
        return program(
            base=TABLE,
            x=RATE_RPS,
            x_knots=np.array(self.rates_rps, float),
            mhz=mhz,
            stepped=True,
            batch_limit=limits.pop(),
        ), server

    def plan(self, arrivals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = np.minimum(np.searchsorted(self.rates_rps, smoothed_rates(arrivals)), len(self.knobs) - 1)
        limits, clocks_mhz = np.array([(k.batch_limit, k.gpu_clock_mhz) for k in self.knobs])[rows].T
        return limits, clocks_mhz


class ClockSchedule:
    """A clock for each segment of time, the last one beyond the end: how an oracle plays what it found."""

    def __init__(self, clocks_mhz: Sequence[int], *, segment_s: float, batch_limit: int) -> None:
        """Use ``clocks_mhz[i]`` in windows that begin in [i, i + 1) x ``segment_s`` seconds."""
        self.clocks_mhz, self._segment_s, self._batch_limit = tuple(clocks_mhz), segment_s, batch_limit
        self.reset()

    def reset(self) -> None:
        self._now_s = 0.0

    def decide(self, window: WindowMetrics) -> Knobs:
        """The clock of the segment in which the next window begins."""
        self._now_s += window.duration_s
        segment = int(self._now_s / self._segment_s + 1e-9)
        return Knobs(self._batch_limit, self.clocks_mhz[min(segment, len(self.clocks_mhz) - 1)])

    def plan(self, arrivals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        segments = (np.arange(1, len(arrivals) + 1) / self._segment_s + 1e-9).astype(int)
        clocks_mhz = np.array(self.clocks_mhz)[np.minimum(segments, len(self.clocks_mhz) - 1)]
        return np.full(len(arrivals), self._batch_limit), clocks_mhz


def are_counts(values: Sequence[Any]) -> bool:
    """Whether these values of a file are whole numbers above 0, and at least one."""
    return bool(values) and all(type(value) is int and 0 < value < 2**31 for value in values)
