"""What a vLLM server says of itself on /metrics: snapshots, and differences between them."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from itertools import chain
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from fuel_ray.errors import TelemetryError
from fuel_ray.histogram import Histogram
from fuel_ray.live.vllm.cache import (
    CACHE_METRIC,
    CacheConfig,
    cache_config,
    cache_info,
    engine_of,
    num_blocks,
)
from fuel_ray.types import LatencyName

Sample = tuple[Mapping[str, str], float]  # labels, value
Series = dict[str, list[Sample]]  # by sample name

_NEEDED = {
    "prompt_tokens": ("vllm:prompt_tokens_total",),
    "generation_tokens": ("vllm:generation_tokens_total",),
    "requests_succeeded": ("vllm:request_success_total",),
}
_OPTIONAL = {
    "prompt_tokens_cached": ("vllm:prompt_tokens_cached_total",),
    "preemptions": ("vllm:num_preemptions_total",),
    "prefix_queries": ("vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total"),
    "prefix_hits": ("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"),
}  # today's name first
HISTOGRAMS: dict[LatencyName, str] = {
    "ttft": "vllm:time_to_first_token_seconds",
    "tpot": "vllm:request_time_per_output_token_seconds",  # a request's mean, since 0.8
    "e2e": "vllm:e2e_request_latency_seconds",
}
_RUNNING, _WAITING = ("vllm:num_requests_running",), ("vllm:num_requests_waiting",)
_KV_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
_CONFIG, _STARTED = (CACHE_METRIC,), ("process_start_time_seconds",)

_PROCESS = "pid"  # the label that a gauge has of which each process shows its own

SCALARS = tuple(
    chain(*_NEEDED.values(), *_OPTIONAL.values(), _RUNNING, _WAITING, _KV_USAGE, _CONFIG, _STARTED)
)
_WANTED = (*SCALARS, *HISTOGRAMS.values())  # SCALARS alone can be parsed and lack the histograms
_LINES = (*_WANTED, *(f"# TYPE {name}" for name in _WANTED))  # skipping the others is 10 times as fast

_LAST_LINE = re.compile(
    r"#.*|[\w:]+(\{.*\})?\s+[-+]?((?P<integer>\d+)|\d*\.\d+|\d+(\.\d+)?e[-+]?\d\d+|Inf|NaN)\s*"
)
_INTEGERS = re.compile(r"(?m)^[\w:].* \d+$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """What a server has counted; None where the page does not say."""

    prompt_tokens: int
    generation_tokens: int
    requests_succeeded: int
    prompt_tokens_cached: int | None
    preemptions: int | None
    prefix_queries: int | None  # tokens
    prefix_hits: int | None  # tokens
    ttft: Histogram | None
    tpot: Histogram | None
    e2e: Histogram | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsSnapshot(Counters):
    """One page, summed over engines, counted since the server's start."""

    running: int
    waiting: int
    kv_usage: float  # share of the KV blocks in use, 0..1
    cache_config: CacheConfig | None
    cache_unknown: str | None  # what the page lacks, if there is no cache_config
    started_s: float | None  # Unix time at which the server process started


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsDelta(Counters):
    """What happened between two snapshots; None where one of them does not say."""

    seconds: float
    restarted: bool  # the server restarted in between: everything here counts from that restart

    @property
    def requests_per_s(self) -> float:
        return self.requests_succeeded / self.seconds

    @property
    def generation_tokens_per_s(self) -> float:
        return self.generation_tokens / self.seconds

    @property
    def prefix_hit_rate(self) -> float | None:
        """Share of the queried prompt tokens that were in the cache; None without queries."""
        if self.prefix_hits is None or not self.prefix_queries:
            return None
        return self.prefix_hits / self.prefix_queries


