"""A performance model from a profile of a server: linear least squares over relative errors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fuel_ray.errors import ConfigError
from fuel_ray.sim.pack import PerfModel
from fuel_ray.sim.perf_model import step_cost

_GRAPH_TOKENS = 256  # vLLM captures CUDA graphs up to 2 x max_num_seqs = 256 tokens by default
_OUTLIER = 0.3
_TURNS = 20
_LAUNCH_BOUND = 1.3  # prefills that take less than this times the shortest eager one tell the launch time


@dataclass(frozen=True, slots=True)
class DecodePoint:
    """Steps that only decode, in steady state."""

    seqs: int
    context_tokens: float  # per sequence
    step_s: float
    power_w: float
    clock_mhz: float


@dataclass(frozen=True, slots=True)
class PrefillPoint:
    """Prompts sent one after another to an idle server, or by several clients for their energy."""

    prompt_tokens: int
    clients: int
    ttft_s: float
    clock_mhz: float  # the pinned one, not the mean under the power cap
    energy_per_token_j: float | None = None


@dataclass(frozen=True, slots=True)
class Profile:
    """What was measured on one server."""

    decode: tuple[DecodePoint, ...]
    prefill: tuple[PrefillPoint, ...] = ()
    idle_w: float | None = None

    @property
    def clocks_mhz(self) -> tuple[float, ...]:
        """The pinned clocks at which decoding was profiled, ascending."""
        return tuple(sorted({point.clock_mhz for point in self.decode}))


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Mean absolute relative errors of decode steps that were left out of the fit."""

    label: str
    time: float
    power: float
    energy: float


def fit(profile: Profile, *, base: PerfModel, shape: PerfModel) -> PerfModel:
    """Constants that reproduce the profile.

    Args:
        profile: what was measured.
        base: where what the profile does not tell comes from, such as the front end.
        shape: where the clock axis comes from if the profile has one clock.

    Raises:
        ConfigError: the profile has too few decode rows.
    """
    points = profile.decode
    if len({(point.seqs, point.context_tokens) for point in points}) < 4:
        raise ConfigError("a profile needs decode rows of at least 4 different (b, ctx_mid)")
    highest_mhz = profile.clocks_mhz[-1]
    idle_w = profile.idle_w if profile.idle_w is not None else base.idle_w
    model = base._replace(max_clock_mhz=highest_mhz, idle_w=idle_w)
    model = model._replace(shape_max_seqs=max(point.seqs for point in points))
    model = _fit_times(points, model, shape)
    model = _fit_power_shape(points, model, shape)
    model = _fit_energy([point for point in points if point.clock_mhz == highest_mhz], model)
    return _fit_prefill([point for point in profile.prefill if point.clock_mhz == highest_mhz], model)


def without_outliers(
    profile: Profile, *, base: PerfModel, shape: PerfModel
) -> tuple[Profile, tuple[DecodePoint, ...]]:
    """The profile without decode rows whose time the fit misses by over 30 %, and those rows, worst first.

    They are measured wrongly rather than modelled wrongly: clients that merge chunks see longer intervals.
    """
    dropped: list[DecodePoint] = []
    while True:
        kept = replace(profile, decode=tuple(p for p in profile.decode if p not in dropped))
        model = fit(kept, base=base, shape=shape)
        error, worst = max(((_errors(model, [p])[0], p) for p in kept.decode), key=lambda pair: pair[0])
        if error <= _OUTLIER:
            return kept, tuple(dropped)
        dropped.append(worst)


def leave_one_out(profile: Profile, *, base: PerfModel, shape: PerfModel) -> tuple[LeftOut, ...]:
    """Errors per clock left out, but the highest, which is the reference; per row if there is one clock."""
    groups: list[tuple[str, tuple[DecodePoint, ...]]]
    if len(profile.clocks_mhz) > 1:
        groups = [
            (f"{clock:.0f} MHz", tuple(point for point in profile.decode if point.clock_mhz == clock))
            for clock in profile.clocks_mhz[:-1]
        ]
    else:
        groups = [(f"b={p.seqs} ctx={p.context_tokens:.0f}", (p,)) for p in profile.decode]
    results = []
    for label, left_out in groups:
        kept = tuple(point for point in profile.decode if point not in left_out)
        model = fit(replace(profile, decode=kept), base=base, shape=shape)
        results.append(LeftOut(label, *_errors(model, left_out)))
    return tuple(results)


