"""Copies of a simulated engine, to try knobs on and go back, and the misses that are certain so far."""

from typing import NamedTuple

import numpy as np
from numba import njit

from fuel_ray.sim.compilation import kept
from fuel_ray.sim.scheduler import (
    ADMITTED,
    ARRIVAL,
    ARRIVED,
    FINISH,
    FIRST_TOKEN,
    HELD,
    KEPT,
    NOW,
    OUTPUT,
    PREEMPTED,
    PREEMPTED_REQUEST,
    REQUEST,
    RUNNING,
    State,
)
from fuel_ray.types import Slo


class Limits(NamedTuple):
    """An SLO's limits for compiled code; infinite where there is none."""

    ttft_s: float
    tpot_s: float
    e2e_s: float


def limits_of(slo: Slo) -> Limits:
    """The limits that a request must meet."""
    return Limits(*(np.inf if limit is None else limit for limit in (slo.ttft_s, slo.tpot_s, slo.e2e_s)))


def new_copy(source: State) -> State:
    """A state of its own that stands where ``source`` does, for ``copy_state`` to write to later."""
    return State(*(array.copy() for array in source))


@kept()
def copy_state(to: State, source: State) -> int:
    """Let ``to`` go on from where ``source`` stands, byte for byte; returns the oldest unfinished request.

    ``to`` is a ``new_copy`` of the same engine with the same requests, wherever it has come to since. What
    no step reads again is left out: times of the requests before the one that is returned, which have all
    finished, and ``sample`` and ``finished`` before the counts at which they go on.
    """
    first = source.count[ADMITTED]
    for k in range(source.count[RUNNING]):
        first = min(first, source.run[REQUEST, k])
    for k in range(source.count[PREEMPTED]):
        first = min(first, source.slot[k, PREEMPTED_REQUEST])
    touched = 1 + max(source.count[ADMITTED], to.count[ADMITTED])  # later requests are as drawn in both
    to.request[first:touched] = source.request[first:touched]
    to.time_s[first:touched] = source.time_s[first:touched]
    to.run[:, : source.count[RUNNING]] = source.run[:, : source.count[RUNNING]]
    to.slot[:] = source.slot
    for slot in range(len(source.slot)):
        for j in range(max(source.slot[slot, HELD], source.slot[slot, KEPT])):
            to.table[slot, j] = source.table[slot, j]
    to.block[:] = source.block
    to.prefix_block[:] = source.prefix_block
    to.event[:] = source.event
    to.step[:] = source.step
    to.clock[:] = source.clock
    to.count[:] = source.count
    return first


@kept()
def missed(s: State, first: int, limits: Limits) -> int:
    """How many requests from ``first`` on are certain by now to miss a limit; never fewer later on.

    A request counts from the moment at which its limit passes: without a first token, while it decodes (its
    last token can only come later), or unfinished. Two branches of one state are compared at the same moment
    from the same ``first``, the one that ``copy_state`` returned.
    """
    misses = 0
    for r in range(first, s.count[ARRIVED]):
        if _is_late(s, r, s.clock[NOW], limits):
            misses += 1
    return misses


@kept()
def met(s: State, limits: Limits) -> int:
    """How many requests finished within every limit."""
    count = 0
    for r in range(s.count[ARRIVED]):
        if s.time_s[r, FINISH] >= 0 and not _is_late(s, r, s.clock[NOW], limits):
            count += 1
    return count


@njit(inline="always")
def _is_late(s: State, r: int, now_s: float, limits: Limits) -> bool:
    """Whether a request has broken a limit, given that what has not happened to it yet is later than now."""
    arrival_s, first_s, last_s = s.time_s[r, ARRIVAL], s.time_s[r, FIRST_TOKEN], s.time_s[r, FINISH]
    if last_s < 0:
        last_s = now_s
    if first_s < 0:
        return last_s - arrival_s > min(limits.ttft_s, limits.e2e_s)
    late = first_s - arrival_s > limits.ttft_s or last_s - arrival_s > limits.e2e_s
    output = s.request[r, OUTPUT]
    return late or (output > 1 and (last_s - first_s) / (output - 1) > limits.tpot_s)
