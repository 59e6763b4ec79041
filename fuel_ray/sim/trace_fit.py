"""A performance model from a profile and recorded runs of a server together: damped Gauss-Newton.

The profile is fitted first, on its own (``calibrate.fit``). From there every constant that a run feels moves
where the rows of the profile and the replays of the runs agree best. Residuals are relative errors over the
error that would be content. What nothing tells stays where it was: each change costs its square over the width
in ``_WIDTHS``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fuel_ray.sim.calibrate import AXIS_CLOCKS, PrefillPoint, Profile, decode_step, with_shares
from fuel_ray.sim.pack import Fidelity, PerfModel
from fuel_ray.sim.replay import RecordedRun, figures, measured_figures, predicted_latencies, relative_errors
from fuel_ray.types import Requests

# How far a constant may well be from where the profile alone puts it: logarithms of the ratio.
_WIDTHS = {
    "frontend_in_s": 0.5, "frontend_out_s": 0.5,
    "launch_graph_s": 0.5, "launch_pieces_s": 0.5, "launch_eager_s": 0.5,
    "stall_w": 0.3,
    "decode_s": 0.1, "decode_seq_s": 0.5, "decode_ctx_s": 0.3,
    "mixed_token_s": 0.7, "prefill_token_s": 0.5,
    "graph_w": 0.2, "prefill_token_j": 0.3,
}  # fmt: skip
_WARM_UP_S = 1.0  # of each run is not fitted: a fresh server's first requests compile kernels
_FIRST_STEPS = (0, 1000, 2000, 3000)  # draws of the host's delays that a fit averages over
_STEP = 0.04  # of a finite difference, as a logarithm
_MOST = 0.3  # of a change in one iteration
_ITERATIONS = 25
_FOLDS = 6  # fits with runs left out, at most
_LENGTHS = ((0, 128), (128, 256), (256, 900), (900, 2**31))  # classes of prompts, in tokens
_REPEATS, _EVERY_S = 9, 2.0  # prompts that come one after another to an idle server
_SATURATED = 4  # steps of waiting prompts, from which on their times tell how fast the GPU computes
_ENGINE_TOKENS, _ENGINE_SEQS = 8192, 128  # of the server that was profiled; vLLM's defaults
_POOL_TOKENS = 2**20


def refine(profile: Profile, runs: Sequence[RecordedRun], *, start: PerfModel) -> PerfModel:
    """The model that reproduces the profile and the runs, from one that was fitted to the profile."""
    parameters = _parameters(profile, start)

    def model(x: np.ndarray) -> PerfModel:
        return _moved(start, parameters, x)

    def residuals(x: np.ndarray) -> np.ndarray:
        perf = model(x)
        parts = [decode_residuals(profile, perf), prefill_residuals(profile, perf)]
        parts += [run_residuals(run, perf) for run in runs]
        return np.concatenate([*parts, x])

    widths = np.array([p.width for p in parameters])
    return model(_least_squares(residuals, widths))


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A constant that is fitted: its logarithm moves by ``width x``, or itself by a scale."""

    name: str
    width: float
    scale: float | None = None  # None: the constant itself, whose logarithm moves


def _parameters(profile: Profile, start: PerfModel) -> tuple[_Parameter, ...]:
    m = start.constants
    positive = [_Parameter(name, width) for name, width in _WIDTHS.items() if getattr(m, name) > 0]
    step_j = m.graph_w * m.decode_s
    free = [
        _Parameter("graph_j", 0.2, step_j),
        _Parameter("graph_seq_j", 0.5, m.graph_w * max(m.decode_seq_s, m.decode_s / 500)),
        _Parameter("prefill_attention_s", 0.5, m.prefill_token_s / 50_000),
    ]
    if len(profile.clocks_mhz) >= AXIS_CLOCKS:
        free += [
            _Parameter("clock_s", 0.2, m.decode_s),
            _Parameter("clock_seq_s", 0.5, m.decode_seq_s),
            _Parameter("prefill_clock_share", 0.2, 1.0),
        ]
    return (*positive, *free)


def _moved(start: PerfModel, parameters: Sequence[_Parameter], x: np.ndarray) -> PerfModel:
    m, changed = start.constants, dict[str, float]()
    for p, value in zip(parameters, x.tolist(), strict=True):
        before = getattr(m, p.name)
        if p.scale is None:
            changed[p.name] = before * float(np.exp(p.width * value))
        else:
            lowest = -np.inf if p.name in ("graph_j", "graph_seq_j") else 0.0
            changed[p.name] = max(lowest, before + p.scale * p.width * value)
    told = {name: changed[name] for name in ("clock_s", "clock_seq_s") if name in changed}
    return with_shares(start.replace(**changed), of=start).replace(**told)


def _least_squares(residuals: Callable[[np.ndarray], np.ndarray], widths: np.ndarray) -> np.ndarray:
    x, damping = np.zeros(len(widths)), 0.1
    now, steps, most = residuals(x), _STEP / widths, _MOST / widths
    for _ in range(_ITERATIONS):
        slope = np.array([(residuals(x + d) - residuals(x - d)) / (2 * d.max()) for d in np.diag(steps)]).T
        square, before = slope.T @ slope, now @ now
        while damping < 1e4:
            damped = square + damping * np.diag(np.diag(square))
            candidate = x - np.clip(np.linalg.solve(damped, slope.T @ now), -most, most)
            then = residuals(candidate)
            if then @ then < before:
                x, now, damping = candidate, then, max(damping / 4, 1e-3)
                break
            damping *= 4
        if now @ now > before * (1 - 1e-3):
            break
    return x