def _errors(model: PerfModel, points: Sequence[DecodePoint]) -> tuple[float, float, float]:
    errors = []
    for p in points:
        step_s, power_w, _ = step_cost(model, p.seqs, p.seqs * p.context_tokens, 0, p.clock_mhz, 0.0)
        time, power = step_s / p.step_s, power_w / p.power_w
        errors.append((abs(time - 1), abs(power - 1), abs(time * power - 1)))
    time, power, energy = np.mean(errors, axis=0).tolist()
    return time, power, energy


def _fit_times(points: Sequence[DecodePoint], model: PerfModel, shape: PerfModel) -> PerfModel:
    """T = D (1 + c / (c + f) (1 / x - 1)) with D as PerfModel has it; c + f is D at the mean context.

    Both factors are linear where the other is known, so they are fitted in turns.
    """
    seqs, context, step_s, _, slower = _columns(points, model.max_clock_mhz)
    columns = [np.ones_like(seqs), seqs]
    if len(set(context.tolist())) > 1:
        columns.append(seqs * context)
    clocked = slower > 0
    stretch = np.ones_like(seqs)
    clock = [0.0, 0.0]
    for _ in range(_TURNS if clocked.any() else 1):
        decode = _relative_fit(columns, step_s / stretch)
        at_highest_s = np.column_stack(columns) @ decode
        per_context_s = max(decode[2], 0.0) if len(decode) > 2 else 0.0
        per_seq_s = decode[1] + per_context_s * float(context.mean())
        if clocked.any():
            typical_s = decode[0] + per_seq_s * seqs
            clock_columns = [(slower * factor / typical_s)[clocked] for factor in (np.ones_like(seqs), seqs)]
            slowdown = (step_s / at_highest_s)[clocked]
            clock = [max(c, 0.0) for c in _relative_fit(clock_columns, slowdown - 1, of=slowdown)]
            stretch = 1 + slower * (clock[0] + clock[1] * seqs) / typical_s
    model = model._replace(decode_s=decode[0], decode_seq_s=decode[1], decode_ctx_s=per_context_s)
    if not clocked.any():
        names = ("clock_s", "clock_seq_s", "fixed_s", "fixed_seq_s", "shape_max_seqs")
        return model._replace(**{name: getattr(shape, name) for name in names})
    fixed_s, fixed_seq_s = max(decode[0] - clock[0], 0.0), max(per_seq_s - clock[1], 0.0)
    return model._replace(clock_s=clock[0], clock_seq_s=clock[1], fixed_s=fixed_s, fixed_seq_s=fixed_seq_s)


def _fit_power_shape(points: Sequence[DecodePoint], model: PerfModel, shape: PerfModel) -> PerfModel:
    """P - idle = (slope_w + slope_seq_w n) x + max(0, x - knee)(knee_w + knee_seq_w n), for the best knee."""
    seqs, _, _, power_w, slower = _columns(points, model.max_clock_mhz)
    x = 1 / (1 + slower)
    clocks = sorted(set(x.tolist()))
    names = ("slope_w", "slope_seq_w", "knee_w", "knee_seq_w", "knee")
    if len(clocks) < 4:  # a knee cannot be seen
        return model._replace(**{name: getattr(shape, name) for name in names})
    best: tuple[float, list[float]] | None = None
    for knee in np.arange(clocks[1], clocks[-2] + 1e-9, 0.005).tolist():
        above = np.maximum(0.0, x - knee)
        columns = [x, x * seqs, above, above * seqs]
        fitted = _relative_fit(columns, power_w - model.idle_w, of=power_w)
        predicted_w = np.column_stack(columns) @ fitted + model.idle_w
        error = float(np.square(predicted_w / power_w - 1).sum())
        if best is None or error < best[0]:
            best = error, [*fitted, knee]
    if best is None:
        raise AssertionError("the range of knees holds at least its first value")
    return model._replace(**dict(zip(names, best[1], strict=True)))


