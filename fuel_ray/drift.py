"""Whether the load is still one that the policy was trained on."""

import math
from collections.abc import Iterable, Mapping

from fuel_ray.averages import EWMA_S
from fuel_ray.codec import Codec, Encoder
from fuel_ray.types import NodeSpec, WindowMetrics

DRIFT_S = 30.0  # time constant over which windows outside the range are weighed
MARGIN = 0.1  # of the range's width, to either side, and at least ``LEAST_MARGIN``
LEAST_MARGIN = 0.05  # of the feature's scale, for what did not vary at all in training

Range = tuple[float, float]


def observed_ranges(
    codec: Codec, spec: NodeSpec, episodes: Iterable[Iterable[WindowMetrics]]
) -> dict[str, Range]:
    """Lowest and highest value of each feature of the load, in units of its scale."""
    found: dict[str, Range] = {}
    encoder = Encoder(codec, spec)
    for episode in episodes:
        encoder.reset()
        seconds = 0.0
        for window in episode:
            context = encoder.context(window)
            seconds += window.duration_s
            if seconds < EWMA_S:
                continue  # a first window's own rate is no average yet
            for name, feature in codec.table.items():
                if feature.load and (value := feature.scaled(window, context)) is not None:
                    low, high = found.get(name, (value, value))
                    found[name] = min(low, value), max(high, value)
    return found


class DriftDetector:
    """Says so when the load was out of range for about half of the last ``DRIFT_S`` or longer."""

    def __init__(self, codec: Codec, spec: NodeSpec, *, ranges: Mapping[str, Range] | None = None) -> None:
        """Watch the features of the load, whether the policy sees them or not, and any other with a range.

        ``ranges`` are those seen in training, in units of a feature's scale; without one, a feature's range
        is what the feature table can express.
        """
        known = ranges or {}
        self._watched = [
            (feature, _widened(*known.get(name, (0.0, feature.high))))
            for name, feature in codec.table.items()
            if feature.load or name in known
        ]
        self._encoder = Encoder(codec, spec)
        self.reset()

    def reset(self) -> None:
        self._encoder.reset()
        self._share, self._drifted = 0.0, False

    def update(self, window: WindowMetrics) -> bool:
        """Whether the load has drifted out of range, after one more window."""
        context = self._encoder.context(window)
        seen = [(feature.scaled(window, context), span) for feature, span in self._watched]
        outside = any(value is not None and not low <= value <= high for value, (low, high) in seen)
        self._share += (outside - self._share) * -math.expm1(-window.duration_s / DRIFT_S)
        if self._share > 0.5:
            self._drifted = True
        elif self._share < 0.25:
            self._drifted = False
        return self._drifted


def _widened(low: float, high: float) -> Range:
    margin = max(MARGIN * (high - low), LEAST_MARGIN)
    return low - margin, high + margin
