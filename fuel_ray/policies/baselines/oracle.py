"""An oracle that knows the arrivals, and a load table fitted by the same search."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from fuel_ray.policies.baselines.profile import Attempts, Runner, Trace, grid_of, profile
from fuel_ray.policies.baselines.static import ClockSchedule, LoadTable
from fuel_ray.types import Knobs


def find_schedule(
    run: Runner,
    supported_mhz: Sequence[int],
    *,
    segment_s: float,
    batch_limit: int,
    allowed: float,
    stride: int = 4,
    budget: int = 24,
) -> ClockSchedule:
    """The schedule of least energy found for exactly the arrivals that ``run`` plays.

    A bound by search, not a proof: the best fixed clocks per segment by ``profile``, then ``budget`` moves of
    single segments. FACTS.md, section 7: a local search over clock sequences beat the load table by at most
    1.1 points.

    Args:
        run: plays a policy against the arrivals that are known, windows of 1 s.
        supported_mhz: clocks of the GPU, ascending.
        segment_s: seconds per clock.
        batch_limit: in all windows.
        allowed: mean badness that keeps the SLO.
        stride: places in ``supported_mhz`` between the clocks that are profiled.
        budget: runs spent on moves of single segments.
    """
    clocks, traces = profile(run, _every(supported_mhz, stride), batch_limit=batch_limit)

    def cell_of(t: Trace) -> np.ndarray:
        return (np.arange(len(t.energy_j)) / segment_s + 1e-9).astype(int)

    make = partial(ClockSchedule, segment_s=segment_s, batch_limit=batch_limit)
    grid = grid_of(clocks, traces, cell_of)
    attempts = Attempts(run, make, allowed=allowed)
    attempts.bisect_price(grid)
    attempts.descend(supported_mhz, stride=stride, budget=budget // 2)
    attempts.descend(supported_mhz, stride=max(1, stride // 2), budget=budget - budget // 2)
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
