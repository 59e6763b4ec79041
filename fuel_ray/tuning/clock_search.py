"""The load table, from runs at fixed clocks.

Energy and misses of a window depend on its own clock far more than on those before it. So runs at each fixed
clock say what every cell (all windows at similar load) would cost at every clock, and for a price per unit of
penalty the cheapest clock per cell is a look-up. The price is then bisected on runs of what was chosen, so
that the result meets the SLO as run and not as predicted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from fuel_ray.averages import EWMA_S, smoothed_rates
from fuel_ray.policies.models import every
from fuel_ray.policies.static import LoadTable, Static
from fuel_ray.types import Knobs, Policy, RequestRecords, Slo

_BISECTIONS = 8


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """One episode, per window that was measured: arrays of equal length (windows,)."""

    energy_j: np.ndarray
    penalty: np.ndarray  # of the requests that arrived in the window; ``penalty`` of its requests, summed
    arrived: np.ndarray  # requests in the window, which lasts 1 s

    @property
    def arrivals(self) -> int:
        """Requests of the episode."""
        return int(self.arrived.sum())

    def rate_rps(self, ewma_s: float) -> np.ndarray:
        """Moving average of the arrival rate before each window, a policy's input; 0 before the first."""
        return np.array([0.0, *smoothed_rates(self.arrived, ewma_s)[:-1]])

    @property
    def mean_penalty(self) -> float:
        """Per request; the SLO is met when it is at most ``allowed_penalty``."""
        return float(self.penalty.sum()) / max(self.arrivals, 1)


Runner = Callable[[Policy], Sequence[Trace]]  # one trace per seed, in the same order each time


def penalty(records: RequestRecords, slo: Slo) -> np.ndarray:
    """Per request 1 if it missed a limit, else 0; where the means count, its largest latency / limit."""
    if slo.share is not None:
        return (~records.meets(slo)).astype(float)
    pairs = slo.limited(records.latencies_s)
    shares = [np.nan_to_num(values_s) / limit_s for _, values_s, limit_s in pairs]
    return np.asarray(np.max(shares, axis=0))


def allowed_penalty(slo: Slo, share: float) -> float:
    """Mean penalty at which ``share`` of the requests meet the SLO, or the means are at ``share`` of it."""
    return share if slo.share is None else 1.0 - share


def trace_of(energy_j: np.ndarray, arrivals: np.ndarray, records: RequestRecords, slo: Slo) -> Trace:
    """A trace from energy and arrivals per window of 1 s; a request without a record is as bad as can be."""
    bad = np.zeros(len(energy_j))
    at = np.minimum((records.arrival_s + 1e-9).astype(int), len(bad) - 1)
    np.add.at(bad, at, penalty(records, slo))
    bad[-1] += (int(arrivals.sum()) - len(records)) * _unserved(slo)
    return Trace(energy_j, bad, arrivals)


def met(records: RequestRecords, slo: Slo, *, arrivals: int) -> float:
    """Requests that met the SLO; where its means count, requests less their penalty, which is comparable."""
    return arrivals - float(penalty(records, slo).sum()) - (arrivals - len(records)) * _unserved(slo)


def _unserved(slo: Slo) -> float:
    """Penalty of a request without a record."""
    return 1.0 if slo.share is not None else 10.0


