"""What a model gets wrong of a profile and of recorded runs, over the errors that would be content."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from fuel_ray.sim.calibrate import PrefillPoint, Profile, decode_step
from fuel_ray.sim.pack import PerfModel
from fuel_ray.sim.recorded import RecordedRun
from fuel_ray.sim.replay import predicted_latencies
from fuel_ray.types import Requests

WARM_UP_S = 1.0  # of each run is not fitted: a fresh server's first requests compile kernels
_LENGTHS = ((0, 128), (128, 256), (256, 900), (900, 2**31))  # classes of prompts, in tokens
_REPEATS, _EVERY_S = 9, 2.0  # prompts that come one after another to an idle server
_SATURATED = 4  # steps of waiting prompts, from which on their times tell how fast the GPU computes
_ENGINE_TOKENS, _ENGINE_SEQS = 8192, 128  # of the server that was profiled; vLLM's defaults
_ARITHMETIC = 1.15  # prompts that take less than this times their tokens' least time are bound by arithmetic
_POOL_TOKENS = 2**20
_DRAW_STEPS = 1000
_FEW = 4  # requests
_Pair = Sequence[np.ndarray]  # predicted and measured
_Statistic = Callable[[np.ndarray], Any]


def decode_residuals(profile: Profile, perf: PerfModel) -> np.ndarray:
    """Of step times and powers of the decode rows, two each."""
    values = []
    for p in profile.decode:
        step_s, power_w = decode_step(perf, p)
        values += [(step_s / p.step_s - 1) / 0.02, (power_w / p.power_w - 1) / 0.04]
    return np.clip(values, -4, 4)


def prefill_residuals(profile: Profile, perf: PerfModel) -> np.ndarray:
    """Of the TTFTs of single prompts and of many that wait, and of the energy of the latter."""
    least_s = {mhz: token_s(p for p in profile.prefill if p.clock_mhz == mhz) for mhz in _clocks(profile)}
    return np.array([value for p in profile.prefill for value in _prefill(p, perf, least_s[p.clock_mhz])])


def token_s(points: Iterable[PrefillPoint]) -> float:
    """Seconds by prompt token, launches and all, where they are least; half of those that wait come first."""
    return min(p.ttft_s / p.prompt_tokens / (p.clients / 2 if is_saturated(p) else 1) for p in points)


def run_residuals(run: RecordedRun, perf: PerfModel, *, draws: int) -> np.ndarray:
    """Of the figures of a run, and of its requests one by one, which are worth a few figures together."""
    each = [_draw_residuals(run, perf, k * _DRAW_STEPS) for k in range(draws)]
    return np.concatenate(each) / draws**0.5


def is_saturated(p: PrefillPoint) -> bool:
    """Whether so many prompts wait that their times tell how fast the GPU computes."""
    return p.clients * p.prompt_tokens >= _SATURATED * _ENGINE_TOKENS


def _clocks(profile: Profile) -> set[float]:
    return {p.clock_mhz for p in profile.prefill}


def _prefill(p: PrefillPoint, perf: PerfModel, least_s: float) -> Iterator[float]:
    n = p.prompt_tokens
    if p.clients == 1:
        ttft_s = np.median(_ttfts_s(perf, p, np.arange(_REPEATS) * _EVERY_S))
        # Few are measured, and an idle host launches now faster, now slower than a busy one.
        yield float(np.log(ttft_s / p.ttft_s)) / (0.05 if p.ttft_s < _ARITHMETIC * least_s * n else 0.2)
    elif is_saturated(p):
        ttft_s = np.median(_ttfts_s(perf, p, np.zeros(p.clients)))
        yield float(np.log(ttft_s / p.ttft_s)) / 0.04
    if p.energy_per_token_j is not None and n >= _ENGINE_TOKENS // 4:
        prompts = max(1, _ENGINE_TOKENS // n)
        step_s, power_w, _ = perf.step_cost(
            prompts, prompts * n, prompts * n, p.clock_mhz, prompts * n**2 / 2
        )
        yield (step_s * power_w / (prompts * n) / p.energy_per_token_j - 1) / 0.04


def _ttfts_s(perf: PerfModel, p: PrefillPoint, arrival_s: np.ndarray) -> np.ndarray:
    each = np.ones(len(arrival_s), np.int64)
    run = RecordedRun(
        requests=Requests(arrival_s, each * p.prompt_tokens, each, -each, each * 0),
        duration_s=float(arrival_s[-1]) + _EVERY_S,
        energy_j=0.0,
        ttft_s=arrival_s,
        e2e_s=arrival_s,
        kv_block_size=16,
        num_kv_blocks=_POOL_TOKENS // 16,
        max_num_seqs=_ENGINE_SEQS,
        max_num_batched_tokens=_ENGINE_TOKENS,
        limit_schedule=(),
        clock_schedule=((0.0, round(p.clock_mhz)),),
    )
    return predicted_latencies(run, perf)[1]


def _draw_residuals(run: RecordedRun, perf: PerfModel, first_step: int) -> np.ndarray:
    energy_j, ttft_s, e2e_s = predicted_latencies(run, perf, first_step=first_step)
    warm = run.requests.arrival_s >= WARM_UP_S
    if warm.sum() < _FEW:  # a burst
        warm = np.full(len(warm), True)
    several = warm & (run.requests.output_tokens > 1)
    tokens = run.requests.output_tokens[several] - 1
    ttft, e2e = (ttft_s, run.ttft_s), (e2e_s, run.e2e_s)
    tpot = [(b - a)[several] / tokens for a, b in zip(ttft, e2e, strict=True)]
    ttft, e2e = (ttft_s[warm], run.ttft_s[warm]), (e2e_s[warm], run.e2e_s[warm])
    values = [] if run.energy_j is None else [(energy_j / run.energy_j - 1) / 0.01]
    values += [_error(np.mean, e2e, 0.01, 0.08), _error(np.median, e2e, 0.015, 0.1)]
    values += [_error(np.mean, ttft, 0.05, 0.4), _error(np.median, ttft, 0.03, 0.4)]
    prompts = run.requests.prompt_tokens[warm]
    for low, high in _LENGTHS:
        values += _of_some(np.median, ttft, (prompts > low) & (prompts <= high), 0.08, 0.4)
    if several.any():
        values += [_error(np.mean, tpot, 0.007, 0.08), _error(np.median, tpot, 0.01, 0.1)]
        values += [_error(partial(np.percentile, q=q), tpot, 0.015, 0.12) for q in (10, 90)]
        for of in _interrupted(run, several):
            values += _of_some(np.mean, tpot, of, 0.007, 0.06)
    return np.concatenate([values, _single(tpot, 0.03, 3), _single(ttft, 0.2, 2)])


def _interrupted(run: RecordedRun, used: np.ndarray) -> Iterator[np.ndarray]:
    """Thirds of the used requests by how often others arrived while they decoded, per token."""
    arrival_s = run.requests.arrival_s
    begin, end = (np.searchsorted(arrival_s, (arrival_s + t)[used]) for t in (run.ttft_s, run.e2e_s))
    often = (end - begin) / run.requests.output_tokens[used]
    order = np.argsort(np.argsort(often, kind="stable"), kind="stable") * 3 // max(len(often), 1)
    yield from (order == third for third in range(3))


def _of_some(statistic: _Statistic, pair: _Pair, of: np.ndarray, model: float, request: float) -> list[float]:
    """The error of some of the requests, if they are not too few."""
    return [_error(statistic, [values[of] for values in pair], model, request)] if of.sum() >= _FEW else []


def _error(statistic: _Statistic, pair: _Pair, model: float, request: float) -> float:
    """Error over what would be content: of the model's form, and of as few requests as that."""
    error = float(statistic(pair[0]) / statistic(pair[1]) - 1)
    return error / float(np.hypot(model, request / len(pair[0]) ** 0.5))


def _single(pair: _Pair, scale: float, most: float) -> np.ndarray:
    return np.clip(np.log(pair[0] / pair[1]) / scale, -most, most) * (3 / max(len(pair[0]), 1)) ** 0.5
