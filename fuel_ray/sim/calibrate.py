"""A performance model from a profile of a server: linear least squares over relative errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fuel_ray.errors import ConfigError
from fuel_ray.sim.clock_axis import ClockAxis
from fuel_ray.sim.pack import PerfModel

_GRAPH_TOKENS = 256  # vLLM captures CUDA graphs up to 2 x max_num_seqs = 256 tokens by default
FEWEST = 4  # different batches and contexts of decode rows, of which a step's time has three coefficients
AXIS_CLOCKS = 3  # from which on a profile tells its own clock axis
OUTLIER = 0.3  # error of a row's time
_KNOTS = 8  # of a fitted clock axis
_MOST_HBM_W = 400.0
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
    idle: tuple[tuple[float, float], ...] = ()  # (clock in MHz, W), ascending

    @property
    def idle_w(self) -> float | None:
        """At the highest clock at which it was measured."""
        return self.idle[-1][1] if self.idle else None

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


def fit(profile: Profile, *, base: PerfModel) -> PerfModel:
    """A model that reproduces the profile; what it does not tell is from ``base``, of the same architecture.

    The clock axis is fitted from three clocks on. Whatever their number, how streaming depends on the clock
    is from ``base``: on one GPU it cannot be told from the rest.

    Raises:
        ConfigError: the profile has too few decode rows.
    """
    points = profile.decode
    if why := too_few(points):
        raise ConfigError(f"--profile: {why}; profile more --batches or --contexts")
    highest_mhz = profile.clocks_mhz[-1]
    at_highest = [point for point in points if point.clock_mhz == highest_mhz]
    axis = _idle_axis(profile, _scaled(base, highest_mhz))
    idle_w = profile.idle_w if profile.idle_w is not None else base.constants.idle_w
    model = PerfModel(base.constants._replace(max_clock_mhz=highest_mhz, idle_w=idle_w), axis)
    model = with_shares(_fit_times(at_highest, model), of=base)
    model = _fit_energy(at_highest, _fit_times(points, model))
    if len(profile.clocks_mhz) >= AXIS_CLOCKS:
        model = _fit_switched(points, model)
    return _fit_prefill([point for point in profile.prefill if point.clock_mhz == highest_mhz], model)


def too_few(points: Sequence[DecodePoint]) -> str:
    """Why a fit needs more decode rows than these; empty where it does not."""
    found = len({(point.seqs, point.context_tokens) for point in points})
    pairs = f"{found} different pairs of batch and context (b, ctx_mid)"
    few = f"decode rows with {pairs}; a fit needs at least {FEWEST}"
    return few if found < FEWEST else ""


def with_clock_axis(model: PerfModel, *, of: PerfModel) -> PerfModel:
    """The model on another GPU's clock axis: its tables, and the shares of a step that they act on."""
    names = ("hbm_w", "prefill_clock_share")
    taken = {name: getattr(of.constants, name) for name in names}
    return with_shares(replace(model, axis=_scaled(of, model.constants.max_clock_mhz)), of=of).replace(
        **taken
    )


def without_outliers(profile: Profile, *, base: PerfModel) -> tuple[Profile, tuple[DecodePoint, ...]]:
    """The profile without decode rows whose time the fit misses by over 30 %, and those rows, worst first.

    They are measured wrongly rather than modelled wrongly: clients that merge chunks see longer intervals.
    As many rows are kept as a fit needs, however far off they are.
    """
    dropped: list[DecodePoint] = []
    while True:
        kept = replace(profile, decode=tuple(p for p in profile.decode if p not in dropped))
        model = fit(kept, base=base)
        error, worst = max(((errors(model, [p])[0], p) for p in kept.decode), key=lambda pair: pair[0])
        if error <= OUTLIER or too_few([p for p in kept.decode if p != worst]):
            return kept, tuple(dropped)
        dropped.append(worst)


def in_words(p: DecodePoint) -> str:
    """A decode row for people."""
    return (
        f"{p.seqs} requests with {p.context_tokens:.0f} tokens each at {p.clock_mhz:.0f} MHz "
        f"({1000 * p.step_s:.3g} ms per step, {p.power_w:.0f} W)"
    )


