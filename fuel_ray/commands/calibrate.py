"""fuel-ray calibrate: fit a calibration pack to a profile of your own server."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuel_ray.disk import whole
from fuel_ray.errors import ConfigError
from fuel_ray.sim.calibrate import (
    AXIS_CLOCKS,
    Profile,
    fit,
    leave_one_out,
    table,
    with_clock_axis,
    without_outliers,
)
from fuel_ray.sim.nearest import nearest_pack, same_architecture
from fuel_ray.sim.pack import Pack, PerfModel, load_pack, pack_fields
from fuel_ray.sim.profile import CLOCK_STEP_MHZ, read_profile


@dataclass(frozen=True)
class CalibrateConfig:
    """Fit a calibration pack to a profile of your own server and print leave-one-out errors."""

    profile: tuple[str, ...]
    """Profile files: JSON lines with decode, prefill and idle rows."""
    name: str
    """Name of the pack."""
    gpu: str
    """GPU as NVML names it."""
    out: str
    """Pack file to write; must end in .json."""
    model: str = "unknown"
    """Model that was served."""
    engine: str = "vLLM"
    """Engine and version that served it."""
    power_cap_w: float | None = None
    """Power limit of the GPU in W; by default the highest power of the profile."""
    clocks_mhz: tuple[int, int, int] | None = None
    """Supported SM clocks: lowest, highest, step; by default from the lowest profiled one, or half of
    the highest, in steps of 15."""
    kv_tokens: int | None = None
    """Size of the KV pool in tokens; by default the base pack's."""
    base: str | None = None
    """Pack that gives what the profile does not tell: front end, limits, CPU; by default the shipped one
    nearest by GPU and, where --model's name tells its parameters, by size."""
    clock_axis_from: str | None = None
    """Pack that gives the clock axis if fewer than three clocks were profiled, and always how streaming
    depends on the clock; by default the shipped one of the GPU's architecture."""


def run(config: CalibrateConfig) -> int:
    """Write the pack and print its leave-one-out errors."""
    if not config.out.endswith(".json"):
        raise ConfigError(f"--out {config.out} must end in .json")
    shape = load_pack(config.clock_axis_from or same_architecture(config.gpu))
    base = load_pack(config.base or nearest_pack(config.gpu, config.model, default=shape.name))
    profile = read_profile(config.profile)
    cap_w = config.power_cap_w or max(point.power_w for point in profile.decode)
    start = with_clock_axis(base.perf, of=shape.perf).replace(power_cap_w=cap_w)
    profile, dropped = without_outliers(profile, base=start)
    for point in dropped:
        print(f"dropped, more than 30 % off any fit: {point}")
    raw = _pack(config, profile, fit(profile, base=start), base=base, shape=shape)
    print(table(leave_one_out(profile, base=start)))
    with whole(Path(os.path.realpath(config.out))) as file:  # a user's link stays one
        file.write(json.dumps(raw, indent=2) + "\n")
    load_pack(config.out)
    print(f"wrote {config.out}; measured: {raw['measured']}; transferred: {raw['transferred']}")
    return 0


def _pack(
    config: CalibrateConfig, profile: Profile, perf: PerfModel, *, base: Pack, shape: Pack
) -> dict[str, Any]:
    clocks, profiled = config.clocks_mhz or _clocks(profile), len(profile.clocks_mhz)
    lowest, highest, step = clocks
    if not (0 < lowest <= highest and step > 0 and (highest - lowest) % step == 0):
        raise ConfigError(f"--clocks-mhz {clocks}: lowest, highest and a step that leads from one to it")
    transferred = {
        f"clock axis, all of it modelled, from {shape.name} ({shape.gpu_name})": profiled < AXIS_CLOCKS,
        f"streaming by clock from {shape.name} ({shape.gpu_name})": profiled >= AXIS_CLOCKS,
        f"prefill from {base.name}": not profile.prefill,
        f"front end, CPU and what else the profile does not tell from {base.name}": True,
    }
    limits = ("max_num_seqs", "max_num_batched_tokens", "max_model_len")
    return {
        "name": config.name,
        "gpu_name": config.gpu,
        "architecture": shape.architecture,
        "model": config.model,
        "engine": config.engine,
        "gpu_clocks_mhz": {"min": lowest, "max": highest, "step": step},
        **{name: getattr(base, name) for name in limits},
        "kv_tokens": config.kv_tokens or base.kv_tokens,
        **pack_fields(perf),
        **({"clock_axis_from": shape.clock_axis_from or shape.name} if profiled < AXIS_CLOCKS else {}),
        "measured": f"{len(profile.decode)} decode and {len(profile.prefill)} prefill rows",
        "transferred": "; ".join(what for what, is_so in transferred.items() if is_so),
        "sources": ["fuel-ray calibrate"],
    }


def _clocks(profile: Profile) -> tuple[int, int, int]:
    lowest, highest = int(profile.clocks_mhz[0]), int(profile.clocks_mhz[-1])
    if lowest == highest:
        lowest = highest - round(0.5 * highest / CLOCK_STEP_MHZ) * CLOCK_STEP_MHZ
    return lowest, highest, CLOCK_STEP_MHZ
