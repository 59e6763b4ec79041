"""What a Ray actor between the control loop and its node costs per step.

python benchmarks/actor_overhead.py [--steps 500] [--rounds 9]: steps of the same simulated node in process
and through a NodeActor of a local Ray, turn by turn; prints medians over the rounds with their range.
"""

import argparse
import os
import statistics
import time

from fuel_ray.build.nodes import build_loop
from fuel_ray.cluster.hosts import connect
from fuel_ray.config import ServingConfig
from fuel_ray.control import ControlLoop
from fuel_ray.types import Knobs

KNOBS = Knobs(32, 1500)


def step_ms(loop: ControlLoop, steps: int) -> list[float]:
    """Milliseconds of each step."""
    loop.reset(seed=1)
    taken = []
    for _ in range(steps):
        began_s = time.perf_counter()
        loop.step(KNOBS)
        taken.append(1e3 * (time.perf_counter() - began_s))
    return taken


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--steps", type=int, default=500)
    flags.add_argument("--rounds", type=int, default=9)
    asked = flags.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    connect(cluster=True)
    loops = {
        kind: build_loop(ServingConfig(node=kind), 16, horizon_s=asked.steps + 1.0) for kind in ("sim", "ray")
    }
    for loop in loops.values():
        step_ms(loop, 50)  # compile, warm up
    medians: dict[str, list[float]] = {kind: [] for kind in loops}
    tails: dict[str, list[float]] = {kind: [] for kind in loops}
    for _ in range(asked.rounds):
        for kind, loop in loops.items():
            taken = sorted(step_ms(loop, asked.steps))
            medians[kind].append(statistics.median(taken))
            tails[kind].append(taken[int(0.99 * len(taken))])
    print(
        f"{asked.rounds} rounds of {asked.steps} steps, ms per step: median of the rounds (lowest to highest)"
    )
    for kind, name in (("sim", "in process"), ("ray", "through the actor")):
        print(f"{name:<18} p50 {_spread(medians[kind])}   p99 {_spread(tails[kind])}")
    overhead = [r - s for r, s in zip(medians["ray"], medians["sim"], strict=True)]
    print(f"{'overhead':<18} p50 {_spread(overhead)}")
    for loop in loops.values():
        loop.node.close()


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
