"""What a server's own counters say about requests that somebody else sends."""

from collections import deque
from dataclasses import dataclass

from fuel_ray.histogram import Histogram
from fuel_ray.live.vllm.metrics import MetricsDelta, MetricsSnapshot
from fuel_ray.types import LatencyName


@dataclass(frozen=True, slots=True)
class Served:
    """The requests of one window, whoever counted them."""

    arrivals: int
    completed: int
    oldest_wait_s: float
    ttfts_s: tuple[float, ...]
    tpots_s: tuple[float, ...]
    e2es_s: tuple[float, ...]
    late_sends: int = 0
    waits_s: tuple[float, ...] | None = None  # of each request, as a window has it, like the next one
    waits_before_s: tuple[float, ...] | None = None
    histograms: dict[LatencyName, Histogram] | None = None  # None: request by request


def came(before: MetricsSnapshot, after: MetricsSnapshot, delta: MetricsDelta) -> int:
    """Requests that came between two snapshots, by the server's counters."""
    there = after.running + after.waiting - before.running - before.waiting
    return delta.requests_succeeded + there


class ForeignLoad:
    """Latencies from the server's histograms, exact to their buckets, and the oldest wait from its counters.

    vLLM admits first come, first served: the oldest request without a first token is the one whose number
    follows the count of first tokens. When it came is known to the window, in which arrivals are taken to be
    evenly spread.
    """

    def __init__(self) -> None:
        self._waiting: deque[_Batch] = deque()

    def window(
        self, before: MetricsSnapshot, after: MetricsSnapshot, delta: MetricsDelta, *, end_s: float
    ) -> Served:
        """What happened between two snapshots ``delta.seconds`` apart, the later one of ``end_s``."""
        arrivals = max(0, came(before, after, delta))
        if arrivals:
            self._waiting.append(_Batch(end_s - delta.seconds, end_s, arrivals, arrivals))
        self._drop(0 if delta.ttft is None else delta.ttft.count)
        most = after.waiting if delta.ttft is None else after.running + after.waiting
        self._drop(sum(batch.left for batch in self._waiting) - most)  # aborted before their first token
        latencies: dict[LatencyName, Histogram | None]
        latencies = {"ttft": delta.ttft, "tpot": delta.tpot, "e2e": delta.e2e}
        return Served(
            arrivals=arrivals,
            completed=delta.requests_succeeded,
            oldest_wait_s=end_s - self._waiting[0].oldest_s if self._waiting else 0.0,
            ttfts_s=_samples_s(delta.ttft),
            tpots_s=_samples_s(delta.tpot),
            e2es_s=_samples_s(delta.e2e),
            histograms={name: found for name, found in latencies.items() if found is not None},
        )

    def _drop(self, requests: int) -> None:
        """Take the oldest requests out."""
        while requests > 0 and self._waiting:
            batch = self._waiting[0]
            taken = min(requests, batch.left)
            batch.left -= taken
            requests -= taken
            if not batch.left:
                self._waiting.popleft()


@dataclass(slots=True)
class _Batch:
    """Requests that came within one window."""

    begin_s: float
    end_s: float
    came: int
    left: int  # without a first token

    @property
    def oldest_s(self) -> float:
        """When the oldest of those that are left came, if arrivals were evenly spread."""
        return self.begin_s + (self.end_s - self.begin_s) * (self.came - self.left + 0.5) / self.came


def _samples_s(histogram: Histogram | None) -> tuple[float, ...]:
    return () if histogram is None else histogram.samples_s()
