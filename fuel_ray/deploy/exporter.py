"""The controller's own /metrics, for Prometheus and for ``fuel-ray watch``."""

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
from prometheus_client.parser import text_string_to_metric_families

from fuel_ray.control import StepRecord
from fuel_ray.deploy.deployment import Attached
from fuel_ray.errors import ConfigError, FuelRayError, TelemetryError
from fuel_ray.metrics import window_attainment
from fuel_ray.types import Knobs, Slo

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says


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
        self._set_up(registry)
        Gauge("fuel_ray_info", "What runs", tuple(info), registry=registry).labels(**info).set(1)
        self._server, self._thread = _serve(port, host, registry)

    def _set_up(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(f"fuel_ray_{name}", what, labels, registry=registry)

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"fuel_ray_{name}", what, labels, registry=registry)

        self._clock_mhz = gauge("gpu_clock_mhz", "GPU clock: chosen, permitted by the guard, applied", "kind")
        self._limit = gauge("batch_limit", "Batch limit: chosen, permitted by the guard, applied", "kind")
        self._power_w = gauge("power_watts", "Mean GPU power of the last window")
        self._reward = gauge("reward", "Reward of the last window: negative watts with the price of misses")
        self._attainment = gauge("slo_attainment", "Smallest share of a limit met in the last window")
        self._load = gauge("requests", "Requests at the end of the last window", "state")
        self._wait_s = gauge("oldest_wait_seconds", "Age of the oldest request without a first token")
        self._latency_s = gauge("latency_seconds", "Mean of the last window that had any", "which")
        self._kv_usage = gauge("kv_usage", "Share of the KV blocks in use")
        self._decision_s = gauge("decision_seconds", "From a window's metrics to knobs")
        self._is_attached = gauge("attached", "1 while the server is under control")
        gauge("window_age_seconds", "Since the last window was measured").set_function(self._age_s)
        self._energy_j = counter("energy_joules", "GPU energy of all measured windows")
        self._saved_j = gauge(
            "saved_joules", "Modelled saving so far of what was permitted over what was in force"
        )
        self._tokens = counter("output_tokens", "Output tokens of all measured windows")
        self._completed = counter("requests_completed", "Requests that finished")
        self._windows = counter("windows", "Windows by how they ended", "result")
        self._overruled = counter("overruled", "Windows in which the guard overruled the policy", "reason")
        self._errors = counter("errors", "What went wrong, by class", "error")

    def attached(self, attached: Attached) -> None:
        """The server is under control."""
        self._is_attached.set(1)

    def measured(self, record: StepRecord, *, decision_s: float, saved_j: float | None) -> None:
        """One more window."""
        window = record.metrics
        self._window_s = self._clock()
        for kind, knobs in (
            ("chosen", record.chosen),
            ("permitted", record.verdict.knobs),
            ("applied", record.applied),
        ):
            self._clock_mhz.labels(kind).set(knobs.gpu_clock_mhz)
            self._limit.labels(kind).set(knobs.batch_limit)
        self._power_w.set(window.energy_j / window.duration_s)
        self._reward.set(record.reward)
        self._attainment.set(window_attainment(window, self._slo))
        self._load.labels("running").set(window.running)
        self._load.labels("waiting").set(window.waiting)
        self._wait_s.set(window.oldest_wait_s)
        for which, values_s in window.latencies_s.items():
            if values_s:
                self._latency_s.labels(which).set(sum(values_s) / len(values_s))
        self._kv_usage.set(window.kv_usage)
        self._decision_s.set(decision_s)
        self._energy_j.inc(window.energy_j)
        self._saved_j.inc(saved_j or 0.0)
        self._tokens.inc(window.output_tokens)
        self._completed.inc(window.completed)
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

    def _age_s(self) -> float:
        return float("nan") if self._window_s is None else self._clock() - self._window_s


def _serve(port: int, host: str, registry: CollectorRegistry) -> tuple[WSGIServer, threading.Thread]:
    try:
        return start_http_server(port, host, registry)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--metrics-port {port} on {host}: {error}") from error


@dataclass(frozen=True, slots=True)
class Page:
    """A controller's /metrics, as numbers by name and label value."""

    values: Mapping[tuple[str, str], float]  # (name without fuel_ray_, value of its only label or "")
    info: Mapping[str, str]

    def get(self, name: str, label: str = "") -> float | None:
        """The number; None if the page does not have it."""
        return self.values.get((name, label))

    def labelled(self, name: str) -> dict[str, float]:
        """All numbers of a name by label."""
        return {label: value for (found, label), value in self.values.items() if found == name}


def read_page(url: str, *, timeout_s: float = 2.0) -> Page:
    """What a controller says of itself; TelemetryError without an answer of one."""
    try:
        with _DIRECT.open(f"{url.rstrip('/')}/metrics", timeout=timeout_s) as answer:
            text = answer.read(2**20).decode()
        families = list(text_string_to_metric_families(text))
    except (OSError, ValueError) as error:
        raise TelemetryError(f"{url}/metrics does not answer as a controller does: {error}") from error
    samples = [
        sample for family in families for sample in family.samples if sample.name.startswith("fuel_ray_")
    ]
    info = [sample.labels for sample in samples if sample.name == "fuel_ray_info"]
    if not info:
        raise TelemetryError(f"{url}/metrics is not a controller's: it has no fuel_ray_info")
    values = {
        (sample.name.removeprefix("fuel_ray_"), next(iter(sample.labels.values()), "")): sample.value
        for sample in samples
        if len(sample.labels) <= 1
    }
    return Page(values, info[0])
