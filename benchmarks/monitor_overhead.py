"""Jitter of the sampler and the share of one core it costs, with fake GPU reads or (--gpu) through NVML.

python benchmarks/monitor_overhead.py [--gpu] [--json] [--seconds 30] [--rate-hz 20] [--repeats 3]

Targets at 20 Hz: p99 jitter < 5 ms, < 1 % of a core. A fake read spins for 30 us, as six NVML reads.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np

from fuel_ray.live.gpu.nvml import Gpus
from fuel_ray.live.sampling import Sampler

FAKE_READ_S = 30e-6


def fake_read() -> float:
    """Spin as long as an NVML read of everything takes."""
    end_s = time.perf_counter() + FAKE_READ_S
    while time.perf_counter() < end_s:
        pass
    return end_s


def measure(read: Callable[[], object], *, rate_hz: float, seconds: float) -> dict[str, float]:
    """One run's lateness against absolute deadlines, and the process's CPU time while nothing else runs."""
    sampler = Sampler(read, 1 / rate_hz, name="benchmark")
    begin_s, cpu_s = time.monotonic(), time.process_time()
    with sampler:
        time.sleep(seconds)
    took_s, cpu_s = time.monotonic() - begin_s, time.process_time() - cpu_s
    late_ms = [(sample.at_s - sample.due_s) * 1000 for sample in sampler.since(begin_s)]
    p50_ms, p99_ms = np.percentile(late_ms, [50, 99])
    return {
        "n": len(late_ms),
        "seconds": took_s,
        "jitter_p50_ms": float(p50_ms),
        "jitter_p99_ms": float(p99_ms),
        "jitter_max_ms": max(late_ms),
        "skipped": sampler.skipped,
        "failed": sampler.failed,
        "core_percent": 100 * cpu_s / took_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="read the real GPUs, and their energy counter too")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=30.0, help="per run")
    parser.add_argument("--rate-hz", type=float, default=20.0)
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args()
    with ExitStack() as stack:
        reads: dict[str, Callable[[], object]] = {"fake": fake_read}
        conditions = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        if flags.gpu:
            gpus = stack.enter_context(Gpus())
            reads = {"nvml": gpus.read, "nvml energy counter": gpus.energy_j}
            conditions += f"; {len(gpus.uuids)} x {gpus.name}, driver {gpus.driver_version}"
        runs = [
            {"reads": name} | measure(read, rate_hz=flags.rate_hz, seconds=flags.seconds)
            for name, read in reads.items()
            for _ in range(flags.repeats)
        ]
    if flags.json:
        print(json.dumps({"rate_hz": flags.rate_hz, "conditions": conditions, "runs": runs}))
        return
    print(f"{flags.rate_hz:g} Hz, {flags.repeats} runs of {flags.seconds:g} s each; {conditions}")
    print(
        f"{'reads':<20}{'n':>6}{'p50 ms':>9}{'p99 ms':>9}{'max ms':>9}"
        f"{'skipped':>9}{'failed':>8}{'% core':>8}"
    )
    for run in runs:
        print(
            f"{run['reads']:<20}{run['n']:>6}{run['jitter_p50_ms']:>9.3f}{run['jitter_p99_ms']:>9.3f}"
            f"{run['jitter_max_ms']:>9.3f}{run['skipped']:>9}{run['failed']:>8}{run['core_percent']:>8.3f}"
        )
    for name in reads:
        own = [run for run in runs if run["reads"] == name]
        p99_ms = statistics.median(run["jitter_p99_ms"] for run in own)
        core = statistics.median(run["core_percent"] for run in own)
        print(
            f"median of {name}: p99 jitter {p99_ms:.3f} ms (target < 5), {core:.3f} % of a core (target < 1)"
        )


if __name__ == "__main__":
    main()
