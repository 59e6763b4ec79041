"""What a program chooses, compiled: the same code serves a node and runs a twin's fast episodes."""

import math

import numpy as np
from numba import njit

from fuel_ray.averages import EWMA_S, FAST_EWMA_S, GAP_EWMA_S
from fuel_ray.sim import scheduler as rules
from fuel_ray.sim.clock_axis import AtClock
from fuel_ray.sim.compilation import kept
from fuel_ray.sim.pack import Constants
from fuel_ray.sim.perf_model import step_cost
from fuel_ray.sim.program import (
    ARRIVALS,
    CLOCK_MHZ,
    FAST_RATE_RPS,
    GAP_S,
    IN_SYSTEM,
    KV_USAGE,
    LIMIT,
    OLDEST_WAIT_S,
    OUTPUT_TOKENS,
    PREDICTION,
    PROMPT_MEAN,
    PROMPT_TOKENS,
    RATE_RPS,
    RUNNING,
    SEEN,
    SLOW_GAP_S,
    WAITING,
    Program,
    Server,
)  # fmt: skip
from fuel_ray.sim.scheduler import Engine, State

PROMPT_START, PROMPT_LEAST, PROMPT_MOST, PROMPT_SHARE = 512.0, 16.0, 4000.0, 0.05
_RATE_SHARE, _FAST_SHARE = -math.expm1(-1.0 / EWMA_S), -math.expm1(-1.0 / FAST_EWMA_S)
_GAP_SHARE, _SLOW_GAP_SHARE = (-math.expm1(-1.0 / average_s) for average_s in GAP_EWMA_S)
_IDLE_RPS = 0.05  # below which an empty server is idle
_PRESSURE = 0.85  # KV usage from which preemption is near
_compiled = kept(_nrt=False)
_inlined = njit(inline="always")


@_compiled
def look(s: State, e: Engine, sight: np.ndarray, batch_limit: int, clock_mhz: float) -> None:
    """See the window that just ended."""
    sight[RUNNING] = s.count[rules.RUNNING]
    sight[WAITING] = s.count[rules.PREEMPTED] + s.count[rules.ARRIVED] - s.count[rules.ADMITTED]
    sight[KV_USAGE] = 1.0 - s.count[rules.FREE_BLOCKS] / e.num_blocks
    sight[ARRIVALS] = s.count[rules.ARRIVALS]
    sight[PROMPT_TOKENS] = s.count[rules.PROMPT_TOKENS]
    sight[OUTPUT_TOKENS] = s.count[rules.OUTPUT_TOKENS]
    sight[OLDEST_WAIT_S] = s.clock[rules.OLDEST_WAIT]
    sight[LIMIT], sight[CLOCK_MHZ] = batch_limit, clock_mhz
    remember(sight)


@_compiled
def remember(sight: np.ndarray) -> None:
    """Take what is in the sight, a window of 1 s, into its averages."""
    sight[IN_SYSTEM] = sight[RUNNING] + sight[WAITING]
    arrivals = sight[ARRIVALS]
    if sight[SEEN] == 0.0:
        sight[SEEN], sight[PROMPT_MEAN] = 1.0, PROMPT_START
        sight[RATE_RPS] = sight[FAST_RATE_RPS] = arrivals
    else:
        sight[RATE_RPS] += (arrivals - sight[RATE_RPS]) * _RATE_SHARE
        sight[FAST_RATE_RPS] += (arrivals - sight[FAST_RATE_RPS]) * _FAST_SHARE
    if sight[OUTPUT_TOKENS] > 0 and sight[RUNNING] > 0:
        gap_s = sight[RUNNING] / sight[OUTPUT_TOKENS]
        if sight[GAP_S] == 0.0:
            sight[GAP_S] = sight[SLOW_GAP_S] = gap_s
        sight[GAP_S] += (gap_s - sight[GAP_S]) * _GAP_SHARE
        sight[SLOW_GAP_S] += (gap_s - sight[SLOW_GAP_S]) * _SLOW_GAP_SHARE
    if arrivals > 0:
        prompt = min(max(sight[PROMPT_TOKENS] / arrivals, PROMPT_LEAST), PROMPT_MOST)
        sight[PROMPT_MEAN] += (prompt - sight[PROMPT_MEAN]) * PROMPT_SHARE


@_compiled
def choose(
    p: Program, sight: np.ndarray, server: Server, clocks: np.ndarray, hidden: np.ndarray
) -> tuple[int, int]:
    """The batch limit, and the clock as a row of ``clocks``, whose first column is the clock in MHz.

    ``hidden`` is room for a network's layers: (3, units of the largest).
    """
    mhz = _predicted_mhz(p, sight, server) if p.base == PREDICTION else _table_mhz(p, sight)
    mhz += p.shift_mhz + _trim_mhz(p, sight, server)
    row = _nearest(clocks[:, 0], mhz)
    if len(p.features) == 0:
        return p.batch_limit, row
    return _improved(p, sight, server, clocks, row, hidden)


