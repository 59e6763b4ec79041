"""What a learned policy is kept near: the best simple rule of its own load."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fuel_ray.codec import ActionGrid
from fuel_ray.policies.rules import Rule, RulePolicy
from fuel_ray.policies.static import Compiled, LoadTable
from fuel_ray.types import Knobs, NodeSpec, Slo, WindowMetrics

REACH_MHZ = 300.0  # how far from the rule's clock training tries other ones, and a policy may go
WEIGHTS = (0.0, 0.01, 0.03, 0.1, 10.0)  # that are tried; the last leaves the rule as it is


@dataclass(frozen=True, slots=True)
class Anchor:
    """A simple rule, and how much Q an action loses per 100 MHz or per batch limit away from its knobs.

    The rule is tuned for the load; the network leaves it where it expects to gain more than that. With weight
    0 the network is free, with a large one the policy is the rule. It never has a lower batch limit than the
    rule, unless it may: behind a queue that is a trap, since what is served more slowly misses less per
    second.
    """

    rule: LoadTable | Rule
    weight: float
    reach_mhz: float = math.inf  # how far the clock may be from the rule's; training tried no further
    lower_limits: bool = False  # whether the batch limit may be lower than the rule's

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        held: dict[str, Any] = {"weight": self.weight}
        if self.reach_mhz < math.inf:
            held["reach_mhz"] = self.reach_mhz
        if self.lower_limits:
            held["lower_limits"] = True
        if isinstance(self.rule, LoadTable):
            return {**self.rule.to_dict(), **held}
        return {"rule": self.rule.to_dict(), **held}

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> "Anchor":
        """The inverse of ``to_dict``; what is no anchor is a ValueError or a TypeError."""
        if not 0 <= raw["weight"] < math.inf:
            raise ValueError("the anchor's weight is not one")
        reach_mhz = float(raw.get("reach_mhz", math.inf))
        if not reach_mhz >= 0:
            raise ValueError("the anchor's reach is not one")
        lower = raw.get("lower_limits", False) is True
        return Anchor(rule_of(raw.get("rule", raw)), float(raw["weight"]), reach_mhz, lower)


class GridAnchor:
    """An anchor at work on one node and grid: the rule's knobs in it, and what leaving them costs."""

    def __init__(self, anchor: Anchor, grid: ActionGrid, spec: NodeSpec, slo: Slo) -> None:
        self._policy = at_work(anchor.rule, spec, slo)
        self._grid, self._anchor = grid, anchor
        self._near: dict[Knobs, tuple[int, int, np.ndarray]] = {}

    def reset(self) -> None:
        self._policy.reset()

    def decide(self, window: WindowMetrics) -> Knobs:
        """The rule's knobs."""
        return self._policy.decide(window)

    def compiled(self, spec: NodeSpec) -> Compiled | None:
        """The rule as a program."""
        return self._policy.compiled(spec)

    def action(self, base: Knobs) -> int:
        """The action nearest to these knobs of the rule."""
        limit, clock, _ = self._at(base)
        return limit * len(self._grid.gpu_clocks_mhz) + clock

    def penalty(self, base: Knobs) -> np.ndarray:
        """What each action loses, infinitely much where it may not be taken: (actions,)."""
        return self._at(base)[2]

    def penalties(self) -> np.ndarray:
        """``penalty`` by ``action``: (actions, actions)."""
        return np.stack([self.penalty(self._grid.decode(action)) for action in range(len(self._grid))])

    def decode(self, action: int, base: Knobs) -> Knobs:
        """The knobs of an action; the grid's nearest values to the rule's stand for these themselves.

        Where it may not be lower than the rule's, a lower batch limit is none: the rule's is taken.
        """
        limit, clock = divmod(action, len(self._grid.gpu_clocks_mhz))
        at_limit, at_clock, _ = self._at(base)
        kept = limit == at_limit or (limit < at_limit and not self._anchor.lower_limits)
        return Knobs(
            base.batch_limit if kept else self._grid.batch_limits[limit],
            base.gpu_clock_mhz if clock == at_clock else self._grid.gpu_clocks_mhz[clock],
        )

    def _at(self, base: Knobs) -> tuple[int, int, np.ndarray]:
        if base not in self._near:
            limits, clocks = np.array(self._grid.batch_limits), np.array(self._grid.gpu_clocks_mhz)
            limit = int(np.abs(limits - base.batch_limit).argmin())
            clock = int(np.abs(clocks - base.gpu_clock_mhz).argmin())
            by_limit = np.abs(np.arange(len(limits)) - limit)
            by_clock = np.abs(clocks - clocks[clock]) / 100.0
            penalty = self._anchor.weight * (by_limit[:, None] + by_clock)
            if not self._anchor.lower_limits:
                penalty[:limit] = np.inf
            penalty[:, by_clock > self._anchor.reach_mhz / 100.0] = np.inf
            self._near[base] = limit, clock, np.asarray(penalty.ravel())
        return self._near[base]


def rule_of(raw: Any) -> LoadTable | Rule:
    """A rule from its plain data; what is none is a ValueError, a TypeError or a KeyError."""
    return Rule.from_dict(raw) if isinstance(raw, Mapping) and "trim_mhz" in raw else LoadTable.from_dict(raw)


def at_work(rule: LoadTable | Rule, spec: NodeSpec, slo: Slo) -> LoadTable | RulePolicy:
    """A rule as a policy with a memory of its own, which takes the nearest clocks that there are."""
    if isinstance(rule, LoadTable):
        nearest = spec.nearest_clock_mhz
        knobs = [Knobs(own.batch_limit, nearest(own.gpu_clock_mhz)) for own in rule.knobs]
        return LoadTable(rule.rates_rps, knobs, ewma_s=rule.ewma_s)
    return RulePolicy(rule, spec, slo)


def knobs_of(rule: LoadTable | Rule) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Batch limits and clocks that a rule names; one that is no table takes the nearest clock there is."""
    if isinstance(rule, LoadTable):
        return tuple(k.batch_limit for k in rule.knobs), tuple(k.gpu_clock_mhz for k in rule.knobs)
    return (rule.batch_limit,), ()
