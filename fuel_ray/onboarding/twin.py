"""Measuring the server, fitting its twin, and comparing the two on a load that was not fitted."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fuel_ray.build.nodes import build_loop
from fuel_ray.build.recording import record
from fuel_ray.commands import calibrate, profile, validate
from fuel_ray.commands.calibrate import CalibrateConfig
from fuel_ray.commands.profile import ProfileConfig
from fuel_ray.disk import whole
from fuel_ray.errors import ConfigError, NodeError
from fuel_ray.onboarding.config import OnboardConfig, settings
from fuel_ray.onboarding.load import mean_lengths
from fuel_ray.onboarding.server import require_alone
from fuel_ray.onboarding.state import Onboarding
from fuel_ray.record import make_folder, read_json
from fuel_ray.report.wording import figure_name, listed
from fuel_ray.sim.calibrate import AXIS_CLOCKS, Profile, too_few
from fuel_ray.sim.nearest import same_architecture
from fuel_ray.sim.pack import Pack, load_pack
from fuel_ray.sim.profile import read_profile
from fuel_ray.sim.recorded import RecordedRun, read_trace, trace_text
from fuel_ray.sim.replay import BOUNDS
from fuel_ray.types import Knobs
from fuel_ray.workload.spec import parse_workload

POOR = 3.0  # times a bound, beyond which a twin is no ground to decide on
NO_SAVING = (
    "no saving can be modelled: fuel_ray cannot set the clocks of {gpu} here, and no shipped pack has the "
    "clock axis of its architecture"
)
_RUNNING = 8  # requests, on average, of the fresh load
_LOWER = 0.65  # of the highest clock: the other one at which it is compared


def measure(state: Onboarding) -> dict[str, Any]:
    """`fuel-ray profile`, into profile/; one that was interrupted is gone on with.

    Raises:
        NodeError: too few points could be measured.
    """
    config = state.serving()
    require_alone(config)
    begun = sorted(state.folder.glob("profile-*"))
    tokens = state.facts.get("max_num_batched_tokens")
    with into(state.folder, "profile", begun):
        resume = begun[-1] if begun else None
        own = settings(ProfileConfig, config, resume=resume, max_num_batched_tokens=tokens)
        profile.run(own, state.bar)
        found = _measured(resume or max(state.folder.glob("profile-*")))
    print(f"wrote {state.folder / 'profile'}")
    return {"clocks_mhz": found.clocks_mhz, "decode": len(found.decode), "prefill": len(found.prefill)}


def fit(state: Onboarding) -> dict[str, Any]:
    """`fuel-ray calibrate`, on profile and traces, into pack.json."""
    facts, path = state.facts, state.folder / "profile" / "profile.jsonl"
    traces = sorted((state.folder / "profile" / "traces").glob("*.json"))
    axis_from, modelled = _axis_from(state)
    name = re.sub(r"[^a-z0-9.]+", "-", f"{facts['gpu_name']} {facts['model'].rpartition('/')[2]}".lower())
    calibrate.run(
        CalibrateConfig(
            profile=(str(path),),
            traces=tuple(map(str, traces)),
            name=f"own-{name}",
            gpu=facts["gpu_name"],
            out=str(state.pack_path),
            model=facts["model"],
            engine=facts["engine"],
            kv_tokens=None
            if facts["num_kv_blocks"] is None
            else facts["num_kv_blocks"] * state.kv_block_size,
            base=state.config.pack,
            clock_axis_from=axis_from,
        )
    )
    pack = load_pack(str(state.pack_path))
    found = {"pack": pack.name, "measured": pack.measured, "transferred": pack.transferred}
    return {**found, "clock_axis_modelled": modelled, "clock_axis_from": axis_from}


def compare(state: Onboarding) -> dict[str, Any]:
    """Serve a fresh load, once per clock, and say how far the twin is off it.

    Where it is too far off to be trusted that ends the onboarding, unless --accept-fidelity was given.
    """
    config = state.serving()
    require_alone(config)
    load = _fresh_load(state)
    print(f"workload: {load}, seed {config.seed + 1}, {config.validate_seconds} s; not used in the fit")
    paths = [_record(state, config, load, clock_mhz) for clock_mhz in _clocks(state)]
    pack, runs = load_pack(str(state.pack_path)), [read_trace(str(path)) for path in paths]
    results = [validate.compared(str(path), run, pack) for path, run in zip(paths, runs, strict=True)]
    print(validate.text(results))
    rows = [_row(state, run, pack, result) for run, result in zip(runs, results, strict=True)]
    beyond = [result["beyond"] for result in results]
    outside = {name for errors in beyond for name in errors}
    poor = {name for errors in beyond for name, e in errors.items() if abs(e) > POOR * BOUNDS[name]}
    found: dict[str, Any] = {
        "workload": load,
        "bounds": BOUNDS,
        "rows": rows,
        "outside": sorted(outside),
        "poor": sorted(poor),
    }
    with whole(state.folder / "validate.json") as file:
        file.write(json.dumps(found, indent=2))
    if poor and not config.accept_fidelity:
        return found | {"stop": _poor(state, found["poor"])}
    if not state.journal.found("calibrate")["clock_axis_modelled"]:
        return found | {"end": NO_SAVING.format(gpu=state.facts["gpu_name"])}
    return found


@contextlib.contextmanager
def into(folder: Path, verb: str, begun: Sequence[Path] = ()) -> Iterator[None]:
    """Give the folder that a verb makes in the block, or goes on with, the verb's plain name."""
    yield
    os.replace(begun[-1] if begun else max(folder.glob(f"{verb}-*")), folder / verb)


