"""fuel-ray profile: measure what `fuel-ray calibrate` fits a pack to, on a live or a simulated node."""

import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fuel_ray.build.nodes import build_spec, described, served
from fuel_ray.build.probing import Points, Probe, probe
from fuel_ray.codec import clock_range
from fuel_ray.config import ServingConfig, to_dict
from fuel_ray.disk import write_or_keep
from fuel_ray.errors import ConfigError, NodeError
from fuel_ray.flags import parse_serving, resumed, value_of
from fuel_ray.live.vllm.facts import assumed
from fuel_ray.progress import UNSEEN, Bar
from fuel_ray.record import StepLog, make_folder, new_folder, origin, read_json, write_json, write_lines
from fuel_ray.sim.calibrate import too_few
from fuel_ray.sim.loads import Server
from fuel_ray.sim.pack import load_pack
from fuel_ray.sim.points import WARM_UP, Lengths, Point, all_points, fitting, spread, warm_up
from fuel_ray.sim.profile import read_profile
from fuel_ray.sim.recorded import trace_text
from fuel_ray.types import NodeSpec

_SHORTEST = 256  # max_model_len, below which there is no window of requests that decode


@dataclass(frozen=True)
class ProfileConfig(ServingConfig):
    """Measure a node for `fuel-ray calibrate`: decode steps, prefills, idle power and short workloads."""

    kv_tokens: int | None = None
    """Size of the KV cache in tokens, for the twin and for a server that is started. None: the pack's or the
    server's own."""
    block_sizes: tuple[int, ...] = (16,)
    """KV block size in tokens; exactly one."""
    clocks_mhz: tuple[int, ...] = ()
    """Clocks to profile in MHz; by default eight, from half of the highest to the highest."""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """Numbers of requests that decode together; those above the server's capacity are skipped."""
    contexts: tuple[int, ...] = (128, 1024)
    """Prompt tokens of the decode points."""
    prompts: tuple[int, ...] = (128, 512, 2048, 4096)
    """Prompt tokens of the prefill points."""
    output_tokens: int = 4096
    """Output tokens of a request at a decode point. If they come too fast to be measured, as many as the
    server accepts."""
    windows: int = 3
    """Windows of 1 s to measure per decode point."""
    traces: bool = True
    """Record traces of short workloads too: mixed steps, short prompts, many streams, chat at two rates."""
    max_num_batched_tokens: int | None = None
    """Tokens per step of the server, for the traces. None: what the server reports, else vLLM's default."""
    resume: Path | None = None
    """Folder of an interrupted profile to continue, with its settings."""


def parse(argv: list[str], *, prog: str) -> ProfileConfig:
    """Settings from flags; with --resume, those of that profile, which flags may repeat but not change."""
    if folder := value_of(argv, "--resume"):
        return resumed(Path(folder), argv, prog=prog, base=ProfileConfig(), may_change=())
    config = parse_serving(ProfileConfig, argv, prog=prog, default=ProfileConfig())
    if len(config.block_sizes) != 1:
        raise ConfigError("--block-sizes: a profile has exactly one block size, such as --block-sizes 16")
    tokens = config.max_num_batched_tokens or config.live.max_num_batched_tokens
    config = replace(config, live=replace(config.live, max_num_batched_tokens=tokens))
    if config.node == "ray" and config.live_server:
        raise ConfigError(
            "--node ray: profile measures a server on this machine; run it on the server's host with --node "
            "live"
        )
    clocks = build_spec(config, config.block_sizes[0]).gpu_clocks_mhz
    if unknown := set(config.clocks_mhz) - set(clocks):
        given = " ".join(map(str, sorted(unknown)))
        raise ConfigError(f"--clocks-mhz {given}: not supported here; {clock_range(clocks)}")
    return config


