"""fuel-ray calibrate: fit a calibration pack to a profile of your own server."""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

from fuel_ray.disk import whole
from fuel_ray.errors import ConfigError
from fuel_ray.sim.calibrate import (
    AXIS_CLOCKS,
    OUTLIER,
    Profile,
    errors,
    fit,
    in_words,
    leave_one_out,
    table,
    with_clock_axis,
    without_outliers,
)
from fuel_ray.sim.doubts import run_doubts
from fuel_ray.sim.fidelity import Fidelity, fidelity_table
from fuel_ray.sim.nearest import nearest_pack, same_architecture
from fuel_ray.sim.pack import Pack, PerfModel, load_pack, pack_fields, variant_fields
from fuel_ray.sim.profile import CLOCK_STEP_MHZ, is_simulated, read_profile, read_source
from fuel_ray.sim.recorded import RecordedRun, read_trace
from fuel_ray.sim.rows import Row
from fuel_ray.sim.trace_fit import WANDER, fidelity, leave_out, refine, wander

_LIMITS = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "kv_tokens")  # of a server
_FACTS = ("gpu_name", "model", "engine", "power_cap_w", "origin")  # of a trace's info


@dataclass(frozen=True)
class CalibrateConfig:
    """Fit a calibration pack to a profile of your own server, and print the errors of the fit."""

    profile: tuple[str, ...]
    """Profiles (profile.jsonl) that `fuel-ray profile` wrote."""
    name: str
    """Name of the calibration pack."""
    out: str
    """Pack file to write; its name ends in .json."""
    traces: tuple[str, ...] = ()
    """Traces of the same server, by `fuel-ray profile` or `fuel-ray benchmark --save-trace`. Launch times,
    front end and mixed steps are fitted to them."""
    held_out: tuple[str, ...] = ()
    """Traces of the same server that are used only to test the fit."""
    gpu: str | None = None
    """Name of the GPU as NVML reports it. None: as in the traces, like --model and --engine."""
    model: str | None = None
    """Model that was served."""
    engine: str | None = None
    """Engine that served it, and its version."""
    power_cap_w: float | None = None
    """Power limit of the GPU in W. None: as in the traces, else the highest power in the profile."""
    clocks_mhz: tuple[int, int, int] | None = None
    """Supported GPU clocks in MHz: lowest, highest, step. None: from the lowest profiled clock to the highest
    in steps of 15; from half of it if only one was profiled."""
    kv_tokens: int | None = None
    """Size of the KV cache in tokens. None: as in the traces, else as in profile or base pack."""
    base: str | None = None
    """Pack that supplies what the profile lacks: front end, limits, CPU. None: the shipped pack with the
    nearest GPU and model size."""
    clock_axis_from: str | None = None
    """Pack that supplies the clock axis if fewer than three clocks were profiled, and in any case how memory
    streaming depends on the clock. None: the shipped pack of the same GPU architecture."""


def run(config: CalibrateConfig) -> int:
    """Write the pack and print its leave-one-out errors."""
    if not config.out.endswith(".json"):
        raise ConfigError(f"--out {config.out}: the name of a pack file must end in .json")
    server = _server(config)
    shape = load_pack(config.clock_axis_from or same_architecture(server.gpu_name))
    base = load_pack(config.base or nearest_pack(server.gpu_name, server.model, default=shape.name))
    profile = read_profile(config.profile)
    cap_w = server.power_cap_w or max(point.power_w for point in profile.decode)
    start = with_clock_axis(base.perf, of=shape.perf).replace(power_cap_w=cap_w)
    profile, dropped = without_outliers(profile, base=start)
    for point in dropped:
        print(f"outlier left out, more than {OUTLIER:.0%} off any fit: {in_words(point)}")
    _warn_of_noise(profile, base=start)
    raw = _pack(config, server, profile, *_fitted(profile, server, base=start), base=base, shape=shape)
    with whole(Path(os.path.realpath(config.out))) as file:  # a user's link stays one
        file.write(json.dumps(raw, indent=2) + "\n")
    load_pack(config.out)
    print(f"wrote {config.out}; measured: {raw['measured']}; transferred: {raw['transferred']}")
    return 0


def _warn_of_noise(profile: Profile, *, base: PerfModel) -> None:
    """Say that rows are kept which no fit meets, since too few would be left without them."""
    model = fit(profile, base=base)
    off = max(errors(model, [point])[0] for point in profile.decode)
    if off > OUTLIER:
        print(
            f"warning: a decode row is {off:.0%} off the fit, but the fit needs it; measure again, with "
            "nothing else on the GPU and its host"
        )


