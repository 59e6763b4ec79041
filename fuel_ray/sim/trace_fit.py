"""A performance model from a profile and recorded runs of a server together: damped Gauss-Newton.

The profile is fitted first, on its own (``calibrate.fit``). From there every constant that a run feels moves
where the rows of the profile and the replays of the runs agree best. Residuals are relative errors over the
error that would be content. What nothing tells stays where it was: a change costs its square over the widths
below.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fuel_ray.errors import ConfigError
from fuel_ray.sim.calibrate import AXIS_CLOCKS, Profile, fit, with_shares
from fuel_ray.sim.fidelity import Fidelity
from fuel_ray.sim.fit_residuals import (
    WARM_UP_S,
    decode_residuals,
    is_load,
    is_saturated,
    prefill_residuals,
    run_residuals,
    token_s,
)
from fuel_ray.sim.pack import PerfModel
from fuel_ray.sim.recorded import RecordedRun
from fuel_ray.sim.replay import figures, measured_figures, predicted_latencies, relative_errors

# How far a constant may well be from where the profile alone puts it: logarithms of the ratio.
_WIDTHS = {
    "frontend_in_s": 0.5, "frontend_out_s": 0.5,
    "launch_graph_s": 0.5, "launch_pieces_s": 0.5, "launch_eager_s": 0.5,
    "stall_w": 0.3,
    "decode_s": 0.1, "decode_seq_s": 0.5, "decode_ctx_s": 0.3,
    "mixed_token_s": 0.7, "prefill_token_s": 0.5,
    "graph_w": 0.2, "prefill_token_j": 0.3,
}  # fmt: skip
_DRAWS = (2, 8, 24)  # of the host's delays that a fit averages over: at least and at most for a run, for all
_STEP = 0.04  # of a finite difference, as a logarithm
_MOST = 0.3  # of a change in one iteration
_ITERATIONS, _AGAIN = 25, 6  # of a fit, of one more with some runs left out
_ROUNDS, _LOOKS = 3, (0.1, -0.1, 0.3, -0.3)
_FOLDS = 6  # fits with runs left out, at most
_SLOW, _SLOW_SHARE = 0.3, 0.4  # where a fit of a host whose speed changes begins
_FRONTEND_SEQ_S = 1e-4  # of tokens that leave one by one
WANDER = 0.06  # from which on it does
_LONG = 30  # tokens of the requests that tell
_HOST_BOUND = 1.15  # steps that take more than this times the shortest are the GPU's, if any are


@dataclass(frozen=True, slots=True, eq=False)
class Refined:
    """A fitted model, and where the fit came from, for another one from there."""

    perf: PerfModel
    cost: float  # sum of squares of what is left
    start: PerfModel
    x: np.ndarray  # how far from the start, in widths


def refine(profile: Profile, runs: Sequence[RecordedRun], *, start: PerfModel) -> Refined:
    """The model that reproduces the profile and the runs, from one that was fitted to the profile.

    It is the best from up to three starts, between which no small steps lead: the GPU sets the time of every
    step, the host that of small ones, and a host whose speed changes.
    """
    start = _with_saturated(profile, start)
    starts = [start, *_bound_by_host(profile, start)]
    fits = [_refined(profile, runs, start) for start in starts]
    best = min(fits, key=_cost)
    if any(wander(run, best.perf) > WANDER for run in runs):
        fits.append(_refined(profile, runs, _with_slow_host(profile, best.perf)))
    return min(fits, key=_cost)


def wander(run: RecordedRun, perf: PerfModel) -> float:
    """Standard deviation of TPOT over its prediction, relative, from some ten requests to the next ten."""
    _, ttft_s, e2e_s = predicted_latencies(run, perf)
    used = (run.requests.output_tokens >= _LONG) & (run.requests.arrival_s >= WARM_UP_S)
    ratio = np.log((run.e2e_s - run.ttft_s)[used] / (e2e_s - ttft_s)[used])
    groups = len(ratio) // 10
    return float(ratio[: groups * 10].reshape(groups, 10).mean(axis=1).std()) if groups > 1 else 0.0


def _cost(fitted: Refined) -> float:
    return fitted.cost


def _refined(
    profile: Profile, runs: Sequence[RecordedRun], start: PerfModel, *, x: np.ndarray | None = None
) -> Refined:
    """The fit from a start, or in few iterations from where another one ended."""
    parameters = _parameters(profile, start)
    draws = int(np.clip(_DRAWS[2] // max(len(runs), 1), *_DRAWS[:2]))
    of_runs = [run_residuals(run, draws=draws) for run in runs]

    def residuals(x: np.ndarray) -> np.ndarray:
        perf = _moved(start, parameters, x)
        parts = [decode_residuals(profile, perf), prefill_residuals(profile, perf)]
        return np.concatenate([*parts, *(of_run(perf) for of_run in of_runs), x])

    widths = np.array([p.width for p in parameters])
    found = (
        _least_squares(residuals, widths)
        if x is None
        else _gauss_newton(residuals, x, widths, iterations=_AGAIN)
    )
    return Refined(_moved(start, parameters, found), _square(residuals(found)), start, found)


def _bound_by_host(profile: Profile, start: PerfModel) -> Iterator[PerfModel]:
    """A start whose small batches wait for the host: the GPU's time is that of the larger steps."""
    launch_s = min(p.step_s for p in profile.decode)
    larger = replace(profile, decode=tuple(p for p in profile.decode if p.step_s > _HOST_BOUND * launch_s))
    try:
        of_gpu = fit(larger, base=start)
    except ConfigError:
        return
    if of_gpu.constants.decode_s < launch_s:
        names = ("decode_s", "decode_seq_s", "decode_ctx_s", "graph_w", "graph_j", "graph_seq_j")
        told = {name: getattr(of_gpu.constants, name) for name in names}
        yield with_shares(start.replace(**told, launch_graph_s=launch_s), of=start)


