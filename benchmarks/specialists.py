"""The arena in which the DQN of each cell was trained for it, as ``fuel-ray train`` does by default.

    python benchmarks/specialists.py --out FOLDER --slos interactive tight [--policies GENERALIST GREENDLS]

A cell is a workload of the arena and a promise. For each, one policy is trained on the workload that the cell
is tuned on (seed 0, block size 16) and takes part as "DQN". The flags are those of ``fuel-ray arena``, which
is the same with the same policies everywhere; ``--policies`` take part in every cell. What is done is kept in
FOLDER, so that the same command goes on after an interruption.
"""

import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from fuel_ray.arena.cell import Contest, loop_of, practice_of
from fuel_ray.arena.scenarios import SCENARIOS, SloName
from fuel_ray.commands.arena import ArenaConfig, cell_file, contests_of, parse, publish, run_and_write
from fuel_ray.record import make_folder, read_json


def train(contest: Contest, slo: SloName, out: Path) -> Path:
    """The policy folder for a cell, trained unless it is there; its anchor is left to the arena."""
    home = SCENARIOS[contest.scenario.tuned_on or contest.scenario.name]
    folder = out / "policies" / f"{home.name}.{slo}" / "DQN"
    if folder.exists():
        return folder
    promise = practice_of(contest, loop_of(contest, home)).slos[slo]
    flags = ["--workload", home.workload, "--kv-tokens", str(home.kv_tokens), "--block-sizes", "16"]
    for name in ("ttft_s", "tpot_s", "e2e_s", "share"):
        flags += [f"--slo-{name.replace('_', '-')}", str(getattr(promise, name))]
    runs = folder.parent / "runs"
    make_folder(runs)
    command = [sys.executable, "-m", "fuel_ray", "train", *flags, "--out", str(runs)]
    with (folder.parent / "train.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    newest = max(runs.glob("train-*/policies/block_16"), key=lambda path: path.stat().st_mtime)
    shutil.copytree(newest, folder)
    return folder


def one_cell(contest: Contest, slo: SloName, out: Path) -> str:
    """Train and run a cell, keep it, and name it."""
    policies = (train(contest, slo, out), *contest.policies)
    run_and_write(replace(contest, slos=(slo,), policies=policies), out / "cells")
    return f"{contest.scenario.name}, {slo}"


def main() -> None:
    config: ArenaConfig = parse(sys.argv[1:], prog="specialists")
    folder, began_s = config.out / "cells", time.monotonic()
    make_folder(folder)
    cells = [(contest, slo) for slo in config.slos for contest in contests_of(config)]
    files = [cell_file(folder, contest.scenario.name, slo) for contest, slo in cells]
    todo = [cell for cell, file in zip(cells, files, strict=True) if not file.is_file()]
    with ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(one_cell, *cell, config.out) for cell in todo]):
            print(f"{future.result()}  {time.monotonic() - began_s:.0f} s", flush=True)
    names = ["DQN", *(policy.name for policy in config.policies)]
    print(publish([read_json(file) for file in files], config.out, names=names))


if __name__ == "__main__":
    main()