@dataclass(frozen=True, slots=True)
class _Server:
    """What flags or else traces tell of the server."""

    runs: dict[str, RecordedRun]
    held_out: dict[str, RecordedRun]
    gpu_name: str
    model: str
    engine: str
    origin: str  # of profile and traces
    power_cap_w: float | None
    limits: Mapping[str, int]  # what it can serve, by the names in a pack


def _server(config: CalibrateConfig) -> _Server:
    paths = (*config.traces, *config.held_out)
    both = dict(zip(_names(paths), map(read_trace, paths), strict=True))
    if len(both) < len(paths):
        raise ConfigError("--traces, --held-out: a trace is given twice; give each one once")
    flags = (config.gpu, config.model, config.engine, config.power_cap_w, None)
    for name, run in both.items():
        for line in run_doubts(run):
            print(f"{name}: {line}")
    infos = [
        Row(dict(run.info), f"trace {path}: info") for path, run in zip(paths, both.values(), strict=True)
    ]
    told = _told(infos, given=[key for key, value in zip(_FACTS, flags, strict=True) if value])
    gpu_name = config.gpu or told["gpu_name"]
    if not gpu_name:
        raise ConfigError("no trace names the GPU: give its name with --gpu")
    runs, source = dict(islice(both.items(), len(config.traces))), read_source(config.profile)
    if told["origin"] and source.origin and is_simulated(told["origin"]) != is_simulated(source.origin):
        raise ConfigError(
            "--profile, --traces, --held-out: some are measured, others simulated; give one kind"
        )
    return _Server(
        runs,
        {name: run for name, run in both.items() if name not in runs},
        gpu_name=gpu_name,
        model=config.model or told["model"] or "unknown",
        engine=config.engine or told["engine"] or "vLLM",
        origin=told["origin"] or source.origin or "measured",
        power_cap_w=config.power_cap_w or told["power_cap_w"],
        limits=dict(source.limits) | _limits(both.values()) | _given(config),
    )


def _given(config: CalibrateConfig) -> dict[str, int]:
    return {} if config.kv_tokens is None else {"kv_tokens": config.kv_tokens}


def _limits(runs: Collection[RecordedRun]) -> dict[str, int]:
    """What the server of these runs can serve, as far as they tell it."""
    if not runs:
        return {}
    return {
        "max_num_seqs": max(run.max_num_seqs for run in runs),
        "max_num_batched_tokens": max(run.max_num_batched_tokens for run in runs),
        "kv_tokens": max(run.num_kv_blocks * run.kv_block_size for run in runs),
    }


def _told(rows: Sequence[Row], *, given: Sequence[str]) -> dict[str, Any]:
    """What the traces say of their server, beside what flags have given; None where none says it.

    Raises:
        ConfigError: they are of several servers, or some measured and some modelled.
    """
    told = dict[str, Any]()
    for key in _FACTS:
        read = Row.number if key.endswith("_w") else _text
        every = [read(row, key) for row in rows if row.values.get(key) is not None]
        said = list({str(one).casefold(): one for one in every}.values())  # vllm and vLLM are one
        if len(said) > 1 and key not in given:
            differ = ", ".join(map(str, said))
            raise ConfigError(
                f"--traces, --held-out: they have different values of {key} ({differ}), and a pack describes "
                "one server; give traces of one server only"
            )
        told[key] = said[0] if said else None
    return told


def _text(row: Row, key: str) -> str:
    return str(row.values[key])


def _names(paths: Sequence[str]) -> list[str]:
    """The files' names, with the folders above where two have the same."""
    stems = [Path(path).stem for path in paths]
    return [path if stems.count(stem) > 1 else stem for path, stem in zip(paths, stems, strict=True)]


def _fitted(profile: Profile, server: _Server, *, base: PerfModel) -> tuple[PerfModel, list[Fidelity]]:
    """The model and what it gets wrong of the runs; errors are printed."""
    start, runs, left_out = fit(profile, base=base), server.runs, list[Fidelity]()
    if runs:
        fitted = refine(profile, list(runs.values()), start=start)
        left_out = list(leave_out(profile, runs, fitted=fitted)) if len(runs) > 1 else []
        start = fitted.perf
    else:
        print(table(leave_one_out(profile, base=base)))
    perf = start.replace(**pack_fields(start)["perf"])  # as the file will have it: replays are sensitive
    rows = [fidelity(name, run, perf, left_out=False) for name, run in runs.items()] + left_out
    rows += [fidelity(name, run, perf, left_out=True) for name, run in server.held_out.items()]
    _say_errors(profile, runs | server.held_out, perf, rows)
    return perf, rows


