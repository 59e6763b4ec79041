"""Whether the load is still one that the policy was trained on."""

import math
from collections.abc import Iterable, Mapping

from fuel_ray.codec import FEATURES, ArrivalRate, Codec, Context
from fuel_ray.types import NodeSpec, WindowMetrics

# Features that the load moves; knobs and shares move with the policy
LOAD_FEATURES = (
    *("running", "waiting", "request_throughput", "token_throughput", "arrival_rate", "arrival_rate_ewma"),
    *("greendls_rate",),
)
DRIFT_S = 30.0  # time constant over which windows outside the range are weighed
MARGIN = 0.1  # of the range's width, to either side

Range = tuple[float, float]


def observed_ranges(
    codec: Codec, spec: NodeSpec, episodes: Iterable[Iterable[WindowMetrics]]
) -> dict[str, Range]:
    """Lowest and highest value of each of the load's features that the codec has, in units of its scale."""
    names = [name for name in codec.features if name in LOAD_FEATURES]
    found: dict[str, Range] = {}
    for episode in episodes:
        rate = ArrivalRate()
        for window in episode:
            context = Context(spec, codec.slo, rate.update(window))
            for name in names:
                value = (FEATURES[name].value(window, context) or 0.0) / FEATURES[name].scale
                low, high = found.get(name, (value, value))
                found[name] = min(low, value), max(high, value)
    return found


class DriftDetector:
    """Says so when the load was out of range for about half of the last ``DRIFT_S`` or longer."""

    def __init__(self, codec: Codec, spec: NodeSpec, *, ranges: Mapping[str, Range] | None = None) -> None:
        """Watch the load's features among those of the codec.

        Args:
            codec: of the policy.
            spec: of the node that it controls.
            ranges: lowest and highest value of a feature in training, in units of its scale; where there is
                none, what the feature table can express.
        """
        self._spec, self._slo = spec, codec.slo
        self._ranges = {
            name: (ranges or {}).get(name, (0.0, FEATURES[name].high))
            for name in codec.features
            if name in LOAD_FEATURES
        }
        self._arrival_rate = ArrivalRate()
        self.reset()

    def reset(self) -> None:
        """Forget the past."""
        self._arrival_rate.reset()
        self._share, self._drifted = 0.0, False

    def update(self, window: WindowMetrics) -> bool:
        """Whether the load has drifted out of range, after one more window."""
        context = Context(self._spec, self._slo, self._arrival_rate.update(window))
        outside = any(self._outside(name, window, context) for name in self._ranges)
        self._share += (outside - self._share) * -math.expm1(-window.duration_s / DRIFT_S)
        if self._share > 0.5:
            self._drifted = True
        elif self._share < 0.25:
            self._drifted = False
        return self._drifted

    def _outside(self, name: str, window: WindowMetrics, context: Context) -> bool:
        low, high = self._ranges[name]
        value = FEATURES[name].value(window, context)
        if value is None:
            return False
        margin = MARGIN * (high - low)
        return not low - margin <= value / FEATURES[name].scale <= high + margin