def leave_one_out(profile: Profile, *, base: PerfModel) -> tuple[LeftOut, ...]:
    """Errors per clock left out, but the highest, which is the reference; per row if there is one clock.

    What cannot be fitted without it is not left out.
    """
    one_clock, groups = len(profile.clocks_mhz) == 1, dict[str, list[DecodePoint]]()
    for p in sorted(profile.decode, key=lambda p: p.clock_mhz):
        if one_clock or p.clock_mhz < profile.clocks_mhz[-1]:
            label = f"b={p.seqs} ctx={p.context_tokens:.0f}" if one_clock else f"{p.clock_mhz:.0f} MHz"
            groups.setdefault(label, []).append(p)
    results = []
    for label, left_out in groups.items():
        rest = tuple(point for point in profile.decode if point not in left_out)
        if too_few(rest):
            continue
        model = fit(replace(profile, decode=rest), base=base)
        results.append(LeftOut(label, *errors(model, left_out)))
    return tuple(results)


def relative_fit(
    columns: Mapping[Any, np.ndarray],
    target: np.ndarray,
    *,
    of: np.ndarray | None = None,
    signed: bool = False,
) -> dict[Any, float]:
    """Coefficients with the least squares of errors relative to ``of``, the target by default.

    They are at least 0 unless ``signed``.
    """
    scale = target if of is None else of
    matrix = np.column_stack(list(columns.values())) / scale[:, None]
    norms = np.linalg.norm(matrix, axis=0)
    norms[norms == 0] = 1.0
    used, coefficients = np.full(len(norms), True), np.zeros(len(norms))
    while used.any():
        solved = np.linalg.lstsq(matrix[:, used] / norms[used], target / scale, rcond=None)[0]
        if signed or not (solved < 0).any():
            coefficients[used] = solved
            break
        used[np.flatnonzero(used)[solved.argmin()]] = False
    return dict(zip(columns, (coefficients / norms).tolist(), strict=True))


def table(errors: Sequence[LeftOut]) -> str:
    """Errors of each row or clock left out, and their means, for people."""
    if not errors:
        return "the errors are unknown, because the fit needs every row"
    lines = [f"{'left out':>20} {'time':>7} {'power':>7} {'energy':>7}   mean absolute errors, decode steps"]
    means = np.mean([(e.time, e.power, e.energy) for e in errors], axis=0).tolist()
    for e in (*errors, LeftOut("mean", *means)):
        lines.append(f"{e.label:>20} {e.time:>7.1%} {e.power:>7.1%} {e.energy:>7.1%}")
    return "\n".join(lines)


def errors(model: PerfModel, points: Sequence[DecodePoint]) -> tuple[float, float, float]:
    """Mean absolute relative errors of time, power and energy."""
    steps = [decode_step(model, p) for p in points]
    time, power = np.array([(s / p.step_s, w / p.power_w) for (s, w), p in zip(steps, points, strict=True)]).T
    errors = np.abs([time - 1, power - 1, time * power - 1])
    return tuple(errors.mean(axis=1).tolist())


def decode_step(model: PerfModel, p: DecodePoint) -> tuple[float, float]:
    """Time (s) and power (W) of such a step in steady state; it takes no less than the host to launch it.

    Where the host's speed changes, a point is short enough to be of one of its speeds, the nearer one.
    """
    m = model.constants
    work_s, power_w, _ = model.step_cost(p.seqs, p.seqs * p.context_tokens, 0, p.clock_mhz)
    speeds = (1.0, 1.0 + m.host_slow)
    step_s = min((max(work_s, m.launch_graph_s * s) for s in speeds), key=lambda s: abs(s - p.step_s))
    stall_w = model.at(p.clock_mhz).stall_w
    return step_s, stall_w + (power_w - stall_w) * work_s / step_s


def _scaled(base: PerfModel, highest_mhz: float) -> ClockAxis:
    """The axis of ``base`` at equal clocks relative to the highest one."""
    share = highest_mhz / base.constants.max_clock_mhz
    return replace(base.axis, clocks_mhz=tuple(mhz * share for mhz in base.axis.clocks_mhz))


