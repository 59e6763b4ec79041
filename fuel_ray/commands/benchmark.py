"""Send a load to a running vLLM server and record GPU, CPU, KV cache and latencies beside each other."""

import contextlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from fuel_ray.live.load.loadgen import LoadGenerator
from fuel_ray.live.load.prompts import DrawnLoad
from fuel_ray.live.monitors import monitors
from fuel_ray.live.vllm.kv_monitor import MetricsClient
from fuel_ray.record import make_folder, write_json
from fuel_ray.report.benchmark import benchmark_result, check


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(DrawnLoad):
    """Benchmark a running vLLM server: latencies, GPU and CPU power, KV cache."""

    model: str
    """Model name that the server serves, or the path it was started with."""
    backend: Literal["vllm"] = "vllm"
    """Kind of server."""
    host: str = "127.0.0.1"
    """Host of the server."""
    port: int = 8000
    """Port of the server."""
    gpu_ids: tuple[str, ...] | None = None
    """The server's GPUs, by nvidia-smi's index or by UUID; None: the first that CUDA_VISIBLE_DEVICES shows;
    empty: none."""
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


def run(config: BenchmarkConfig) -> int:
    """Run the benchmark, print its figures and check; Ctrl-C keeps what there is and marks it partial."""
    requests, prompts = config.draw()
    if config.save_result:
        make_folder(config.result_dir)
    base_url = f"http://{config.host}:{config.port}"
    with contextlib.closing(MetricsClient(base_url)) as client:
        client.scrape()  # a wrong address is said before anything is sent
    load = LoadGenerator(base_url, requests, prompts=prompts, model=config.model, timeout_s=config.timeout_s)
    monitored = monitors(
        base_url,
        gpu_ids=config.gpu_ids,
        gpu_interval_s=config.gpu_monitor_interval,
        cpu=config.monitor_cpu,
        kv_interval_s=config.kv_monitor_interval if config.enable_kv_trace else None,
    )
    with monitored as measured:
        for missing in measured.missing:
            print(missing)
        partial = _send(load, config.num_prompts)
    result = benchmark_result(
        load.result(),
        measured,
        model=config.model,
        request_rate=config.request_rate,
        num_prompts=config.num_prompts,
        partial=partial,
    )
    if config.save_result:
        name = f"{Path(config.model).name}-benchmark-{datetime.now():%Y%m%d-%H%M%S}.json"
        write_json(config.result_dir / name, result)
        print(f"wrote {config.result_dir / name}")
    print("\n".join(check(result)))
    return 130 if partial else 0


def _send(load: LoadGenerator, n: int) -> bool:
    """Run the load to its end, with a line of progress now and then; whether it was interrupted."""
    load.start()
    try:
        while not load.wait(2.0):
            now = load.take()
            flying = len(now.in_flight)
            print(f"{now.sent - flying}/{n} ended, {flying} in flight, {now.now_s:.0f} s", flush=True)
    except KeyboardInterrupt:
        load.stop()
        return True
    return False