def parse_metrics(text: str, *, is_whole: bool = False) -> MetricsSnapshot:
    """Read a /metrics page of any vLLM from 0.6 on, complete or filtered.

    Whether nothing is missing at its end is known to whoever brought it; else by how it ends.

    Raises:
        TelemetryError: not a vLLM's page, cut off, or a metric is missing or has an impossible value.
    """
    series = _read(text, is_whole=is_whole)
    counted: dict[str, Any] = {field: _needed(series, names) for field, names in _NEEDED.items()}
    counted |= {field: _total(series, names) for field, names in _OPTIONAL.items()}
    counted |= {field: _histogram(series, name) for field, name in HISTOGRAMS.items()}
    cache = cache_config(cache_info(_find(series, _CONFIG)))
    return MetricsSnapshot(
        **counted,
        running=_state(series, _RUNNING),
        waiting=_state(series, _WAITING),
        kv_usage=_kv_usage(series),
        cache_config=None if isinstance(cache, str) else cache,
        cache_unknown=cache if isinstance(cache, str) else None,
        started_s=max((value for _, value in _find(series, _STARTED)), default=None),
    )


_COUNTERS = ("prompt_tokens", "generation_tokens", "requests_succeeded", "preemptions", "prefix_queries")


def difference(before: MetricsSnapshot, after: MetricsSnapshot, seconds: float) -> MetricsDelta:
    """What happened in the ``seconds`` between two snapshots of one server.

    Raises:
        TelemetryError: ``seconds`` is not positive.
    """
    if not seconds > 0:
        raise TelemetryError(f"two scrapes of /metrics are {seconds} s apart, which gives no rates")
    counted = {f.name: getattr(after, f.name) for f in fields(Counters)}
    if not (restarted := _restarted(before, after)):
        counted = {name: _minus(value, getattr(before, name)) for name, value in counted.items()}
    return MetricsDelta(seconds=seconds, restarted=restarted, **counted)


def _restarted(before: MetricsSnapshot, after: MetricsSnapshot) -> bool:
    if before.started_s is not None and after.started_s is not None and before.started_s != after.started_s:
        return True
    changes = (_minus(getattr(after, name), getattr(before, name)) for name in _COUNTERS)
    return any(change is not None and change < 0 for change in changes)


def _minus(after: Any, before: Any) -> Any:
    return None if after is None or before is None else after - before


def _read(text: str, *, is_whole: bool) -> Series:
    """The samples we want; a metric that is declared without samples has an empty list."""
    lines = [line for line in text.splitlines(keepends=True) if line.startswith(_LINES)]
    if not any("vllm:" in line for line in lines):
        raise TelemetryError(f"the page has no metrics of vLLM; it begins with {text[:60]!r}")
    if not _is_ended(text, is_whole=is_whole):
        raise TelemetryError(f"the /metrics page is cut off after {text[-60:]!r}")
    series: Series = {}
    try:
        for family in text_string_to_metric_families("".join(lines)):
            series.setdefault(family.name, [])
            for sample in family.samples:
                series.setdefault(sample.name, []).append((sample.labels, sample.value))
    except ValueError as error:
        raise TelemetryError(f"the /metrics page is malformed: {error}") from error
    return series


def _is_ended(text: str, *, is_whole: bool) -> bool:
    """Whether the last line is one; without a newline after it only if nothing is said to be missing."""
    before, _, last = text.rpartition("\n")
    if not last or last == "# EOF":
        return True
    line = _LAST_LINE.fullmatch(last) if is_whole else None
    # a gateway may have stored a page that was cut: Python's client writes 1.0, and 1 would be a part of that
    return line is not None and (
        not (line["integer"] or "").isdigit() or _INTEGERS.search(before) is not None
    )


def _find(series: Series, names: Sequence[str]) -> list[Sample]:
    """Samples under the first name that the page has, its values checked; empty if it has none."""
    name = next((name for name in names if name in series), names[0])
    samples = series.get(name, [])
    for _, value in samples:
        if not (math.isfinite(value) and value >= 0):
            raise TelemetryError(f"{name} is {value}")
    return samples


def _total(series: Series, names: Sequence[str]) -> int | None:
    """Of a counter: over engines, and over processes, which count what each of them served.

    Of two names the one that has counted more: the other is kept at 0 for old readers, or not yet filled.
    """
    there = [name for name in names if name in series or name.removesuffix("_total") in series]
    return max((round(sum(_parts(_find(series, (name,))).values())) for name in there), default=None)