@_inlined
def _nearest(values: np.ndarray, value: float) -> int:
    """The place of the nearest of ascending values; the first of two."""
    best = len(values) - 1  # with a literal, whatever takes it would be compiled once more
    for i in range(len(values) - 2, -1, -1):
        if abs(values[i] - value) <= abs(values[best] - value):
            best = i
    return best


@_compiled
def _table_mhz(p: Program, sight: np.ndarray) -> float:
    x, y = sight[p.x], sight[p.y]
    if p.stepped:
        i = 0
        while i < len(p.x_knots) and x > p.x_knots[i]:
            i += 1
        return p.mhz[i, 0]
    i, u = _between(p.x_knots, x)
    j, v = _between(p.y_knots, y)
    low = p.mhz[i, j] * (1.0 - u)
    if u > 0.0:
        low += p.mhz[i + 1, j] * u
    if v == 0.0:
        return low
    high = p.mhz[i, j + 1] * (1.0 - u)
    if u > 0.0:
        high += p.mhz[i + 1, j + 1] * u
    return low * (1.0 - v) + high * v


@_compiled
def _between(knots: np.ndarray, value: float) -> tuple[int, float]:
    """The knot below, and the share of the way to the next one; flat beyond the ends."""
    last = len(knots) - 1
    if value <= knots[0]:
        return 0, 0.0
    if value >= knots[last]:
        return last, 0.0
    i = 0
    while value >= knots[i + 1]:
        i += 1
    return i, (value - knots[i]) / (knots[i + 1] - knots[i])


@_compiled
def _predicted_mhz(p: Program, sight: np.ndarray, server: Server) -> float:
    """The clock of least predicted energy per token among those whose token gap keeps the limit."""
    requests = max(sight[IN_SYSTEM], 1.0)
    if sight[IN_SYSTEM] == 0.0 and sight[RATE_RPS] < _IDLE_RPS:
        return p.clocks[0, 0]
    context = max(sight[KV_USAGE] * server.kv_tokens, 150.0 * requests)
    rate_rps = 0.7 * sight[RATE_RPS] + 0.3 * sight[ARRIVALS]
    best, least_j = len(p.clocks) - 1, math.inf
    for k in range(len(p.clocks)):
        gap_s, token_j = _predicted(p.constants, p.clocks[k], requests, context, rate_rps, sight[PROMPT_MEAN])
        if gap_s <= p.stretch * server.tpot_s and token_j < least_j:
            best, least_j = k, token_j
    return p.clocks[best, 0]


@_compiled
def _predicted(
    m: Constants, c: np.ndarray, requests: float, context: float, rate_rps: float, prompt: float
) -> tuple[float, float]:
    """Mean time between a request's tokens (s), and energy per token (J), while requests arrive so often."""
    at = AtClock(c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9], c[10], c[11])
    decode_s, decode_w, _ = step_cost(m, at, requests, context, 0.0, 0.0)
    decode_s = max(decode_s, m.launch_graph_s)
    attention = prompt * prompt / 2.0
    launch_s = m.launch_eager_s if requests + prompt > m.graph_max_tokens else m.launch_pieces_s
    stall_s = max(launch_s - decode_s, 0.0)  # what of the launch the step before it does not hide
    alone_s, _, _ = step_cost(m, at, requests, context + prompt, prompt, attention)
    mixed_hz = rate_rps / (1.0 + rate_rps * (alone_s + stall_s))  # who arrives during one shares the next
    if mixed_hz <= 1e-6:
        return decode_s, decode_s * decode_w / requests
    together = rate_rps / mixed_hz
    mixed_s, mixed_w, _ = step_cost(
        m, at, requests, context + prompt * together, prompt * together, attention * together
    )
    share = min(mixed_hz * (mixed_s + stall_s), 0.95)
    steps_hz = mixed_hz + (1.0 - share) / decode_s
    mixed_w = (mixed_s * mixed_w + stall_s * at.stall_w) / (mixed_s + stall_s)
    return 1.0 / steps_hz, (share * mixed_w + (1.0 - share) * decode_w) / (steps_hz * requests)


@_compiled
def _trim_mhz(p: Program, sight: np.ndarray, server: Server) -> float:
    w = p.trim_mhz
    gap = 0.0
    if sight[OUTPUT_TOKENS] > 0:
        gap = min(sight[RUNNING] / sight[OUTPUT_TOKENS] / server.tpot_s, 2.0)
    kv = sight[KV_USAGE]
    return (
        w[0] * sight[RUNNING] / server.capacity * 4.0
        + w[1] * min(sight[WAITING], 20.0) / 10.0
        + w[2] * kv
        + w[3] * max(kv - _PRESSURE, 0.0) / (1.0 - _PRESSURE)
        + w[4] * (sight[FAST_RATE_RPS] - sight[RATE_RPS]) / 10.0
        + w[5] * gap
        + w[6] * max(gap - 0.9, 0.0) * 5.0
        + w[7] * min(sight[PROMPT_TOKENS] / 10_000.0, 4.0)
        + w[8] * min(sight[OLDEST_WAIT_S] / server.ttft_s, 2.0)
    )


