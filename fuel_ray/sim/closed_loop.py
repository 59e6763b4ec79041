"""Whole episodes of compiled programs on a twin, in a third of the time of the loop in Python."""

import numpy as np

from fuel_ray.sim import scheduler as rules
from fuel_ray.sim.choice import choose, look
from fuel_ray.sim.clock_axis import AtClock
from fuel_ray.sim.compilation import kept
from fuel_ray.sim.pack import Constants
from fuel_ray.sim.program import Program, Server
from fuel_ray.sim.scheduler import Engine, State, advance

_compiled = kept(_nrt=False)


@_compiled
def play(
    s: State,
    e: Engine,
    m: Constants,
    clocks: np.ndarray,
    p: Program,
    server: Server,
    sight: np.ndarray,
    hidden: np.ndarray,
    at_least: int,
    energy_j: np.ndarray,
    limits: np.ndarray,
    rows: np.ndarray,
) -> int:
    """Let a program control the engine in windows of 1 s; returns how many ran.

    The first window is at maximum performance. Stops after ``at_least`` windows once nothing runs or waits,
    or when ``energy_j`` (J per window), ``limits`` and ``rows`` (the knobs), which are filled, are full.
    """
    limit, row = e.max_num_seqs, len(clocks) - 1
    for k in range(len(energy_j)):
        run_window(s, e, m, clocks, limit, row)
        energy_j[k], limits[k], rows[k] = s.clock[rules.ENERGY], limit, row
        look(s, e, sight, limit, clocks[row, 0])
        busy = s.count[rules.RUNNING] + s.count[rules.PREEMPTED]
        busy += s.count[rules.ARRIVED] - s.count[rules.ADMITTED]
        if k + 1 >= at_least and busy == 0:
            return k + 1
        limit, row = choose(p, sight, server, clocks, hidden)
    return len(energy_j)


@_compiled
def run_window(s: State, e: Engine, m: Constants, clocks: np.ndarray, limit: int, row: int) -> None:
    """One window of 1 s under these knobs."""
    c = clocks[row]
    at = AtClock(c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9], c[10], c[11])
    advance(s, e, m, at, s.clock[rules.NOW] + 1.0, limit)
