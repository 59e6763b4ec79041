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

    What it does not tell is from ``base``; with one clock the clock axis is from ``shape``.

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
    one_clock, groups = len(profile.clocks_mhz) == 1, dict[str, list[DecodePoint]]()
    for p in sorted(profile.decode, key=lambda p: p.clock_mhz):
        if one_clock or p.clock_mhz < profile.clocks_mhz[-1]:
            label = f"b={p.seqs} ctx={p.context_tokens:.0f}" if one_clock else f"{p.clock_mhz:.0f} MHz"
            groups.setdefault(label, []).append(p)
    results = []
    for label, left_out in groups.items():
        rest = tuple(point for point in profile.decode if point not in left_out)
        model = fit(replace(profile, decode=rest), base=base, shape=shape)
        results.append(LeftOut(label, *_errors(model, left_out)))
    return tuple(results)


def table(errors: Sequence[LeftOut]) -> str:
    """Errors of each row or clock left out, and their means, for people."""
    lines = [f"{'left out':>20} {'time':>7} {'power':>7} {'energy':>7}   mean absolute errors, decode steps"]
    means = np.mean([(e.time, e.power, e.energy) for e in errors], axis=0).tolist()
    for e in (*errors, LeftOut("mean", *means)):
        lines.append(f"{e.label:>20} {e.time:>7.1%} {e.power:>7.1%} {e.energy:>7.1%}")
    return "\n".join(lines)


def _errors(model: PerfModel, points: Sequence[DecodePoint]) -> tuple[float, float, float]:
    """Of time, power and energy."""
    costs = [step_cost(model, p.seqs, p.seqs * p.context_tokens, 0, p.clock_mhz, 0.0) for p in points]
    time, power = np.array(
        [(c[0] / p.step_s, c[1] / p.power_w) for c, p in zip(costs, points, strict=True)]
    ).T
    errors = np.abs([time - 1, power - 1, time * power - 1])
    return tuple(errors.mean(axis=1).tolist())


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
    tried: list[tuple[float, list[float]]] = []
    for knee in np.arange(clocks[1], clocks[-2] + 1e-9, 0.005).tolist():
        above = np.maximum(0.0, x - knee)
        columns = [x, x * seqs, above, above * seqs]
        fitted = _relative_fit(columns, power_w - model.idle_w, of=power_w)
        predicted_w = np.column_stack(columns) @ fitted + model.idle_w
        tried.append((float(np.square(predicted_w / power_w - 1).sum()), [*fitted, knee]))
    _, best = min(tried, key=lambda pair: pair[0])
    return model._replace(**dict(zip(names, best, strict=True)))


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
        if bound := [pair for pair in large if pair[1] > _LAUNCH_BOUND * eager_s]:
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
