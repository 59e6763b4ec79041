"""A search in hindsight, compiled: knobs per window for one seed's arrivals, improved segment by segment.

What is minimised is the Lagrangian: energy + price x requests that miss a limit.
"""

from typing import NamedTuple

import numpy as np

from fuel_ray.sim.clock_axis import AtClock
from fuel_ray.sim.compilation import kept
from fuel_ray.sim.node import Inside
from fuel_ray.sim.pack import Constants
from fuel_ray.sim.scheduler import (
    ADMITTED,
    ARRIVAL,
    ARRIVED,
    ENERGY,
    NOW,
    PREEMPTED,
    RUNNING,
    Engine,
    State,
    advance,
)
from fuel_ray.sim.snapshot import Limits, copy_state, met, missed, new_copy

WINDOW_S = 1.0
# Where a number is int(np.int64), what is called with a literal would be compiled once more.


class Episode(NamedTuple):
    """One seed's arrivals before the first window, and what judges how they are served."""

    start: State
    engine: Engine
    constants: Constants
    clock_table: np.ndarray
    limits: Limits
    at_least: int  # windows, after which the episode ends as soon as nothing runs or waits


class Moves(NamedTuple):
    """What is tried on a segment: clocks so many places up or down, or one batch limit."""

    places: np.ndarray
    batch_limits: np.ndarray
    segment: int  # windows moved together
    horizon: int  # windows after the segment in which a move is followed


def episode_of(inside: Inside, limits: Limits, *, at_least: int) -> Episode:
    """The episode of a node that was just reset; the node itself is left as it is."""
    return Episode(new_copy(inside.state), *inside[1:], limits, at_least)


@kept()
def outcome(e: Episode, work: State, knobs: np.ndarray) -> tuple[float, int, int]:
    """Energy (J), requests and how many of them met the limits, of a whole episode under these knobs.

    ``knobs`` has a batch limit and the index of a clock as a row per window; ``work`` is a ``new_copy``.
    """
    copy_state(work, e.start)
    energy_j = _serve(e, work, knobs, int(np.int64(0)), len(knobs))
    return energy_j, work.count[ARRIVED], met(work, e.limits)


@kept()
def improve(
    e: Episode, s: State, branch: State, knobs: np.ndarray, moves: Moves, price_j: float, offset: int
) -> int:
    """One pass forward in time over ``knobs``, which it changes; returns how many segments it moved.

    At each segment, from where the moves before it have led, every move is served for the segment and
    ``horizon`` windows more against no move, and the best is made. ``offset`` shifts the segments. The first
    window belongs to the node's start. That a pass lowers the Lagrangian of the whole episode is likely, not
    certain: ``outcome`` says.
    """
    copy_state(s, e.start)
    windows, made = len(knobs), 0
    begin = int(np.int64(1))
    _serve(e, s, knobs, int(np.int64(0)), begin)
    while begin < windows and not _is_over(e, s, begin):
        end = min((begin + offset) // moves.segment * moves.segment + moves.segment - offset, windows)
        last = min(end + moves.horizon, windows)
        before, tried = knobs[begin:end].copy(), knobs[begin:end].copy()
        least, crowd = before[:, 0].min(), _crowd(s, end - begin)
        best, best_j = before, _lagrangian(e, s, branch, knobs, begin, last, price_j)
        for k in range(len(moves.places) + len(moves.batch_limits)):
            limits = k >= len(moves.places)
            if limits and crowd <= min(least, moves.batch_limits[k - len(moves.places)]):
                continue  # neither limit keeps anybody waiting
            knobs[begin:end] = before
            if not _move(knobs[begin:end], moves, k, len(e.clock_table)) or (knobs[begin:end] == tried).all():
                continue
            tried[:] = knobs[begin:end]
            cost_j = _lagrangian(e, s, branch, knobs, begin, last, price_j)
            if cost_j < best_j - 1e-6:
                best, best_j = knobs[begin:end].copy(), cost_j
        knobs[begin:end] = best
        made += 1 if (best != before).any() else 0
        _serve(e, s, knobs, begin, end)
        begin = end
    return made


@kept()
def _crowd(s: State, windows: int) -> int:
    """At most so many requests are in the system at once in the next windows."""
    arrived, until_s = s.count[ARRIVED], s.clock[NOW] + windows * WINDOW_S
    while arrived < len(s.time_s) and s.time_s[arrived, ARRIVAL] <= until_s:
        arrived += 1
    return s.count[RUNNING] + s.count[PREEMPTED] + arrived - s.count[ADMITTED]


@kept()
def _move(knobs: np.ndarray, moves: Moves, k: int, clocks: int) -> bool:
    """Make the k-th move; whether it changed anything."""
    changed = False
    for row in range(len(knobs)):
        column, value = 0, 0
        if k < len(moves.places):
            column, value = 1, min(max(knobs[row, 1] + moves.places[k], 0), clocks - 1)
        else:
            value = moves.batch_limits[k - len(moves.places)]
        changed |= knobs[row, column] != value
        knobs[row, column] = value
    return changed


@kept()
def _lagrangian(
    e: Episode, s: State, branch: State, knobs: np.ndarray, begin: int, end: int, price_j: float
) -> float:
    """Energy and priced misses up to ``end`` if knobs are followed from ``s``, which is left as it is."""
    first = copy_state(branch, s)
    energy_j = _serve(e, branch, knobs, begin, end)
    return energy_j + price_j * missed(branch, first, e.limits)


@kept()
def _serve(e: Episode, s: State, knobs: np.ndarray, begin: int, end: int) -> float:
    """Energy (J) of these windows, or of those before the episode is over."""
    energy_j = 0.0
    for k in range(begin, end):
        if _is_over(e, s, k):
            break
        c = e.clock_table[knobs[k, 1]]
        at = AtClock(c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9], c[10], c[11])
        advance(s, e.engine, e.constants, at, s.clock[NOW] + WINDOW_S, knobs[k, 0])
        energy_j += s.clock[ENERGY]
    return energy_j


@kept()
def _is_over(e: Episode, s: State, windows: int) -> bool:
    return (
        windows >= e.at_least
        and s.count[RUNNING] + s.count[PREEMPTED] + s.count[ARRIVED] == s.count[ADMITTED]
    )
