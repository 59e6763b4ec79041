"""fuel-ray profile: measure what `fuel-ray calibrate` fits a pack to, on a live or a simulated node."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from fuel_ray.build.nodes import build_loop, build_spec, served
from fuel_ray.config import ServingConfig, to_dict
from fuel_ray.control import ControlLoop
from fuel_ray.disk import write_or_keep
from fuel_ray.errors import ConfigError
from fuel_ray.flags import parse_serving
from fuel_ray.record import StepLog, new_folder, origin, write_json
from fuel_ray.sim.profile import LONGEST_S, points, spread
from fuel_ray.types import Knobs, NodeSpec, WindowMetrics


@dataclass(frozen=True)
class ProfileConfig(ServingConfig):
    """Measure decode steps, prefills and idle power of a node, for `fuel-ray calibrate`."""

    kv_tokens: int | None = None
    """Size of the KV pool in tokens, of a server that is started too; None: the pack's or server's own."""
    block_sizes: tuple[int, ...] = (16,)
    """KV block size in tokens: one."""
    clocks_mhz: tuple[int, ...] = ()
    """Clocks to profile in MHz; none: eight from half of the highest to the highest."""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """Requests that decode together; those above the server's capacity are left out."""
    contexts: tuple[int, ...] = (128, 1024)
    """Prompt tokens of the requests that decode."""
    prompts: tuple[int, ...] = (128, 512, 2048, 4096)
    """Prompt tokens of the prefills."""
    output_tokens: int = 2048
    """Tokens that a decoding request may have before its point is measured; with the prompt it has to fit
    the server's --max-model-len."""
    windows: int = 3
    """Windows of 1 s per decode point."""


def parse(argv: list[str], *, prog: str) -> ProfileConfig:
    """Settings from flags."""
    config = parse_serving(ProfileConfig, argv, prog=prog, default=ProfileConfig())
    if len(config.block_sizes) != 1:
        raise ConfigError("--block-sizes: a profile is of one server, give one block size")
    if config.node == "ray" and config.live_server:
        raise ConfigError("--node ray: a profile is of this machine's server; run it there with --node live")
    clocks = build_spec(config, config.block_sizes[0]).gpu_clocks_mhz
    if unknown := set(config.clocks_mhz) - set(clocks):
        known = f"the {len(clocks)} clocks {clocks[0]}..{clocks[-1]}"
        raise ConfigError(f"--clocks-mhz {sorted(unknown)}: none of {known}")
    return config


def run(config: ProfileConfig) -> int:
    """Print a line per point as it is measured, and write profile.jsonl; what there is when stopped stays."""
    size = config.block_sizes[0]
    run_dir = new_folder(config.out, "profile")
    source = "measured" if config.live_server else f"modelled, pack {config.pack}"
    facts = {**origin("profile"), "config": to_dict(config), "origin": source, "partial": True}
    path = run_dir / "profile.jsonl"
    with _kept_lines(path) as keep, served(replace(config, out=run_dir), size) as there:
        spec = build_spec(there, size)
        facts |= {"gpu_name": spec.gpu_name, "model": spec.model}
        write_json(run_dir / "run.json", facts)
        for row in _rows(there, spec):
            print(" ".join(f"{key}={_short(value)}" for key, value in row.items()), flush=True)
            keep(json.dumps(row))
    write_json(run_dir / "run.json", {**facts, "partial": False})
    print(
        f"\nwrote {path}; next: fuel-ray calibrate --profile {path} --name NAME --gpu {spec.gpu_name!r} ..."
    )
    return 0


@contextlib.contextmanager
def _kept_lines(path: Path) -> Iterator[Callable[[str], None]]:
    """Takes lines, which are in the file at once, and whole; where there is no room, elsewhere in the end.

    Raises:
        DiskError: they are elsewhere.
    """
    log, lines, whole = StepLog(path), list[str](), False

    def keep(line: str) -> None:
        lines.append(line)
        log.write(line)

    try:
        yield keep
        whole = True
    finally:
        log.close()
        if lines and not whole:
            print(f"ended early, {len(lines)} points are kept in {path}", flush=True)
        if log.lost_lines:
            with contextlib.suppress(OSError):
                path.unlink()  # a line of it may be torn
            write_or_keep(path.parent, {path.name: "".join(f"{line}\n" for line in lines)})


def _rows(config: ProfileConfig, spec: NodeSpec) -> Iterator[dict[str, Any]]:
    measured_at = partial(
        points,
        batches=[n for n in config.batches if n <= spec.batch_limits[-1]],
        contexts=config.contexts,
        prompts=config.prompts,
        output_tokens=config.output_tokens,
        windows=config.windows,
    )
    clocks_mhz = sorted(config.clocks_mhz or spread(spec.gpu_clocks_mhz), reverse=True)
    for point in chain.from_iterable(map(measured_at, clocks_mhz)):
        loop = build_loop(config, spec.kv_block_size, horizon_s=float(LONGEST_S), workload=point.workload)
        with contextlib.closing(loop.node):
            row = point.row(_windows(loop, point.clock_mhz, seed=config.seed))
        if row is None:
            print(f"skipped: there was no window of {point.what}", flush=True)
        else:
            yield row


def _windows(loop: ControlLoop, clock_mhz: int, *, seed: int) -> Iterator[WindowMetrics]:
    """The windows of a node that has just been given its load, at a clock, without a batch limit."""
    yield loop.reset(seed=seed)
    for _ in range(LONGEST_S):
        yield loop.step(Knobs(loop.node.spec.batch_limits[-1], clock_mhz)).metrics


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
