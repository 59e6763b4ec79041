"""What a benchmark's monitors tell of GPUs, CPU and KV cache, and what they cannot tell and why."""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fuel_ray.errors import TelemetryError
from fuel_ray.live.cpu import CpuReading
from fuel_ray.live.monitors import GpuTrack, Measured, Track
from fuel_ray.live.sampling import LEAST_SHARE, Sample, figures, held_mean, held_s, window_energy_j
from fuel_ray.live.vllm.metrics import MetricsSnapshot, difference

_AT_ODDS = 0.3  # of the integrated power, by which no counter is off
_LONG_S = 10.0  # a window in which NVML's mean power over a second is as good as the counter

Say = Callable[[str], None]  # takes what is missing, and why


def gpu_stats(measured: Measured, index: int, say: Say) -> dict[str, Any]:
    """Mean power in mW, utilisations in per cent, energy in J, the samples and their times."""
    track, name = measured.gpus[index], f"GPU {index}"
    _say_failures(track, measured, name, say)
    power_w = _known(track, "power_w")
    span = {"begin_s": measured.began_s, "end_s": measured.ended_s}
    known_s, mean_w = sum(held_s(power_w, **span)), held_mean(power_w, **span)
    duration_s = measured.ended_s - measured.began_s
    if not power_w:
        say(f"{name}: there is no reading of its power")
    elif known_s < LEAST_SHARE * duration_s:
        say(f"{name}: its power is known for {known_s:.1f} of {duration_s:.1f} s; avg_power is of those")
    energy_j, source = _energy(track, power_w, span, lambda what: say(f"{name}: {what}"))
    return {
        "avg_power": None if mean_w is None else mean_w * 1000,  # mW
        "power_known_s": known_s,
        "avg_gpu_util": _percent(_known(track, "gpu_util")),
        "avg_mem_util": _percent(_known(track, "mem_util")),
        "energy_j": energy_j,
        "energy_source": source,
        "power_trace": [sample.value * 1000 for sample in power_w],  # mW
        "time_trace": [sample.at_s - measured.began_s for sample in power_w],  # s
    }


def _energy(
    track: GpuTrack, power_w: Sequence[Sample[float]], span: dict[str, float], say: Say
) -> tuple[float | None, str | None]:
    """Energy in J and where it is from; None without either, and why is said."""
    for note in track.notes:
        say(note)
    integrated_j: float | None
    try:
        integrated_j, why = window_energy_j(power_w, begin_s=span["begin_s"], end_s=span["end_s"]), ""
    except TelemetryError as error:
        integrated_j, why = None, str(error)
    if track.first_j is None or track.last_j is None:
        counted_j = None
    else:
        counted_j = _counted_j(track.last_j - track.first_j, integrated_j, span, say)
    if counted_j is not None:
        return counted_j, "energy counter"
    if integrated_j is None:
        say(f"its energy is unknown: {why}, and there is no energy counter for all of the run")
        return None, None
    return integrated_j, "integrated power"


def _counted_j(counted_j: float, power_j: float | None, span: dict[str, float], say: Say) -> float | None:
    """What the counter tells; None where it cannot be, as after a reset."""
    if counted_j < 0:
        say(f"its energy counter fell by {-counted_j:.0f} J: it was reset in the run, and is not used")
        return None
    if power_j is None or span["end_s"] - span["begin_s"] < _LONG_S:
        return counted_j
    if abs(counted_j - power_j) > _AT_ODDS * power_j:
        say(f"its energy counter tells {counted_j:.0f} J, its power {power_j:.0f} J, which is used")
        return None
    return counted_j


def cpu_stats(measured: Measured, say: Say) -> dict[str, Any] | None:
    """Mean power in W, and whether it was measured or modelled; None if it was not asked for."""
    track = measured.cpu
    if track is None:
        return None
    _say_failures(track, measured, "CPU", say)
    if len(track.samples) < 2:
        say(f"CPU: {len(track.samples)} readings are too few for a mean power")
        return None
    first, last = track.samples[0], track.samples[-1]
    known_s, duration_s = last.at_s - first.at_s, measured.ended_s - measured.began_s
    if known_s < LEAST_SHARE * duration_s:
        say(f"CPU: its energy is known for {known_s:.1f} of {duration_s:.1f} s; avg_power_w is of those")
    return {
        "avg_power_w": _cpu_power_w(first, last),
        "power_known_s": known_s,
        "avg_util": _percent(_known(track, "util")),
        "source": "modelled from utilisation" if measured.cpu_modelled else "RAPL",
        "source_reason": measured.cpu_reason,
    }


def _cpu_power_w(first: Sample[CpuReading], last: Sample[CpuReading]) -> float | None:
    energies_j: tuple[float | None, float | None] = (first.value.energy_j, last.value.energy_j)
    if energies_j[0] is None or energies_j[1] is None or last.at_s <= first.at_s:
        return None
    return (energies_j[1] - energies_j[0]) / (last.at_s - first.at_s)


