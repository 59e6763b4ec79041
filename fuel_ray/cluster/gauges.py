"""A node's figures as Ray metrics, which Prometheus and the dashboard read."""

import math
import socket
import time
from collections.abc import Callable
from functools import cache

from ray.util.metrics import Gauge

from fuel_ray.types import NodeSpec, WindowMetrics

GAUGE_INTERVAL_S = 1.0


class NodeGauges:
    """A node's last window under the names that `fuel-ray deploy` has, which Ray puts ``ray_`` before."""

    def __init__(self, spec: NodeSpec) -> None:
        tags = {
            "host": socket.gethostname(),
            "gpu": spec.gpu_uuids[0],
            "kv_block_size": str(spec.kv_block_size),
        }
        self._shown = [
            (_gauge(name, what, (*tags, *labels)), {**tags, **labels}, value)
            for name, labels, what, value in _GAUGES
        ]
        self._shown_s = -math.inf

    def show(self, window: WindowMetrics) -> None:
        """Set them, at most once in GAUGE_INTERVAL_S: a simulated node has windows every millisecond."""
        now_s = time.monotonic()
        if now_s - self._shown_s >= GAUGE_INTERVAL_S:
            self._shown_s = now_s
            for gauge, tags, value in self._shown:
                gauge.set(value(window), tags)


@cache
def _gauge(name: str, what: str, tag_keys: tuple[str, ...]) -> Gauge:
    """One of a name: two would be two figures of one name to Ray."""
    return Gauge(f"fuel_ray_{name}", description=what, tag_keys=tag_keys)


_GAUGES: tuple[tuple[str, dict[str, str], str, Callable[[WindowMetrics], float]], ...] = (
    ("power_watts", {}, "Mean GPU power of the last window", lambda w: w.energy_j / w.duration_s),
    ("gpu_clock_mhz", {"kind": "applied"}, "GPU clock in MHz", lambda w: w.knobs.gpu_clock_mhz),
    ("batch_limit", {"kind": "applied"}, "Batch limit in requests", lambda w: w.knobs.batch_limit),
    ("requests", {"state": "running"}, "Requests at the end of the last window", lambda w: w.running),
    ("requests", {"state": "waiting"}, "Requests at the end of the last window", lambda w: w.waiting),
    ("kv_usage", {}, "Share of the KV blocks in use", lambda w: w.kv_usage),
)