def _needed(series: Series, names: Sequence[str]) -> int:
    if (total := _total(series, names)) is None:
        raise _missing(names)
    return total


def _parts(samples: Sequence[Sample]) -> dict[frozenset[tuple[str, str]], float]:
    """Each series once: the last of those that are given twice; processes only where there is no total."""
    found = {frozenset(labels.items()): value for labels, value in samples}
    totals = {labels for labels in found if not _of_process(labels)}
    return {k: value for k, value in found.items() if k in totals or k - _of_process(k) not in totals}


def _of_process(labels: frozenset[tuple[str, str]]) -> frozenset[tuple[str, str]]:
    return frozenset(label for label in labels if label[0] == _PROCESS)


def _missing(names: Sequence[str]) -> TelemetryError:
    return TelemetryError(f"no {' nor '.join(names)} on the /metrics page; this vLLM may have renamed it")


def _state(series: Series, names: Sequence[str]) -> int:
    """Of a gauge that counts: each process shows what it last heard of the whole, and 0 before that."""
    if not any(name in series for name in names):
        raise _missing(names)
    largest: dict[frozenset[tuple[str, str]], float] = {}
    for labels, value in _find(series, names):
        whole = frozenset(label for label in labels.items() if label[0] != _PROCESS)
        largest[whole] = max(value, largest.get(whole, 0.0))
    return round(sum(largest.values()))


def _kv_usage(series: Series) -> float:
    """Mean over engines, weighted by their blocks where all are known; by today's name if it is ever set."""
    today, older = (_usages(series, name) for name in _KV_USAGE)
    by_engine = {engine: today.get(engine) or older.get(engine, 0.0) for engine in (*today, *older)}
    if not by_engine:
        raise _missing(_KV_USAGE)
    if (most := max(by_engine.values())) > 1.0 + 1e-6:
        raise TelemetryError(f"{_KV_USAGE[0]} is {most}; expected a share, 0..1")
    blocks = {engine: num_blocks(labels) for engine, labels in cache_info(_find(series, _CONFIG)).items()}
    weights = [blocks.get(engine) or 0 for engine in by_engine]
    weights = weights if all(weights) else [1] * len(by_engine)
    weighted = sum(weight * value for weight, value in zip(weights, by_engine.values(), strict=True))
    return min(1.0, weighted / sum(weights))


def _usages(series: Series, name: str) -> dict[str, float]:
    """By engine, what the one process that hears of it shows: the others stay at 0."""
    found: dict[str, float] = {}
    for labels, value in _find(series, (name,)):
        found[engine_of(labels)] = max(value, found.get(engine_of(labels), 0.0))
    return found


def _histogram(series: Series, name: str) -> Histogram | None:
    """Over engines and processes; without requests if it is declared and nothing more."""
    parts = _parts(_find(series, (f"{name}_bucket",)))
    if not parts:
        return Histogram((), (), 0, 0.0) if name in series else None
    by_part: dict[frozenset[tuple[str, str]], dict[float, int]] = {}
    for labels, value in parts.items():
        own = dict(labels)
        bound_s = float(own.pop("le", "nan"))
        by_part.setdefault(frozenset(own.items()), {})[bound_s] = round(value)
    sums = _parts(_find(series, (f"{name}_sum",)))
    found = [_one(name, counts, sums.get(labels)) for labels, counts in by_part.items()]
    return reduce(Histogram.__add__, found)


def _one(name: str, counts: Mapping[float, int], sum_s: float | None) -> Histogram:
    bounds_s = tuple(sorted(counts))
    cumulative = tuple(counts[bound_s] for bound_s in bounds_s)
    if not math.isinf(bounds_s[-1]) or list(cumulative) != sorted(cumulative):
        raise TelemetryError(f"{name} is incomplete or not cumulative on the /metrics page")
    return Histogram(bounds_s, cumulative, cumulative[-1], sum_s)
