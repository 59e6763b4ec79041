"""How the static pair is tuned on training seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fuel_ray.policies.static import Static
from fuel_ray.types import Knobs, NodeSpec, Policy


@dataclass(frozen=True, slots=True)
class Score:
    """What a policy did on the training seeds."""

    energy_j_per_request: float
    slo_attainment: float

    def rank(self, share: float) -> tuple[bool, float]:
        """Lower is better: least energy of those that meet the SLO for ``share``, or else most attainment."""
        missed = self.slo_attainment < share
        return missed, -self.slo_attainment if missed else self.energy_j_per_request


Scorer = Callable[[Policy], Score]


def tune_static(score: Scorer, spec: NodeSpec, *, share: float, limits: Sequence[int]) -> Knobs:
    """The pair of least energy that meets the SLO for ``share`` of the requests.

    Walks down a coarse grid of clocks for every limit until attainment is lost, then the GPU's own grid
    around the best pair. Without any pair that meets the SLO, the one of highest attainment.
    """
    tried: dict[Knobs, Score] = {}

    def attempt(knobs: Knobs) -> Score:
        if knobs not in tried:
            tried[knobs] = score(Static(knobs))
        return tried[knobs]

    def best() -> Knobs:
        return min(tried, key=lambda knobs: tried[knobs].rank(share))

    clocks = spec.gpu_clocks_mhz
    stride = max(1, len(clocks) // 16)
    for limit in sorted(limits, reverse=True):
        for clock_mhz in clocks[::-1][::stride]:
            if attempt(Knobs(limit, clock_mhz)).slo_attainment < share - 0.05:
                break
    coarse = best()
    middle = clocks.index(coarse.gpu_clock_mhz)
    for clock_mhz in clocks[max(0, middle - stride + 1) : middle + stride]:
        attempt(replace(coarse, gpu_clock_mhz=clock_mhz))
    return best()