def kv_stats(measured: Measured, say: Say, *, model: str) -> dict[str, Any] | None:
    """The KV cache and the queues over time; None if they were not asked for."""
    track = measured.kv
    if track is None:
        return None
    _say_failures(track, measured, "KV cache", say)
    if not track.samples:
        return None
    _say_restarts(track.samples, measured.began_s, say)
    snapshots = [sample.value for sample in track.samples]
    columns = _kv_columns(snapshots)
    averages = {f"avg_{name}": _mean(values) for name, values in columns.items()}
    averages["avg_cache_usage_perc"] = averages.pop("avg_cache_usage")
    return {
        "avg_stats": averages,
        "detailed_stats": {
            "cache_usage": _spread([value for value in columns["cache_usage"] if value is not None]),
            "static_config": _static_config(snapshots, model),
        },
        "trace": columns | {"time": [sample.at_s - measured.began_s for sample in track.samples]},
        "monitoring_interval_seconds": measured.kv_interval_s,
        "samples_collected": len(snapshots),
    }


def _kv_columns(snapshots: Sequence[MetricsSnapshot]) -> dict[str, list[Any]]:
    """A value per snapshot; blocks and tokens are empty lists where the server never told its cache."""
    latest = next((s.cache_config for s in reversed(snapshots) if s.cache_config), None)
    caches = [s.cache_config or latest for s in snapshots]
    shares: list[float | None] = [s.kv_usage for s in snapshots]
    used = [
        None if share is None else (cache.used_blocks(share), cache)
        for share, cache in zip(shares, caches, strict=True)
        if cache is not None
    ]
    return {
        "cache_usage": [None if share is None else share * 100 for share in shares],
        "used_blocks": [known and known[0] for known in used],
        "free_blocks": [known and known[1].usable_blocks - known[0] for known in used],
        "used_tokens": [known and known[0] * known[1].block_size for known in used],
        "requests_running": [s.running for s in snapshots],
        "requests_waiting": [s.waiting for s in snapshots],
    }


def _spread(usage: Sequence[float]) -> dict[str, float | None]:
    at = {"min": 0, "p25": 25, "median": 50, "p75": 75, "p95": 95, "max": 100}
    if not usage:
        return dict.fromkeys((*at, "std"))
    percentiles = np.percentile(usage, list(at.values())).tolist()
    return {**dict(zip(at, percentiles, strict=True)), "std": float(np.std(usage))}


def _static_config(snapshots: Sequence[MetricsSnapshot], model: str) -> dict[str, int | None]:
    cache = next((s.cache_config for s in reversed(snapshots) if s.cache_config), None)
    return {
        "total_gpu_blocks": cache.num_gpu_blocks if cache else None,
        "block_size": cache.block_size if cache else None,
        "tokens_per_block": cache.block_size if cache else None,
        "total_kv_cache_tokens": cache.num_gpu_blocks * cache.block_size if cache else None,
        **_model_shape(model),
    }


def _say_failures(track: Track[Any], measured: Measured, name: str, say: Say) -> None:
    failed = [failure for failure in track.failures if failure.at_s <= measured.ended_s]
    if failed:
        n, first_s = len(failed) + len(track.samples), failed[0].at_s - measured.began_s
        error = " ".join((str(failed[0].error) or repr(failed[0].error)).split())
        say(f"{name}: {len(failed)} of {n} readings failed, the first at {max(0, first_s):.1f} s: {error}")


def _say_restarts(samples: Sequence[Sample[MetricsSnapshot]], began_s: float, say: Say) -> None:
    for before, after in pairwise(samples):
        seconds = max(after.at_s - before.at_s, 1e-3)
        if difference(before.value, after.value, seconds).restarted:
            at_s = after.at_s - began_s
            say(f"KV cache: the server was restarted before {at_s:.1f} s; figures are of both lives")


def _known(track: Track[Any], name: str) -> list[Sample[float]]:
    """One figure of the readings that have it."""
    return [sample for sample in figures(track.samples, name) if sample.value is not None]


def _percent(samples: Sequence[Sample[float]]) -> float | None:
    return float(np.mean([sample.value for sample in samples])) * 100 if samples else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _model_shape(model: str) -> dict[str, int | None]:
    """Layers, KV heads and head size from a local model's config.json; None elsewhere."""
    try:
        raw = json.loads((Path(model) / "config.json").read_text())
    except (OSError, ValueError):
        raw = {}
    raw = raw if isinstance(raw, dict) else {}
    heads, hidden = raw.get("num_attention_heads"), raw.get("hidden_size")
    return {
        "num_layers": raw.get("num_hidden_layers"),
        "num_kv_heads": raw.get("num_key_value_heads", heads),
        "head_size": raw.get("head_dim", hidden // heads if heads and hidden else None),
    }
