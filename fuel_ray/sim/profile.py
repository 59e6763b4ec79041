"""A profile of a server as files of JSON lines."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fuel_ray.errors import ConfigError
from fuel_ray.sim.calibrate import (
    DecodePoint,
    PrefillPoint,
    Profile,
)

CLOCK_STEP_MHZ = 15  # NVIDIA's data centre GPUs since Volta


def read_profile(paths: Sequence[str]) -> Profile:
    """The rows of all files that tell something.

    Raises:
        ConfigError: a file is missing or malformed, or there is no decode row.
    """
    rows = [pair for path in paths for pair in _rows(path)]
    decode = tuple(_point(row, where) for row, where in rows if row.get("phase") == "decode")
    if not decode:
        raise ConfigError(f"profile {', '.join(paths)}: no row with phase decode")
    highest_mhz = max(point.clock_mhz for point in decode)
    decode = tuple(
        replace(p, clock_mhz=highest_mhz) if p.clock_mhz > 0.95 * highest_mhz else p for p in decode
    )
    prefill = tuple(
        _prefill_point(row, where, highest_mhz)
        for row, where in rows
        if row.get("phase") in ("prefill", "prefill_sustained")
    )
    idle = [_idle_w(row, where) for row, where in rows if row.get("phase") == "idle"]
    return Profile(decode, prefill, min(idle) if idle else None)


def _rows(path: str) -> list[tuple[dict[str, Any], str]]:
    if not Path(path).is_file():
        raise ConfigError(f"profile {path}: no such file")
    rows = []
    for number, line in enumerate(Path(path).read_text(errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"profile {path} line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(f"profile {path} line {number}: must be an object")
        rows.append((row, f"profile {path} line {number}"))
    return rows


def _point(row: dict[str, Any], where: str) -> DecodePoint:
    return DecodePoint(
        seqs=int(_number(row, "b", where)),
        context_tokens=_number(row, "ctx_mid", where),
        step_s=_number(row, "itl", where),
        power_w=_number(row, "power_w", where),
        clock_mhz=_snapped(_number(row, "clock_mhz" if "clock_mhz" in row else "sm_mhz", where)),
    )


def _prefill_point(row: dict[str, Any], where: str, highest_mhz: float) -> PrefillPoint:
    sustained = row["phase"] == "prefill_sustained"
    energy_j = None
    if sustained and "energy_j" in row:
        energy_j = _number(row, "energy_j", where) / _number(row, "prompt_tok", where)
    return PrefillPoint(
        prompt_tokens=int(_number(row, "n_in", where)),
        clients=int(_number(row, "c", where)) if "c" in row else (4 if sustained else 1),
        ttft_s=_number(row, "ttft_p50", where),
        clock_mhz=_snapped(_number(row, "clock_mhz", where)) if "clock_mhz" in row else highest_mhz,
        energy_per_token_j=energy_j,
    )


def _idle_w(row: dict[str, Any], where: str) -> float:
    names = [name for name in ("power_w", "power_inst_mean_w", "power_mean_w") if name in row]
    return _number(row, names[0] if names else "power_w", where)


def _number(row: dict[str, Any], key: str, where: str) -> float:
    value = row.get(key)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value <= 0
    ):
        raise ConfigError(f"{where}: {key} is {value}; it must be a number above 0")
    return float(value)


def _snapped(clock_mhz: float) -> float:
    """The step next to a mean clock, so that rows pinned to the same clock belong together."""
    return float(round(clock_mhz / CLOCK_STEP_MHZ) * CLOCK_STEP_MHZ)
