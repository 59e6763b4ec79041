"""Speed of the simulated node: one-second windows per second of one core, through ``SimulatedNode.measure``.

python benchmarks/sim_speed.py [--json] [--repeats 5] [--seconds 600]
"""

import argparse
import json
import statistics
import time

from fuel_ray.sim.node import SimulatedNode
from fuel_ray.sim.pack import load_pack
from fuel_ray.workload.spec import parse_workload

RATES_RPS = (1, 10, 50, 200)


def windows_per_s(rate_rps: float, *, seconds: int) -> float:
    """Measured speed at maximum performance under a steady Poisson load, default lengths, ample KV pool."""
    node = SimulatedNode(
        load_pack("h100-qwen3-8b"),
        parse_workload(f"steady:rate_rps={rate_rps}"),
        kv_block_size=16,
        horizon_s=float(seconds),
    )
    node.reset(seed=0)
    node.measure(1.0)
    began_s = time.perf_counter()
    for _ in range(seconds - 1):
        node.measure(1.0)
    return (seconds - 1) / (time.perf_counter() - began_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=600, help="simulated seconds per repeat")
    flags = parser.parse_args()
    windows_per_s(1, seconds=2)  # compile
    rows = []
    for rate_rps in RATES_RPS:
        speeds = [windows_per_s(rate_rps, seconds=flags.seconds) for _ in range(flags.repeats)]
        rows.append((rate_rps, statistics.median(speeds), min(speeds), max(speeds)))
    if flags.json:
        keys = ("rate_rps", "windows_per_s", "x_realtime")
        print(json.dumps([dict(zip(keys, (row[0], row[1], row[1]), strict=True)) for row in rows]))
        return
    columns = f"{'req/s':>6} {'windows/s':>10} {'x real time':>12} {'us/window':>10}"
    print(f"{columns}   min .. max of {flags.repeats}")
    for rate_rps, median, low, high in rows:
        figures = f"{rate_rps:>6} {median:>10,.0f} {median:>12,.0f} {1e6 / median:>10.1f}"
        print(f"{figures}   {low:,.0f} .. {high:,.0f}")


if __name__ == "__main__":
    main()
