"""What a model gets wrong of a profile and of recorded runs, over the errors that would be content."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
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
_DRAW_STEPS = 1000
_FEW = 4  # requests
_PROBE_DOUBT = 3.0  # of a probe's TTFTs
_PLACED = ("listed:", "burst:")  # workloads whose arrivals are not drawn
_SINGLE = {"tpot": (0.03, 3.0), "ttft": (0.2, 2.0)}  # of one request: content error, and at most so many
_Latencies = Mapping[str, np.ndarray]
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


def run_residuals(run: RecordedRun, *, draws: int) -> Callable[[PerfModel], np.ndarray]:
    """Of the figures of a run, and of its requests one by one, which are worth a few figures together."""
    several = np.flatnonzero(_warm(run) & (run.requests.output_tokens > 1))
    measured = _latencies(run, several, run.ttft_s, run.e2e_s)
    parts = tuple(_figures(run, measured, several))

    def total(perf: PerfModel) -> np.ndarray:
        return np.concatenate([draw(perf, k * _DRAW_STEPS) for k in range(draws)]) / draws**0.5

    def draw(perf: PerfModel, first_step: int) -> np.ndarray:
        energy_j, ttft_s, e2e_s = predicted_latencies(run, perf, first_step=first_step)
        predicted = _latencies(run, several, ttft_s, e2e_s)
        values = [] if run.energy_j is None else [(energy_j / run.energy_j - 1) / 0.01]
        values += [part.error(predicted) for part in parts]
        single = (_single(predicted[name], measured[name], *of) for name, of in _SINGLE.items())
        return np.concatenate([values, *single])

    return total


def is_load(run: RecordedRun) -> bool:
    """Whether requests came as users send them, and not when and as long as a probe wants them."""
    return not str(run.info.get("workload", "")).startswith(_PLACED)


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
        num_kv_blocks=len(arrival_s) * (p.prompt_tokens // 16 + 2),
        max_num_seqs=_ENGINE_SEQS,
        max_num_batched_tokens=_ENGINE_TOKENS,
        limit_schedule=(),
        clock_schedule=((0.0, round(p.clock_mhz)),),
    )
    return predicted_latencies(run, perf)[1]


@dataclass(frozen=True, slots=True)
class _Figure:
    """A statistic of some of the requests' latencies, as measured, and the error that would be content."""

    latency: str
    of: np.ndarray | slice
    statistic: _Statistic
    measured: float
    content: float

    def error(self, predicted: _Latencies) -> float:
        return (self.statistic(predicted[self.latency][self.of]) / self.measured - 1) / self.content


def _warm(run: RecordedRun) -> np.ndarray:
    warm = run.requests.arrival_s >= WARM_UP_S
    return warm if warm.sum() >= _FEW else np.full(len(warm), True)  # else it is a burst


def _latencies(run: RecordedRun, several: np.ndarray, ttft_s: np.ndarray, e2e_s: np.ndarray) -> _Latencies:
    warm, tokens = _warm(run), run.requests.output_tokens[several] - 1
    return {"ttft": ttft_s[warm], "e2e": e2e_s[warm], "tpot": (e2e_s - ttft_s)[several] / tokens}


def _figures(run: RecordedRun, measured: _Latencies, several: np.ndarray) -> Iterator[_Figure]:
    """What counts of a run: its statistics with the errors of the model's form and of one request."""
    every = slice(None)
    figures: list[tuple[str, np.ndarray | slice, _Statistic, float, float]] = [
        ("e2e", every, np.mean, 0.01, 0.08), ("e2e", every, _median, 0.015, 0.1),
        ("ttft", every, np.mean, 0.05, 0.4), ("ttft", every, _median, 0.03, 0.4),
    ]  # fmt: skip
    prompts = run.requests.prompt_tokens[_warm(run)]
    for low, high in _LENGTHS:
        figures.append(("ttft", np.flatnonzero((prompts > low) & (prompts <= high)), _median, 0.08, 0.4))
    figures += [("tpot", every, np.mean, 0.007, 0.08), ("tpot", every, _median, 0.01, 0.1)]
    figures += [("tpot", every, partial(_quantile, q=q), 0.015, 0.12) for q in (0.1, 0.9)]
    figures += [("tpot", third, np.mean, 0.007, 0.06) for third in _interrupted(run, several)]
    # A probe's few prompts, sent at set times, tell less of TTFT than those of a load, which is what counts.
    doubt = {"ttft": 1.0 if is_load(run) else _PROBE_DOUBT}
    for name, of, statistic, model, request in figures:
        values = measured[name][of]
        if len(values) >= (1 if of is every else _FEW):
            content = doubt.get(name, 1.0) * float(np.hypot(model, request / len(values) ** 0.5))
            yield _Figure(name, of, statistic, float(statistic(values)), content)


def _interrupted(run: RecordedRun, used: np.ndarray) -> Iterator[np.ndarray]:
    """Thirds of the used requests by how often others arrived while they decoded, per token."""
    arrival_s = run.requests.arrival_s
    begin, end = (np.searchsorted(arrival_s, (arrival_s + t)[used]) for t in (run.ttft_s, run.e2e_s))
    often = (end - begin) / run.requests.output_tokens[used]
    order = np.argsort(np.argsort(often, kind="stable"), kind="stable") * 3 // max(len(often), 1)
    yield from (np.flatnonzero(order == third) for third in range(3))


def _median(values: np.ndarray) -> float:
    return _quantile(values, q=0.5)


def _quantile(values: np.ndarray, *, q: float) -> float:
    """As ``np.quantile``, which takes five times as long for a few hundred values."""
    ordered, at = np.sort(values), q * (len(values) - 1)
    low, high = ordered[int(at)], ordered[min(int(at) + 1, len(values) - 1)]
    return float(low + (high - low) * (at - int(at)))


def _single(predicted: np.ndarray, measured: np.ndarray, scale: float, most: float) -> np.ndarray:
    return (np.log(predicted / measured) / scale).clip(-most, most) * (3 / max(len(measured), 1)) ** 0.5
