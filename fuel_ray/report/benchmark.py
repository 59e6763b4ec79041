"""What a benchmark leaves: the JSON of one run, figure by figure, and its check."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from fuel_ray.live.gpu.nvml import GpuReading
from fuel_ray.live.load.loadgen import LoadResult
from fuel_ray.live.monitors import Measured
from fuel_ray.live.sampling import Sample, figures, held_mean, window_energy_j

_PERCENTILES = (50, 90, 95, 99)


def benchmark_result(
    load: LoadResult,
    measured: Measured,
    *,
    model: str,
    request_rate: float,
    num_prompts: int,
    partial: bool,
) -> dict[str, Any]:
    """Latencies, energy, power and KV cache of a benchmark, as it is written."""
    result = {
        **_serving_figures(load, model=model, request_rate=request_rate),
        "partial": partial,
        "num_prompts": num_prompts,
        "gpu_power_stats": {str(index): _gpu_stats(measured, index) for index in measured.gpus},
        "cpu_power_stats": _cpu_stats(measured),
        "kv_cache_monitoring_stats": _kv_stats(measured, model=model),
    }
    return result | _energy_figures(result)


def check(result: dict[str, Any]) -> list[str]:
    """Lines that say whether the samples are what they should be."""

    def shown(name: str, form: str, unit: str = "") -> str:
        return "unknown" if result[name] is None else f"{result[name]:{form}}{unit}"

    latencies = (
        f"TTFT p50 {shown('p50_ttft_ms', '.1f', ' ms')}, TPOT p50 {shown('p50_tpot_ms', '.1f', ' ms')}"
    )
    lines = [f"requests   {result['completed']} completed, {result['failed']} failed, {latencies}"]
    gpu_samples = [len(stats["power_trace"]) for stats in result["gpu_power_stats"].values()]
    kv = result["kv_cache_monitoring_stats"]
    kv_samples = kv["samples_collected"] if kv else 0
    if gpu_samples:
        lines.append(
            f"GPU        {gpu_samples[0]} samples, {shown('gpu_energy_per_request_j', '.2f')} J/request,"
            f" {shown('gpu_energy_per_output_token_j', '.2f')} J/output token"
        )
    else:
        lines.append("GPU        no samples: no NVML here")
    if kv_samples:
        usage = kv["avg_stats"]["avg_cache_usage_perc"]
        lines.append(f"KV cache   {kv_samples} samples, average usage {usage:.1f} %")
    else:
        lines.append("KV cache   no samples: give --enable-kv-trace, or look at the server's /metrics")
    if gpu_samples and kv_samples:
        lines.append(f"ratio      {gpu_samples[0] / kv_samples:.1f} : 1 (expected about 10 : 1 by default)")
    return lines


def _serving_figures(result: LoadResult, *, model: str, request_rate: float) -> dict[str, Any]:
    """Figures under the names of ``vllm bench serve --save-result``."""
    records = result.records
    completed = int(np.isfinite(records.finished_s).sum())
    tokens_in, tokens_out = int(records.prompt_tokens.sum()), sum(n or 0 for n in result.received_tokens)
    itls_s = np.array([gap for gaps in result.itls_s for gap in gaps])
    figures: dict[str, Any] = {
        "date": f"{datetime.now():%Y%m%d-%H%M%S}",
        "endpoint_type": "openai",
        "backend": "vllm",
        "label": None,
        "model_id": model,
        "request_rate": request_rate,
        "burstiness": 1.0,
        "duration": result.duration_s,
        "completed": completed,
        "failed": len(records) - completed,
        "late_sends": result.late_sends,
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": completed / result.duration_s,
        "output_throughput": tokens_out / result.duration_s,
        "total_token_throughput": (tokens_in + tokens_out) / result.duration_s,
        "errors": [error for error in result.errors if error is not None],
    }
    latencies_s = {"ttft": records.ttft_s, "tpot": records.tpot_s, "itl": itls_s, "e2el": records.e2e_s}
    for name, values_s in latencies_s.items():
        figures |= _latency_ms(name, values_s)
    return figures


def _latency_ms(name: str, values_s: np.ndarray) -> dict[str, float | None]:
    known_ms = values_s[np.isfinite(values_s)] * 1000
    keys = [f"{kind}_{name}_ms" for kind in ("mean", "median", "std", *(f"p{p}" for p in _PERCENTILES))]
    if not len(known_ms):
        return dict.fromkeys(keys)
    percentiles = np.percentile(known_ms, _PERCENTILES)
    figures = (known_ms.mean(), np.median(known_ms), known_ms.std(), *percentiles)
    return {key: float(figure) for key, figure in zip(keys, figures, strict=True)}


def _energy_figures(result: dict[str, Any]) -> dict[str, float | None]:
    """Energy of all GPUs over completed requests and over output tokens; None without either."""
    gpus = result["gpu_power_stats"].values()
    energy_j = sum(stats["energy_j"] for stats in gpus) if gpus else None
    counts = {"request": result["completed"], "output_token": result["total_output_tokens"]}
    return {"gpu_energy_j": energy_j} | {
        f"gpu_energy_per_{name}_j": None if energy_j is None or not count else energy_j / count
        for name, count in counts.items()
    }


def _gpu_stats(measured: Measured, index: int) -> dict[str, Any]:
    """Mean power in mW, utilisations in per cent, energy in J, the samples and their times."""
    samples = measured.gpus[index]
    counter_j = measured.energy_j[index]
    power_w = figures(samples, "power_w")
    span = {"begin_s": measured.began_s, "end_s": measured.ended_s}
    mean_w = held_mean(power_w, **span)
    return {
        "avg_power": None if mean_w is None else mean_w * 1000,  # mW
        "avg_gpu_util": _mean_share(samples, "gpu_util"),  # %
        "avg_mem_util": _mean_share(samples, "mem_util"),  # %
        "energy_j": window_energy_j(power_w, **span, counter_j=counter_j),
        "energy_source": "integrated power" if None in counter_j else "energy counter",
        "power_trace": [sample.value * 1000 for sample in power_w],  # mW
        "time_trace": [sample.at_s - measured.began_s for sample in power_w],  # s
    }


def _mean_share(samples: Sequence[Sample[GpuReading]], name: str) -> float | None:
    known = [sample.value for sample in figures(samples, name)]
    return float(np.mean(known)) * 100 if known else None


def _cpu_stats(measured: Measured) -> dict[str, Any] | None:
    """Mean power in W, and whether it was measured or modelled; None if it was not asked for."""
    if len(measured.cpu) < 2:
        return None
    first, last = measured.cpu[0], measured.cpu[-1]
    utils = [sample.value.util for sample in measured.cpu if sample.value.util is not None]
    return {
        "avg_power_w": (last.value.energy_j - first.value.energy_j) / (last.at_s - first.at_s),
        "avg_util": float(np.mean(utils)) * 100 if utils else None,  # %
        "source": "modelled from utilisation" if measured.cpu_modelled else "RAPL",
        "source_reason": measured.cpu_reason,
    }


def _kv_stats(measured: Measured, *, model: str) -> dict[str, Any] | None:
    """The KV cache and the queues over time; None if they were not asked for."""
    trace = measured.kv
    if not trace:
        return None
    snapshots = [snapshot for _, snapshot in trace]
    cache = next((s.cache_config for s in reversed(snapshots) if s.cache_config), None)
    usage = np.array([s.kv_usage * 100 for s in snapshots])
    used = [cache.used_blocks(s.kv_usage) for s in snapshots] if cache else []
    columns = {
        "cache_usage": usage.tolist(),
        "used_blocks": used,
        "free_blocks": [cache.usable_blocks - blocks for blocks in used] if cache else [],
        "used_tokens": [blocks * cache.block_size for blocks in used] if cache else [],
        "requests_running": [s.running for s in snapshots],
        "requests_waiting": [s.waiting for s in snapshots],
    }
    at = {"min": 0, "p25": 25, "median": 50, "p75": 75, "p95": 95, "max": 100}
    percentiles = dict(zip(at, np.percentile(usage, list(at.values())).tolist(), strict=True))
    averages = {f"avg_{name}": float(np.mean(v)) if v else None for name, v in columns.items()}
    averages["avg_cache_usage_perc"] = averages.pop("avg_cache_usage")
    return {
        "avg_stats": averages,
        "detailed_stats": {
            "cache_usage": percentiles | {"std": float(usage.std())},
            "static_config": {
                "total_gpu_blocks": cache.num_gpu_blocks if cache else None,
                "block_size": cache.block_size if cache else None,
                "tokens_per_block": cache.block_size if cache else None,
                "total_kv_cache_tokens": cache.num_gpu_blocks * cache.block_size if cache else None,
                **_model_shape(model),
            },
        },
        "trace": columns | {"time": [at_s - measured.began_s for at_s, _ in trace]},
        "monitoring_interval_seconds": measured.kv_interval_s,
        "samples_collected": len(trace),
    }


def _model_shape(model: str) -> dict[str, int | None]:
    """Layers, KV heads and head size from a local model's config.json; None elsewhere."""
    try:
        raw = json.loads((Path(model) / "config.json").read_text())
    except (OSError, ValueError):
        raw = {}
    heads, hidden = raw.get("num_attention_heads"), raw.get("hidden_size")
    return {
        "num_layers": raw.get("num_hidden_layers"),
        "num_kv_heads": raw.get("num_key_value_heads", heads),
        "head_size": raw.get("head_dim", hidden // heads if heads and hidden else None),
    }
