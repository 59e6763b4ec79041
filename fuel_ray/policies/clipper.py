"""Clipper (Crankshaw et al., NSDI 2017): additive increase, multiplicative decrease of the batch limit."""

from fuel_ray.types import Knobs, NodeSpec, Slo, WindowMetrics


class Clipper:
    """Moves the batch limit by how close the worst latency comes to the SLO; the clock stays highest.

    Constants as in GreenDLS's own comparison: start at 8; L > SLO: b - 3; L > 0.9 SLO:
    0.9 b; else b + 1. L / SLO is here the largest share that a sample of the window takes of its limit.
    """

    def __init__(self, spec: NodeSpec, slo: Slo, *, only_while_binding: bool = False) -> None:
        """``only_while_binding``: raise the limit only when requests wait for it or it is fully used."""
        self._spec, self._slo, self._only_while_binding = spec, slo, only_while_binding
        self.reset()

    def reset(self) -> None:
        """Back to a limit of 8."""
        self._limit = min(8, self._spec.batch_limits[-1])

    def decide(self, window: WindowMetrics) -> Knobs:
        """The limit after this window's feedback."""
        share = worst_share_of_slo(window, self._slo)
        if share > 1.0:
            self._limit -= 3
        elif share > 0.9:
            self._limit = int(0.9 * self._limit)
        elif not self._only_while_binding or window.waiting or window.running >= self._limit:
            self._limit += 1
        self._limit = min(max(self._limit, 1), self._spec.batch_limits[-1])
        return Knobs(self._limit, self._spec.gpu_clocks_mhz[-1])


def worst_share_of_slo(window: WindowMetrics, slo: Slo) -> float:
    """Largest of a window's TTFT, TPOT and e2e samples and its oldest wait, each by its limit; 0 if none."""
    wait = window.oldest_wait_s / slo.wait_limit_s if slo.wait_limit_s else 0.0
    pairs = slo.limited(window.latencies_s)
    return max(wait, *(max(values) / limit for _, values, limit in pairs if values), 0.0)
