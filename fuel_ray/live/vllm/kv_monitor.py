"""Scrapes of /metrics over HTTP, once or from a background thread."""

import http.client
import math
import time
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from typing import Self
from urllib.parse import quote, urlsplit

from fuel_ray.errors import ConfigError, TelemetryError
from fuel_ray.live.sampling import Missing, Sampler
from fuel_ray.live.vllm.endpoint import Endpoint, decoded, with_other_slash
from fuel_ray.live.vllm.metrics import SCALARS, MetricsSnapshot, difference, parse_metrics

_FILTER = "/?" + "&".join(f"name[]={quote(name)}" for name in SCALARS)  # without the slash vLLM ignores it
_MAX_PAGE_BYTES = 2**28  # a page of 64 engines is 3 MB; the deadline is the nearer bound
_RATE_WINDOW_S = 1.0  # counters move once per engine step: rates need several
_MIN_INTERVAL_S = 0.05
_FULL_PAGE_FROM_S = 0.5  # a full page costs the server 6 ms, a filtered one 0.33 ms (vLLM 0.32)

TimedSnapshot = tuple[float, MetricsSnapshot]  # monotonic s


class MetricsClient:
    """One kept-alive connection to a server's /metrics; for one thread at a time.

    Raises:
        TelemetryError: ``base_url`` is not an address of a server.
    """

    def __init__(self, base_url: str | Endpoint, *, timeout_s: float = 2.0) -> None:
        try:
            self._endpoint = Endpoint.of(base_url)
        except ConfigError as error:
            raise TelemetryError(str(error)) from error
        self.url = self._endpoint.metrics_url
        self._timeout_s = timeout_s
        self._path = urlsplit(self.url).path
        self._headers = self._endpoint.headers(self.url)
        self._connection = self._endpoint.connection(self.url, timeout_s)
        self._filter_works = True

    def scrape(self, *, filtered: bool = False) -> MetricsSnapshot:
        """Read the page now; ``filtered`` leaves the histograms out where the server can.

        Raises:
            TelemetryError: no answer in time, or not a page of vLLM's; the message has the URL.
        """
        if filtered and self._filter_works:
            try:
                return self._page(self._path.rstrip("/") + _FILTER)
            except _PageError:
                snapshot = self._page(self._path)
                self._filter_works = False
                return snapshot
        return self._page(self._path)

    def close(self) -> None:
        """Drop the connection; a later scrape opens a new one."""
        self._connection.close()

    def _page(self, path: str) -> MetricsSnapshot:
        response, body = self._get(path)
        location = response.getheader("Location")
        if path == self._path and (other := with_other_slash(self.url, response.status, location)):
            self._path = urlsplit(other).path
            response, body = self._get(self._path)
        try:
            if response.status != http.client.OK:
                words = body.decode(errors="replace")
                raise TelemetryError(
                    self._endpoint.refusal(self.url, response.status, location=location, words=words)
                )
            return parse_metrics(body.decode(), is_whole=_is_whole(response, body))
        except (TelemetryError, UnicodeDecodeError) as error:
            raise _PageError(f"{self.url}: {error}") from error

    def _get(self, path: str) -> tuple[http.client.HTTPResponse, bytes]:
        deadline_s = time.monotonic() + self._timeout_s
        try:
            response = self._response(path)
            body = self._body(response, deadline_s)
            encoding = response.getheader("Content-Encoding")
            return response, decoded(body, encoding, most_bytes=_MAX_PAGE_BYTES)
        except (OSError, http.client.HTTPException) as error:
            self.close()  # the rest of the page may still be in it
            raise TelemetryError(f"{self.url}: {self._endpoint.trouble(self.url, error)}") from error
        except TelemetryError as error:
            self.close()
            raise TelemetryError(f"{self.url}: {error}") from error

    def _response(self, path: str) -> http.client.HTTPResponse:
        kept_alive = self._connection.sock is not None
        try:
            self._connection.request("GET", path, headers=self._headers)
            return self._connection.getresponse()
        except (ConnectionError, http.client.BadStatusLine):
            self.close()
            if not kept_alive:  # a server drops idle connections, uvicorn after 5 s: that is no fault
                raise
        self._connection.request("GET", path, headers=self._headers)
        return self._connection.getresponse()

    def _body(self, response: http.client.HTTPResponse, deadline_s: float) -> bytes:
        body = bytearray()
        while chunk := response.read1(2**16):
            body += chunk
            if len(body) > _MAX_PAGE_BYTES:
                raise TelemetryError(f"the page is larger than {_MAX_PAGE_BYTES} bytes")
            if time.monotonic() > deadline_s:
                raise TelemetryError(f"no complete page within {self._timeout_s} s")
        if response.length:
            raise TelemetryError(f"the page is cut off, {response.length} bytes are missing")
        response.close()  # read1 does not notice that it was the end, and the connection would stay busy
        return bytes(body)