def _measured(folder: Path) -> Profile:
    """What a profile has measured.

    Raises:
        NodeError: that is too little for a twin.
        ConfigError: that is all that was asked for, and too little for a twin.
    """
    found = read_profile([str(folder / "profile.jsonl")])
    if why := too_few(found.decode):
        skipped = read_json(folder / "run.json")["skipped"]
        if not skipped:
            raise ConfigError(f"the profile has {why}; start again with more --batches or --contexts")
        reasons = "; ".join(dict.fromkeys(skipped.values()))
        raise NodeError(
            f"the profile has {why}. Not measured: {', '.join(skipped)} ({reasons}). Check whether "
            "something else runs on the server or its host"
        )
    return found


def _poor(state: Onboarding, names: list[str]) -> str:
    errors = listed([figure_name(name) for name in names])
    return (
        f"the error of the twin in {errors} is more than {POOR:g} times the accepted bound, so its "
        "predictions cannot be trusted. Check whether something else ran at the same time and start again, "
        f"or continue anyway: fuel-ray onboard --resume {state.folder} --accept-fidelity"
    )


def _row(state: Onboarding, run: RecordedRun, pack: Pack, result: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison as validate.json has it."""
    return {
        "trace": str(Path(result["trace"]).relative_to(state.folder)),
        "clock_mhz": run.clock_schedule[-1][1] if run.clock_schedule else pack.gpu_clocks_mhz[-1],
        "requests": len(run.requests),
        **{name: result[name] for name in ("measured", "predicted", "errors")},
        "doubts": result["warnings"],
    }


def _axis_from(state: Onboarding) -> tuple[str | None, bool]:
    """Pack of the clock axis, and whether a saving can be modelled with it."""
    facts, profiled = state.facts, len(state.journal.found("profile")["clocks_mhz"])
    try:
        same_architecture(facts["gpu_name"])
    except ConfigError as error:
        if profiled >= AXIS_CLOCKS:
            print(f"how memory streaming depends on the clock is taken from {state.config.pack}: {error}")
            return state.config.pack, True
        print(NO_SAVING.format(gpu=facts["gpu_name"]))
        return state.config.pack, False
    return None, True


def _clocks(state: Onboarding) -> list[int]:
    clocks_mhz = state.facts["gpu_clocks_mhz"]
    lower = min(clocks_mhz, key=lambda clock_mhz: abs(clock_mhz - _LOWER * clocks_mhz[-1]))
    return list(dict.fromkeys((clocks_mhz[-1], lower)))


def _fresh_load(state: Onboarding) -> str:
    """The user's lengths at a steady rate, by default one that keeps a few requests running."""
    prompt, output, longest_prompt, longest_output = mean_lengths(parse_workload(state.workload))
    rate_rps = state.config.validate_rate_rps
    if rate_rps is None:
        pack = load_pack(str(state.pack_path))
        step_s, _, _ = pack.perf.step_cost(
            _RUNNING, _RUNNING * (prompt + output / 2), 0, pack.gpu_clocks_mhz[-1]
        )
        prefill_s, _, _ = pack.perf.step_cost(1, prompt, prompt, pack.gpu_clocks_mhz[-1])
        rate_rps = _RUNNING / (output * step_s + _RUNNING * prefill_s)
    if longest_prompt == round(prompt) and longest_output == round(output):
        return (
            f"steady:rate_rps={rate_rps:.3g},lengths=fixed,prompt_mean={prompt:.0f},output_mean={output:.0f}"
        )
    prompt, output = max(prompt, 8.0), max(output, 4.0)
    longest = f"max_prompt_tokens={max(longest_prompt, round(2 * prompt) + 1, 16)}"
    longest += f",max_output_tokens={max(longest_output, round(2 * output) + 1, 8)}"
    return f"steady:rate_rps={rate_rps:.3g},prompt_mean={prompt:.4g},output_mean={output:.4g},{longest}"


def _record(state: Onboarding, config: OnboardConfig, load: str, clock_mhz: int) -> Path:
    """The load, served at a clock, as a trace file."""
    size, seconds = config.block_sizes[0], config.validate_seconds
    loop = build_loop(config, size, horizon_s=float(seconds), workload=load)
    with contextlib.closing(loop.node):
        spec = loop.node.spec
        knobs = Knobs(spec.batch_limits[-1], clock_mhz)
        run = record(loop, knobs, seed=config.seed + 1, windows=seconds)
    make_folder(state.folder / "traces")
    path = state.folder / "traces" / f"validate-{clock_mhz}.json"
    facts: Mapping[str, Any] = {
        "origin": state.facts["origin"],
        "gpu_name": spec.gpu_name,
        "model": spec.model,
    }
    with whole(path) as file:
        file.write(
            trace_text(run, **facts, engine=state.facts["engine"], workload=load, seed=config.seed + 1)
        )
    return path