def find_load_table(
    run: Runner,
    supported_mhz: Sequence[int],
    *,
    batch_limit: int,
    allowed: float,
    rows: int = 10,
    stride: int = 4,
    budget: int = 30,
    ewma_s: float = EWMA_S,
) -> LoadTable:
    """The table from arrival rate to clock of least energy on the seeds that ``run`` plays.

    Rows are equally wide up to the highest rate seen, averaged over ``ewma_s``. Clocks are profiled
    ``stride`` places apart in ``supported_mhz``, ascending, and single rows then moved by less, for at most
    ``budget`` runs. The mean penalty is at most ``allowed`` where a table was found for which it is.
    """
    clocks = every(supported_mhz, stride)
    traces = _fixed(run, clocks, batch_limit)
    highest_rps = max(float(t.rate_rps(ewma_s).max()) for per_seed in traces for t in per_seed)
    rates_rps = [highest_rps * row / rows for row in range(1, rows)]

    def cell_of(t: Trace) -> np.ndarray:
        return np.minimum(np.searchsorted(rates_rps, t.rate_rps(ewma_s)), rows - 1)

    def make(clocks_mhz: tuple[int, ...]) -> LoadTable:
        knobs = [Knobs(batch_limit, clock_mhz) for clock_mhz in clocks_mhz]
        return LoadTable(rates_rps, knobs, ewma_s=ewma_s)

    attempts = _Attempts(run, make, allowed=allowed)
    attempts.assign(clocks, traces, cell_of)
    attempts.descend(supported_mhz, stride=max(1, stride // 2), budget=budget // 2)
    attempts.descend(supported_mhz, stride=1, budget=budget - budget // 2)
    return make(attempts.best())


def _fixed(run: Runner, clocks_mhz: Sequence[int], batch_limit: int) -> list[Sequence[Trace]]:
    """Traces of runs at each fixed clock."""
    return [run(Static(Knobs(batch_limit, clock_mhz))) for clock_mhz in clocks_mhz]


class _Attempts:
    """Runs candidates (a clock per cell) once each and knows the best so far."""

    def __init__(self, run: Runner, make: Callable[[tuple[int, ...]], Policy], *, allowed: float) -> None:
        self._run, self._make, self._allowed = run, make, allowed
        self._tried: dict[tuple[int, ...], tuple[float, float]] = {}

    def cost(self, clocks_mhz: tuple[int, ...]) -> tuple[float, float]:
        """Energy in J and mean penalty of a candidate over all seeds."""
        if clocks_mhz not in self._tried:
            self._note(clocks_mhz, self._run(self._make(clocks_mhz)))
        return self._tried[clocks_mhz]

    def rank(self, clocks_mhz: tuple[int, ...]) -> tuple[bool, float]:
        """Lower is better: least energy of those within the allowed penalty, or else least penalty."""
        energy_j, bad = self.cost(clocks_mhz)
        return bad > self._allowed, bad if bad > self._allowed else energy_j

    def assign(
        self,
        clocks_mhz: Sequence[int],
        traces: Sequence[Sequence[Trace]],
        cell_of: Callable[[Trace], np.ndarray],
    ) -> None:
        """Try, from runs at each of these clocks, the cheapest one per cell, at many prices of a penalty.

        ``cell_of`` gives each window's cell, 0 .. cells - 1.
        """
        cells = 1 + max(int(cell_of(t).max()) for per_seed in traces for t in per_seed)
        energy_j, bad = np.zeros((2, len(clocks_mhz), cells))
        for k, per_seed in enumerate(traces):
            for t in per_seed:
                np.add.at(energy_j[k], cell_of(t), t.energy_j)
                np.add.at(bad[k], cell_of(t), t.penalty)
        scale_j = float(energy_j.min(axis=0).sum()) / max(float(bad.max(axis=0).sum()), 1.0)
        clocks = np.array(clocks_mhz)
        self._bisect(lambda j: clocks[(energy_j + j * bad).argmin(axis=0)], scale_j * 1e-4, scale_j * 1e6)
        for clock_mhz, per_seed in zip(clocks_mhz, traces, strict=True):
            self._note((clock_mhz,) * cells, per_seed)

    def descend(self, supported_mhz: Sequence[int], *, stride: int, budget: int) -> None:
        """Move one cell's clock at a time by ``stride`` places, as long as that ranks better."""
        best, budget = self.best(), budget + len(self._tried)
        for cell, step in product(range(len(best)), (-stride, stride)):
            at = supported_mhz.index(best[cell]) + step
            if len(self._tried) < budget and 0 <= at < len(supported_mhz):
                moved = (*best[:cell], supported_mhz[at], *best[cell + 1 :])
                best = min(best, moved, key=self.rank)

    def _bisect(self, candidate: Callable[[float], np.ndarray], low_j: float, high_j: float) -> None:
        """Try candidates at prices per unit of penalty between which the allowed penalty lies."""
        for _ in range(_BISECTIONS):
            price_j = (low_j * high_j) ** 0.5
            _, bad = self.cost(tuple(candidate(price_j).tolist()))
            low_j, high_j = (price_j, high_j) if bad > self._allowed else (low_j, price_j)

    def _note(self, clocks_mhz: tuple[int, ...], traces: Sequence[Trace]) -> None:
        arrivals = sum(t.arrivals for t in traces)
        bad = sum(float(t.penalty.sum()) for t in traces) / max(arrivals, 1)
        self._tried[clocks_mhz] = sum(float(t.energy_j.sum()) for t in traces), bad

    def best(self) -> tuple[int, ...]:
        """The candidate of lowest rank."""
        return min(self._tried, key=self.rank)
