"""What another action would have done: branches of a simulated node under the same arrivals.

At a window of an episode the engine is copied, an action is held for some windows and the program goes on
from there; the same once more with the program's own action. The difference in energy and misses is what the
action is worth, exactly, since both see the same requests (common random numbers).
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from fuel_ray.sim import scheduler as rules
from fuel_ray.sim.choice import choose, encode, look
from fuel_ray.sim.closed_loop import run_window
from fuel_ray.sim.compilation import kept
from fuel_ray.sim.node import Inside
from fuel_ray.sim.pack import Constants
from fuel_ray.sim.program import SIGHT, Program, Server
from fuel_ray.sim.scheduler import Engine, State
from fuel_ray.sim.snapshot import Limits, copy_state, new_copy


class Plan(NamedTuple):
    """How branches are taken."""

    every: int  # windows between two places where the episode branches
    tries: int  # other actions at each
    hold: int  # windows for which an action is held
    horizon: int  # windows after which branches are compared
    within_mhz: float  # how far from the program's clock an action is
    other_limit: float  # share of actions at another batch limit
    soft: float  # share of a limit around it over which a miss counts more and more
    noise_mhz: float  # by which the episode itself leaves the program, to see other states


class Samples(NamedTuple):
    """Arrays that are filled, a row per action tried."""

    observation: np.ndarray  # (n, features)
    action: np.ndarray  # (n,) indices of the grid
    base: np.ndarray  # (n,) of the program's own action
    energy_j: np.ndarray  # (n,) more than with the program's own action
    misses: np.ndarray  # (n,) likewise


def start(inside: Inside) -> tuple[State, State, Engine, Constants, np.ndarray]:
    """The first arguments of ``collect`` for a node that was reset."""
    state, engine, constants, clock_table = inside
    return state, new_copy(state), engine, constants, clock_table


@kept()
def collect(
    s: State,
    other: State,
    e: Engine,
    m: Constants,
    clocks: np.ndarray,
    p: Program,
    seen: Program,
    server: Server,
    limits: Limits,
    plan: Plan,
    windows: int,
    random: np.ndarray,
    out: Samples,
    totals: np.ndarray,
) -> int:
    """Play an episode of so many windows and fill ``out``; returns how many rows.

    ``p`` plays; it has no network, but the grid of one. ``seen`` is the same with the network's features.
    ``random`` are draws from 0..1, used one after the other and again from the first. ``totals`` get the
    episode's energy (J), arrivals and the sum of its windows' clocks (MHz).
    """
    sight, aside = np.zeros(SIGHT), np.zeros(SIGHT)
    hidden = np.zeros((3, 1))
    at, drawn, held, away = 0, 0, 0, 0.0
    limit, row = e.max_num_seqs, len(clocks) - 1
    for k in range(windows):
        run_window(s, e, m, clocks, limit, row)
        look(s, e, sight, limit, clocks[row, 0])
        totals[0] += s.clock[rules.ENERGY]
        totals[1] += s.count[rules.ARRIVALS]
        totals[2] += clocks[row, 0]
        limit, row = choose(p, sight, server, clocks, hidden)
        if k % plan.every == 0 and k > 5:
            own_j, own_misses = _branch(
                other, s, e, m, clocks, p, server, limits, plan, sight, aside, hidden, limit, row
            )
            base = _action(p, limit, clocks[row, 0])
            for _ in range(plan.tries):
                if at == len(out.action):
                    return at
                try_limit, try_row = limit, row
                offset = (2.0 * random[drawn] - 1.0) * plan.within_mhz
                try_row = _row(clocks, clocks[row, 0] + offset)
                if random[drawn + 1] < plan.other_limit:
                    pick = int(random[drawn + 2] * len(p.grid_limits))
                    try_limit = int(p.grid_limits[pick])
                    if not p.lower_limits:
                        try_limit = max(try_limit, p.batch_limit)
                drawn = (drawn + 3) % (len(random) - 8)
                action = _action(p, try_limit, clocks[try_row, 0])
                if action == base:
                    continue
                energy_j, misses = _branch(
                    other, s, e, m, clocks, p, server, limits, plan, sight, aside, hidden, try_limit, try_row
                )
                encode(seen, sight, server, out.observation[at])
                out.action[at], out.base[at] = action, base
                out.energy_j[at], out.misses[at] = energy_j - own_j, misses - own_misses
                at += 1
        if held == 0:
            held = 1 + int(10.0 * random[drawn])
            away = (2.0 * random[drawn + 1] - 1.0) * plan.noise_mhz
            drawn = (drawn + 2) % (len(random) - 8)
        held -= 1
        row = _row(clocks, clocks[row, 0] + away)
    return at


@kept()
def _branch(
    other: State,
    s: State,
    e: Engine,
    m: Constants,
    clocks: np.ndarray,
    p: Program,
    server: Server,
    limits: Limits,
    plan: Plan,
    sight: np.ndarray,
    aside: np.ndarray,
    hidden: np.ndarray,
    limit: int,
    row: int,
) -> tuple[float, float]:
    """Energy (J) and misses over the horizon with this action first."""
    first = copy_state(other, s)
    before = soft_missed(s, first, limits, plan.soft)
    aside[:] = sight
    energy_j = 0.0
    for k in range(plan.horizon):
        if k >= plan.hold:
            limit, row = choose(p, aside, server, clocks, hidden)
        run_window(other, e, m, clocks, limit, row)
        look(other, e, aside, limit, clocks[row, 0])
        energy_j += other.clock[rules.ENERGY]
    return energy_j, soft_missed(other, first, limits, plan.soft) - before


@njit(inline="always")
def _row(clocks: np.ndarray, mhz: float) -> int:
    best = len(clocks) - 1  # as in ``choice``
    for i in range(len(clocks) - 2, -1, -1):
        if abs(clocks[i, 0] - mhz) <= abs(clocks[best, 0] - mhz):
            best = i
    return best


@kept()
def _action(p: Program, limit: int, mhz: float) -> int:
    """The index of the grid's nearest action."""
    i = 0
    for k in range(1, len(p.grid_limits)):
        if abs(p.grid_limits[k] - limit) < abs(p.grid_limits[i] - limit):
            i = k
    j = 0
    for k in range(1, len(p.grid_mhz)):
        if abs(p.grid_mhz[k] - mhz) < abs(p.grid_mhz[j] - mhz):
            j = k
    return i * len(p.grid_mhz) + j


@kept()
def soft_missed(s: State, first: int, limits: Limits, soft: float) -> float:
    """As ``missed``, but a request near its limit counts in part: 0 at 1 - soft of it, 1 at 1 + soft."""
    misses, now = 0.0, s.clock[rules.NOW]
    for r in range(first, s.count[rules.ARRIVED]):
        arrival, got, end = (
            s.time_s[r, rules.ARRIVAL],
            s.time_s[r, rules.FIRST_TOKEN],
            s.time_s[r, rules.FINISH],
        )
        share = (now if got < 0 else got) - arrival
        share /= limits.ttft_s
        output = s.request[r, rules.OUTPUT]
        if got >= 0 and output > 1:
            share = max(share, ((now if end < 0 else end) - got) / (output - 1) / limits.tpot_s)
        share = max(share, ((now if end < 0 else end) - arrival) / limits.e2e_s)
        misses += min(max((share - 1.0 + soft) / (2.0 * soft), 0.0), 1.0)
    return misses
