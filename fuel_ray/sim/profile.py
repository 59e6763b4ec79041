"""A profile of a server: the points that are measured, and the file of JSON lines that they make.

Each point is a burst of equal requests at one clock. ``read_profile`` uses rows of these phases, no others:

    {"phase": "decode", "b": 8, "ctx_mid": 353.0, "itl": 0.0071, "power_w": 451.6, "sm_mhz": 1980}
    {"phase": "prefill", "n_in": 2048, "c": 1, "ttft_p50": 0.057, "sm_mhz": 1980}
    {"phase": "prefill_sustained", "n_in": 2048, "ttft_p50": 0.2, "energy_j": 2891, "prompt_tok": 163840}
    {"phase": "idle", "power_w": 133}

A row may name the pinned clock as ``clock_mhz``. Decode rows otherwise have it from ``sm_mhz``, the mean
clock, where less than 5 % below the highest counts as the highest; prefill rows without it are taken to be at
the highest clock, because the power cap lowers their mean.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from fuel_ray.errors import ConfigError
from fuel_ray.sim.calibrate import DecodePoint, PrefillPoint, Profile
from fuel_ray.types import WindowMetrics

CLOCK_STEP_MHZ = 15  # NVIDIA's data centre GPUs since Volta
LONGEST_S = 120  # in which a point has to be there
_CLOCKS = 8  # from half of the highest clock to the highest
_SETTLED = "after_s=1.5"  # the first window is at the highest clock, and a change takes up to 0.2 s
_PREFILL_REPEATS = 5
_SUSTAINED = 64  # prompts at once

Measured = dict[str, Any] | None
Windows = Iterator[WindowMetrics]


@dataclass(frozen=True, slots=True)
class Point:
    """One thing to measure: a load at a clock, and what its windows of 1 s tell (None: not enough)."""

    what: str
    phase: str
    clock_mhz: int
    workload: str
    measure: Callable[[Windows], Measured]

    def row(self, windows: Windows) -> Measured:
        """Its row of the profile, from the windows of a node that has just been given the load."""
        measured = self.measure(windows)
        return measured and {"phase": self.phase, "clock_mhz": self.clock_mhz, **measured}


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """What to measure at each clock."""

    batches: tuple[int, ...]  # requests that decode together
    contexts: tuple[int, ...]  # their prompt tokens
    prompts: tuple[int, ...]  # tokens of the prefills
    output_tokens: int  # that a decoding request may have
    windows: int  # per decode point

    def at(self, clock_mhz: int) -> Iterator[Point]:
        """Idle, decode steps by context and batch, prefills one by one, many prompts at once."""
        yield Point("idle", "idle", clock_mhz, "burst:count=0", partial(_idle, n=self.windows))
        for context in self.contexts:
            for n in self.batches:
                yield self._decode(clock_mhz, n, context)
        for tokens in self.prompts:
            lengths = f"lengths=fixed,prompt_mean={tokens},output_mean=2"
            load = f"burst:count={_PREFILL_REPEATS},every_s=2,{_SETTLED},{lengths}"
            yield Point(f"{tokens} tokens", "prefill", clock_mhz, load, partial(_prefill, tokens=tokens))
        tokens = max(self.prompts, default=2048)
        what = f"{_SUSTAINED} prompts of {tokens} tokens that wait for each other"
        load = f"burst:count={_SUSTAINED},{_SETTLED},lengths=fixed,prompt_mean={tokens},output_mean=1"
        yield Point(what, "prefill_sustained", clock_mhz, load, partial(_sustained, tokens=tokens))

    def _decode(self, clock_mhz: int, n: int, context: int) -> Point:
        lengths = f"lengths=fixed,prompt_mean={context},output_mean={self.output_tokens}"
        measure = partial(_decode, n=n, context=context, enough=self.windows)
        what = f"{n} requests of {context} tokens that decode together"
        return Point(what, "decode", clock_mhz, f"burst:count={n},{_SETTLED},{lengths}", measure)


def spread(clocks_mhz: Sequence[int]) -> tuple[int, ...]:
    """Eight of the ascending clocks, from half of the highest to the highest."""
    upper = [clock_mhz for clock_mhz in clocks_mhz if clock_mhz >= clocks_mhz[-1] / 2]
    return tuple(sorted({upper[round(i * (len(upper) - 1) / (_CLOCKS - 1))] for i in range(_CLOCKS)}))


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


def _idle(windows: Windows, *, n: int) -> Measured:
    _, *used = islice(windows, n + 1)
    return {"power_w": _power_w(used)}


def _decode(windows: Windows, *, n: int, context: int, enough: int) -> Measured:
    """Of the windows in which ``n`` requests did nothing but decode."""
    used: list[WindowMetrics] = []
    contexts: list[float] = []
    generated, running = 0, 0
    for window in windows:
        if running == window.running == n and not (window.prompt_tokens or window.preemptions):
            used.append(window)
            contexts.append(context + (generated + window.output_tokens / 2) / n)
        elif used or window.completed:
            break
        generated, running = generated + window.output_tokens, window.running
        if len(used) == enough:
            break
    tokens = sum(window.output_tokens for window in used)
    if not tokens:
        return None
    return {
        "b": n,
        "ctx_mid": statistics.fmean(contexts),
        "itl": sum(window.duration_s for window in used) * n / tokens,
        "power_w": _power_w(used),
        "sm_mhz": statistics.fmean(window.gpu_clock_mhz or window.knobs.gpu_clock_mhz for window in used),
        "windows": len(used),
    }


def _prefill(windows: Windows, *, tokens: int) -> Measured:
    """TTFT of prompts that come one after another to an idle server."""
    ttfts_s: list[float] = []
    for window in windows:
        ttfts_s += window.ttfts_s
        if len(ttfts_s) >= _PREFILL_REPEATS:
            break
    return {"n_in": tokens, "c": 1, "ttft_p50": statistics.median(ttfts_s)} if ttfts_s else None


def _sustained(windows: Windows, *, tokens: int) -> Measured:
    """Energy of prompts while more of them wait."""
    used: list[WindowMetrics] = []
    ttfts_s: list[float] = []
    waiting = 0
    for window in windows:
        ttfts_s += window.ttfts_s
        if waiting and window.waiting and window.prompt_tokens:
            used.append(window)
        waiting = window.waiting
        if len(ttfts_s) >= _SUSTAINED:
            break
    if not used:
        return None
    return {
        "n_in": tokens,
        "c": _SUSTAINED,
        "ttft_p50": statistics.median(ttfts_s),
        "energy_j": sum(window.energy_j for window in used),
        "prompt_tok": sum(window.prompt_tokens for window in used),
    }


def _power_w(windows: Sequence[WindowMetrics]) -> float:
    return sum(window.energy_j for window in windows) / sum(window.duration_s for window in windows)


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
    value: Any = row.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and value > 0):
        raise ConfigError(f"{where}: {key} is {value}; it must be a number above 0")
    return float(value)


def _snapped(clock_mhz: float) -> float:
    """The step next to a mean clock, so that rows pinned to the same clock belong together."""
    return float(round(clock_mhz / CLOCK_STEP_MHZ) * CLOCK_STEP_MHZ)
