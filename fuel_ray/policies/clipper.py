"""Clipper (Crankshaw et al., NSDI 2017): additive increase, multiplicative decrease of the batch limit."""

from dataclasses import dataclass

from fuel_ray.types import Knobs, NodeSpec, Slo, WindowMetrics


@dataclass(eq=False)
class Clipper:
    """Moves the batch limit by how close the worst latency comes to the SLO; the clock stays highest.

    Constants as in GreenDLS's own comparison: start at 8; L > SLO: b - 3; L > 0.9 SLO: 0.9 b; else b + 1.
    L / SLO is here the largest share that a sample of the window, or its oldest wait, takes of its limit.
    """

    spec: NodeSpec
    slo: Slo
    only_while_binding: bool = False  # raise the limit only when requests wait for it or it is fully used

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._limit = min(8, self.spec.batch_limits[-1])

    def decide(self, window: WindowMetrics) -> Knobs:
        wait = window.oldest_wait_s / self.slo.wait_limit_s if self.slo.wait_limit_s else 0.0
        samples = self.slo.limited(window.latencies_s)
        share = max(wait, *(max(values) / limit for _, values, limit in samples if values), 0.0)
        if share > 1.0:
            self._limit -= 3
        elif share > 0.9:
            self._limit = int(0.9 * self._limit)
        elif not self.only_while_binding or window.waiting or window.running >= self._limit:
            self._limit += 1
        self._limit = min(max(self._limit, 1), self.spec.batch_limits[-1])
        return Knobs(self._limit, self.spec.gpu_clocks_mhz[-1])
