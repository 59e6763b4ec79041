"""The rounds of a run: as many block sizes at a time as there are nodes, finished before the next begin."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fuel_ray.build.cluster import gpus_per_node
from fuel_ray.build.resolve import Learning, Resolved, resolve
from fuel_ray.cluster.hosts import num_nodes, require_nodes
from fuel_ray.config import LearnConfig
from fuel_ray.errors import UnsupportedError
from fuel_ray.record import read_csv, read_json, write_csv, write_json, write_lines
from fuel_ray.training.trials import start_ray

Sizes = tuple[int, ...]


def in_rounds(
    config: Learning,
    run_dir: Path,
    work: Callable[[Resolved[Learning]], object],
    *,
    finished: Callable[[], Iterable[int]],
) -> None:
    """Do the work of a run for the block sizes that are not ``finished``, while their servers are kept.

    Simulated nodes are all there at once, and are done again. What is found out goes to run.json.

    Raises:
        UnsupportedError: no block size can be served.
    """
    start_ray(config)
    for sizes in _rounds(config, run_dir):
        done = {*finished(), *map(int, read_json(run_dir / "run.json")["unsupported"])}
        left = tuple(size for size in sizes if size not in done or not config.live_server)
        if left:
            with resolve(replace(config, block_sizes=left, out=run_dir), run=run_dir.name) as found:
                _note(run_dir, found)
                if found.setups:
                    work(found)
    if read_json(run_dir / "run.json")["engine"] is None:
        raise UnsupportedError(f"no block size of {', '.join(map(str, config.block_sizes))} can be served")


def merged(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows into a table, in place of its rows of the same block sizes."""
    sizes = {str(row["block_size"]) for row in rows}
    others = [row for row in read_csv(path) if row["block_size"] not in sizes] if path.exists() else []
    write_csv(path, [*others, *rows])


def merged_lines(path: Path, lines: Sequence[str]) -> None:
    """The same for JSON lines."""
    sizes = {json.loads(line)["block_size"] for line in lines}
    there = path.read_text().splitlines() if path.exists() else []
    write_lines(path, [*(line for line in there if json.loads(line)["block_size"] not in sizes), *lines])


def block_sizes_of(path: Path) -> set[int]:
    """Block sizes that have rows in a table of the run."""
    names = {row["block_size"] for row in read_csv(path)} if path.exists() else set()
    return {int(size) for name in names for size in name.split("/")}


def _rounds(config: LearnConfig, run_dir: Path) -> list[Sizes]:
    """Planned at the run's beginning and kept, so that a resumed one finds its trials."""
    if not config.live_server:
        return [config.block_sizes]
    facts = read_json(run_dir / "run.json")
    if "rounds" not in facts:
        at_once = _at_once(config)
        sizes = config.block_sizes
        facts["rounds"] = [sizes[k : k + at_once] for k in range(0, len(sizes), at_once)]
        write_json(run_dir / "run.json", facts)
    return [tuple(sizes) for sizes in facts["rounds"]]


def _at_once(config: LearnConfig) -> int:
    """One on this machine's GPUs; on a cluster what it has nodes for at this moment."""
    if config.node == "live":
        return 1
    gpus = gpus_per_node(config)
    require_nodes(config.nodes_per_trial, gpus=gpus, wait_s=config.node_wait_s)
    return max(1, num_nodes(gpus) // config.nodes_per_trial)


def _note(run_dir: Path, found: Resolved[Learning]) -> None:
    facts = read_json(run_dir / "run.json")
    facts["unsupported"] |= {str(size): why for size, why in found.unsupported.items()}
    facts["nodes"] |= {str(size): asdict(setup.spec) for size, setup in found.setups.items()}
    facts["engine"] = next((setup.engine for setup in found.setups.values()), facts["engine"])
    write_json(run_dir / "run.json", facts)
