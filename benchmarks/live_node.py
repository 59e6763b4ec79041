"""A live node measured: sensors, sampler, batch limit, counter against power, cost on the throughput.

python benchmarks/live_node.py --model FOLDER [--vllm "vllm"] [--flags "..."] [--gpu-ids 0] [--repeats 5]
    [--clients 64] [--prompt 512] [--output 128] [--limits 36 4 16 8] [--out FILE.json]

Starts a vLLM server, observes only (no clock is set), and prints one table. ``--gpu-ids`` without a value
leaves everything out that needs NVML.
"""

import argparse
import json
import multiprocessing
import shlex
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np

from fuel_ray.errors import NodeError
from fuel_ray.live.cpu import CpuMeter
from fuel_ray.live.gpu.nvml import Gpus
from fuel_ray.live.gpu.visible import server_environment
from fuel_ray.live.load.loadgen import LoadGenerator
from fuel_ray.live.load.prompts import TokenPrompts
from fuel_ray.live.sampling import Sampler, window_energy_j
from fuel_ray.live.vllm.kv_monitor import KVCacheMonitor, MetricsClient
from fuel_ray.live.vllm.limiter import BatchLimiter, LimiterStatus
from fuel_ray.live.vllm.server import VllmServer, served_model
from fuel_ray.types import Requests

GPU_INTERVAL_S, KV_INTERVAL_S = 0.05, 0.5


def spread(values: list[float], digits: int = 3) -> str:
    """Median, range and n."""
    shown = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return "{} ({}..{}), n = {}".format(*shown, len(values))


def burst(url: str, n: int, flags: argparse.Namespace, *, seed: int) -> LoadGenerator:
    """``n`` requests at once."""
    work = Requests(
        np.zeros(n),
        np.full(n, flags.prompt),
        np.full(n, flags.output),
        np.full(n, -1),
        np.zeros(n, np.int64),
    )
    prompts = TokenPrompts(work, vocab_size=flags.vocab, rng=np.random.default_rng(seed))
    return LoadGenerator(url, work, prompts=prompts, model=served_model(url).name)


@contextmanager
def load_that_lasts(url: str, flags: argparse.Namespace) -> Iterator[None]:
    """Bursts one after the other, so that there is always a queue."""
    over = threading.Event()

    def keep_busy() -> None:
        seed = 100
        running: list[LoadGenerator] = []
        while not over.is_set():
            seed += 1
            load = burst(url, flags.clients, flags, seed=seed)
            load.start()
            running = [*running[-1:], load]
            while len(running) > 1 and not running[0].wait(0.05) and not over.is_set():
                pass
        for load in running:
            load.stop()

    thread = threading.Thread(target=keep_busy)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def read_costs(gpus: Gpus) -> dict[str, str]:
    """Cost of NVML's reads and the time between changes of their values."""
    found = {}
    for name, read, n in (
        ("read of everything cheap", gpus.read, 500),
        ("read of the energy counter", gpus.energy_j, 100),
    ):
        took_ms = []
        for _ in range(n):
            begin_s = time.perf_counter()
            read()
            took_ms.append((time.perf_counter() - begin_s) * 1000)
        p50, p99 = np.percentile(took_ms, (50, 99))
        found[name] = f"p50 {p50:.3f} ms, p99 {p99:.3f} ms, n = {n}"
    return found


def counter_against_power(gpus: Gpus, *, windows: int, seconds: float) -> str:
    """Window energy by the counter over window energy by integrated power, in per cent."""
    differences = []
    sampler = Sampler(lambda: gpus.read().power_w, GPU_INTERVAL_S)
    with sampler:
        time.sleep(1.5)
        for _ in range(windows):
            begin_s, first_j = time.monotonic(), gpus.energy_j()
            time.sleep(seconds)
            end_s, last_j = time.monotonic(), gpus.energy_j()
            if first_j is None or last_j is None:
                return "there is no counter"
            samples = sampler.since(begin_s - 0.5)
            power_j = window_energy_j(samples, begin_s=begin_s, end_s=end_s)
            differences.append(100 * ((last_j - first_j) / power_j - 1))
    return spread(differences, 2) + f" windows of {seconds:g} s"


def jitter(read: Callable[[], object], *, seconds: float) -> str:
    """Lateness of a sampler under load against its absolute deadlines."""
    begin_s = time.monotonic()
    sampler = Sampler(read, GPU_INTERVAL_S)
    with sampler:
        time.sleep(seconds)
    late_ms = [(sample.at_s - sample.due_s) * 1000 for sample in sampler.since(begin_s)]
    p50, p99 = np.percentile(late_ms, (50, 99))
    return f"p50 {p50:.2f} ms, p99 {p99:.2f} ms, n = {len(late_ms)}, {sampler.skipped} skipped"


def wait(limiter: BatchLimiter, holds: Callable[[LimiterStatus], bool]) -> None:
    """Return at the scheduler's first step of which it holds."""
    deadline_s = time.monotonic() + 60.0
    while not holds(status := limiter.status()):
        if time.monotonic() >= deadline_s:
            raise NodeError(f"not within 60 s: {status}")
        time.sleep(0.002)


