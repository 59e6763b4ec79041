"""A node's figures as Ray metrics, which Prometheus and the dashboard read."""

import math
import socket
import time
from collections.abc import Callable

from ray.util.metrics import Gauge

from fuel_ray.types import NodeSpec, WindowMetrics

GAUGE_INTERVAL_S = 1.0


class NodeGauges:
    """A node's last window as Ray metrics, which Prometheus and the dashboard read."""

    def __init__(self, spec: NodeSpec) -> None:
        tags = {
            "host": socket.gethostname(),
            "gpu": spec.gpu_uuids[0],
            "kv_block_size": str(spec.kv_block_size),
        }
        self._gauges = [
            (Gauge(f"fuel_ray_{name}", description=what, tag_keys=tuple(tags)), value)
            for name, (what, value) in _GAUGES.items()
        ]
        for gauge, _ in self._gauges:
            gauge.set_default_tags(tags)
        self._shown_s = -math.inf

    def show(self, window: WindowMetrics) -> None:
        """Set them, at most once in GAUGE_INTERVAL_S: a simulated node has windows every millisecond."""
        now_s = time.monotonic()
        if now_s - self._shown_s >= GAUGE_INTERVAL_S:
            self._shown_s = now_s
            for gauge, value in self._gauges:
                gauge.set(value(window))


_GAUGES: dict[str, tuple[str, Callable[[WindowMetrics], float]]] = {
    "power_w": (
        "Mean power of the node's GPUs over the last control window in W",
        lambda window: window.energy_j / window.duration_s,
    ),
    "gpu_clock_mhz": ("SM clock in force in MHz", lambda window: window.knobs.gpu_clock_mhz),
    "batch_limit": ("Requests that may run at once", lambda window: window.knobs.batch_limit),
    "running": ("Requests that run", lambda window: window.running),
    "waiting": ("Requests that wait", lambda window: window.waiting),
    "kv_usage": ("Share of the KV blocks in use, 0..1", lambda window: window.kv_usage),
}
