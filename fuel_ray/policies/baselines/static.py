"""Rules whose knobs are tuned beforehand: the same ones always, or by the load."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from fuel_ray.codec import ArrivalRate
from fuel_ray.types import Knobs, WindowMetrics


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
        self._arrival_rate = ArrivalRate()

    def reset(self) -> None:
        """Forget the past rate."""
        self._arrival_rate.reset()

    def decide(self, window: WindowMetrics) -> Knobs:
        """The knobs for the rate seen so far."""
        row = bisect_left(self.rates_rps, self._arrival_rate.update(window))
        return self.knobs[min(row, len(self.knobs) - 1)]


class ClockSchedule:
    """A clock for each segment of time, the last one beyond the end: how an oracle plays what it found."""

    def __init__(self, clocks_mhz: Sequence[int], *, segment_s: float, batch_limit: int) -> None:
        """Use ``clocks_mhz[i]`` in windows that begin in [i, i + 1) x ``segment_s`` seconds."""
        self.clocks_mhz, self._segment_s, self._batch_limit = tuple(clocks_mhz), segment_s, batch_limit
        self._now_s = 0.0

    def reset(self) -> None:
        """Back to time 0."""
        self._now_s = 0.0

    def decide(self, window: WindowMetrics) -> Knobs:
        """The clock of the segment in which the next window begins."""
        self._now_s += window.duration_s
        segment = int(self._now_s / self._segment_s + 1e-9)
        return Knobs(self._batch_limit, self.clocks_mhz[min(segment, len(self.clocks_mhz) - 1)])
