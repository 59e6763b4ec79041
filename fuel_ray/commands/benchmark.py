"""Send a load to a running vLLM server and record GPU, CPU, KV cache and latencies beside each other."""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fuel_ray.errors import ConfigError, GpuError, TelemetryError
from fuel_ray.live.cpu import CpuMeter, CpuReading
from fuel_ray.live.kv_monitor import KVCacheMonitor, MetricsClient, TimedSnapshot
from fuel_ray.live.loadgen import LoadGenerator, LoadResult
from fuel_ray.live.nvml import GpuReading, Gpus
from fuel_ray.live.prompts import TokenPrompts, load_sharegpt
from fuel_ray.live.sampler import Sample, Sampler
from fuel_ray.record import make_folder, write_json
from fuel_ray.types import Requests

_PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class BenchmarkConfig:
    """Benchmark a running vLLM server: latencies, GPU and CPU power, KV cache."""

    model: str
    """Model name that the server serves, or the path it was started with."""
    backend: Literal["vllm"] = "vllm"
    """Kind of server."""
    host: str = "127.0.0.1"
    """Host of the server."""
    port: int = 8000
    """Port of the server."""
    dataset_name: Literal["sharegpt", "random"] = "random"
    """sharegpt: prompts and answer lengths of a ShareGPT file. random: token ids of fixed lengths."""
    dataset_path: Path | None = None
    """ShareGPT JSON file."""
    num_prompts: int = 100
    """Requests to send."""
    request_rate: float = 10.0
    """Requests per second; inter-arrival times are exponential."""
    random_input_len: int = 512
    """Prompt tokens of the random dataset."""
    random_output_len: int = 128
    """Output tokens of the random dataset."""
    vocab_size: int = 1000
    """Token ids of the random dataset are below this."""
    gpu_ids: tuple[int, ...] = (0,)
    """NVML indices of the server's GPUs; none where there is no NVML."""
    gpu_monitor_interval: float = 0.05
    """Seconds between GPU and CPU samples."""
    kv_monitor_interval: float = 0.5
    """Seconds between scrapes of the KV cache; down to 0.05."""
    monitor_cpu: bool = False
    """Record CPU power and utilisation."""
    enable_kv_trace: bool = False
    """Record the KV cache over time."""
    save_result: bool = False
    """Write the result as JSON."""
    result_dir: Path = Path("benchmark_results")
    """Folder for the result."""
    timeout_s: float = 600.0
    """Seconds after which a request is given up."""
    seed: int = 0
    """Seed of arrivals and prompts."""


def run(config: BenchmarkConfig) -> int:
    """Run the benchmark, print its figures and check; Ctrl-C keeps what there is and marks it partial."""
    if config.num_prompts < 1 or not config.request_rate > 0:
        raise ConfigError("--num-prompts must be at least 1 and --request-rate above 0")
    if config.save_result:
        make_folder(config.result_dir)
    base_url = f"http://{config.host}:{config.port}"
    with contextlib.closing(MetricsClient(base_url)) as client:
        client.scrape()  # a wrong address is said before anything is sent
    load = _load(config, base_url)
    with _monitors(config, base_url) as monitors:
        partial = _send(load, config.num_prompts)
    result = {
        **_serving(config, load.result()),
        "partial": partial,
        "gpu_power_stats": {str(i): _gpu_stats(s) for i, s in monitors.gpus.items()},
        "cpu_power_stats": _cpu_stats(monitors),
        "kv_cache_monitoring_stats": _kv_stats(config, monitors.kv),
    }
    if config.save_result:
        name = f"{Path(config.model).name}-benchmark-{datetime.now():%Y%m%d-%H%M%S}.json"
        write_json(config.result_dir / name, result)
        print(f"wrote {config.result_dir / name}")
    print("\n".join(check(result)))
    return 130 if partial else 0


