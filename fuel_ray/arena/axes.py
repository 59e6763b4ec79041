"""The same policies under the pack's other clock axes: evaluation only, on the first held-out seeds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fuel_ray.arena.config import ArenaConfig, RecommendConfig
from fuel_ray.control import ControlLoop
from fuel_ray.metrics import attained
from fuel_ray.sim.pack import load_pack
from fuel_ray.tuning.runs import Runs, held_out
from fuel_ray.types import Policy, Slo


def on_other_axes(
    config: ArenaConfig | RecommendConfig, build: Callable[[str], ControlLoop], *, slos: Mapping[str, Slo]
) -> dict[str, list[Runs]]:
    """Held-out seeds, each by itself, under every clock axis of the pack but the twin's own."""
    seeds = min(config.seeds, config.axis_seeds)
    names = load_pack(config.pack).clock_axes if seeds else ()
    return {
        name: held_out(build(name), seeds, seconds=config.seconds, slos=slos)
        for name in names
        if name != config.clock_axis
    }


def axis_rows(name: str, policy: Policy, alone: Sequence[Runs], slo: str) -> list[dict[str, Any]]:
    """One row per seed: what a comparison under a clock axis needs."""
    rows = []
    for runs in alone:
        (seed,) = runs.seeds
        energy_j, arrivals, records = runs.played(policy, seed)
        requests = int(arrivals.sum())
        share, met = attained(records, runs.slos[slo], arrivals=requests)
        rows.append(
            {
                "policy": name,
                "seed": seed,
                "energy_j": float(energy_j.sum()),
                "requests": requests,
                "slo_attainment": share,
                "slo_met": met,
            }
        )
    return rows