def run(config: ProfileConfig, around: Bar | None = None) -> int:
    """Write the row or the trace of each point; what there is when stopped stays.

    As a stage of the bar ``around`` it leaves the words on how to go on to the run that it is a stage of.
    """
    if not config.live_server:
        print(f"a simulated node, modelled by pack {config.pack}; no server is measured")
    run_dir = config.resume or new_folder(config.out, "profile")
    facts = _facts(config)
    path = run_dir / "profile.jsonl"
    make_folder(run_dir / "traces")
    rows, skipped = _rows_of(path), dict[str, str]()
    with (
        _kept_lines(path, rows, go_on=None if around else _go_on(run_dir)) as keep,
        served(replace(config, out=run_dir), config.block_sizes[0]) as there,
    ):
        spec, engine, server = _server(there)
        traces = there.traces and spec.num_kv_blocks is not None
        for fact in assumed(spec.server) if traces and spec.server else ():
            print(f"assumed for the traces, because the server does not report it: {fact}")
        if traces != there.traces:
            print("no traces will be recorded: the server's /metrics does not report the number of KV blocks")
        _add(facts, config, gpu_name=spec.gpu_name, model=spec.model, engine=engine)
        facts["limits"] = _limits(spec, server)
        write_json(run_dir / "run.json", facts)
        of = {name: facts[name] for name in ("origin", "gpu_name", "model", "engine")}
        for point, found in _probes(replace(there, traces=traces), server, rows, run_dir, around or UNSEEN):
            if found.row is not None:
                keep(json.dumps(found.row))
            if found.trace is not None:
                text = trace_text(found.trace, **found.facts, **of, clock_mhz=point.clock_mhz)
                write_or_keep(run_dir / "traces", {_trace_name(point): text})
            if found.refused:
                skipped[f"{point.name} at {point.clock_mhz} MHz"] = found.refused
    if not any(row["phase"] == "decode" for row in rows):
        raise NodeError(
            f"no decode point could be measured (the lines above say why), so {path} is of no use"
        )
    write_json(run_dir / "run.json", {**facts, "partial": False, "skipped": skipped})
    if skipped:
        print(f"not measured (the lines above say why): {_by_point(skipped)}")
    if around is None:
        _say_next(run_dir, spec, skipped)
    return 0


def _by_point(skipped: Collection[str]) -> str:
    """Points that were not measured, each once."""
    clocks: dict[str, list[str]] = {}
    for text in skipped:
        name, _, clock = text.partition(" at ")
        clocks.setdefault(name, []).append(clock)
    return ", ".join(
        f"{name} at {own[0] if len(own) == 1 else f'{len(own)} clocks'}" for name, own in clocks.items()
    )


def _say_next(run_dir: Path, spec: NodeSpec, skipped: Collection[str]) -> None:
    path, traces = run_dir / "profile.jsonl", sorted((run_dir / "traces").glob("*.json"))
    print(f"\nwrote {path} and {len(traces)} traces")
    if why := too_few(read_profile([str(path)]).decode):
        more = f"measure the rest: {_go_on(run_dir)}" if skipped else "profile more --batches or --contexts"
        print(f"not enough for `fuel-ray calibrate`: {why}; {more}")
        return
    and_traces = f" --traces {run_dir}/traces/*.json" if traces else ""
    print(f"next: fuel-ray calibrate --profile {path}{and_traces} --name NAME --gpu {spec.gpu_name!r} ...")


def _go_on(run_dir: Path) -> str:
    return f"fuel-ray profile --resume {run_dir}"


