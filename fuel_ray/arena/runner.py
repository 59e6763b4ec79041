"""The cells of an arena, several at a time, each kept as it is done."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fuel_ray.arena.cell import Job, run_scenario
from fuel_ray.arena.comparison import summarise, trainings_of
from fuel_ray.arena.config import ArenaConfig
from fuel_ray.arena.figures import draw
from fuel_ray.arena.pool import in_processes
from fuel_ray.arena.scenarios import SloName, scenarios_of
from fuel_ray.arena.tables import headline, markdown, text
from fuel_ray.config import to_dict
from fuel_ray.errors import DiskError
from fuel_ray.progress import Bar
from fuel_ray.record import origin, read_json, write_csv, write_json, write_lines
from fuel_ray.sim.pack import load_pack
from fuel_ray.tuning.episodes import HELD_OUT_SEED, TUNING_SEEDS

_CELL_S = 240.0  # that a cell is expected to take on one core, until some are done


def publish(cells: Sequence[dict[str, Any]], run_dir: Path, *, names: Sequence[str], notes: str) -> str:
    """Write what came of the cells as tables, pictures and CSV files; the text table is returned.

    ``names`` of policies get a table of their own, a line per cell, one for all trainings of a policy;
    ``notes`` say what the clock axis rests on.
    """
    summaries = [row for cell in cells for row in summarise(cell)]
    write_csv(run_dir / "summary.csv", summaries)
    episodes = [{**_labels(cell), **row} for cell in cells for row in cell["rows"]]
    write_csv(run_dir / "episodes.csv", episodes)
    axes = [(cell, axis, rows) for cell in cells for axis, rows in cell.get("axes", {}).items()]
    if axes:
        under = [{**_labels(cell), "clock_axis": axis, **row} for cell, axis, rows in axes for row in rows]
        write_csv(run_dir / "clock_axes.csv", under)
    noted = [notes] if notes else []
    heads = [headline(summaries, name) for name in trainings_of(names)]
    write_lines(run_dir / "arena.md", ["\n\n".join([*heads, markdown(summaries), *noted])])
    draw(summaries, run_dir)
    return "\n\n".join([text(summaries), *noted])


def _labels(cell: dict[str, Any]) -> dict[str, Any]:
    return {"scenario": cell["scenario"], "slo": cell["slo"]}


def facts(config: ArenaConfig) -> dict[str, Any]:
    """What run.json says of an arena."""
    return {
        "config": to_dict(config),
        **origin("arena"),
        "origin": "modelled",
        "pack_sha256": load_pack(config.pack).sha256,
        "tuning_seeds": list(TUNING_SEEDS[: config.tuning_seeds]),
        "held_out_seeds": [HELD_OUT_SEED + i for i in range(config.seeds)],
    }


def all_cells(config: ArenaConfig, run_dir: Path) -> list[dict[str, Any]]:
    """Every cell in order, from its file where there is one."""
    folder = run_dir / "cells"
    jobs = jobs_of(config)
    todo = [job for job in jobs if len(_done(job, folder)) < len(config.slos)]
    print(f"arena  {run_dir}: {len(jobs)} workloads x {len(config.slos)} SLO, {len(todo)} to do", flush=True)
    expected_s = _CELL_S * len(config.slos) * len(todo) / config.workers
    try:
        with Bar({"arena": expected_s}) as bar:
            bar.stage("arena")
            calls = [(job, folder) for job in todo]
            for number, name in enumerate(in_processes(run_and_write, calls, workers=config.workers), 1):
                bar.at(number / len(todo), f"{number}/{len(todo)}  {name}")
    except KeyboardInterrupt:
        print(f"\ninterrupted; to continue: fuel-ray arena --resume {run_dir}", flush=True)
        raise
    except DiskError as error:
        raise DiskError(f"{error}; then continue: fuel-ray arena --resume {run_dir}") from error
    return [read_json(cell_file(folder, c.scenario.name, slo)) for c in jobs for slo in config.slos]


def jobs_of(config: ArenaConfig) -> list[Job]:
    """One per workload."""
    return [Job(config, scenario) for scenario in scenarios_of(config.scenarios)]


def run_and_write(job: Job, folder: Path) -> str:
    """Run what is not yet in the folder, keep each cell as it is done; the workload's name."""
    for cell in run_scenario(job, _done(job, folder)):
        write_json(cell_file(folder, cell["scenario"], cell["slo"]), cell)
    return job.scenario.name


def _done(job: Job, folder: Path) -> tuple[SloName, ...]:
    return tuple(slo for slo in job.config.slos if cell_file(folder, job.scenario.name, slo).is_file())


def cell_file(folder: Path, scenario: str, slo: str) -> Path:
    """Where a cell is kept."""
    return folder / f"{scenario}.{slo}.json"