def fidelity(name: str, run: RecordedRun, perf: PerfModel, *, left_out: bool) -> Fidelity:
    """Errors of the run's prediction, as ``fuel-ray validate`` has them."""
    predicted = figures(run, *predicted_latencies(run, perf))
    errors = relative_errors(predicted, measured_figures(run))
    names = ("energy", "tpot_mean", "e2e_mean", "ttft_p50")
    return Fidelity(name, len(run.requests), left_out, *(errors[name] for name in names))


def leave_out(profile: Profile, runs: Mapping[str, RecordedRun], *, start: PerfModel) -> Iterator[Fidelity]:
    """Errors of each run's prediction by a model fitted without it, and of many without others too."""
    for fold in range(min(len(runs), _FOLDS)):
        left_out = list(runs)[fold::_FOLDS]
        perf = refine(profile, [run for name, run in runs.items() if name not in left_out], start=start)
        yield from (fidelity(name, runs[name], perf, left_out=True) for name in left_out)


def fidelity_table(rows: Sequence[Fidelity]) -> str:
    """Errors of each run's prediction, for people."""
    lines = [
        f"{'trace':>24} {'requests':>8} {'energy':>8} {'mean TPOT':>9} {'mean e2e':>8} {'median TTFT':>11}"
    ]
    for row in rows:
        values = f"{row.energy:>+8.1%} {row.tpot_mean:>+9.1%} {row.e2e_mean:>+8.1%} {row.ttft_p50:>+11.1%}"
        how = "left out of the fit" if row.left_out else "fitted"
        lines.append(f"{row.trace:>24} {row.requests:>8} {values}   {how}")
    return "\n".join(lines)


def decode_residuals(profile: Profile, perf: PerfModel) -> np.ndarray:
    """Of step times and powers of the decode rows, two each."""
    values = []
    for p in profile.decode:
        step_s, power_w = decode_step(perf, p)
        values += [(step_s / p.step_s - 1) / 0.02, (power_w / p.power_w - 1) / 0.04]
    return np.clip(values, -4, 4)


def prefill_residuals(profile: Profile, perf: PerfModel) -> np.ndarray:
    """Of the TTFTs of single prompts and of many that wait, and of the energy of the latter."""
    return np.array([value for p in profile.prefill for value in _prefill(p, perf)])


def _prefill(p: PrefillPoint, perf: PerfModel) -> Iterator[float]:
    n = p.prompt_tokens
    if p.clients == 1:
        ttft_s = np.median(_ttfts_s(perf, p, np.arange(_REPEATS) * _EVERY_S))
        # Few are measured, and an idle host launches now faster, now slower than a busy one.
        yield float(np.log(ttft_s / p.ttft_s)) / (0.05 if _is_bound_by_arithmetic(perf, p) else 0.2)
    elif p.clients * n >= _SATURATED * _ENGINE_TOKENS:
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


def _is_bound_by_arithmetic(perf: PerfModel, p: PrefillPoint) -> bool:
    work_s, _, _ = perf.step_cost(1, p.prompt_tokens, p.prompt_tokens, p.clock_mhz, p.prompt_tokens**2 / 2)
    return work_s > 1.3 * perf.constants.launch_eager_s


def run_residuals(run: RecordedRun, perf: PerfModel) -> np.ndarray:
    """Of the figures of a run, and of its requests one by one, which are worth a few figures together."""
    draws = [_draw_residuals(run, perf, first_step) for first_step in _FIRST_STEPS]
    return np.concatenate(draws) / len(draws) ** 0.5


def _draw_residuals(run: RecordedRun, perf: PerfModel, first_step: int) -> np.ndarray:
    energy_j, ttft_s, e2e_s = predicted_latencies(run, perf, first_step=first_step)
    warm = run.requests.arrival_s >= _WARM_UP_S
    prompts, outputs = run.requests.prompt_tokens[warm], run.requests.output_tokens[warm]
    ttft, e2e = (ttft_s[warm], run.ttft_s[warm]), (e2e_s[warm], run.e2e_s[warm])
    several = outputs > 1
    tpot = [(b - a)[several] / (outputs[several] - 1) for a, b in zip(ttft, e2e, strict=True)]
    n = len(prompts)
    figures = [(energy_j / run.energy_j - 1) / 0.01]
    figures += [
        _ratio(np.mean, e2e) / _content(0.01, 0.08, n),
        _ratio(np.median, e2e) / _content(0.015, 0.1, n),
    ]
    figures += [
        _ratio(np.mean, ttft) / _content(0.05, 0.4, n),
        _ratio(np.median, ttft) / _content(0.03, 0.4, n),
    ]
    figures += [
        _ratio(np.mean, tpot) / _content(0.007, 0.08, n),
        _ratio(np.median, tpot) / _content(0.01, 0.1, n),
    ]
    for low, high in _LENGTHS:
        of = (prompts > low) & (prompts <= high)
        if of.sum() >= 4:
            pair = [values[of] for values in ttft]
            figures.append(_ratio(np.median, pair) / _content(0.08, 0.4, int(of.sum())))
    return np.concatenate([figures, _single(tpot, 0.03, 3), _single(ttft, 0.2, 2)])


def _content(model: float, request: float, n: int) -> float:
    """The error that would be content: of the model's form, and of as few requests as that."""
    return float(np.hypot(model, request / n**0.5))


def _ratio(statistic: Callable[[np.ndarray], float], pair: Sequence[np.ndarray]) -> float:
    return float(statistic(pair[0]) / statistic(pair[1]) - 1)


def _single(pair: Sequence[np.ndarray], scale: float, most: float) -> np.ndarray:
    return np.clip(np.log(pair[0] / pair[1]) / scale, -most, most) * (3 / max(len(pair[0]), 1)) ** 0.5