class _PageError(TelemetryError):
    """The server answered, but not with a page of vLLM's."""


def _is_whole(response: http.client.HTTPResponse, body: bytes) -> bool:
    """Whether HTTP itself says where the page ends; else the connection's end may be the server's.

    Raises:
        TelemetryError: it is in a format with an end mark, which is not there.
    """
    if "openmetrics" in response.getheader("Content-Type", "") and not body.rstrip().endswith(b"\n# EOF"):
        raise TelemetryError("the page is cut off: it has no # EOF")
    compressed = response.getheader("Content-Encoding", "identity") != "identity"  # which has an end mark
    return compressed or response.chunked or response.length == 0


class KVCacheMonitor:
    """Watches the KV cache and queues of a server from a background thread.

    ``interval`` is in seconds. From 0.5 s on it reads full pages, histograms included; below, filtered ones.

    Raises:
        ConfigError: ``interval`` is below 0.05 s.
        TelemetryError: ``base_url`` is not an address of a server.
    """

    def __init__(
        self,
        base_url: str | Endpoint,
        interval: float = 0.5,
        *,
        timeout_s: float = 2.0,
        max_samples: int = 100_000,
    ) -> None:
        if not (math.isfinite(interval) and interval >= _MIN_INTERVAL_S):
            raise ConfigError(f"the monitor's interval is {interval} s; at least {_MIN_INTERVAL_S}")
        self.interval_s = interval
        self._timeout_s = timeout_s
        self._client = MetricsClient(base_url, timeout_s=timeout_s)
        read = partial(self._client.scrape, filtered=interval < _FULL_PAGE_FROM_S)
        name = f"the monitor of {self._client.url}"
        self._sampler = Sampler(read, interval, name=name, capacity=max_samples)

    def start(self) -> None:
        """Begin to scrape; the first state may take as long as the server takes to answer."""
        self._sampler.start()

    def stop(self) -> None:
        """Stop scraping and close the connection; the trace stays. Safe to call twice."""
        self._sampler.stop()
        self._client.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def trace(self) -> tuple[TimedSnapshot, ...]:
        """All samples kept so far with their monotonic times; a failed scrape leaves a gap."""
        return tuple((sample.at_s, sample.value) for sample in self._sampler.kept()[0])

    def failures(self) -> tuple[Missing, ...]:
        """The scrapes that failed, of those that are still kept."""
        return self._sampler.kept()[1]

    def get_current_state(self) -> dict[str, float]:
        """The state now; a key that is unknown is absent. ``kv_cache_usage`` and its like are 0..1.

        Throughputs and the hit rate are over the last second, or two intervals if those are longer.

        Raises:
            TelemetryError: not started, or the server gave no good answer for the latest scrape.
        """
        newest = self._sampler.latest(timeout_s=2 * self.interval_s + 2 * self._timeout_s)
        if time.monotonic() - newest.at_s > 2 * self.interval_s + self._timeout_s:
            raise TelemetryError(f"{self._client.url}: no answer for more than {2 * self.interval_s:g} s")
        trace = self.trace()
        since_s = newest.at_s - max(_RATE_WINDOW_S, 2 * self.interval_s)
        return state(trace[max(0, bisect_right(trace, since_s, key=itemgetter(0)) - 1) :])


def state(recent: Sequence[TimedSnapshot]) -> dict[str, float]:
    """The latest snapshot under the names that users of the monitor know, with rates since the first one."""
    (first_s, first), (last_s, last) = recent[0], recent[-1]
    found: dict[str, float] = {
        "kv_cache_usage": last.kv_usage,
        "cache_usage_perc": last.kv_usage,
        "num_requests_running": last.running,
        "num_requests_waiting": last.waiting,
    }
    if (config := last.cache_config) is not None:
        used_blocks = config.used_blocks(last.kv_usage)
        found["kv_blocks_used_ratio"] = used_blocks / config.usable_blocks
        found["used_blocks"] = used_blocks
        found["free_blocks"] = config.usable_blocks - used_blocks
        found["used_tokens"] = used_blocks * config.block_size
    if last_s > first_s:
        delta = difference(first, last, last_s - first_s)
        found["request_throughput"] = delta.requests_per_s
        found["token_throughput"] = delta.generation_tokens_per_s
        if delta.prefix_hit_rate is not None:
            found["prefix_cache_hit_rate"] = delta.prefix_hit_rate
    return found
