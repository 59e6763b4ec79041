"""Every policy on every workload: tuned on training seeds, compared on held-out ones, side by side."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from fuel_ray.arena.cell import Contest, run_scenario
from fuel_ray.arena.config import ArenaConfig
from fuel_ray.arena.figures import draw
from fuel_ray.arena.scenarios import SloName, scenarios_of
from fuel_ray.arena.tables import headline, markdown, summarise, text
from fuel_ray.build.nodes import build_spec
from fuel_ray.config import to_dict
from fuel_ray.errors import ConfigError
from fuel_ray.flags import parse_serving, resumed
from fuel_ray.policies.learned import load_policy
from fuel_ray.record import make_folder, new_folder, origin, read_json, write_csv, write_json, write_lines
from fuel_ray.sim.perf_model import load_pack
from fuel_ray.tuning.episodes import HELD_OUT_SEED, TUNING_SEEDS

# Settings of a node that are not the user's here
_OF_SCENARIOS = (
    *("preset", "workload", "kv_tokens", "slo_ttft_s", "slo_tpot_s", "slo_e2e_s", "slo_share"),
    *("reward", "miss_price_j", "guard"),
)


def parse(argv: list[str], *, prog: str) -> ArenaConfig:
    """Settings from flags; with --resume, those of that run.

    Raises:
        ConfigError: a flag is wrong.
        PolicyError: a policy folder does not fit the node.
    """
    config = parse_serving(ArenaConfig, argv, prog=prog, default=ArenaConfig())
    if config.resume is not None:
        config = resumed(config.resume, argv, prog=prog, base=ArenaConfig(), may_change=("workers",))
    if config.node != "sim" or len(config.block_sizes) != 1:
        raise ConfigError("the arena needs --node sim and one --block-sizes")
    _validate(config)
    return replace(config, slos=tuple(dict.fromkeys(config.slos)))


def _validate(config: ArenaConfig) -> None:
    most = len(TUNING_SEEDS)
    for flag, value, low, high in (
        ("--seeds", config.seeds, 1, 10_000),
        ("--tuning-seeds", config.tuning_seeds, 1, most),
        ("--seconds", config.seconds, 60, 86_400),
        ("--workers", config.workers, 1, 256),
        ("--tune-share", config.tune_share, 0.01, 1),
        ("--oracle-segment-s", config.oracle_segment_s, 1, 3_600),
    ):
        if not low <= value <= high:
            raise ConfigError(f"{flag} {value}: must be from {low} to {high}")
    for name in _OF_SCENARIOS:
        if getattr(config, name) != getattr(ArenaConfig(), name):
            raise ConfigError(f"--{name.replace('_', '-')}: the arena's own scenarios and promises say that")
    scenarios_of(config.scenarios)
    if not config.slos:
        raise ConfigError("--slos: at least one of interactive, tight, seed")
    names = [folder.name for folder in config.policies]
    if len(set(names)) < len(names):
        raise ConfigError("--policies: two folders have the same name; rows are named after folders")
    for folder in config.policies:
        load_policy(folder, build_spec(config, config.block_sizes[0]))


def run(config: ArenaConfig) -> int:
    """Run or resume; prints progress and tables, and writes them."""
    run_dir = config.resume or new_folder(config.out, "arena")
    make_folder(run_dir / "cells")
    if config.resume is None:
        write_json(run_dir / "run.json", _facts(config))
    cells = _all_cells(config, run_dir)
    print(f"\n{publish(cells, run_dir, names=[folder.name for folder in config.policies])}")
    print(f"\nmodelled, pack {config.pack}; wrote {run_dir}")
    return 0


def publish(cells: Sequence[dict[str, Any]], run_dir: Path, *, names: Sequence[str]) -> str:
    """Write what came of the cells as tables, pictures and CSV files; the text table is returned.

    ``names`` of policies get a table of their own, a line per cell.
    """
    summaries = [row for cell in cells for row in summarise(cell)]
    write_csv(run_dir / "summary.csv", summaries)
    write_csv(run_dir / "episodes.csv", [_episode(cell, row) for cell in cells for row in cell["rows"]])
    heads = [headline(summaries, name) for name in names]
    write_lines(run_dir / "arena.md", ["\n\n".join([*heads, markdown(summaries)])])
    draw(summaries, run_dir)
    return text(summaries)


def _facts(config: ArenaConfig) -> dict[str, Any]:
    return {
        "config": to_dict(config),
        **origin("arena"),
        "origin": "modelled",
        "pack_sha256": load_pack(config.pack).sha256,
        "tuning_seeds": list(TUNING_SEEDS[: config.tuning_seeds]),
        "held_out_seeds": [HELD_OUT_SEED + i for i in range(config.seeds)],
    }


def _episode(cell: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    return {"scenario": cell["scenario"], "slo": cell["slo"], **row}


def _all_cells(config: ArenaConfig, run_dir: Path) -> list[dict[str, Any]]:
    """Every cell in order, from its file where there is one."""
    folder = run_dir / "cells"
    contests = list(contests_of(config))
    todo = [contest for contest in contests if len(_done(contest, folder)) < len(config.slos)]
    print(
        f"arena  {run_dir}: {len(contests)} workloads x {len(config.slos)} SLO, {len(todo)} to do", flush=True
    )
    began_s = time.monotonic()
    try:
        for number, name in enumerate(_in_parallel(todo, folder, config.workers), 1):
            spent_s = time.monotonic() - began_s
            left_s = spent_s / number * (len(todo) - number)
            print(f"arena  {number}/{len(todo)}  {name:<16} {spent_s:.0f} s, {left_s:.0f} left", flush=True)
    except KeyboardInterrupt:
        print(f"\nto go on: fuel-ray arena --resume {run_dir}", flush=True)
        raise
    return [read_json(cell_file(folder, c.scenario.name, slo)) for c in contests for slo in config.slos]


def _in_parallel(contests: Sequence[Contest], folder: Path, workers: int) -> Iterator[str]:
    """Run the contests and name each as it is done; what has not begun is dropped on an error."""
    if workers == 1 or len(contests) < 2:
        yield from (run_and_write(contest, folder) for contest in contests)
        return
    pool = ProcessPoolExecutor(min(workers, len(contests)), mp_context=get_context("spawn"))
    try:
        for future in as_completed([pool.submit(run_and_write, c, folder) for c in contests]):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in active_children():  # in the middle of a cell, if this ends early
            child.terminate()


def contests_of(config: ArenaConfig) -> Iterator[Contest]:
    """One per workload."""
    return (Contest(config, scenario) for scenario in scenarios_of(config.scenarios))


def run_and_write(contest: Contest, folder: Path) -> str:
    """Run what is not yet in the folder, keep each cell as it is done; the workload's name."""
    for cell in run_scenario(contest, _done(contest, folder)):
        write_json(cell_file(folder, cell["scenario"], cell["slo"]), cell)
    return contest.scenario.name


def _done(contest: Contest, folder: Path) -> tuple[SloName, ...]:
    return tuple(
        slo for slo in contest.config.slos if cell_file(folder, contest.scenario.name, slo).is_file()
    )


def cell_file(folder: Path, scenario: str, slo: str) -> Path:
    """Where a cell is kept."""
    return folder / f"{scenario}.{slo}.json"
