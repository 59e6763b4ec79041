"""Send a load to a running vLLM server and record GPU, CPU, KV cache and latencies beside each other."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np

from fuel_ray.errors import ConfigError, GpuError, TelemetryError
from fuel_ray.live.cpu import CpuMeter
from fuel_ray.live.gpu.nvml import Gpus
from fuel_ray.live.load.loadgen import LoadGenerator
from fuel_ray.live.load.prompts import TokenPrompts, load_sharegpt
from fuel_ray.live.sampling import Sampler
from fuel_ray.live.vllm.kv_monitor import KVCacheMonitor, MetricsClient
from fuel_ray.record import make_folder, write_json
from fuel_ray.report.benchmark import (
    Measured,
    check,
    cpu_stats,
    energy_figures,
    gpu_stats,
    kv_stats,
    serving_figures,
)
from fuel_ray.types import Requests


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
    with _monitors(config, base_url) as measured:
        partial = _send(load, config.num_prompts)
    result = {
        **serving_figures(load.result(), model=config.model, request_rate=config.request_rate),
        "partial": partial,
        "num_prompts": config.num_prompts,
        "gpu_power_stats": gpu_stats(measured),
        "cpu_power_stats": cpu_stats(measured),
        "kv_cache_monitoring_stats": kv_stats(measured, config.kv_monitor_interval, model=config.model),
    }
    result |= energy_figures(result)
    if config.save_result:
        name = f"{Path(config.model).name}-benchmark-{datetime.now():%Y%m%d-%H%M%S}.json"
        write_json(config.result_dir / name, result)
        print(f"wrote {config.result_dir / name}")
    print("\n".join(check(result)))
    return 130 if partial else 0


@contextlib.contextmanager
def _monitors(config: BenchmarkConfig, base_url: str) -> Iterator[Measured]:
    """Everything that samples, while the block runs; the samples are there after it."""
    found = Measured(began_s=time.monotonic())
    with contextlib.ExitStack() as stack:
        samplers, counters = {}, {}
        for index in config.gpu_ids:
            try:
                gpus = stack.enter_context(Gpus([index]))
            except GpuError as error:
                print(f"GPU {index} is not recorded: {error}")
                continue
            counters[index] = (gpus, gpus.energy_j())
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
            found.ended_s = time.monotonic()
            found.energy_j = {i: (gpus.energy_j(), first) for i, (gpus, first) in counters.items()}
            with contextlib.suppress(TelemetryError):  # no sample at all shows as none in the result
                found.gpus = {index: sampler.since(found.began_s) for index, sampler in samplers.items()}
                found.cpu = cpu.since(found.began_s) if cpu is not None else ()
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
