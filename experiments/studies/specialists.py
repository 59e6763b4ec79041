"""The arena in which the DQN of each cell was trained for it, as ``fuel-ray train`` does by default.

    python experiments/studies/specialists.py --out FOLDER --slos interactive tight [--trainings 3]
        [--policies GENERALIST GREENDLS]

A cell is a workload of the arena and an SLO. For each, so many policies are trained on the workload that the
cell is tuned on (seeds 0, 1, ..) and take part as "DQN". The other flags are those of ``fuel-ray arena``, the
same with the same policies everywhere; ``--policies`` take part in every cell. What is done is kept in
FOLDER, so that the same command goes on after an interruption. Other studies train other variants in the
same way.

It asks what a policy trained for its own load and SLO is worth beside every other policy, and makes the
tables that docs/arena.md shows. It takes 76 minutes on two cores for 26 cells: 6 to tune, 33 to train (24
loads and SLOs, three times each) and 37 to play, the search in hindsight and eleven other clock axes
included.

What to expect (docs/arena.md, 2026-11-27, block size 16, n = 10): better than the best simple rule beyond the
interval in nine of 26 cells, worse beyond it in none that can be compared.
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fuel_ray.arena.cell import Job, loop_of, tuning_runs
from fuel_ray.arena.config import ArenaConfig
from fuel_ray.arena.pool import in_processes
from fuel_ray.arena.runner import cell_file, facts, jobs_of, publish, run_and_write
from fuel_ray.arena.scenarios import SloName
from fuel_ray.commands.arena import parse
from fuel_ray.config import LearnConfig
from fuel_ray.flags import parse_serving
from fuel_ray.record import make_folder, read_json, write_json
from fuel_ray.sim.pack import load_pack
from fuel_ray.tuning.contenders import names_of
from fuel_ray.tuning.tuned import tune_baselines

TRAININGS = 3
_LIMITS = ("ttft-s", "tpot-s", "e2e-s", "share")


@dataclass(frozen=True, slots=True)
class Variant:
    """A policy that takes part: its name, the flags of ``fuel-ray train`` that make it, and how often."""

    name: str
    flags: tuple[str, ...] = ()
    trainings: int = TRAININGS
    # (another of the same flags, a third one): so many steps as at the rate of the first last as long as the
    # training of the second
    as_long: tuple[str, str] | None = None
    root: Path | None = None  # where its policies are, if several studies share them


@dataclass(frozen=True, slots=True)
class Cell:
    """A workload and an SLO of a study, its variants and where it is kept."""

    job: Job
    slo: SloName
    variants: tuple[Variant, ...]

    @property
    def file(self) -> Path:
        return cell_file(self.job.config.out / "cells", self.job.scenario.name, self.slo)

    @property
    def baselines(self) -> Path:
        """Those that its trainings share."""
        return self._policies(None) / "baselines.json"

    def folders(self, variant: Variant) -> list[Path]:
        """One per training; the arena takes NAME#0, NAME#1, .. for trainings of one policy."""
        return [self._policies(variant.root) / f"{variant.name}#{seed}" for seed in range(variant.trainings)]

    def _policies(self, root: Path | None) -> Path:
        return (root or self.job.config.out) / "policies" / f"{self.job.home.name}.{self.slo}"


def study(config: ArenaConfig, variants: Sequence[Variant]) -> str:
    """Train the variants for every cell, play it with all of them, and say what came out."""
    cells = [Cell(job, slo, tuple(variants)) for slo in config.slos for job in jobs_of(config)]
    todo = [cell for cell in cells if not cell.file.is_file()]
    make_folder(config.out / "cells")
    write_json(config.out / "run.json", facts(config) | {"variants": {v.name: v.flags for v in variants}})
    homes = list({cell.baselines: cell for cell in todo}.values())
    left = [(cell, v, seed) for cell in homes for v in variants for seed in _left(cell, v)]
    first, then = ([call for call in left if bool(call[1].as_long) == late] for late in (False, True))
    untuned = [(cell,) for cell in homes if not cell.baselines.is_file()]
    began_s = time.monotonic()
    tasks: list[tuple[Callable[..., str], Sequence[tuple[Any, ...]]]] = [
        *((tune, untuned), (train, first), (train, then), (play, [(cell,) for cell in todo])),
    ]
    for task, calls in tasks:
        for done in in_processes(task, calls, workers=config.workers):
            print(f"{done}  {time.monotonic() - began_s:.0f} s", flush=True)
    names = [*(variant.name for variant in variants), *names_of(config.policies)]
    notes = load_pack(config.pack).clock_axis_notes
    return publish([read_json(cell.file) for cell in cells], config.out, names=names, notes=notes)