def _with_slow_host(profile: Profile, perf: PerfModel) -> PerfModel:
    """A start whose launches take longer for some of the time, and as long as before on average."""
    m = perf.constants
    faster = {
        name: getattr(m, name) / (1 + _SLOW * _SLOW_SHARE) for name in ("launch_pieces_s", "launch_eager_s")
    }
    launch_s = min(p.step_s for p in profile.decode)
    decode_s = min(m.decode_s, 0.85 * launch_s)
    start = perf.replace(host_slow=_SLOW, host_slow_share=_SLOW_SHARE, launch_graph_s=launch_s, **faster)
    return with_shares(start.replace(decode_s=decode_s), of=perf)


def _with_saturated(profile: Profile, start: PerfModel) -> PerfModel:
    """The start with the time of a prompt token from prompts that wait for each other, without launches."""
    saturated = [p for p in profile.prefill if is_saturated(p) and p.clock_mhz == profile.clocks_mhz[-1]]
    return start.replace(prefill_token_s=token_s(saturated)) if saturated else start


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
        _Parameter("frontend_seq_s", 1.0, _FRONTEND_SEQ_S),
    ]
    if m.host_slow > 0:
        free += [_Parameter("host_slow", 0.2, 1.0), _Parameter("host_slow_share", 0.3, 1.0)]
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
    """Damped Gauss-Newton, and where it ends a look at each parameter alone: replays are not smooth."""
    x, now = np.zeros(len(widths)), np.inf
    for _ in range(_ROUNDS):
        x = _gauss_newton(residuals, x, widths, iterations=_ITERATIONS)
        before, now = now, _square(residuals(x))
        if now > 0.99 * before:
            break
        for move in (m * unit for m in _LOOKS for unit in np.diag(1 / widths)):
            if (then := _square(residuals(x + move))) < now:
                x, now = x + move, then
    return x


def _gauss_newton(
    residuals: Callable[[np.ndarray], np.ndarray], x: np.ndarray, widths: np.ndarray, *, iterations: int
) -> np.ndarray:
    damping, now, steps, most = 0.1, residuals(x), _STEP / widths, _MOST / widths
    for _ in range(iterations):
        slope = np.array([(residuals(x + d) - residuals(x - d)) / (2 * d.max()) for d in np.diag(steps)]).T
        square, before = slope.T @ slope, _square(now)
        while damping < 1e4:
            damped = square + damping * np.diag(np.diag(square))
            candidate = x - np.clip(np.linalg.solve(damped, slope.T @ now), -most, most)
            then = residuals(candidate)
            if _square(then) < before:
                x, now, damping = candidate, then, max(damping / 4, 1e-3)
                break
            damping *= 4
        if _square(now) > before * (1 - 1e-3):
            break
    return x


def _square(residuals: np.ndarray) -> float:
    return float(residuals @ residuals)


def fidelity(name: str, run: RecordedRun, perf: PerfModel, *, left_out: bool) -> Fidelity:
    """Errors of the run's prediction, as ``fuel-ray validate`` has them."""
    predicted = figures(run, *predicted_latencies(run, perf))
    errors = relative_errors(predicted, measured_figures(run))
    names = ("energy", "tpot_mean", "e2e_mean", "ttft_p50")
    return Fidelity(name, len(run.requests), left_out, *(errors[name] for name in names))


def leave_out(profile: Profile, runs: Mapping[str, RecordedRun], *, fitted: Refined) -> Iterator[Fidelity]:
    """Errors of each load's prediction by a model fitted without it, and of many without others too.

    Probes are a fit's ground, no load to be predicted. The fits begin where the one to all runs ended.
    """
    loads = [name for name, run in runs.items() if is_load(run)]
    for fold in range(min(len(loads), _FOLDS)):
        left_out = loads[fold::_FOLDS]
        others = [run for name, run in runs.items() if name not in left_out]
        perf = _refined(profile, others, fitted.start, x=fitted.x).perf
        yield from (fidelity(name, runs[name], perf, left_out=True) for name in left_out)