def _rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a profile that was interrupted; a torn last line is taken out of the file."""
    if not path.exists():
        return []
    try:
        *lines, torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--resume: {path} is not a file of JSON lines: {error}") from error
    if not all(isinstance(row, dict) and {"phase", "clock_mhz", "point"} <= set(row) for row in rows):
        raise ConfigError(f"--resume: {path} is not a profile: a row has no phase, clock_mhz or point")
    if torn:
        write_lines(path, lines)
    return rows


def _facts(config: ProfileConfig) -> dict[str, Any]:
    """What run.json says, of an interrupted profile what it said."""
    if config.resume is not None:
        return dict(read_json(config.resume / "run.json"))
    source = "measured" if config.live_server else f"modelled, pack {config.pack}"
    return {**origin("profile"), "config": to_dict(config), "origin": source, "partial": True}


def _add(facts: dict[str, Any], config: ProfileConfig, **found: str) -> None:
    """Raises ConfigError where the profile that goes on is of something else."""
    for name, value in found.items():
        if facts.setdefault(name, value) != value:
            raise ConfigError(
                f"--resume {config.resume}: that profile is of {name} {facts[name]}, and this server has "
                f"{value}"
            )


def _server(config: ProfileConfig) -> tuple[NodeSpec, str, Server]:
    """The node, its engine, and what bounds its loads.

    Raises:
        ConfigError: its max_model_len is too small for a profile.
    """
    size, pack = config.block_sizes[0], load_pack(config.pack)
    spec, engine, longest = described(config, size)
    server = Server(
        clocks_mhz=spec.gpu_clocks_mhz,
        max_num_seqs=spec.batch_limits[-1],
        max_model_len=longest or pack.max_model_len,
        kv_tokens=((spec.num_kv_blocks or 0) - 1) * size if spec.num_kv_blocks else pack.kv_tokens,
    )
    if min(server.max_model_len, server.kv_tokens) < _SHORTEST:
        found = f"max_model_len {server.max_model_len} and a KV cache of {server.kv_tokens} tokens"
        raise ConfigError(f"{spec.name} has {found}; a profile needs at least {_SHORTEST} tokens of each")
    return spec, engine, server


def _limits(spec: NodeSpec, server: Server) -> dict[str, int | None]:
    """What the server can serve, as a pack has it; None where it is not known."""
    size, blocks = spec.kv_block_size, spec.num_kv_blocks
    return {
        "max_num_seqs": server.max_num_seqs,
        "max_num_batched_tokens": spec.server.max_num_batched_tokens if spec.server else None,
        "max_model_len": server.max_model_len,
        "kv_tokens": blocks and blocks * size,
    }


def _probes(
    config: ProfileConfig, server: Server, rows: list[dict[str, Any]], run_dir: Path, bar: Bar
) -> Iterator[tuple[Point, Probe]]:
    """Measure the points that are missing, with a line for each, and ``rows`` grown by them."""
    lengths = Lengths(config.batches, config.contexts, config.prompts, config.output_tokens, config.windows)
    lengths, left_out = fitting(lengths, server)
    for what in left_out:
        print(f"skipped: {what}", flush=True)
    token_s = load_pack(config.pack).perf.constants.prefill_token_s
    clocks_mhz = config.clocks_mhz or spread(server.clocks_mhz)
    plan = all_points(clocks_mhz, lengths, server=server, token_s=token_s, traces=config.traces)
    missing = [point for point in plan if not _is_there(point, rows, run_dir)]
    first = [warm_up(missing[0].clock_mhz, lengths, server)] if missing else []
    progress = Points([*first, *missing], bar, on_twin=not config.live_server)
    progress.begin(len(plan) - len(missing), len(clocks_mhz))
    for point in progress.points:
        of_clock = [row for row in rows if row["clock_mhz"] == point.clock_mhz]
        found = probe(config, point, of_clock)
        progress.measured(point, found)
        if point.name != WARM_UP:
            rows += [found.row] if found.row is not None else []
            yield point, found


def _trace_name(point: Point) -> str:
    return f"{point.name}-{point.clock_mhz}.json"


def _is_there(point: Point, rows: Sequence[dict[str, Any]], run_dir: Path) -> bool:
    if point.is_trace:
        return (run_dir / "traces" / _trace_name(point)).exists()
    return any((row.get("clock_mhz"), row.get("point")) == (point.clock_mhz, point.name) for row in rows)


@contextlib.contextmanager
def _kept_lines(
    path: Path, rows: Sequence[dict[str, Any]], *, go_on: str | None
) -> Iterator[Callable[[str], None]]:
    """Takes lines for the file of ``rows``, there at once, and whole; without room, elsewhere in the end.

    Raises:
        DiskError: they are elsewhere.
    """
    log, lines, whole = StepLog(path), [json.dumps(row) for row in rows], False

    def keep(line: str) -> None:
        lines.append(line)
        log.write(line)

    try:
        yield keep
        whole = True
    finally:
        log.close()
        if lines and not whole:
            print(f"stopped early; {len(lines)} points were saved in {path}", flush=True)
            if go_on is not None:
                print(f"to continue: {go_on}", flush=True)
        if log.lost_lines:
            with contextlib.suppress(OSError):
                path.unlink()  # a line of it may be torn
            write_or_keep(path.parent, {path.name: "".join(f"{line}\n" for line in lines)})
