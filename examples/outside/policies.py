"""A policy of your own, played by ``fuel-ray evaluate --policies examples.outside.policies:Mine``."""

from fuel_ray.types import Knobs, NodeSpec, Slo, WindowMetrics


class Mine:
    """The highest clock while anybody waits, else the one at three quarters of the clocks."""

    def __init__(self, spec: NodeSpec, slo: Slo) -> None:
        self._limit, clocks_mhz = spec.batch_limits[-1], spec.gpu_clocks_mhz
        self._calm_mhz, self._highest_mhz = clocks_mhz[3 * len(clocks_mhz) // 4], clocks_mhz[-1]

    def reset(self) -> None:
        """Nothing to forget."""

    def decide(self, window: WindowMetrics) -> Knobs:
        return Knobs(self._limit, self._highest_mhz if window.waiting else self._calm_mhz)
