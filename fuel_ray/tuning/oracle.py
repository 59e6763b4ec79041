"""An oracle that knows the arrivals, and a load table fitted by the same search."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from fuel_ray.policies.static import ClockSchedule, LoadTable
from fuel_ray.tuning.clock_search import Attempts, Runner, Trace, grid_of, profile
from fuel_ray.types import Knobs


def find_schedule(
    run: Runner,
    supported_mhz: Sequence[int],
    *,
    segment_s: float,
    batch_limit: int,
    allowed: float,
    strides: Sequence[int] = (4,),
    starts: Sequence[Sequence[int]] = (),
) -> ClockSchedule:
    """The schedule of least energy found for exactly the arrivals that ``run`` plays, in windows of 1 s.

    A bound by search, not a proof: the best of the fixed clocks per segment by ``profile`` and of ``starts``,
    improved by moving segments up and down.

    Args:
        run: plays a policy against the arrivals that are known.
        supported_mhz: clocks of the GPU, ascending.
        segment_s: seconds that are moved together.
        batch_limit: in all windows.
        allowed: mean badness that keeps the SLO.
        strides: places in ``supported_mhz`` by which segments are moved, in turn; clocks are profiled as far
            apart as the first.
        starts: clocks per window, such as those that other policies chose.
    """
    clocks, traces = profile(run, _every(supported_mhz, strides[0]), batch_limit=batch_limit)

    def cell_of(t: Trace) -> np.ndarray:
        return (np.arange(len(t.energy_j)) / segment_s + 1e-9).astype(int)

    by_segment = partial(ClockSchedule, segment_s=segment_s, batch_limit=batch_limit)
    coarse = Attempts(run, by_segment, allowed=allowed)
    coarse.bisect_price(grid_of(clocks, traces, cell_of))
    make = partial(ClockSchedule, segment_s=1.0, batch_limit=batch_limit)
    attempts = Attempts(run, make, allowed=allowed)
    segment_of = cell_of(max((per_seed[0] for per_seed in traces), key=lambda t: len(t.energy_j)))
    for start in ([coarse.best()[segment] for segment in segment_of], *starts):
        attempts.cost(tuple([*start, *[start[-1]] * len(segment_of)][: len(segment_of)]))
    for stride in strides:
        attempts.exchange(supported_mhz, segment_of, stride=stride)
    return make(attempts.best())


def find_load_table(
    run: Runner,
    supported_mhz: Sequence[int],
    *,
    batch_limit: int,
    allowed: float,
    rows: int = 10,
    stride: int = 4,
    budget: int = 60,
) -> LoadTable:
    """The table from arrival rate to clock of least energy on the seeds that ``run`` plays.

    Rows are equally wide up to the highest rate seen. Other arguments as for ``find_schedule``.
    """
    clocks, traces = profile(run, _every(supported_mhz, stride), batch_limit=batch_limit)
    highest_rps = max(float(t.rate_rps.max()) for per_seed in traces for t in per_seed)
    rates_rps = [highest_rps * row / rows for row in range(1, rows)]

    def cell_of(t: Trace) -> np.ndarray:
        return np.minimum(np.searchsorted(rates_rps, t.rate_rps), rows - 1)

    def make(clocks_mhz: tuple[int, ...]) -> LoadTable:
        return LoadTable(rates_rps, [Knobs(batch_limit, clock_mhz) for clock_mhz in clocks_mhz])

    attempts = Attempts(run, make, allowed=allowed)
    attempts.bisect_price(grid_of(clocks, traces, cell_of))
    attempts.descend(supported_mhz, stride=max(1, stride // 2), budget=budget // 2)
    attempts.descend(supported_mhz, stride=1, budget=budget - budget // 2)
    return make(attempts.best())


def _every(supported_mhz: Sequence[int], stride: int) -> tuple[int, ...]:
    """Every ``stride``-th clock down from the highest, ascending."""
    return tuple(supported_mhz[::-1][::stride][::-1])
