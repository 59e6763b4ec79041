"""What a benchmark leaves: the JSON of one run, figure by figure, what is missing in it, and its check."""

import math
from collections import Counter
from datetime import datetime
from functools import partial
from typing import Any

import numpy as np

from fuel_ray.live.load.loadgen import LoadResult
from fuel_ray.live.monitors import Measured
from fuel_ray.report.monitored import cpu_stats, gpu_stats, kv_stats
from fuel_ray.types import Slo

_PERCENTILES = (50, 90, 95, 99)
_SHOWN_ERRORS, _SHOWN_LETTERS = 3, 300


def benchmark_result(
    load: LoadResult,
    measured: Measured,
    *,
    model: str,
    request_rate: float,
    num_prompts: int,
    ended: str | None,
    max_concurrency: int | None = None,
    goodput: Slo | None = None,
) -> dict[str, Any]:
    """Latencies, energy, power and KV cache of a benchmark, as it is written.

    ``ended`` says why it is not all of the load. ``missing`` has a sentence for each thing that is not
    there, or not of the whole run.
    """
    missing = [] if ended is None else [f"{ended} after {len(load.records)} of {num_prompts} requests"]
    missing += measured.missing
    gpus = {str(index): gpu_stats(measured, index, missing.append) for index in measured.gpus}
    result = {
        **_serving_figures(load, model=model, request_rate=request_rate),
        **_goodput_figures(load, goodput),
        **_concurrency_figures(load, max_concurrency, request_rate=request_rate),
        "partial": ended is not None,
        "num_prompts": num_prompts,
        "gpu_power_stats": gpus,
        "cpu_power_stats": cpu_stats(measured, missing.append),
        "kv_cache_monitoring_stats": kv_stats(measured, missing.append, model=model),
    }
    result |= _energy_figures(result, measured, missing)
    return {**result, "missing": missing}


def check(result: dict[str, Any], measured: Measured) -> list[str]:
    """Lines that say what was measured and whether the samples are what they should be.

    Why there is no GPU is not among them: that was said before the load.
    """
    shown = partial(_shown, result)
    latencies = (
        f"TTFT p50 {shown('p50_ttft_ms', '.1f', ' ms')}, TPOT p50 {shown('p50_tpot_ms', '.1f', ' ms')}"
    )
    lines = [f"requests   {result['completed']} completed, {result['failed']} failed, {latencies}"]
    if result["request_goodput"] is not None:
        lines.append(f"goodput    {result['request_goodput']:.2f} requests/s within all limits")
    lines += [f"failed     {line}" for line in errors_by_kind(result["errors"])]
    gpu_samples = [len(stats["power_trace"]) for stats in result["gpu_power_stats"].values()]
    kv = result["kv_cache_monitoring_stats"]
    kv_samples = kv["samples_collected"] if kv else 0
    if gpu_samples:
        lines.append(
            f"GPU        {gpu_samples[0]} samples, {shown('gpu_energy_per_request_j', '.2f')} J/request,"
            f" {shown('gpu_energy_per_output_token_j', '.2f')} J/output token"
        )
    else:
        lines.append("GPU        no samples" + ("" if measured.gpu_ids else ": none was asked for"))
    if kv_samples:
        usage = kv["avg_stats"]["avg_cache_usage_perc"]
        average = "unknown" if usage is None else f"{usage:.1f} %"
        lines.append(f"KV cache   {kv_samples} samples, average usage {average}")
    else:
        lines.append("KV cache   no samples: give --enable-kv-trace, or look at the server's /metrics")
    if gpu_samples and kv_samples:
        lines.append(f"ratio      {gpu_samples[0] / kv_samples:.1f} : 1 (expected about 10 : 1 by default)")
    said = () if measured.gpus else measured.missing
    return lines + [f"missing    {line}" for line in result["missing"] if line not in said]


def errors_by_kind(errors: list[str]) -> list[str]:
    """How many requests failed with which words of the server, most first."""
    counts = Counter(" ".join(error.split())[:_SHOWN_LETTERS] for error in errors)
    lines = [f"{n} with {error}" for error, n in counts.most_common(_SHOWN_ERRORS)]
    left = len(counts) - len(lines)
    return lines + ([f"and {left} other errors, all in the result"] if left else [])


def _shown(result: dict[str, Any], name: str, form: str, unit: str = "") -> str:
    return "unknown" if result[name] is None else f"{result[name]:{form}}{unit}"


