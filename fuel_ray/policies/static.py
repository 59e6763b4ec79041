"""Rules whose knobs are tuned beforehand: the same ones always, or by the load."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fuel_ray.averages import EWMA_S, FAST_EWMA_S, ArrivalRate, smoothed_rates
from fuel_ray.sim.program import FAST_RATE_RPS, RATE_RPS, TABLE, Program, Server, program
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
    """Knobs by the moving average of the arrival rate, by default over the last ten seconds."""

    def __init__(self, rates_rps: Sequence[float], knobs: Sequence[Knobs], *, ewma_s: float = EWMA_S) -> None:
        """Use ``knobs[i]`` up to ``rates_rps[i]``, and the last knobs beyond the last rate."""
        self.rates_rps, self.knobs, self.ewma_s = tuple(rates_rps), tuple(knobs), ewma_s
        self.reset()

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        knobs = [[k.batch_limit, k.gpu_clock_mhz] for k in self.knobs]
        average = {} if self.ewma_s == EWMA_S else {"ewma_s": self.ewma_s}
        return {"rates_rps": list(self.rates_rps), "knobs": knobs, **average}

    @staticmethod
    def from_dict(raw: Any) -> "LoadTable":
        """The inverse of ``to_dict``; also reads the [rate, limit, clock] rows of older runs.

        Raises:
            ValueError: it is not a load table.
        """
        if isinstance(raw, list):
            raw = {"rates_rps": [row[0] for row in raw[:-1]], "knobs": [row[1:] for row in raw]}
        rates, knobs = raw["rates_rps"], [Knobs(*pair) for pair in raw["knobs"]]
        ewma_s = float(raw.get("ewma_s", EWMA_S))
        if not are_counts([value for k in knobs for value in (k.batch_limit, k.gpu_clock_mhz)]):
            raise ValueError("the load table's knobs are not knobs")
        if len(knobs) != len(rates) + 1 or rates != sorted(rates) or not np.isfinite(rates).all():
            raise ValueError("the load table's rates are malformed")
        if not 0 < ewma_s < math.inf:
            raise ValueError("the load table's average is none")
        return LoadTable(rates, knobs, ewma_s=ewma_s)

    def moved(self, offset_mhz: float) -> "LoadTable":
        """The same with all clocks higher by this, whether a GPU has them or not."""
        moved = [Knobs(own.batch_limit, max(round(own.gpu_clock_mhz + offset_mhz), 1)) for own in self.knobs]
        return LoadTable(self.rates_rps, moved, ewma_s=self.ewma_s)

    def reset(self) -> None:
        self._arrival_rate = ArrivalRate(self.ewma_s)

    def decide(self, window: WindowMetrics) -> Knobs:
        row = bisect_left(self.rates_rps, self._arrival_rate.update(window))
        return self.knobs[min(row, len(self.knobs) - 1)]

    def compiled(self, spec: NodeSpec) -> Compiled | None:
        limits = {knobs.batch_limit for knobs in self.knobs}
        average = {EWMA_S: RATE_RPS, FAST_EWMA_S: FAST_RATE_RPS}.get(self.ewma_s)
        if len(limits) > 1 or average is None:
            return None
        capacity, highest_mhz = float(spec.batch_limits[-1]), float(spec.gpu_clocks_mhz[-1])
        server = Server(capacity, 0.0, math.inf, math.inf, highest_mhz)  # it looks at nothing but arrivals
        mhz = np.array([[float(knobs.gpu_clock_mhz)] for knobs in self.knobs])
        return program(
            base=TABLE,
            x=average,
            x_knots=np.array(self.rates_rps, float),
            mhz=mhz,
            stepped=True,
            batch_limit=limits.pop(),
        ), server

    def plan(self, arrivals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rates_rps = smoothed_rates(arrivals, self.ewma_s)
        rows = np.minimum(np.searchsorted(self.rates_rps, rates_rps), len(self.knobs) - 1)
        limits, clocks_mhz = np.array([(k.batch_limit, k.gpu_clock_mhz) for k in self.knobs])[rows].T
        return limits, clocks_mhz


def are_counts(values: Sequence[Any]) -> bool:
    """Whether these values of a file are whole numbers above 0, and at least one."""
    return bool(values) and all(type(value) is int and 0 < value < 2**31 for value in values)
