"""Feedback on measured TTFT and TPOT, with hysteresis."""

from collections import deque
from dataclasses import KW_ONLY, dataclass

import numpy as np

from fuel_ray.types import Knobs, NodeSpec, WindowMetrics

_PATIENCE = 3  # windows below ``low`` before the clock is lowered


@dataclass(eq=False)
class Feedback:
    """Raises the clock when the 95th percentile of TTFT or TPOT comes near its limit, lowers it slowly.

    After GreenLLM: fine steps of 15 MHz on P95 latency, and a hysteresis of three
    intervals before the clock is lowered. Above ``high`` of a limit the clock is raised by ``up_mhz``, and
    to the highest when a limit is broken; below ``low`` three times in a row it is lowered by ``down_mhz``.
    The two bounds, the steps up and the memory of ``memory_s`` for the percentiles are ours.
    """

    spec: NodeSpec
    _: KW_ONLY
    ttft_s: float
    tpot_s: float
    batch_limit: int
    low: float = 0.85
    high: float = 0.95
    up_mhz: int = 60
    down_mhz: int = 15
    memory_s: float = 10.0

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._clock_mhz = self.spec.gpu_clocks_mhz[-1]
        self._calm = 0
        self._recent: deque[WindowMetrics] = deque()

    def decide(self, window: WindowMetrics) -> Knobs:
        lowest_mhz, highest_mhz = self.spec.gpu_clocks_mhz[0], self.spec.gpu_clocks_mhz[-1]
        share = self._share(window)
        self._calm = self._calm + 1 if share < self.low else 0
        if share > 1.0:
            self._clock_mhz = highest_mhz
        elif share > self.high:
            self._clock_mhz = min(self._clock_mhz + self.up_mhz, highest_mhz)
        elif self._calm >= _PATIENCE:
            self._clock_mhz = max(self._clock_mhz - self.down_mhz, lowest_mhz)
            self._calm = 0
        return Knobs(self.batch_limit, self._clock_mhz)

    def _share(self, window: WindowMetrics) -> float:
        """P95 of the last seconds' TTFT and TPOT and the oldest wait, the largest share of its limit."""
        self._recent.append(window)
        while sum(past.duration_s for past in self._recent) - self._recent[0].duration_s >= self.memory_s:
            self._recent.popleft()
        ttfts_s = [value for past in self._recent for value in past.ttfts_s]
        tpots_s = [value for past in self._recent for value in past.tpots_s]
        return max(
            _p95(ttfts_s) / self.ttft_s, _p95(tpots_s) / self.tpot_s, window.oldest_wait_s / self.ttft_s
        )


def _p95(values: list[float]) -> float:
    return float(np.percentile(values, 95)) if values else 0.0