def _idle_axis(profile: Profile, axis: ClockAxis) -> ClockAxis:
    """The axis with the idle powers of the profile, where it has them at three clocks or more."""
    idle = dict(profile.idle)
    if len(idle) < AXIS_CLOCKS or profile.clocks_mhz[-1] not in idle:
        return axis
    clocks = sorted(idle)
    return _at_clocks(axis, clocks, idle=[idle[mhz] / idle[clocks[-1]] for mhz in clocks])


def _at_clocks(axis: ClockAxis, clocks_mhz: Sequence[float], **columns: Sequence[float]) -> ClockAxis:
    """The axis with columns replaced by others over these clocks; the rest keeps the clocks that it has.

    Below and above these clocks a column that is replaced goes on as it did, from its new ends.
    """
    others = (mhz for mhz in axis.clocks_mhz if min(abs(mhz - other) for other in clocks_mhz) >= 1.0)
    every = sorted({*others, *clocks_mhz})
    streaming, switched, idle = (np.array(c) for c in zip(*map(axis.read, every), strict=True))
    read = {"streaming": streaming, "switched": switched, "idle": idle}
    for name, column in columns.items():
        goes_on = read[name] / np.interp(np.clip(every, clocks_mhz[0], clocks_mhz[-1]), every, read[name])
        read[name] = np.interp(every, clocks_mhz, column) * goes_on
    return ClockAxis(tuple(every), **{name: tuple(column.tolist()) for name, column in read.items()})


def _fit_times(points: Sequence[DecodePoint], model: PerfModel) -> PerfModel:
    """T = decode_s + decode_seq_s n + decode_ctx_s ctx r + stream_s (r - 1) + (clock_s + clock_seq_s n) / x'.

    r is the streaming of the axis and 1 / x' = 1 / x - 1. With one clock nothing is said of what it acts on.
    """
    m = model.constants
    seqs, context, step_s, _, slower = _columns(points, m.max_clock_mhz)
    streaming = np.array([model.axis.read(point.clock_mhz)[0] for point in points])
    columns = {"decode_s": np.ones_like(seqs), "decode_seq_s": seqs}
    if len(set(context.tolist())) > 1:
        columns["decode_ctx_s"] = seqs * context * streaming
    if slower.any():
        columns |= {"clock_s": slower, "clock_seq_s": slower * seqs}
    fitted = relative_fit(columns, step_s - m.stream_s * (streaming - 1), of=step_s)
    return model.replace(**{"decode_ctx_s": 0.0} | fitted)


def with_shares(model: PerfModel, *, of: PerfModel) -> PerfModel:
    """The model with the shares of a step's time that stream and that the clock scales in another one."""
    m, shares = model.constants, of.constants
    return model.replace(
        stream_s=m.decode_s * shares.stream_s / shares.decode_s,
        clock_s=m.decode_s * shares.clock_s / shares.decode_s,
        clock_seq_s=m.decode_seq_s * shares.clock_seq_s / (shares.decode_seq_s or 1.0),
    )


def _fit_switched(points: Sequence[DecodePoint], model: PerfModel) -> PerfModel:
    """P - idle = (hbm_w streaming + switched v) / T, v of at most eight clocks, for the best of the hbm_w."""
    clocks = [float(mhz) for mhz in sorted({point.clock_mhz for point in points})]
    knots = [clocks[round(i)] for i in np.linspace(0, len(clocks) - 1, min(len(clocks), _KNOTS))]
    hbm_w = np.linspace(0, _MOST_HBM_W, 41).tolist()
    return min((_switched(points, model.replace(hbm_w=w), knots) for w in hbm_w), key=lambda pair: pair[0])[1]