def _say_errors(
    profile: Profile, runs: dict[str, RecordedRun], perf: PerfModel, rows: Sequence[Fidelity]
) -> None:
    if not runs:
        return
    print(fidelity_table(rows))
    for name, run in runs.items():
        if (spread := wander(run, perf)) > WANDER:
            print(
                f"{name}: the ratio of measured to predicted TPOT varies by {spread:.0%} between groups of "
                "ten requests: the speed of the host changes, so another short run will have another mean"
            )
    time, power, _ = errors(perf, profile.decode)
    print(f"fitted to {_rows(profile)}; mean error of decode steps: time {time:.1%}, power {power:.1%}")


def _pack(
    config: CalibrateConfig,
    server: _Server,
    profile: Profile,
    perf: PerfModel,
    rows: Sequence[Fidelity],
    *,
    base: Pack,
    shape: Pack,
) -> dict[str, Any]:
    clocks, profiled, runs = config.clocks_mhz or _clocks(profile), len(profile.clocks_mhz), server.runs
    lowest, highest, step = clocks
    if not (0 < lowest <= highest and step > 0 and (highest - lowest) % step == 0):
        raise ConfigError(
            f"--clocks-mhz {lowest} {highest} {step}: give the lowest clock, the highest, and a step that "
            "divides their difference, such as 345 1980 15"
        )
    from_base = "CPU figures" if runs else "front end, launch times, mixed steps, CPU figures"
    transferred = {
        f"modelled: the clock axis, from {shape.name} ({shape.gpu_name})": profiled < AXIS_CLOCKS,
        f"streaming by clock, from {shape.name} ({shape.gpu_name})": profiled >= AXIS_CLOCKS,
        f"prefill, from {base.name}": not (profile.prefill or runs),
        f"{from_base} and all else that was not measured, from {base.name}": True,
    }
    limits = {name: server.limits.get(name, getattr(base, name)) for name in _LIMITS}
    requests = sum(len(run.requests) for run in runs.values())
    of_traces = f"; traces {server.origin}" if runs else ""
    with_traces = (
        f"; {len(runs)} trace{'s' * (len(runs) > 1)} of {requests} requests: {', '.join(runs)}"
        if runs
        else ""
    )
    return {
        "name": config.name,
        "gpu_name": server.gpu_name,
        "architecture": shape.architecture,
        "model": server.model,
        "engine": server.engine,
        "gpu_clocks_mhz": {"min": lowest, "max": highest, "step": step},
        **limits,
        **pack_fields(perf),
        **(_axis_of(shape, perf) if profiled < AXIS_CLOCKS else {}),
        "measured": ("nothing; simulated: " if is_simulated(server.origin) else "")
        + _rows(profile)
        + with_traces,
        "transferred": "; ".join(what for what, is_so in transferred.items() if is_so),
        "sources": [f"fuel-ray calibrate, {date.today().isoformat()}, from {base.name}{of_traces}"],
        "fidelity": [asdict(row) for row in rows],
    }


def _axis_of(shape: Pack, perf: PerfModel) -> dict[str, Any]:
    """Where the clock axis is from, and the other axes that are as likely there."""
    others = {name: with_clock_axis(perf, of=shape.with_axis(name).perf) for name in shape.clock_axes[1:]}
    notes = {"clock_axis_notes": shape.clock_axis_notes} if others else {}
    variants = {"clock_axis_variants": variant_fields(perf, others)} if others else {}
    return {"clock_axis_from": shape.clock_axis_from or shape.name, **notes, **variants}


def _rows(profile: Profile) -> str:
    return f"{len(profile.decode)} decode and {len(profile.prefill)} prefill rows"


def _clocks(profile: Profile) -> tuple[int, int, int]:
    lowest, highest = int(profile.clocks_mhz[0]), int(profile.clocks_mhz[-1])
    if lowest == highest:
        lowest = highest - round(0.5 * highest / CLOCK_STEP_MHZ) * CLOCK_STEP_MHZ
    return lowest, highest, CLOCK_STEP_MHZ