@_compiled
def _feature(code: int, sight: np.ndarray, server: Server) -> float:  # noqa: PLR0912  (a branch per code)
    """A feature of the codec's table, before it is clipped."""
    value = 0.0
    if code == 1:
        value = sight[RUNNING] / server.capacity
    elif code == 2:
        value = sight[WAITING] / server.capacity
    elif code == 3:
        value = sight[KV_USAGE]
    elif code == 4:
        value = (1.0 - sight[KV_USAGE]) * server.kv_tokens / 26_000.0
    elif code == 5:
        value = min(sight[RATE_RPS] / 20.0, 1.0)
    elif code == 6:
        value = 0.5 + (sight[ARRIVALS] - sight[RATE_RPS]) / 20.0
    elif code == 7:
        value = sight[PROMPT_TOKENS] / 20_000.0
    elif code == 8:
        value = sight[OUTPUT_TOKENS] / 8_000.0
    elif code == 9:
        if sight[OUTPUT_TOKENS] > 0 and server.tpot_s < math.inf:
            value = sight[RUNNING] / sight[OUTPUT_TOKENS] / server.tpot_s / 2.0
    elif code == 10:
        value = sight[CLOCK_MHZ] / server.highest_mhz
    elif code == 11:
        value = sight[OLDEST_WAIT_S] / server.ttft_s
    elif code == 12:
        value = sight[RATE_RPS] / 20.0
    elif code == 13:
        value = sight[FAST_RATE_RPS] / 20.0
    elif code == 14:
        value = sight[PROMPT_MEAN] / 2_000.0
    elif code == 15:
        value = sight[LIMIT] / server.capacity
    elif code == 16:
        value = sight[GAP_S] / server.tpot_s / 2.0
    elif code == 17:
        value = sight[SLOW_GAP_S] / server.tpot_s / 2.0
    return min(max(value, 0.0), 5.0 if code in (12, 13, 14) else 1.0)


@_compiled
def encode(p: Program, sight: np.ndarray, server: Server, out: np.ndarray) -> None:
    """The observation that the network sees."""
    for i in range(len(p.features)):
        out[i] = p.fixed[i] if p.features[i] == 0 else _feature(p.features[i], sight, server)


@_inlined
def _linear(weight: np.ndarray, bias: np.ndarray, x: np.ndarray, out: np.ndarray) -> None:
    """Write x @ weight + bias; all sums grow together, which the processor does four at a time."""
    for i in range(len(bias)):
        out[i] = bias[i]
    for j in range(len(weight)):
        value = x[j]
        if value != 0.0:
            for i in range(len(bias)):
                out[i] += value * weight[j, i]


@_inlined
def _layer(weight: np.ndarray, bias: np.ndarray, x: np.ndarray, out: np.ndarray) -> None:
    _linear(weight, bias, x, out)
    for i in range(len(bias)):
        out[i] = max(out[i], 0.0)


@_compiled
def _improved(
    p: Program, sight: np.ndarray, server: Server, clocks: np.ndarray, row: int, hidden: np.ndarray
) -> tuple[int, int]:
    """The action of highest Q less what leaving the base costs."""
    encode(p, sight, server, hidden[0])
    _layer(p.weight_1, p.bias_1, hidden[0], hidden[1])
    _layer(p.weight_2, p.bias_2, hidden[1], hidden[2])
    limit_q, clock_q = hidden[0], hidden[1]
    _linear(p.limit_weight, p.limit_bias, hidden[2], limit_q)
    _linear(p.clock_weight, p.clock_bias, hidden[2], clock_q)
    own_limit = _nearest(p.grid_limits, p.batch_limit)
    limit, most = own_limit, -math.inf
    for i in range(0 if p.lower_limits else own_limit, len(p.grid_limits)):
        q = limit_q[i] - p.per_100_mhz * abs(i - own_limit)
        if q > most:
            limit, most = i, q
    own_clock = _nearest(p.grid_mhz, clocks[row, 0])
    clock, most = own_clock, -math.inf
    for j in range(len(p.grid_mhz)):
        away_mhz = abs(p.grid_mhz[j] - p.grid_mhz[own_clock])
        if away_mhz > p.reach_mhz:
            continue
        q = clock_q[j] - p.per_100_mhz * away_mhz / 100.0
        if q > most:
            clock, most = j, q
    if clock != own_clock:
        row = _nearest(clocks[:, 0], p.grid_mhz[clock])
    return p.batch_limit if limit == own_limit else int(p.grid_limits[limit]), row