def check(result: dict[str, Any]) -> list[str]:
    """Lines that say whether the samples are what they should be."""
    lines = [
        f"requests   {result['completed']} completed, {result['failed']} failed,"
        f" TTFT p50 {_ms(result['p50_ttft_ms'])}, TPOT p50 {_ms(result['p50_tpot_ms'])}"
    ]
    gpu_samples = [len(stats["power_trace"]) for stats in result["gpu_power_stats"].values()]
    kv = result["kv_cache_monitoring_stats"]
    kv_samples = kv["samples_collected"] if kv else 0
    lines.append(
        f"GPU        {gpu_samples[0]} samples" if gpu_samples else "GPU        no samples: no NVML here"
    )
    if kv_samples:
        usage = kv["avg_stats"]["avg_cache_usage_perc"]
        lines.append(f"KV cache   {kv_samples} samples, average usage {usage:.1f} %")
    else:
        lines.append("KV cache   no samples: give --enable-kv-trace, or look at the server's /metrics")
    if gpu_samples and kv_samples:
        lines.append(f"ratio      {gpu_samples[0] / kv_samples:.1f} : 1 (expected about 10 : 1 by default)")
    return lines


@dataclass(slots=True)
class _Monitors:
    gpus: dict[int, tuple[Sample[GpuReading], ...]]
    cpu: tuple[Sample[CpuReading], ...]
    cpu_modelled: bool
    kv: tuple[TimedSnapshot, ...]


@contextlib.contextmanager
def _monitors(config: BenchmarkConfig, base_url: str) -> Iterator[_Monitors]:
    """Everything that samples, while the block runs; the samples are there after it."""
    found = _Monitors({}, (), False, ())
    began_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        samplers = {}
        for index in config.gpu_ids:
            try:
                gpus = stack.enter_context(Gpus([index]))
            except GpuError as error:
                print(f"GPU {index} is not recorded: {error}")
                continue
            samplers[index] = stack.enter_context(Sampler(gpus.read, config.gpu_monitor_interval))
        meter = CpuMeter()
        found.cpu_modelled = meter.modelled
        cpu = Sampler(meter.read, config.gpu_monitor_interval, name="CPU") if config.monitor_cpu else None
        kv = KVCacheMonitor(base_url, config.kv_monitor_interval) if config.enable_kv_trace else None
        for monitor in (cpu, kv):
            if monitor is not None:
                stack.enter_context(monitor)
        try:
            yield found
        finally:
            with contextlib.suppress(TelemetryError):  # no sample at all shows as none in the result
                found.gpus = {index: sampler.since(began_s) for index, sampler in samplers.items()}
                found.cpu = cpu.since(began_s) if cpu is not None else ()
            found.kv = kv.trace() if kv is not None else ()


def _load(config: BenchmarkConfig, base_url: str) -> LoadGenerator:
    rng = np.random.default_rng(config.seed)
    n = config.num_prompts
    arrival_s = np.cumsum(rng.exponential(1 / config.request_rate, n))
    prompt_tokens = np.full(n, config.random_input_len)
    output_tokens = np.full(n, config.random_output_len)
    texts: list[str] | None = None
    if config.dataset_name == "sharegpt":
        if config.dataset_path is None:
            raise ConfigError("--dataset-name sharegpt needs --dataset-path")
        texts, output_tokens = load_sharegpt(config.dataset_path, n, rng)
        prompt_tokens = np.ones(n, np.int64)  # as the server counts them
    requests = Requests(arrival_s, prompt_tokens, output_tokens, np.full(n, -1), np.zeros(n, np.int64))
    prompts = texts if texts is not None else TokenPrompts(requests, vocab_size=config.vocab_size, rng=rng)
    return LoadGenerator(base_url, requests, prompts=prompts, model=config.model, timeout_s=config.timeout_s)


def _send(load: LoadGenerator, n: int) -> bool:
    """Run the load to its end, with a line of progress now and then; whether it was interrupted."""
    load.start()
    ended = 0
    try:
        while not load.wait(2.0):
            progress = load.take()
            ended += len(progress.ended)
            print(
                f"{ended}/{n} ended, {len(progress.in_flight)} in flight, {progress.now_s:.0f} s", flush=True
            )
    except KeyboardInterrupt:
        load.stop()
        return True
    return False