def limiter_reaction(
    limiter: BatchLimiter, client: MetricsClient, flags: argparse.Namespace
) -> dict[str, str]:
    """Time until each limit is in force, and until no more than it run; the running count then."""
    applied: dict[int, list[float]] = {}
    reached: dict[int, list[float]] = {}
    running: dict[int, list[int]] = {}
    for _ in range(flags.repeats):
        for limit in flags.limits:
            begin_s = time.monotonic()
            limiter.set(limit)
            wait(limiter, lambda status, limit=limit: status.batch_limit == limit)
            applied.setdefault(limit, []).append(time.monotonic() - begin_s)
            wait(limiter, lambda status, limit=limit: status.running <= limit)
            reached.setdefault(limit, []).append(time.monotonic() - begin_s)
            for _ in range(8):
                time.sleep(0.25)
                running.setdefault(limit, []).append(client.scrape(filtered=True).running)
    limiter.clear()
    return {
        f"limit {limit}": f"in force after {spread(applied[limit])} s;"
        f" reached after {spread(reached[limit])} s;"
        f" running by /metrics afterwards {min(running[limit])}..{max(running[limit])}"
        for limit in flags.limits
    }


def overhead(url: str, flags: argparse.Namespace) -> str:
    """Tokens/s with every monitor on over tokens/s with none, in pairs whose order alternates, per cent.

    The monitors run in a process of their own: in the load's they would slow down the client, not the server.
    """
    differences = []
    for repeat in range(flags.repeats):
        rates = {}
        for monitored in (repeat % 2 == 0, repeat % 2 == 1):
            with monitors(url, flags.gpu_ids) if monitored else nullcontext():
                # other prompts each time: the prefix cache has those of the pair's first
                rates[monitored] = throughput(url, flags, seed=2000 + 2 * repeat + monitored)
        differences.append(100 * (rates[True] / rates[False] - 1))
    return spread(differences, 2)


@contextmanager
def monitors(url: str, gpu_ids: list[str]) -> Iterator[None]:
    """Everything that a node samples, in another process."""
    context = multiprocessing.get_context("spawn")
    started, over = context.Event(), context.Event()
    process = context.Process(target=monitor, args=(url, gpu_ids, started, over))
    process.start()
    if not started.wait(60.0):
        raise SystemExit("the monitors do not start")
    try:
        yield
    finally:
        over.set()
        process.join()


def monitor(url: str, gpu_ids: list[str], started: Event, over: Event) -> None:
    with ExitStack() as stack:
        stack.enter_context(KVCacheMonitor(url, KV_INTERVAL_S))
        stack.enter_context(Sampler(CpuMeter().read, GPU_INTERVAL_S))
        if gpu_ids:
            gpus = stack.enter_context(Gpus(gpu_ids))
            stack.enter_context(Sampler(gpus.read, GPU_INTERVAL_S))
            stack.enter_context(Sampler(gpus.energy_j, 1.0))
        started.set()
        over.wait()


def throughput(url: str, flags: argparse.Namespace, *, seed: int) -> float:
    """Output tokens per second of a burst of three times the clients."""
    load = burst(url, 3 * flags.clients, flags, seed=seed)
    load.start()
    if not load.wait(300.0):
        raise SystemExit("a burst did not end within 300 s")
    result = load.result()
    return sum(n or 0 for n in result.received_tokens) / result.duration_s


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """The table: what, figure."""
    table: dict[str, Any] = {}
    with ExitStack() as stack:
        gpus = stack.enter_context(Gpus(flags.gpu_ids)) if flags.gpu_ids else None
        if gpus is not None:
            table["GPUs"] = f"{len(gpus.uuids)} x {gpus.name}, driver {gpus.driver_version}"
            table["clocks may be set"] = gpus.can_set_clocks()
            table["supported clocks"] = f"{len(gpus.supported_clocks_mhz)}: {gpus.supported_clocks_mhz[:1]}.."
            table |= {f"{name}, idle": cost for name, cost in read_costs(gpus).items()}
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        limiter = stack.enter_context(BatchLimiter(folder / "limit"))
        begin_s = time.monotonic()
        server = stack.enter_context(
            VllmServer(
                flags.model,
                log_path=flags.log,
                executable=shlex.split(flags.vllm),
                flags=shlex.split(flags.flags),
                env=None if gpus is None else server_environment(gpus.devices, by_index=True),
                limit_file=limiter.path,
            )
        )
        table["server up after"] = f"{time.monotonic() - begin_s:.0f} s"
        client = MetricsClient(server.url)
        throughput(server.url, flags, seed=1000)  # warm
        with load_that_lasts(server.url, flags):
            time.sleep(2.0)
            table |= limiter_reaction(limiter, client, flags)
            if gpus is not None:
                table["read of everything cheap, under load"] = read_costs(gpus)["read of everything cheap"]
                table["counter over integrated power - 1, per cent"] = counter_against_power(
                    gpus, windows=8, seconds=5.0
                )
            table["jitter at 20 Hz under load"] = jitter(gpus.read if gpus else time.monotonic, seconds=20.0)
        table["tokens/s with monitors over without - 1, per cent"] = overhead(server.url, flags)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--vllm", default="vllm")
    parser.add_argument("--flags", default="")
    parser.add_argument("--gpu-ids", nargs="*", default=["0"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--output", type=int, default=128, help="tokens")
    parser.add_argument("--vocab", type=int, default=1000)
    parser.add_argument("--limits", type=int, nargs="+", default=[36, 4, 16, 8])
    parser.add_argument("--log", type=Path, default=Path("vllm.log"))
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    table = measure(flags)
    for name, figure in table.items():
        print(f"| {name} | {figure} |")
    if flags.out:
        flags.out.write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
