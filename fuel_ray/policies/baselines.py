"""The rules that a learned policy has to beat, and how they are tuned."""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fuel_ray.codec import EWMA_S
from fuel_ray.types import Knobs, NodeSpec, Policy, WindowMetrics


@dataclass(frozen=True, slots=True)
class Static:
    """The same knobs in every window."""

    knobs: Knobs

    def reset(self) -> None:
        """Nothing to forget."""

    def decide(self, window: WindowMetrics) -> Knobs:
        """The knobs."""
        return self.knobs


class LoadTable:
    """Knobs by the moving average of the arrival rate over the last ten seconds."""

    def __init__(self, rates_rps: Sequence[float], knobs: Sequence[Knobs]) -> None:
        """Use ``knobs[i]`` up to ``rates_rps[i]``, and the last knobs beyond the last rate."""
        self.rates_rps, self.knobs = tuple(rates_rps), tuple(knobs)
        self._rate_rps: float | None = None

    def reset(self) -> None:
        """Forget the past rate."""
        self._rate_rps = None

    def decide(self, window: WindowMetrics) -> Knobs:
        """The knobs for the rate seen so far."""
        rate_rps = window.arrivals / window.duration_s
        if self._rate_rps is not None:
            rate_rps = self._rate_rps + (rate_rps - self._rate_rps) * -math.expm1(-window.duration_s / EWMA_S)
        self._rate_rps = rate_rps
        return self.knobs[min(bisect_left(self.rates_rps, rate_rps), len(self.knobs) - 1)]


@dataclass(frozen=True, slots=True)
class Score:
    """What a policy did on the training seeds."""

    energy_j_per_request: float
    slo_attainment: float


Scorer = Callable[[Policy], Score]


def tune_static(score: Scorer, spec: NodeSpec, *, share: float, limits: Sequence[int]) -> Knobs:
    """The pair of least energy that keeps the SLO for ``share`` of the requests.

    Walks down a coarse grid of clocks for every limit until attainment is lost, then the GPU's own grid
    around the best pair. Without any pair that keeps the SLO, the one of highest attainment.
    """
    tried: dict[Knobs, Score] = {}

    def rank(knobs: Knobs) -> tuple[bool, float]:
        if knobs not in tried:
            tried[knobs] = score(Static(knobs))
        result = tried[knobs]
        missed = result.slo_attainment < share
        return missed, -result.slo_attainment if missed else result.energy_j_per_request

    clocks = spec.gpu_clocks_mhz
    stride = max(1, len(clocks) // 16)
    for limit in sorted(set(limits) | {spec.batch_limits[-1]}, reverse=True):
        for clock_mhz in clocks[::-1][::stride]:
            rank(Knobs(limit, clock_mhz))
            if tried[Knobs(limit, clock_mhz)].slo_attainment < share - 0.05:
                break
    best = min(tried, key=rank)
    middle = clocks.index(best.gpu_clock_mhz)
    for clock_mhz in clocks[max(0, middle - stride + 1) : middle + stride]:
        rank(replace(best, gpu_clock_mhz=clock_mhz))
    return min(tried, key=rank)


def tune_load_table(
    score: Scorer, spec: NodeSpec, *, share: float, start: Knobs, rates_rps: Sequence[float], sweeps: int = 3
) -> LoadTable:
    """A load table by coordinate descent from a static pair, on energy plus a price per miss.

    The price starts at what a percent of attainment costs along the static clock, and follows the attainment
    reached: up when it is below ``share``, down when it is above.
    """
    clocks = spec.gpu_clocks_mhz
    knobs = [start] * (len(rates_rps) + 1)
    price_j = 3.0 * score(Static(start)).energy_j_per_request
    best: tuple[tuple[bool, float], list[Knobs]] | None = None

    def evaluate(candidate: list[Knobs]) -> float:
        nonlocal best
        result = score(LoadTable(rates_rps, candidate))
        missed = result.slo_attainment < share
        rank = (missed, -result.slo_attainment if missed else result.energy_j_per_request)
        if best is None or rank < best[0]:
            best = (rank, list(candidate))
        return result.energy_j_per_request + price_j * (1.0 - result.slo_attainment)

    for sweep in range(sweeps):
        stride = max(1, len(clocks) // (8 << sweep))
        current = evaluate(knobs)
        for i in range(len(knobs)):
            for direction in (-1, 1):
                while True:
                    at = clocks.index(knobs[i].gpu_clock_mhz) + direction * stride
                    if not 0 <= at < len(clocks):
                        break
                    candidate = [*knobs[:i], replace(knobs[i], gpu_clock_mhz=clocks[at]), *knobs[i + 1 :]]
                    value = evaluate(candidate)
                    if value >= current:
                        break
                    knobs, current = candidate, value
        attained = score(LoadTable(rates_rps, knobs)).slo_attainment
        price_j *= 2.0 if attained < share else 0.7
    assert best is not None
    return LoadTable(rates_rps, best[1])
