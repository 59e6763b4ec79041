"""The arena in which the DQN of each cell was trained for it, as ``fuel-ray train`` does by default.

    python experiments/studies/specialists.py --out FOLDER --slos interactive tight [--policies GENERALIST
        GREENDLS]

A cell is a workload of the arena and an SLO. For each, one policy is trained on the workload that the cell is
tuned on (seed 0) and takes part as "DQN". The flags are those of ``fuel-ray arena``, the same with the same
policies everywhere; ``--policies`` take part in every cell. What is done is kept in FOLDER, so that the same
command goes on after an interruption.

It asks what a policy trained for its own load and SLO is worth beside every other policy, and makes the big
tables that docs/arena.md shows. It takes about three minutes per cell and core to train,
baselines and tuning included, and 7 to 9 minutes on two cores to play 13 workloads under one SLO.

What to expect (docs/notes/2026-11-26-arena.md, block size 16, n = 10): better than the load table
in 14 of 26 cells, level in ten, worse in two by at most 0.5 %; on average -11.2 % against tuned static.
"""

import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from fuel_ray.arena.cell import Job, loop_of, tuning_runs
from fuel_ray.arena.config import ArenaConfig
from fuel_ray.arena.runner import cell_file, jobs_of, run_and_write
from fuel_ray.arena.scenarios import Scenario, SloName
from fuel_ray.commands.arena import parse, publish
from fuel_ray.record import make_folder, read_json
from fuel_ray.sim.pack import load_pack
from fuel_ray.tuning.contenders import names_of

TRAININGS = 3


def policy_folders(home: Scenario, slo: SloName, out: Path) -> list[Path]:
    """One per training; the arena takes NAME#0, NAME#1, .. for trainings of one policy."""
    return [out / "policies" / f"{home.name}.{slo}" / f"DQN#{seed}" for seed in range(TRAININGS)]


def train(job: Job, slo: SloName, out: Path) -> str:
    """Train the policies for a cell, the baselines once, and name it."""
    home = job.home
    promise = tuning_runs(job, loop_of(job, home)).slos[slo]
    flags = ["--workload", home.workload, "--kv-tokens", str(home.kv_tokens), "--pack", job.config.pack]
    flags += ["--clock-axis", job.config.clock_axis]
    flags += ["--block-sizes", str(job.config.block_sizes[0])]
    flags += ["--tune-share", str(job.config.tune_share)]
    for name in ("ttft_s", "tpot_s", "e2e_s", "share"):
        flags += [f"--slo-{name.replace('_', '-')}", str(getattr(promise, name))]
    for seed, folder in enumerate(policy_folders(home, slo, out)):
        if folder.exists():
            continue
        runs = folder.parent / f"runs-{seed}"
        make_folder(runs)
        known = next((folder.parent / "runs-0").glob("train-*/baselines.json"), None)
        same = [] if known is None else ["--baselines", str(known)]
        command = [sys.executable, "-m", "fuel_ray", "train", *flags, *same, "--seed", str(seed)]
        with (folder.parent / f"train-{seed}.log").open("w") as log:
            subprocess.run([*command, "--out", str(runs)], check=True, stdout=log, stderr=subprocess.STDOUT)
        trained = runs.glob("train-*/policies/block_*")
        shutil.copytree(max(trained, key=lambda path: path.stat().st_mtime), folder)
    return f"trained for {home.name}, {slo}"


def play(job: Job, slo: SloName, out: Path) -> str:
    """Run a cell, keep it, and name it."""
    policies = (*map(str, policy_folders(job.home, slo, out)), *job.config.policies)
    config = replace(job.config, slos=(slo,), policies=policies)
    run_and_write(replace(job, config=config), out / "cells")
    return f"played {job.scenario.name}, {slo}"


def main() -> None:
    config: ArenaConfig = parse(sys.argv[1:], prog="specialists")
    folder, began_s = config.out / "cells", time.monotonic()
    make_folder(folder)
    cells = [(job, slo) for slo in config.slos for job in jobs_of(config)]
    files = [cell_file(folder, job.scenario.name, slo) for job, slo in cells]
    todo = [cell for cell, file in zip(cells, files, strict=True) if not file.is_file()]
    homes = {policy_folders(job.home, slo, config.out)[-1]: (job, slo) for job, slo in todo}
    untrained = [cell for folder, cell in homes.items() if not folder.exists()]
    with ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as pool:
        for task, some in ((train, untrained), (play, todo)):
            for future in as_completed([pool.submit(task, *cell, config.out) for cell in some]):
                print(f"{future.result()}  {time.monotonic() - began_s:.0f} s", flush=True)
    names = ["DQN", *names_of(config.policies)]
    print(
        publish(
            [read_json(file) for file in files],
            config.out,
            names=names,
            notes=load_pack(config.pack).clock_axis_notes,
        )
    )


if __name__ == "__main__":
    main()
