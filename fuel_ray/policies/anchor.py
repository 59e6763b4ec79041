"""What a learned policy is kept near: the load table of its own load."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fuel_ray.codec import ActionGrid
from fuel_ray.policies.static import LoadTable
from fuel_ray.types import Knobs, WindowMetrics

WEIGHTS = (0.0, 0.02, 0.06, 0.2, 10.0)  # that are tried; the last leaves the table as it is


@dataclass(frozen=True, slots=True)
class Anchor:
    """A load table, and how much Q an action loses per 100 MHz or per batch limit away from its knobs.

    The table is tuned for the load; the network leaves it where it expects to gain more than that. With
    weight 0 the network is free, with a large one the policy is the table. It never has a lower batch limit
    than the table: behind a queue that is a trap, since what is served more slowly misses less per second.
    """

    table: LoadTable
    weight: float

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {**self.table.to_dict(), "weight": self.weight}

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> "Anchor":
        """The inverse of ``to_dict``; what is no anchor is a ValueError."""
        if not 0 <= raw["weight"] < math.inf:
            raise ValueError("the anchor's weight is not one")
        return Anchor(LoadTable.from_dict(raw), float(raw["weight"]))


class GridAnchor:
    """An anchor at work on one grid: the table's knobs in it, and what leaving them costs."""

    def __init__(self, anchor: Anchor, grid: ActionGrid) -> None:
        self._table = LoadTable(anchor.table.rates_rps, anchor.table.knobs)  # with a memory of its own
        self._grid = grid
        self._at = {knobs: self._nearest(knobs) for knobs in anchor.table.knobs}
        self._penalties = {knobs: self._penalty(knobs, anchor.weight) for knobs in anchor.table.knobs}

    def reset(self) -> None:
        self._table.reset()

    def decide(self, window: WindowMetrics) -> Knobs:
        """The table's knobs."""
        return self._table.decide(window)

    def action(self, base: Knobs) -> int:
        """The action nearest to these knobs of the table."""
        limit, clock = self._at[base]
        return limit * len(self._grid.gpu_clocks_mhz) + clock

    def penalty(self, base: Knobs) -> np.ndarray:
        """What each action loses; infinitely much with a lower batch limit than the table: (actions,)."""
        return self._penalties[base]

    def penalties(self) -> np.ndarray:
        """``penalty`` by ``action``, zero where no knobs of the table are nearest: (actions, actions)."""
        found = np.zeros((len(self._grid), len(self._grid)))
        for base, penalty in self._penalties.items():
            found[self.action(base)] = penalty
        return found

    def decode(self, action: int, base: Knobs) -> Knobs:
        """The knobs of an action; the grid's nearest values to the table's stand for these themselves.

        A lower batch limit than the table's is none: the table's is taken.
        """
        limit, clock = divmod(action, len(self._grid.gpu_clocks_mhz))
        at_limit, at_clock = self._at[base]
        return Knobs(
            base.batch_limit if limit <= at_limit else self._grid.batch_limits[limit],
            base.gpu_clock_mhz if clock == at_clock else self._grid.gpu_clocks_mhz[clock],
        )

    def _nearest(self, base: Knobs) -> tuple[int, int]:
        limits, clocks = np.array(self._grid.batch_limits), np.array(self._grid.gpu_clocks_mhz)
        limit = int(np.abs(limits - base.batch_limit).argmin())
        return limit, int(np.abs(clocks - base.gpu_clock_mhz).argmin())

    def _penalty(self, base: Knobs, weight: float) -> np.ndarray:
        limit, clock = self._at[base]
        clocks = np.array(self._grid.gpu_clocks_mhz)
        by_limit = np.abs(np.arange(len(self._grid.batch_limits)) - limit)
        by_clock = np.abs(clocks - clocks[clock]) / 100.0
        penalty = weight * (by_limit[:, None] + by_clock)
        penalty[:limit] = np.inf
        return np.asarray(penalty.ravel())