def unless_given(defaults: Mapping[str, Sequence[str]], flags: Sequence[str]) -> list[str]:
    """These flags and their values, but for those that are given."""
    return [word for name, values in defaults.items() if name not in flags for word in (name, *values)]


def _left(cell: Cell, variant: Variant) -> list[int]:
    """Seeds of the trainings that are to be done."""
    return [seed for seed, folder in enumerate(cell.folders(variant)) if not folder.exists()]


def flags_of(cell: Cell) -> dict[str, tuple[str, ...]]:
    """Those of ``fuel-ray train`` that say a cell's load, node and SLO."""
    config, home = cell.job.config, cell.job.home
    promise = tuning_runs(cell.job, loop_of(cell.job, home)).slos[cell.slo]
    flags = {"workload": home.workload, "kv-tokens": home.kv_tokens, "pack": config.pack}
    flags |= {"clock-axis": config.clock_axis, "tune-share": config.tune_share}
    flags |= {"block-sizes": config.block_sizes[0]}
    flags |= {f"slo-{name}": getattr(promise, name.replace("-", "_")) for name in _LIMITS}
    caching: dict[str, tuple[str, ...]] = {} if config.prefix_caching else {"--no-prefix-caching": ()}
    return caching | {f"--{name}": (str(value),) for name, value in flags.items()}


def tune(cell: Cell) -> str:
    """Tune the baselines that all trainings for a cell share."""
    config = parse_serving(LearnConfig, unless_given(flags_of(cell), ()), prog="study")
    (size,) = config.block_sizes
    make_folder(cell.baselines.parent)
    found = tune_baselines(config, size, config.workload)
    write_json(cell.baselines, {str(size): {config.workload: found.to_dict()}})
    return f"tuned {cell.job.home.name}, {cell.slo}"


def train(cell: Cell, variant: Variant, seed: int) -> str:
    """Train a policy for a cell, and name it."""
    folder = cell.folders(variant)[seed]
    runs = folder.parent / f"runs-{folder.name}"
    make_folder(runs)
    flags = [*unless_given(flags_of(cell), variant.flags), *variant.flags]
    flags += ["--baselines", str(cell.baselines)] if variant.root is None else []
    flags += ["--seed", str(seed), "--out", str(runs)]
    if variant.as_long is not None:
        flags += ["--steps", str(_steps(cell, *variant.as_long))]
    with (runs / "train.log").open("w") as log:
        command = [sys.executable, "-m", "fuel_ray", "train", *flags]
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    trained = runs.glob("train-*/policies/*")
    shutil.copytree(max(trained, key=lambda path: path.stat().st_mtime), folder)
    return f"trained {folder.name} for {cell.job.home.name}, {cell.slo}"


def _steps(cell: Cell, rated: str, lasting: str) -> int:
    """Windows that one variant, at its rate, is trained on while the other is."""
    by_name = {variant.name: variant for variant in cell.variants}

    def spent(name: str) -> tuple[float, int]:
        """Seconds and windows of all of its trainings."""
        runs = [f.parent / f"runs-{f.name}" for f in cell.folders(by_name[name])]
        done = [read_json(file) for run in runs for file in run.glob("train-*/run.json")]
        return sum(d["seconds"]["training"] for d in done), sum(d["config"]["steps"] for d in done)

    (own_s, own_steps), (seconds, _) = spent(rated), spent(lasting)
    return max(1, round(own_steps * seconds / own_s / by_name[lasting].trainings))


def play(cell: Cell) -> str:
    """Run a cell with all variants, keep it, and name it."""
    job = cell.job
    own = [str(folder) for variant in cell.variants for folder in cell.folders(variant)]
    config = replace(job.config, slos=(cell.slo,), policies=(*own, *job.config.policies))
    run_and_write(replace(job, config=config), cell.file.parent)
    return f"played {job.scenario.name}, {cell.slo}"


def main(argv: list[str]) -> None:
    """Train, play and print the tables."""
    arguments = argparse.ArgumentParser(prog="specialists", add_help=False, allow_abbrev=False)
    arguments.add_argument("--trainings", type=int, default=TRAININGS)
    given, flags = arguments.parse_known_args(argv)
    print(study(parse(flags, prog="specialists"), [Variant("DQN", trainings=given.trainings)]))


if __name__ == "__main__":
    main(sys.argv[1:])
