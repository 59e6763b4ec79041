"""The arena in which the DQN of each cell was trained for it, as ``fuel-ray train`` does by default.

    python benchmarks/specialists.py --out FOLDER [--policies GENERALIST GREENDLS] [--slos interactive tight]
        [--scenarios mmpp ...] [--workers 2] [--no-peers] [--no-oracle]

A cell is a workload of the arena and a promise. For each, one policy is trained on the workload that the cell
is tuned on (seed 0, block size 16) and takes part as "DQN"; ``--policies`` take part in every cell. What is
done is kept in FOLDER, so that the same command goes on after an interruption. ``fuel-ray arena`` is the same
with the same policies everywhere.
"""

import argparse
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fuel_ray.arena.cell import Contest, loop_of, practice_of, run_scenario
from fuel_ray.arena.episodes import EPISODE_S
from fuel_ray.arena.scenarios import SCENARIOS, SLO_NAMES, SloName, scenarios_of
from fuel_ray.commands.arena import publish
from fuel_ray.config import ServingConfig
from fuel_ray.record import make_folder, read_json, write_json


def contest(scenario: str, slo: SloName, policies: tuple[Path, ...], given: argparse.Namespace) -> Contest:
    return Contest(
        config=ServingConfig(),
        scenario=SCENARIOS[scenario],
        slos=(slo,),
        kv_block_size=16,
        policies=policies,
        seeds=10,
        tuning_seeds=6,
        seconds=EPISODE_S,
        tune_share=0.97,
        peers=given.peers,
        oracle=given.oracle,
        oracle_segment_s=60.0,
    )


def train(scenario: str, slo: SloName, given: argparse.Namespace) -> Path:
    """The policy folder for a cell, trained unless it is there; its anchor is left to the arena."""
    home = SCENARIOS[SCENARIOS[scenario].tuned_on or scenario]
    folder = given.out / "policies" / f"{home.name}.{slo}" / "DQN"
    if folder.exists():
        return folder
    own = contest(home.name, slo, (), given)
    promise = practice_of(own, loop_of(own, home)).slos[slo]
    flags = ["--workload", home.workload, "--kv-tokens", str(home.kv_tokens), "--block-sizes", "16"]
    for name in ("ttft_s", "tpot_s", "e2e_s", "share"):
        flags += [f"--slo-{name.replace('_', '-')}", str(getattr(promise, name))]
    runs = folder.parent / "runs"
    make_folder(runs)
    command = [sys.executable, "-m", "fuel_ray", "train", *flags, "--no-anchor", "--out", str(runs)]
    with (folder.parent / "train.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    newest = max(runs.glob("train-*/policies/block_16"), key=lambda path: path.stat().st_mtime)
    shutil.copytree(newest, folder)
    return folder


def one_cell(scenario: str, slo: SloName, given: argparse.Namespace) -> None:
    """Train and run a cell, and keep it."""
    policies = (train(scenario, slo, given), *given.policies)
    (cell,) = run_scenario(contest(scenario, slo, policies, given))
    write_json(given.out / "cells" / f"{scenario}.{slo}.json", cell)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--policies", type=Path, nargs="*", default=[])
    arguments.add_argument("--slos", nargs="*", default=["interactive", "tight"], choices=SLO_NAMES)
    arguments.add_argument("--scenarios", nargs="*", default=[])
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    arguments.add_argument("--oracle", action=argparse.BooleanOptionalAction, default=True)
    arguments.add_argument("--only-cell", action="store_true", help="run the one cell named, without tables")
    given = arguments.parse_args()
    names = [scenario.name for scenario in scenarios_of(given.scenarios)]
    make_folder(given.out / "cells")
    if given.only_cell:
        one_cell(names[0], given.slos[0], given)
        return
    cells = [(name, slo) for slo in given.slos for name in names]
    todo = [(n, slo) for n, slo in cells if not (given.out / "cells" / f"{n}.{slo}.json").is_file()]
    kept = [arg for flag in ("peers", "oracle") for arg in ([] if getattr(given, flag) else [f"--no-{flag}"])]
    shared = ["--out", str(given.out), *kept, "--policies", *map(str, given.policies)]
    began_s = time.monotonic()

    def run(cell: tuple[str, SloName]) -> None:
        own = ["--only-cell", "--scenarios", cell[0], "--slos", cell[1]]
        subprocess.run([sys.executable, __file__, *shared, *own], check=True)
        print(f"{cell[0]}, {cell[1]}  {time.monotonic() - began_s:.0f} s", flush=True)

    with ThreadPoolExecutor(given.workers) as pool:
        list(pool.map(run, todo))
    read = [read_json(given.out / "cells" / f"{name}.{slo}.json") for name, slo in cells]
    print(publish(read, given.out, names=["DQN", *(folder.name for folder in given.policies)]))


if __name__ == "__main__":
    main()