def _serving(config: BenchmarkConfig, result: LoadResult) -> dict[str, Any]:
    """Figures under the names of ``vllm bench serve --save-result``."""
    records = result.records
    completed = int(np.isfinite(records.finished_s).sum())
    tokens_in, tokens_out = int(records.prompt_tokens.sum()), sum(n or 0 for n in result.received_tokens)
    itls_s = np.array([gap for gaps in result.itls_s for gap in gaps])
    figures: dict[str, Any] = {
        "date": f"{datetime.now():%Y%m%d-%H%M%S}",
        "endpoint_type": "openai",
        "backend": config.backend,
        "label": None,
        "model_id": config.model,
        "num_prompts": config.num_prompts,
        "request_rate": config.request_rate,
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
    for name, values_s in (
        ("ttft", records.ttft_s),
        ("tpot", records.tpot_s),
        ("itl", itls_s),
        ("e2el", records.e2e_s),
    ):
        figures.update(_latency_ms(name, values_s))
    return figures


def _latency_ms(name: str, values_s: np.ndarray) -> dict[str, float | None]:
    known_ms = values_s[np.isfinite(values_s)] * 1000
    keys = [f"{kind}_{name}_ms" for kind in ("mean", "median", "std", *(f"p{p}" for p in _PERCENTILES))]
    if not len(known_ms):
        return dict.fromkeys(keys)
    percentiles = np.percentile(known_ms, _PERCENTILES)
    figures = (known_ms.mean(), np.median(known_ms), known_ms.std(), *percentiles)
    return {key: float(figure) for key, figure in zip(keys, figures, strict=True)}


def _gpu_stats(samples: Sequence[Sample[GpuReading]]) -> dict[str, Any]:
    power_mw = [sample.value.power_w * 1000 for sample in samples]
    return {
        "avg_power": float(np.mean(power_mw)),  # mW
        "avg_gpu_util": float(np.mean([sample.value.gpu_util for sample in samples])) * 100,  # %
        "avg_mem_util": float(np.mean([sample.value.mem_util for sample in samples])) * 100,  # %
        "power_trace": power_mw,
    }


def _cpu_stats(monitors: _Monitors) -> dict[str, Any] | None:
    if len(monitors.cpu) < 2:
        return None
    first, last = monitors.cpu[0], monitors.cpu[-1]
    utils = [sample.value.util for sample in monitors.cpu if sample.value.util is not None]
    return {
        "avg_power_w": (last.value.energy_j - first.value.energy_j) / (last.at_s - first.at_s),
        "avg_util": float(np.mean(utils)) * 100 if utils else None,  # %
        "source": "modelled from utilisation" if monitors.cpu_modelled else "RAPL",
    }


def _kv_stats(config: BenchmarkConfig, trace: Sequence[TimedSnapshot]) -> dict[str, Any] | None:
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
    p25, median, p75, p95 = np.percentile(usage, (25, 50, 75, 95)).tolist()
    averages = {f"avg_{name}": float(np.mean(v)) if v else None for name, v in columns.items()}
    averages["avg_cache_usage_perc"] = averages.pop("avg_cache_usage")
    return {
        "avg_stats": averages,
        "detailed_stats": {
            "cache_usage": {
                "min": float(usage.min()), "p25": p25, "median": median, "p75": p75, "p95": p95,
                "max": float(usage.max()), "std": float(usage.std()),
            },
            "static_config": {
                "total_gpu_blocks": cache.num_gpu_blocks if cache else None,
                "block_size": cache.block_size if cache else None,
                "tokens_per_block": cache.block_size if cache else None,
                "total_kv_cache_tokens": cache.num_gpu_blocks * cache.block_size if cache else None,
                **_model_shape(config.model),
            },
        },
        "trace": columns,
        "monitoring_interval_seconds": config.kv_monitor_interval,
        "samples_collected": len(trace),
    }  # fmt: skip


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


def _ms(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f} ms"
