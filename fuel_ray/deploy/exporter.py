"""The controller's own /metrics, for Prometheus and for ``fuel-ray watch``."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from fuel_ray.control import StepRecord
from fuel_ray.deploy.deployment import Attached
from fuel_ray.errors import ConfigError, FuelRayError, NodeError, TelemetryError
from fuel_ray.histogram import Histogram
from fuel_ray.live.vllm.endpoint import Endpoint, ask
from fuel_ray.metrics import attainment_bounds, window_attainment
from fuel_ray.types import Knobs, LatencyName, Slo, WindowMetrics

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
_KNOBS = {"gpu_clock_mhz": "GPU clock in MHz", "batch_limit": "Batch limit in requests"}
_HISTOGRAMS: dict[LatencyName, str] = {
    "ttft": "Time to first token of the requests whose first token came",
    "tpot": "Mean time per output token of the requests that finished",
    "e2e": "Time from arrival to the last token of the requests that finished",
}
_BY_BUCKET = (
    "in all measured windows, as the engine counted them: counts at its bucket bounds and the sum are exact, "
    "a quantile is known to its bucket"
)
_JUDGED = (
    "Requests of all measured windows by limit: within, outside, or unsure where the limit lies inside a "
    "bucket of the engine's and the window's mean leaves both possible. A limit that is a bucket bound has "
    "no unsure ones. TTFT counts when the first token came, TPOT and e2e when the request finished"
)


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
        self._slo_gauges(gauge)
        self._judged = _judged(slo, gauge, counter)
        self._latencies = _Latencies()
        registry.register(self._latencies)
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

    def _slo_gauges(self, gauge: Callable[..., Gauge]) -> None:
        self._attainment = gauge(
            "slo_attainment",
            "Smallest share of a limit met in the last window, an estimate within its bounds; NaN: unknown",
        )
        self._bounds = gauge("slo_attainment_bounds", "What is certain of it", ["which"])
        self._judge(None, None)

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
        self._count_limits(window)
        self._latencies.add(window)
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

    def _count_limits(self, window: WindowMetrics) -> None:
        """Count what is certain of each limit, and beside it what is not."""
        for name, limit_s in self._slo.limits_s.items():
            fewest, most = window.misses(name, limit_s)
            counts = {"within": window.count(name) - most, "outside": fewest, "unsure": most - fewest}
            for result, count in counts.items():
                self._judged.labels(name, result).inc(count)

    def _age_s(self) -> float:
        return float("nan") if self._window_s is None else self._clock() - self._window_s


class _Latencies(Collector):
    """The engine's own histograms of the windows that were measured."""

    def __init__(self) -> None:
        self._totals: dict[LatencyName, Histogram] = {}

    def add(self, window: WindowMetrics) -> None:
        """Count the requests of one more window."""
        for name, histogram in (window.histograms or {}).items():
            self._totals[name] = self._totals.get(name, Histogram((), (), 0, 0.0)) + histogram

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """A histogram per latency; without a line before the first request."""
        for name, what in _HISTOGRAMS.items():
            family = HistogramMetricFamily(f"fuel_ray_{name}_seconds", f"{what}, {_BY_BUCKET}")
            total = self._totals.get(name)
            if total is not None and total.upper_bounds_s:
                bounds = map(floatToGoString, total.upper_bounds_s)
                buckets = list(zip(bounds, map(float, total.cumulative_counts), strict=True))
                family.add_metric([], buckets, total.sum_s)
            yield family


def _judged(slo: Slo, gauge: Callable[..., Gauge], counter: Callable[..., Counter]) -> Counter:
    """The counter of requests by limit, which begins at 0; the limits and the share are beside it."""
    limits_s = gauge("slo_limit_seconds", "Limit of the SLO", ["limit"])
    share = gauge("slo_share", "Share of requests that must meet the SLO; NaN: its means must")
    share.set(_or_nan(slo.share))
    judged = counter("slo_requests", _JUDGED, ["limit", "result"])
    for name, limit_s in slo.limits_s.items():
        limits_s.labels(name).set(limit_s)
        for result in ("within", "outside", "unsure"):
            judged.labels(name, result)
    return judged


def _or_nan(value: float | None) -> float:
    """What Prometheus has for unknown."""
    return math.nan if value is None else value


def _serve(port: int, host: str, registry: CollectorRegistry) -> tuple[WSGIServer, threading.Thread]:
    try:
        return start_http_server(port, host.strip("[]"), registry)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--metrics-port {port}: cannot listen on {host}: {getattr(error, 'strerror', None) or error}; "
            "choose another port"
        ) from error


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
    except NodeError as error:
        if isinstance(error.__cause__, ConnectionRefusedError):
            starts = f"start fuel-ray deploy with --metrics-port {urlsplit(url).port or 'PORT'}"
            raise TelemetryError(f"no controller at {url} (connection refused): {starts}") from error
        raise TelemetryError(f"no controller: {error}") from error
    except ValueError as error:
        raise TelemetryError(f"{url}/metrics does not answer like a controller: {error}") from error
    samples = [s for family in families for s in family.samples if s.name.startswith("fuel_ray_")]
    info = [s.labels for s in samples if s.name == "fuel_ray_info"]
    if not info:
        raise TelemetryError(f"{url}/metrics is not a controller of fuel_ray: it has no fuel_ray_info")
    values = {
        (s.name.removeprefix("fuel_ray_"), next(iter(s.labels.values()), "")): s.value
        for s in samples
        if len(s.labels) <= 1
    }
    return Page(values, info[0])