def _switched(
    points: Sequence[DecodePoint], model: PerfModel, knots: Sequence[float]
) -> tuple[float, PerfModel]:
    """Sum of squares of the power's relative errors, and the model with the switched energies fitted."""
    m, rows, target = model.constants, [], []
    for p in points:
        context = p.seqs * p.context_tokens
        reference_s = m.decode_s + m.decode_seq_s * p.seqs + m.decode_ctx_s * context
        above_j = m.graph_w * reference_s + m.graph_j + m.graph_seq_j * p.seqs - m.idle_w * reference_s
        hbm_j = min(above_j, m.hbm_w * (m.stream_s + m.decode_ctx_s * context))
        step_s, _, _ = model.step_cost(p.seqs, context, 0, p.clock_mhz)
        idle_w = m.idle_w * model.axis.read(p.clock_mhz)[2]
        tents = np.array([np.interp(p.clock_mhz, knots, unit) for unit in np.eye(len(knots))])
        rows.append(tents * (above_j - hbm_j) / step_s)
        target.append(p.power_w - idle_w - hbm_j / step_s)
    *below, top = np.array(rows).T
    power_w = np.array([p.power_w for p in points])
    fitted = relative_fit(dict(enumerate(below)), np.array(target) - top, of=power_w)
    switched = [*(max(value, 0.01) for value in fitted.values()), 1.0]
    error = (np.column_stack([*below, top]) @ switched - target) / power_w
    return float(error @ error), replace(model, axis=_at_clocks(model.axis, knots, switched=switched))


def _fit_energy(points: Sequence[DecodePoint], model: PerfModel) -> PerfModel:
    """P = graph_w + graph_j / T + graph_seq_j n / T at the highest clock, with the fitted T."""
    m = model.constants
    seqs, context, _, power_w, _ = _columns(points, m.max_clock_mhz)
    step_s = m.decode_s + m.decode_seq_s * seqs + m.decode_ctx_s * seqs * context
    columns = {"graph_w": np.ones_like(seqs), "graph_seq_j": seqs / step_s}
    if len({point.context_tokens for point in points}) > 1:  # otherwise T and n tell the same
        columns["graph_j"] = 1 / step_s
    return model.replace(**{"graph_j": 0.0} | relative_fit(columns, power_w, signed=True))


def _fit_prefill(points: Sequence[PrefillPoint], model: PerfModel) -> PerfModel:
    """Launch times from short prompts, slope and its growth from long ones, energy where it was measured."""
    m = model.constants
    frontend_s = m.frontend_in_s + m.frontend_out_s
    single = [(point.prompt_tokens, point.ttft_s - frontend_s) for point in points if point.clients == 1]
    small = [engine_s for tokens, engine_s in single if tokens < _GRAPH_TOKENS]
    large = [pair for pair in single if pair[0] >= _GRAPH_TOKENS]
    if small:
        model = model.replace(launch_pieces_s=max(min(small), 1e-4))
    if large:
        eager_s = min(engine_s for _, engine_s in large)
        if eager_s <= 0:
            raise ConfigError(f"a prefill row has a TTFT of at most the front end's {frontend_s:.4f} s")
        model = model.replace(launch_eager_s=eager_s)
        if bound := [pair for pair in large if pair[1] > _LAUNCH_BOUND * eager_s]:
            model = _fit_prefill_time(*np.array(bound).T, model=model)
    # the least of them has the least waiting for launches in it
    energies_j = [p.energy_per_token_j for p in points if p.energy_per_token_j is not None]
    token_j = min(energies_j, default=model.constants.power_cap_w * model.constants.prefill_token_s)
    return model.replace(prefill_token_j=token_j)


def _fit_prefill_time(tokens: np.ndarray, engine_s: np.ndarray, *, model: PerfModel) -> PerfModel:
    columns = {"prefill_token_s": tokens, "prefill_attention_s": tokens**2 / 2}
    if len(tokens) < 2:
        columns.pop("prefill_attention_s")
    return model.replace(**{"prefill_attention_s": 0.0} | relative_fit(columns, engine_s))


def _columns(points: Sequence[DecodePoint], highest_mhz: float) -> tuple[np.ndarray, ...]:
    """Sequences, context per sequence, step time, power and 1 / x - 1."""
    rows = [(p.seqs, p.context_tokens, p.step_s, p.power_w, highest_mhz / p.clock_mhz - 1) for p in points]
    return tuple(np.array(rows, float).T)
