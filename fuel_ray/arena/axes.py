"""What is played on held-out seeds: policies as tuned and at other settings, and under other clock axes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fuel_ray.arena.config import ArenaConfig, RecommendConfig
from fuel_ray.arena.equal import Rows, setting_of
from fuel_ray.control import ControlLoop
from fuel_ray.metrics import attained
from fuel_ray.sim.pack import load_pack
from fuel_ray.tuning.clock_search import met
from fuel_ray.tuning.runs import Played, Runs, held_out
from fuel_ray.tuning.search import Swept
from fuel_ray.types import Slo


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


def axis_rows(name: str, plays: Sequence[Played], alone: Sequence[Runs], slo: str) -> list[dict[str, Any]]:
    """One row per seed: what a comparison under a clock axis needs."""
    return [_row(name, own, runs, slo) for own, runs in zip(plays, alone, strict=True)]


def _row(name: str, own: Played, runs: Runs, slo: str) -> dict[str, Any]:
    requests, (seed,) = int(own.arrivals.sum()), runs.seeds
    share, kept = attained(own.records, runs.slos[slo], arrivals=requests)
    return {
        "policy": name,
        "seed": seed,
        "energy_j": float(own.energy_j.sum()),
        "requests": requests,
        "slo_attainment": share,
        "slo_met": kept,
        "met": met(own.records, runs.slos[slo], arrivals=requests),
    }


def played(swept: Swept, nominal: Rows, alone: Sequence[Runs], slo: str) -> list[dict[str, Any]]:
    """What each setting did, a value per seed; ``nominal`` are the rows of the first, as it was tuned."""
    settings = [{"asked": s.asked, "setting": s.setting} for s in swept.settings]
    figures = [setting_of(nominal)]
    for setting in swept.around:
        traces = [trace for runs in alone for trace in runs.traces(setting.policy, slo)]
        figures.append(
            {
                "energy_j": [float(t.energy_j.sum()) for t in traces],
                "requests": [t.arrivals for t in traces],
                "met": [t.arrivals - float(t.penalty.sum()) for t in traces],
            }
        )
    return [{**setting, **figure} for setting, figure in zip(settings, figures, strict=True)]
