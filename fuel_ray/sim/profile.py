"""The file of JSON lines that a profile of a server is.

Each row is a load of equal requests at one clock. ``read_profile`` uses rows of these phases, no others:

    {"phase": "decode", "b": 8, "ctx_mid": 353.0, "itl": 0.0071, "power_w": 451.6, "sm_mhz": 1980}
    {"phase": "prefill", "n_in": 2048, "c": 1, "ttft_p50": 0.057, "sm_mhz": 1980}
    {"phase": "prefill_sustained", "n_in": 2048, "ttft_p50": 0.2, "energy_j": 2891, "prompt_tok": 163840}
    {"phase": "idle", "power_w": 133}

A row may name the pinned clock as ``clock_mhz``. Decode rows otherwise have it from ``sm_mhz``, the mean
clock, where less than 5 % below the highest counts as the highest; prefill rows without it are taken to be at
the highest clock, because the power cap lowers their mean.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fuel_ray.errors import ConfigError
from fuel_ray.sim.calibrate import DecodePoint, PrefillPoint, Profile
from fuel_ray.sim.rows import Row

CLOCK_STEP_MHZ = 15  # NVIDIA's data centre GPUs since Volta


@dataclass(frozen=True, slots=True)
class Source:
    """Where a profile comes from."""

    origin: str | None  # measured, or modelled with a pack; None: nothing tells it
    limits: Mapping[str, int]  # of the server that was profiled, by their names in a pack


def read_profile(paths: Sequence[str]) -> Profile:
    """The rows of all files that tell something.

    Raises:
        ConfigError: a file is missing or malformed, or there is no decode row.
    """
    rows = [row for path in paths for row in _rows(path)]
    decode = [_decode_point(row) for row in rows if row.values.get("phase") == "decode"]
    if not decode:
        raise ConfigError(f"--profile {' '.join(paths)}: not a profile (no row with phase decode)")
    highest_mhz = max(point.clock_mhz for point in decode)
    prefill = [row for row in rows if row.values.get("phase") in ("prefill", "prefill_sustained")]
    idle = [row for row in rows if row.values.get("phase") == "idle"]
    return Profile(
        tuple(replace(p, clock_mhz=highest_mhz) if p.clock_mhz > 0.95 * highest_mhz else p for p in decode),
        tuple(_prefill_point(row, highest_mhz) for row in prefill),
        _idle_powers(idle, highest_mhz),
    )


def read_source(paths: Sequence[str]) -> Source:
    """What the run.json beside each profile says of where it comes from; nothing where there is none.

    Raises:
        ConfigError: some of them are measured and others simulated.
    """
    every = [_facts(Path(path).with_name("run.json")) for path in paths]
    origins = [str(facts["origin"]) for facts in every if facts.get("origin")]
    if len({is_simulated(origin) for origin in origins}) > 1:
        raise ConfigError("--profile: some are measured, others simulated; give those of one server only")
    limits: dict[str, int] = {}
    for facts in every:
        found = facts.get("limits")
        for name, value in found.items() if isinstance(found, dict) else ():
            if type(value) is int and value > 0:
                limits[name] = max(value, limits.get(name, 0))
    return Source(origins[0] if origins else None, limits)


def is_simulated(origin: str) -> bool:
    """Whether what has this origin was recorded on a simulated node."""
    return origin.startswith("modelled")


def _facts(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        facts = json.loads(path.read_text(encoding="utf-8"))
        return facts if isinstance(facts, dict) else {}
    return {}


def _rows(path: str) -> Iterator[Row]:
    if not Path(path).is_file():
        raise ConfigError(f"--profile {path}: there is no such file")
    for number, line in enumerate(
        Path(path).read_text(encoding="utf-8-sig", errors="replace").splitlines(), start=1
    ):
        where = f"profile {path} line {number}"
        try:
            row = json.loads(line.strip() or "{}")
        except ValueError as error:
            raise ConfigError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: must be an object")
        yield Row(row, where)


def _decode_point(row: Row) -> DecodePoint:
    return DecodePoint(
        seqs=int(row.number("b")),
        context_tokens=row.number("ctx_mid"),
        step_s=row.number("itl"),
        power_w=row.number("power_w"),
        clock_mhz=_snapped(row.number("clock_mhz", "sm_mhz")),
    )


def _prefill_point(row: Row, highest_mhz: float) -> PrefillPoint:
    clients, energy_j = 1, None
    if row.values["phase"] == "prefill_sustained":
        clients = 4
        if "energy_j" in row.values:
            energy_j = row.number("energy_j") / row.number("prompt_tok")
    return PrefillPoint(
        prompt_tokens=int(row.number("n_in")),
        clients=int(row.number("c")) if "c" in row.values else clients,
        ttft_s=row.number("ttft_p50"),
        clock_mhz=_snapped(row.number("clock_mhz")) if "clock_mhz" in row.values else highest_mhz,
        energy_per_token_j=energy_j,
    )


def _idle_powers(rows: Sequence[Row], highest_mhz: float) -> tuple[tuple[float, float], ...]:
    """The least power at each clock; rows that name none are at the highest."""
    found: dict[float, float] = {}
    for row in rows:
        clock_mhz = _snapped(row.number("clock_mhz")) if "clock_mhz" in row.values else highest_mhz
        power_w = row.number("power_w", "power_inst_mean_w", "power_mean_w")
        found[clock_mhz] = min(power_w, found.get(clock_mhz, power_w))
    return tuple(sorted(found.items()))


def _snapped(clock_mhz: float) -> float:
    """The step next to a mean clock, so that rows pinned to the same clock belong together."""
    return float(round(clock_mhz / CLOCK_STEP_MHZ) * CLOCK_STEP_MHZ)
