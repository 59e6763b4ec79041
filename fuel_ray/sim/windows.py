"""What the windows of a burst of equal requests tell: the figures of a row of a profile."""

import statistics
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from fuel_ray.types import WindowMetrics

REPEATS = 5  # prompts that come one after another

Measured = dict[str, Any] | None
Windows = Iterator[WindowMetrics]


def passed(windows: Windows, *, n: int) -> Measured:
    """Nothing, after so many windows more than the first."""
    return {"windows": len(list(islice(windows, n + 1)))}


def idle(windows: Windows, *, n: int) -> Measured:
    """Of so many windows after the first."""
    _, *used = islice(windows, n + 1)
    return {"power_w": _power_w(used)}


def decode(windows: Windows, *, n: int, context: int, enough: int) -> Measured:
    """Of the windows in which ``n`` requests did nothing but decode."""
    used: list[WindowMetrics] = []
    contexts: list[float] = []
    generated, running = 0, 0
    for window in windows:
        if running == window.running == n and not (window.prompt_tokens or window.preemptions):
            used.append(window)
            contexts.append(context + (generated + window.output_tokens / 2) / n)
        elif used or window.completed or window.preemptions:  # from then on fewer run
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


def prefill(windows: Windows, *, tokens: int, clients: int) -> Measured:
    """TTFT of prompts that come one after another; of many at once also their energy while more wait."""
    used: list[WindowMetrics] = []
    ttfts_s: list[float] = []
    waiting = 0
    for window in windows:
        ttfts_s += window.ttfts_s
        if waiting and window.waiting and window.prompt_tokens:
            used.append(window)
        waiting = window.waiting
        if len(ttfts_s) >= max(clients, REPEATS):
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
