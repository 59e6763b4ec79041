"""Feedback on measured TTFT and TPOT, with hysteresis."""

from collections import deque

import numpy as np

from fuel_ray.types import Knobs, NodeSpec, WindowMetrics


class Feedback:
    """Raises the clock when the 95th percentile of TTFT or TPOT comes near its limit, lowers it slowly.

    After GreenLLM: fine steps of 15 MHz on P95 latency, and a hysteresis of three
    intervals before the clock is lowered. Above ``high`` of a limit the clock is raised by ``up_mhz``, and
    to the highest when a limit is broken; below ``low`` three times in a row it is lowered by ``down_mhz``.
    The two bounds, the steps up and the memory of ``memory_s`` for the percentiles are ours.
    """

    def __init__(
        self,
        spec: NodeSpec,
        *,
        ttft_s: float,
        tpot_s: float,
        batch_limit: int,
        low: float = 0.85,
        high: float = 0.95,
        patience: int = 3,
        up_mhz: int = 60,
        down_mhz: int = 15,
        memory_s: float = 10.0,
    ) -> None:
        """``batch_limit`` stays as it is."""
        self._clocks_mhz, self._batch_limit = spec.gpu_clocks_mhz, batch_limit
        self._limits_s = (ttft_s, tpot_s)
        self._low, self._high, self._patience = low, high, patience
        self._up_mhz, self._down_mhz, self._memory_s = up_mhz, down_mhz, memory_s
        self.reset()

    def reset(self) -> None:
        """Forget the past, back to the highest clock."""
        self._clock_mhz = self._clocks_mhz[-1]
        self._calm = 0
        self._recent: deque[WindowMetrics] = deque()

    def decide(self, window: WindowMetrics) -> Knobs:
        """The clock after this window's feedback."""
        share = self._share(window)
        self._calm = self._calm + 1 if share < self._low else 0
        if share > 1.0:
            self._clock_mhz = self._clocks_mhz[-1]
        elif share > self._high:
            self._clock_mhz = min(self._clock_mhz + self._up_mhz, self._clocks_mhz[-1])
        elif self._calm >= self._patience:
            self._clock_mhz = max(self._clock_mhz - self._down_mhz, self._clocks_mhz[0])
            self._calm = 0
        return Knobs(self._batch_limit, self._clock_mhz)

    def _share(self, window: WindowMetrics) -> float:
        """P95 of the last seconds' TTFT and TPOT and the oldest wait, the largest share of its limit."""
        self._recent.append(window)
        while sum(past.duration_s for past in self._recent) - self._recent[0].duration_s >= self._memory_s:
            self._recent.popleft()
        ttft_limit_s, tpot_limit_s = self._limits_s
        ttfts_s = [value for past in self._recent for value in past.ttfts_s]
        tpots_s = [value for past in self._recent for value in past.tpots_s]
        wait = window.oldest_wait_s / ttft_limit_s
        return max(_p95(ttfts_s) / ttft_limit_s, _p95(tpots_s) / tpot_limit_s, wait)


def _p95(values: list[float]) -> float:
    return float(np.percentile(values, 95)) if values else 0.0
