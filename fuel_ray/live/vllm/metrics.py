"""What a vLLM server says of itself on /metrics: snapshots, and differences between them."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from fuel_ray.errors import TelemetryError

Sample = tuple[Mapping[str, str], float]  # labels, value
Series = dict[str, list[Sample]]  # by sample name

_NEEDED = {
    "running": ("vllm:num_requests_running",),
    "waiting": ("vllm:num_requests_waiting",),
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
_HISTOGRAMS = {
    "ttft": "vllm:time_to_first_token_seconds",
    "tpot": "vllm:request_time_per_output_token_seconds",  # a request's mean, since 0.8
    "e2e": "vllm:e2e_request_latency_seconds",
}
_KV_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
_CONFIG, _STARTED = ("vllm:cache_config_info",), ("process_start_time_seconds",)

SCALARS = tuple(chain(*_NEEDED.values(), *_OPTIONAL.values(), _KV_USAGE, _CONFIG, _STARTED))
_WANTED = (*SCALARS, *_HISTOGRAMS.values())  # SCALARS alone can be parsed and lack the histograms
_LINES = (*_WANTED, *(f"# TYPE {name}" for name in _WANTED))  # skipping the others is 10 times as fast

_LAST_LINE = re.compile(
    r"#.*|[\w:]+(\{.*\})?\s+[-+]?((?P<integer>\d+)|\d*\.\d+|\d+(\.\d+)?e[-+]?\d\d+|Inf|NaN)\s*"
)
_INTEGERS = re.compile(r"(?m)^[\w:].* \d+$")


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts below each bound; of a whole server life, or of a window after ``difference``."""

    upper_bounds_s: tuple[float, ...]  # ascending, the last is inf
    cumulative_counts: tuple[int, ...]  # as many
    count: int

    def __sub__(self, before: "Histogram") -> "Histogram | None":
        """The samples since ``before``; None if the bounds changed."""
        if self.upper_bounds_s != before.upper_bounds_s:
            return None
        counts = tuple(map(int.__sub__, self.cumulative_counts, before.cumulative_counts))
        return Histogram(self.upper_bounds_s, counts, self.count - before.count)

    def samples_s(self) -> tuple[float, ...]:
        """As many values as were counted, evenly spread within each bucket: exact to the bucket.

        The share below any bound is exact. What lies above the last finite bound counts as that bound.
        """
        found: list[float] = []
        below_s, below = 0.0, 0
        for bound_s, counted in zip(self.upper_bounds_s, self.cumulative_counts, strict=True):
            width_s = bound_s - below_s if math.isfinite(bound_s) else 0.0
            n = counted - below
            found.extend(below_s + width_s * (i + 0.5) / n for i in range(n))
            below_s, below = min(bound_s, below_s + width_s), counted
        return tuple(found)


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The KV cache of all engines."""

    block_size: int  # tokens
    num_gpu_blocks: int

    def used_blocks(self, kv_usage: float) -> int:
        """Blocks in use; vLLM's usage is a share of ``usable_blocks``."""
        return round(kv_usage * self.usable_blocks)

    @property
    def usable_blocks(self) -> int:
        """All but the null block, which vLLM V1 never hands out (block_pool.py, get_usage)."""
        return max(1, self.num_gpu_blocks - 1)


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
    counted: dict[str, Any] = {field: _total(series, names) for field, names in _NEEDED.items()}
    counted |= {field: _total_or_none(series, names) for field, names in _OPTIONAL.items()}
    counted |= {field: _histogram(series, name) for field, name in _HISTOGRAMS.items()}
    return MetricsSnapshot(
        **counted,
        kv_usage=_kv_usage(series),
        cache_config=_cache_config(series),
        started_s=max((value for _, value in _find(series, _STARTED)), default=None),
    )


_COUNTERS = ("prompt_tokens", "generation_tokens", "requests_succeeded", "preemptions", "prefix_queries")


def difference(before: MetricsSnapshot, after: MetricsSnapshot, seconds: float) -> MetricsDelta:
    """What happened in the ``seconds`` between two snapshots of one server.

    Raises:
        TelemetryError: ``seconds`` is not positive.
    """
    if not seconds > 0:
        raise TelemetryError(f"no rates over {seconds} s between two scrapes of /metrics")
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
        raise TelemetryError(f"the page has no metric of vLLM; it begins {text[:60]!r}")
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


def _total_or_none(series: Series, names: Sequence[str]) -> int | None:
    declared = any(name in series or name.removesuffix("_total") in series for name in names)
    return round(sum(value for _, value in _find(series, names))) if declared else None


def _total(series: Series, names: Sequence[str]) -> int:
    if (total := _total_or_none(series, names)) is None:
        raise _missing(names)
    return total


def _missing(names: Sequence[str]) -> TelemetryError:
    return TelemetryError(f"no {' nor '.join(names)} on the /metrics page; this vLLM may have renamed it")


def _kv_usage(series: Series) -> float:
    """Mean over engines, weighted by their blocks where all are known."""
    if not (samples := _find(series, _KV_USAGE)):
        raise _missing(_KV_USAGE)
    if (most := max(value for _, value in samples)) > 1.0 + 1e-6:
        raise TelemetryError(f"{_KV_USAGE[0]} is {most}; expected a share, 0..1")
    blocks = {labels.get("engine"): _label(labels, "num_gpu_blocks") for labels, _ in _find(series, _CONFIG)}
    weights = [blocks.get(labels.get("engine")) for labels, _ in samples]
    weights = [1] * len(samples) if not all(weights) else weights
    weighted = sum((weight or 0) * value for weight, (_, value) in zip(weights, samples, strict=True))
    return min(1.0, weighted / sum(weight or 0 for weight in weights))


def _label(labels: Mapping[str, str], name: str) -> int | None:
    return int(labels[name]) if labels.get(name, "").isdecimal() else None


def _cache_config(series: Series) -> CacheConfig | None:
    engines = [labels for labels, _ in _find(series, _CONFIG)]
    sizes = {_label(labels, "block_size") for labels in engines}
    blocks = [count for labels in engines if (count := _label(labels, "num_gpu_blocks"))]
    size = sizes.pop() if len(sizes) == 1 else None
    if not size or len(blocks) < len(engines):
        return None
    return CacheConfig(block_size=size, num_gpu_blocks=sum(blocks))


def _histogram(series: Series, name: str) -> Histogram | None:
    counts: dict[float, int] = {}
    for labels, value in _find(series, (f"{name}_bucket",)):
        bound_s = float(labels.get("le", "nan"))
        counts[bound_s] = counts.get(bound_s, 0) + round(value)
    if not counts:
        return None
    bounds_s = tuple(sorted(counts))
    cumulative = tuple(counts[bound_s] for bound_s in bounds_s)
    if not math.isinf(bounds_s[-1]) or list(cumulative) != sorted(cumulative):
        raise TelemetryError(f"{name} is incomplete or not cumulative on the /metrics page")
    return Histogram(bounds_s, cumulative, cumulative[-1])
