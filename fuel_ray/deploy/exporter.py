"""The controller's own /metrics, for Prometheus and for ``fuel-ray watch``."""

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
from prometheus_client.parser import text_string_to_metric_families

from fuel_ray.control import StepRecord
from fuel_ray.deploy.deployment import Attached
from fuel_ray.errors import ConfigError, FuelRayError, NodeError, TelemetryError
from fuel_ray.live.vllm.endpoint import Endpoint, ask
from fuel_ray.metrics import attainment_bounds, window_attainment
from fuel_ray.types import Knobs, Slo

_GAUGES: dict[str, tuple[str, Callable[[StepRecord], float | None]]] = {
    "power_watts": ("Mean GPU power of the last window", lambda r: r.metrics.energy_j / r.metrics.duration_s),
    "reward": ("Reward of the last window: negative watts with the price of misses", lambda r: r.reward),
    "oldest_wait_seconds": ("Age of the oldest request without a token", lambda r: r.metrics.oldest_wait_s),
    "kv_usage": ("Share of the KV blocks in use", lambda r: r.metrics.kv_usage),
}
_COUNTERS: dict[str, tuple[str, Callable[[StepRecord], float]]] = {
    "energy_joules": ("GPU energy of all measured windows", lambda r: r.metrics.energy_j),
    "output_tokens": ("Output tokens of all measured windows", lambda r: r.metrics.output_tokens),
    "requests_completed": ("Requests that finished", lambda r: r.metrics.completed),
}
_KNOBS = {"gpu_clock_mhz": "GPU clock", "batch_limit": "Batch limit"}


class Exporter:
    """Serves what a deployment does on ``/metrics`` of a port.

    Raises:
        ConfigError: the port cannot be listened on.
    """

    def __init__(
        self,
        port: int,
        slo: Slo,
        *,
        host: str,
        info: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slo, self._clock = slo, clock
        self._window_s: float | None = None
        registry = CollectorRegistry()
        gauge = partial(Gauge, namespace="fuel_ray", registry=registry)
        counter = partial(Counter, namespace="fuel_ray", registry=registry)
        self._gauges = {gauge(name, what): value for name, (what, value) in _GAUGES.items()}
        self._counters = {counter(name, what): value for name, (what, value) in _COUNTERS.items()}
        kinds = "chosen, permitted by the guard, applied"
        self._knobs = {name: gauge(name, f"{what}: {kinds}", ["kind"]) for name, what in _KNOBS.items()}
        self._attainment = gauge(
            "slo_attainment",
            "Smallest share of a limit met in the last window, an estimate within its bounds; NaN: unknown",
        )
        self._bounds = gauge("slo_attainment_bounds", "What is certain of it", ["which"])
        self._judge(None, None)
        self._load = gauge("requests", "Requests at the end of the last window", ["state"])
        self._latency_s = gauge(
            "latency_seconds", "Exact mean of the last window with requests; NaN: unknown", ["which"]
        )
        self._decision_s = gauge("decision_seconds", "From a window's metrics to knobs")
        self._is_attached = gauge("attached", "1 while the server is under control")
        self._saved_j = gauge(
            "saved_joules", "Modelled saving so far of what was permitted over what was in force"
        )
        self._windows = counter("windows", "Windows by how they ended", ["result"])
        self._overruled = counter("overruled", "Windows in which the guard overruled the policy", ["reason"])
        self._errors = counter("errors", "What went wrong, by class", ["error"])
        gauge("window_age_seconds", "Since the last window was measured").set_function(self._age_s)
        gauge("info", "What runs", tuple(info)).labels(**info).set(1)
        self._server, self._thread = _serve(port, host, registry)

    def attached(self, attached: Attached) -> None:
        """The server is under control."""
        self._is_attached.set(1)

    def measured(self, record: StepRecord, *, decision_s: float, saved_j: float | None) -> None:
        """One more window."""
        window = record.metrics
        self._window_s = self._clock()
        kinds = {"chosen": record.chosen, "permitted": record.verdict.knobs, "applied": record.applied}
        for name, gauge in self._knobs.items():
            for kind, knobs in kinds.items():
                gauge.labels(kind).set(getattr(knobs, name))
        for gauge, value in self._gauges.items():
            gauge.set(_or_nan(value(record)))
        for counter, value in self._counters.items():
            counter.inc(value(record))
        self._judge(window_attainment(window, self._slo), attainment_bounds(window, self._slo))
        self._load.labels("running").set(window.running)
        self._load.labels("waiting").set(window.waiting)
        for which, values_s in window.latencies_s.items():
            if values_s or not window.measured(which):
                self._latency_s.labels(which).set(_or_nan(window.mean_s(which)))
        self._decision_s.set(decision_s)
        self._saved_j.inc(saved_j or 0.0)
        self._windows.labels("measured").inc()
        for reason in record.verdict.reasons:
            self._overruled.labels(reason).inc()

    def lost(self, step: int, chosen: Knobs, error: FuelRayError) -> None:
        """A window that could not be measured."""
        self._windows.labels("lost").inc()
        self._errors.labels(type(error).__name__).inc()

    def detached(self, error: FuelRayError) -> None:
        """The server is not under control."""
        self._is_attached.set(0)
        self._errors.labels(type(error).__name__).inc()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(2.0)

    def _judge(self, attainment: float | None, bounds: tuple[float, float] | None) -> None:
        self._attainment.set(_or_nan(attainment))
        for which, value in zip(("lowest", "highest"), bounds or (None, None), strict=True):
            self._bounds.labels(which).set(_or_nan(value))

    def _age_s(self) -> float:
        return float("nan") if self._window_s is None else self._clock() - self._window_s


def _or_nan(value: float | None) -> float:
    """What Prometheus has for unknown."""
    return math.nan if value is None else value


def _serve(port: int, host: str, registry: CollectorRegistry) -> tuple[WSGIServer, threading.Thread]:
    try:
        return start_http_server(port, host.strip("[]"), registry)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--metrics-port {port} on {host}: {error}") from error


@dataclass(frozen=True, slots=True)
class Page:
    """A controller's /metrics, as numbers by name and label value."""

    values: Mapping[tuple[str, str], float]  # (name without fuel_ray_, value of its only label or "")
    info: Mapping[str, str]

    def get(self, name: str, label: str = "") -> float | None:
        """The number; None if the page does not have it, or says that it is unknown."""
        value = self.values.get((name, label))
        return None if value is None or math.isnan(value) else value

    def labelled(self, name: str) -> dict[str, float]:
        """All numbers of a name by label."""
        return {label: value for (found, label), value in self.values.items() if found == name}


def read_page(server: str | Endpoint, *, timeout_s: float = 2.0) -> Page:
    """What a controller says of itself; TelemetryError without an answer of one."""
    controller = Endpoint.of(server)
    url = controller.url
    try:
        text = ask(controller, "/metrics", timeout_s=timeout_s).decode()
        families = list(text_string_to_metric_families(text))
    except (NodeError, ValueError) as error:
        raise TelemetryError(f"{url}/metrics does not answer as a controller does: {error}") from error
    samples = [s for family in families for s in family.samples if s.name.startswith("fuel_ray_")]
    info = [s.labels for s in samples if s.name == "fuel_ray_info"]
    if not info:
        raise TelemetryError(f"{url}/metrics is not a controller's: it has no fuel_ray_info")
    values = {
        (s.name.removeprefix("fuel_ray_"), next(iter(s.labels.values()), "")): s.value
        for s in samples
        if len(s.labels) <= 1
    }
    return Page(values, info[0])
