"""What a deployment costs: time per decision and resident memory.

    OMP_NUM_THREADS=1 python benchmarks/deploy_cost.py

A decision is policy and guard (shield, drift, budget) on a window that was measured: encode, Q network,
verdict. Windows and weights are random. CPU time leaves out what other processes take; wall time does not.
"""

import argparse
import os
import platform
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from fuel_ray.codec import PLAIN_FEATURES, SEED_FEATURES, SEED_GRID, Codec, node_grid
from fuel_ray.commands import deploy  # noqa: F401  (its imports are part of the memory)
from fuel_ray.config import GuardConfig
from fuel_ray.drift import DriftDetector
from fuel_ray.guard import Guard
from fuel_ray.policies.anchor import Anchor
from fuel_ray.policies.learned import LearnedPolicy
from fuel_ray.policies.static import LoadTable
from fuel_ray.types import Knobs, NodeSpec, Slo, WindowMetrics

SPEC = NodeSpec("n", "gpu", (), "model", 16, 1625, (1, 128), tuple(range(990, 1981, 15)))
SLO = Slo(1.0, 0.05)


def arrays(
    features: int, hidden: int, heads: dict[str, int], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Random weights of two hidden layers."""
    shapes = {"trunk.0": (hidden, features), "trunk.2": (hidden, hidden)}
    shapes |= {name: (size, hidden) for name, size in heads.items()}
    found = {}
    for name, shape in shapes.items():
        found[f"{name}.weight"] = rng.normal(0, shape[1] ** -0.5, shape).astype(np.float32)
        found[f"{name}.bias"] = np.zeros(shape[0], np.float32)
    return found


def policies(rng: np.random.Generator) -> dict[str, tuple[LearnedPolicy, Codec]]:
    grid = node_grid(SPEC, clock_step_mhz=75, lowest_clock_share=0.5, batch_limits=(32, 40, 128))
    plain, seed = Codec(PLAIN_FEATURES, grid, SLO), Codec(SEED_FEATURES, SEED_GRID, SLO)
    heads = {
        "value": 1,
        "limit_advantage": len(grid.batch_limits),
        "clock_advantage": len(grid.gpu_clocks_mhz),
    }
    free = LearnedPolicy(arrays(len(PLAIN_FEATURES), 128, heads, rng), plain, SPEC, head="additive")
    table = LoadTable([1.0 + row for row in range(9)], [Knobs(40, 990 + 105 * row) for row in range(10)])
    return {
        "plain (128-128, additive)": (free, plain),
        "plain near a load table": (free.near(Anchor(table, 0.06)), plain),
        "seed (256-256, 187 actions)": (
            LearnedPolicy(arrays(10, 256, {"value": 1, "advantage": 187}, rng), seed, SPEC, head="joint"),
            seed,
        ),
    }


def windows(n: int, rng: np.random.Generator) -> list[WindowMetrics]:
    base = WindowMetrics(
        1.0,
        450.0,
        60.0,
        0.9,
        0.4,
        0.2,
        6,
        6,
        3000,
        1300,
        20,
        0,
        0,
        0.4,
        None,
        0.0,
        (),
        (),
        (),
        Knobs(128, 1980),
        1900.0,
    )
    made = []
    for _ in range(n):
        finished = int(rng.poisson(6))
        latencies = {
            "ttfts_s": tuple(rng.gamma(2.0, 0.05, finished)),
            "tpots_s": tuple(rng.gamma(40.0, 0.001, finished)),
            "e2es_s": tuple(rng.gamma(4.0, 1.0, finished)),
        }
        load = {
            "arrivals": int(rng.poisson(6)),
            "running": int(rng.poisson(20)),
            "waiting": int(rng.poisson(0.3)),
        }
        made.append(
            replace(base, completed=finished, energy_j=float(rng.uniform(150, 700)), **latencies, **load)
        )
    return made


def rss_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument(
        "--pause-ms", type=float, default=0.0, help="between decisions, so that caches are cold"
    )
    settings = parser.parse_args()
    n, pause_s = settings.n, settings.pause_ms / 1000
    rng = np.random.default_rng(0)
    load = windows(500, rng)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}"
    )
    for name, (policy, codec) in policies(rng).items():
        rules = GuardConfig(max_wait_s=1.0, latency=True, switches_per_minute=30)
        guard = Guard(rules.rules(SLO, SPEC), drift=DriftDetector(codec, SPEC))
        took_us = np.empty((2, n))
        for i in range(n):
            window = load[i % len(load)]
            if pause_s:
                time.sleep(pause_s)
            began_ns = time.perf_counter_ns(), time.thread_time_ns()
            guard.check(policy.decide(window), last=window, spec=SPEC)
            ended_ns = time.perf_counter_ns(), time.thread_time_ns()
            took_us[:, i] = [(end - begin) / 1e3 for begin, end in zip(began_ns, ended_ns, strict=True)]
        for clock, values_us in zip(("wall", "CPU"), took_us, strict=True):
            p50, p99, p999 = np.percentile(values_us, (50, 99, 99.9))
            print(f"{name}, {clock}: p50 {p50:.0f}, p99 {p99:.0f}, p99.9 {p999:.0f} us, n = {n}")
    print(f"resident: {rss_mb():.0f} MB")


if __name__ == "__main__":
    main()