def _fit_energy(points: Sequence[DecodePoint], model: PerfModel) -> PerfModel:
    """P = graph_w + graph_j / T + graph_seq_j n / T at the highest clock, with the fitted T."""
    seqs, context, _, power_w, _ = _columns(points, model.max_clock_mhz)
    step_s = model.decode_s + model.decode_seq_s * seqs + model.decode_ctx_s * seqs * context
    columns = [np.ones_like(seqs), seqs / step_s]
    if len({point.context_tokens for point in points}) > 1:  # otherwise T and n tell the same
        columns.append(1 / step_s)
    fitted = _relative_fit(columns, power_w)
    constant_j = fitted[2] if len(fitted) > 2 else 0.0
    return model._replace(graph_w=fitted[0], graph_seq_j=fitted[1], graph_j=constant_j)


def _fit_prefill(points: Sequence[PrefillPoint], model: PerfModel) -> PerfModel:
    """Launch times from short prompts, slope and its growth from long ones, energy where it was measured."""
    frontend_s = model.frontend_in_s + model.frontend_out_s
    single = [(point.prompt_tokens, point.ttft_s - frontend_s) for point in points if point.clients == 1]
    small = [engine_s for tokens, engine_s in single if tokens < _GRAPH_TOKENS]
    large = [pair for pair in single if pair[0] >= _GRAPH_TOKENS]
    if small:
        model = model._replace(launch_pieces_s=max(min(small), 1e-4))
    if large:
        eager_s = min(engine_s for _, engine_s in large)
        if eager_s <= 0:
            raise ConfigError(f"a prefill row has a TTFT of at most the front end's {frontend_s:.4f} s")
        model = model._replace(launch_eager_s=eager_s)
        bound = [(tokens, engine_s) for tokens, engine_s in large if engine_s > _LAUNCH_BOUND * eager_s]
        if bound:
            model = _fit_prefill_time(*np.array(bound).T, model=model)
    # the least of them has the least waiting for launches in it
    energies_j = [p.energy_per_token_j for p in points if p.energy_per_token_j is not None]
    token_j = min(energies_j, default=model.power_cap_w * model.prefill_token_s)
    return model._replace(prefill_token_j=token_j)


def _fit_prefill_time(tokens: np.ndarray, engine_s: np.ndarray, *, model: PerfModel) -> PerfModel:
    columns = [tokens, tokens**2 / 2][: len(tokens)]
    fitted = _relative_fit(columns, engine_s)
    if len(fitted) < 2 or fitted[1] < 0:
        fitted = [*_relative_fit(columns[:1], engine_s), 0.0]
    return model._replace(prefill_token_s=fitted[0], prefill_attention_s=fitted[1])


def _columns(points: Sequence[DecodePoint], highest_mhz: float) -> tuple[np.ndarray, ...]:
    """Sequences, context per sequence, step time, power and 1 / x - 1."""
    rows = [(p.seqs, p.context_tokens, p.step_s, p.power_w, highest_mhz / p.clock_mhz - 1) for p in points]
    return tuple(np.array(rows, float).T)


def _relative_fit(
    columns: Sequence[np.ndarray], target: np.ndarray, *, of: np.ndarray | None = None
) -> list[float]:
    """Coefficients with the least squares of errors relative to ``of``, the target by default."""
    scale = target if of is None else of
    matrix = np.column_stack(columns) / scale[:, None]
    norms = np.linalg.norm(matrix, axis=0)
    norms[norms == 0] = 1.0
    coefficients = np.linalg.lstsq(matrix / norms, target / scale, rcond=None)[0] / norms
    return [float(value) for value in coefficients]