def _serving_figures(result: LoadResult, *, model: str, request_rate: float) -> dict[str, Any]:
    """Figures under the names of ``vllm bench serve --save-result``; latencies are of what completed."""
    records = result.records
    finished = np.isfinite(records.finished_s)
    counted = [n is not None for n in result.received_tokens]  # by the server
    tokens_in = int(records.prompt_tokens[counted].sum())
    tokens_out = sum(n or 0 for n in result.received_tokens)
    itls_s = [gap for gaps, whole in zip(result.itls_s, finished, strict=True) if whole for gap in gaps]
    seconds = result.duration_s
    figures: dict[str, Any] = {
        "date": f"{datetime.now():%Y%m%d-%H%M%S}",
        "endpoint_type": "openai",
        "backend": "vllm",
        "label": None,
        "model_id": model,
        "request_rate": request_rate if math.isfinite(request_rate) else "inf",
        "burstiness": 1.0,
        "duration": seconds,
        "completed": int(finished.sum()),
        "failed": int((~finished).sum()),
        "late_sends": result.late_sends,
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": int(finished.sum()) / seconds if seconds > 0 else None,
        "output_throughput": tokens_out / seconds if seconds > 0 else None,
        "total_token_throughput": (tokens_in + tokens_out) / seconds if seconds > 0 else None,
        "errors": [error for error in result.errors if error is not None],
    }
    latencies_s = {"ttft": records.ttft_s, "tpot": records.tpot_s, "e2el": records.e2e_s}
    for name, values_s in latencies_s.items():
        figures |= _latency_ms(name, values_s[finished])
    return figures | _latency_ms("itl", np.array(itls_s))


def _goodput_figures(result: LoadResult, limits: Slo | None) -> dict[str, Any]:
    """Requests per second within all limits, one-token outputs within that on TPOT; None without limits."""
    if limits is None or not result.duration_s > 0:
        return {"request_goodput": None}
    return {"request_goodput": int(result.records.meets(limits).sum()) / result.duration_s}


def _concurrency_figures(
    result: LoadResult, max_concurrency: int | None, *, request_rate: float
) -> dict[str, Any]:
    """How long requests were kept back, which no other latency includes; of what completed."""
    figures: dict[str, Any] = {"max_concurrency": max_concurrency}
    if max_concurrency is None:
        return figures
    finished = np.isfinite(result.records.finished_s)
    held_s = np.array(result.held_s)[finished]
    figures |= _latency_ms("client_queue_time", held_s)
    if math.isinf(request_rate):
        return figures  # all came at once: how long the last one waited says nothing
    return figures | _latency_ms("e2el_including_client_queue", result.records.e2e_s[finished] + held_s)


def _latency_ms(name: str, values_s: np.ndarray) -> dict[str, float | None]:
    known_ms = values_s[np.isfinite(values_s)] * 1000
    keys = [f"{kind}_{name}_ms" for kind in ("mean", "median", "std", *(f"p{p}" for p in _PERCENTILES))]
    if not len(known_ms):
        return dict.fromkeys(keys)
    percentiles = np.percentile(known_ms, _PERCENTILES)
    figures = (known_ms.mean(), np.median(known_ms), known_ms.std(), *percentiles)
    return {key: float(figure) for key, figure in zip(keys, figures, strict=True)}


def _energy_figures(
    result: dict[str, Any], measured: Measured, missing: list[str]
) -> dict[str, float | None]:
    """Energy of all GPUs that were asked for, over completed requests and output tokens; None without it."""
    stats = result["gpu_power_stats"]
    unknown = [i for i in measured.gpu_ids if stats.get(i, {}).get("energy_j") is None]
    energy_j = None if unknown or not stats else sum(own["energy_j"] for own in stats.values())
    if unknown and len(measured.gpu_ids) > len(unknown):
        names = ", ".join(f"GPU {index}" for index in unknown)
        missing.append(f"J/request and J/output token: they would lack the energy of {names}")
    if energy_j is not None and result["completed"] and result["failed"]:
        missing.append(
            f"J/request holds the energy of the {result['failed']} failed requests too, J/output token only "
            "tokens that the server counted"
        )
    counts = {"request": result["completed"], "output_token": result["total_output_tokens"]}
    return {"gpu_energy_j": energy_j} | {
        f"gpu_energy_per_{name}_j": None if energy_j is None or not count else energy_j / count
        for name, count in counts.items()
    }
