"""A benchmark as a recorded run, which the simulator can replay."""

from dataclasses import replace
from typing import Any

import numpy as np

from fuel_ray.build.recording import ended_requests, server_info
from fuel_ray.errors import ConfigError, NodeError
from fuel_ray.live.foreign_load import came
from fuel_ray.live.load.loadgen import LoadResult
from fuel_ray.live.monitors import Measured
from fuel_ray.live.vllm.cache import CacheConfig
from fuel_ray.live.vllm.endpoint import Endpoint
from fuel_ray.live.vllm.facts import Cards, server_facts
from fuel_ray.live.vllm.kv_monitor import MetricsClient
from fuel_ray.live.vllm.metrics import MetricsSnapshot, difference
from fuel_ray.sim.recorded import RecordedRun
from fuel_ray.types import NodeSpec


def cache_of(before: MetricsSnapshot) -> CacheConfig:
    """The KV cache of the server that will be benchmarked.

    Raises:
        ConfigError: its page does not tell it, so that nobody could replay the benchmark.
    """
    if before.cache_config is None:
        raise ConfigError(f"--save-trace: the server's /metrics does not report {before.cache_unknown}")
    return before.cache_config


def benchmark_run(
    load: LoadResult,
    measured: Measured,
    *,
    start_s: float,
    energy_j: float | None,
    spec: NodeSpec,
    counted: dict[str, Any],
) -> RecordedRun:
    """The run from the first to the last reading of the energy counters, between which the load was sent.

    ``start_s`` is when arrivals counted from, on the clock of ``measured``; ``counted`` is what the server's
    own counters tell.
    """
    records, server = load.records, spec.server
    if server is None:
        raise ConfigError("the trace cannot be written: nothing is known about its server")
    offset_s = start_s - measured.began_s
    requests, ttft_s, e2e_s = ended_requests(records)
    own = {
        "failed": int((~np.isfinite(records.finished_s)).sum()),
        "late_sends": load.late_sends,
        "highest_sm_clock_mhz": _highest_clock_mhz(measured),
    }
    return RecordedRun(
        requests=replace(requests, arrival_s=requests.arrival_s + offset_s),
        duration_s=measured.ended_s - measured.began_s,
        energy_j=energy_j or None,
        ttft_s=ttft_s,
        e2e_s=e2e_s,
        kv_block_size=spec.kv_block_size,
        num_kv_blocks=spec.num_kv_blocks or 0,
        max_num_seqs=server.max_num_seqs,
        max_num_batched_tokens=server.max_num_batched_tokens,
        limit_schedule=(),
        prefix_caching=server.prefix_caching,
        info=server_info(spec) | own | counted,
    )


def _highest_clock_mhz(measured: Measured) -> float | None:
    readings = [sample.value for track in measured.gpus.values() for sample in track.samples]
    return max((r.sm_clock_mhz for r in readings if r.sm_clock_mhz is not None), default=None)


def benchmarked_server(
    endpoint: Endpoint,
    cache: CacheConfig,
    measured: Measured,
    *,
    model: str,
    max_num_seqs: int | None,
    max_num_batched_tokens: int | None,
) -> NodeSpec:
    """The server that was benchmarked, with what is known of how it schedules."""
    tracks = list(measured.gpus.values())
    name = " + ".join(dict.fromkeys(track.name for track in tracks))
    memories = [track.memory_bytes for track in tracks if track.memory_bytes is not None]
    facts = server_facts(
        endpoint,
        cache,
        Cards(name, len(tracks), min(memories, default=None)) if tracks else None,
        said={
            "max_num_seqs": (max_num_seqs, "--max-num-seqs"),
            "max_num_batched_tokens": (max_num_batched_tokens, "--max-num-batched-tokens"),
        },
    )
    return NodeSpec(
        name=endpoint.url,
        gpu_name=name,
        gpu_uuids=tuple(track.uuid for track in tracks),
        model=model,
        kv_block_size=cache.block_size,
        num_kv_blocks=cache.num_gpu_blocks,
        batch_limits=(facts.max_num_seqs,),
        gpu_clocks_mhz=(),
        server=facts,
    )


def counted_by_server(client: MetricsClient, before: MetricsSnapshot, *, sent: int) -> dict[str, Any]:
    """Requests of somebody else and the share of prompt tokens from the prefix cache, since ``before``.

    Each is None where the server does not tell it.
    """
    try:
        after = client.scrape()
    except NodeError:
        return {"foreign_requests": None, "prefix_hit_rate": None}
    delta = difference(before, after, 1.0)
    if delta.restarted:
        return {"foreign_requests": None, "prefix_hit_rate": None}
    foreign = max(0, came(before, after, delta) - sent) + before.running + before.waiting
    share = delta.prefix_hit_rate
    return {"foreign_requests": foreign, "prefix_hit_rate": None if share is None else round(share, 4)}
