"""How the static pair and the load table are tuned on training seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from fuel_ray.policies.baselines.static import LoadTable, Static
from fuel_ray.types import Knobs, NodeSpec, Policy


@dataclass(frozen=True, slots=True)
class Score:
    """What a policy did on the training seeds."""

    energy_j_per_request: float
    slo_attainment: float

    def rank(self, share: float) -> tuple[bool, float]:
        """Lower is better: least energy of those that keep the SLO for ``share``, or else most attainment."""
        missed = self.slo_attainment < share
        return missed, -self.slo_attainment if missed else self.energy_j_per_request


Scorer = Callable[[Policy], Score]


def tune_static(score: Scorer, spec: NodeSpec, *, share: float, limits: Sequence[int]) -> Knobs:
    """The pair of least energy that keeps the SLO for ``share`` of the requests.

    Walks down a coarse grid of clocks for every limit until attainment is lost, then the GPU's own grid
    around the best pair. Without any pair that keeps the SLO, the one of highest attainment.
    """
    search = _Search[Knobs](lambda knobs: score(Static(knobs)), share)
    clocks = spec.gpu_clocks_mhz
    stride = max(1, len(clocks) // 16)
    for limit in sorted({*limits, spec.batch_limits[-1]}, reverse=True):
        for clock_mhz in clocks[::-1][::stride]:
            if search.score(Knobs(limit, clock_mhz)).slo_attainment < share - 0.05:
                break
    best = search.best()
    middle = clocks.index(best.gpu_clock_mhz)
    for clock_mhz in clocks[max(0, middle - stride + 1) : middle + stride]:
        search.score(replace(best, gpu_clock_mhz=clock_mhz))
    return search.best()


def tune_load_table(
    score: Scorer, spec: NodeSpec, *, share: float, start: Knobs, rates_rps: Sequence[float], sweeps: int = 3
) -> LoadTable:
    """A load table by coordinate descent from a static pair, on energy plus a price per miss.

    The price starts at three times the energy of a request, and follows the attainment reached: up when it is
    below ``share``, down when it is above. Each sweep moves every row's clock in finer steps than the last.
    """
    search = _Search[tuple[Knobs, ...]](lambda rows: score(LoadTable(rates_rps, rows)), share)
    rows = (start,) * (len(rates_rps) + 1)
    price_j = 3.0 * search.score(rows).energy_j_per_request

    def cost_j(candidate: tuple[Knobs, ...]) -> float:
        result = search.score(candidate)
        return result.energy_j_per_request + price_j * (1.0 - result.slo_attainment)

    for sweep in range(sweeps):
        stride = max(1, len(spec.gpu_clocks_mhz) // (8 << sweep))
        for row in range(len(rows)):
            for step in (-stride, stride):
                moved = _moved(rows, row, step, spec)
                while moved is not None and cost_j(moved) < cost_j(rows):
                    rows = moved
                    moved = _moved(rows, row, step, spec)
        price_j *= 2.0 if search.score(rows).slo_attainment < share else 0.7
    return LoadTable(rates_rps, search.best())


def _moved(rows: tuple[Knobs, ...], row: int, step: int, spec: NodeSpec) -> tuple[Knobs, ...] | None:
    """The table with one row's clock ``step`` places further; None beyond the supported clocks."""
    at = spec.gpu_clocks_mhz.index(rows[row].gpu_clock_mhz) + step
    if not 0 <= at < len(spec.gpu_clocks_mhz):
        return None
    return (*rows[:row], replace(rows[row], gpu_clock_mhz=spec.gpu_clocks_mhz[at]), *rows[row + 1 :])


Candidate = TypeVar("Candidate")


class _Search(Generic[Candidate]):
    """Scores every candidate once and knows the best so far."""

    def __init__(self, score: Callable[[Candidate], Score], share: float) -> None:
        self._score, self._share = score, share
        self._tried: dict[Candidate, Score] = {}

    def score(self, candidate: Candidate) -> Score:
        if candidate not in self._tried:
            self._tried[candidate] = self._score(candidate)
        return self._tried[candidate]

    def best(self) -> Candidate:
        """The one of least energy that keeps the SLO, or else the one of highest attainment."""
        return min(self._tried, key=lambda candidate: self._tried[candidate].rank(self._share))
