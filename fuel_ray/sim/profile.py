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
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

from fuel_ray.errors import ConfigError
from fuel_ray.sim.calibrate import DecodePoint, PrefillPoint, Profile
from fuel_ray.sim.rows import Row
from fuel_ray.types import WindowMetrics

CLOCK_STEP_MHZ = 15  # NVIDIA's data centre GPUs since Volta
LONGEST_S = 120  # in which a point has to be there
_CLOCKS = 8  # from half of the highest clock to the highest
_SETTLED = "after_s=1.5"  # the first window is at the highest clock, and a change takes up to 0.2 s
_REPEATS = 5
_SUSTAINED = 64  # prompts at once

Measured = dict[str, Any] | None
Windows = Iterator[WindowMetrics]


@dataclass(frozen=True, slots=True)
class Point:
    """One thing to measure: a load at a clock, and what its windows of 1 s tell (None: not enough)."""

    clock_mhz: int
    phase: str
    what: str
    workload: str
    measure: Callable[[Windows], Measured]

    def row(self, windows: Windows) -> Measured:
        """Its row of the profile, from the windows of a node that has just been given the load."""
        measured = self.measure(windows)
        return measured and {"phase": self.phase, "clock_mhz": self.clock_mhz, **measured}


def points(
    clock_mhz: int,
    *,
    batches: Sequence[int],  # requests that decode together
    contexts: Sequence[int],  # their prompt tokens
    prompts: Sequence[int],  # tokens of the prefills
    output_tokens: int,  # that a decoding request may have
    windows: int,  # per decode point
) -> Iterator[Point]:
    """What to measure at a clock: idle, decode steps, prefills one by one, many prompts at once."""
    point = partial(Point, clock_mhz)
    yield point("idle", "idle", "burst:count=0", partial(_idle, n=windows))
    for context, n in product(contexts, batches):
        load = f"burst:count={n},{_SETTLED},lengths=fixed,prompt_mean={context},output_mean={output_tokens}"
        what = f"{n} requests of {context} tokens that decode together"
        yield point("decode", what, load, partial(_decode, n=n, context=context, enough=windows))
    for tokens in prompts:
        load = f"burst:count={_REPEATS},every_s=2,{_SETTLED},lengths=fixed,prompt_mean={tokens},output_mean=2"
        yield point("prefill", f"{tokens} tokens", load, partial(_prefill, tokens=tokens, clients=1))
    tokens = max(prompts, default=2048)
    what = f"{_SUSTAINED} prompts of {tokens} tokens that wait for each other"
    load = f"burst:count={_SUSTAINED},{_SETTLED},lengths=fixed,prompt_mean={tokens},output_mean=1"
    yield point("prefill_sustained", what, load, partial(_prefill, tokens=tokens, clients=_SUSTAINED))


def spread(clocks_mhz: Sequence[int]) -> tuple[int, ...]:
    """Eight of the ascending clocks, from half of the highest to the highest."""
    upper = [clock_mhz for clock_mhz in clocks_mhz if clock_mhz >= clocks_mhz[-1] / 2]
    return tuple(sorted({upper[round(i * (len(upper) - 1) / (_CLOCKS - 1))] for i in range(_CLOCKS)}))


def read_profile(paths: Sequence[str]) -> Profile:
    """The rows of all files that tell something.

    Raises:
        ConfigError: a file is missing or malformed, or there is no decode row.
    """
    rows = [row for path in paths for row in _rows(path)]
    decode = [_decode_point(row) for row in rows if row.values.get("phase") == "decode"]
    if not decode:
        raise ConfigError(f"profile {', '.join(paths)}: no row with phase decode")
    highest_mhz = max(point.clock_mhz for point in decode)
    prefill = [row for row in rows if row.values.get("phase") in ("prefill", "prefill_sustained")]
    idle = [row for row in rows if row.values.get("phase") == "idle"]
    return Profile(
        tuple(replace(p, clock_mhz=highest_mhz) if p.clock_mhz > 0.95 * highest_mhz else p for p in decode),
        tuple(_prefill_point(row, highest_mhz) for row in prefill),
        _idle_powers(idle, highest_mhz),
    )


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


def _prefill(windows: Windows, *, tokens: int, clients: int) -> Measured:
    """TTFT of prompts that come one after another; of many at once also their energy while more wait."""
    used: list[WindowMetrics] = []
    ttfts_s: list[float] = []
    waiting = 0
    for window in windows:
        ttfts_s += window.ttfts_s
        if waiting and window.waiting and window.prompt_tokens:
            used.append(window)
        waiting = window.waiting
        if len(ttfts_s) >= max(clients, _REPEATS):
            break
    if not ttfts_s or (clients > 1 and not used):
        return None
    measured = {"n_in": tokens, "c": clients, "ttft_p50": statistics.median(ttfts_s)}
    if clients > 1:
        measured["energy_j"] = sum(window.energy_j for window in used)
        measured["prompt_tok"] = sum(window.prompt_tokens for window in used)
    return measured


def _power_w(windows: Sequence[WindowMetrics]) -> float:
    return sum(window.energy_j for window in windows) / sum(window.duration_s for window in windows)


def _rows(path: str) -> Iterator[Row]:
    if not Path(path).is_file():
        raise ConfigError(f"profile {path}: no such file")
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
