"""Simple rules that look at their node, tuned on tuning seeds.

How careful a rule is, its dial, is bisected on all of the seeds, so that it just meets the SLO as asked.
Shapes are searched by an evolution strategy on a few of them: tables from what other rules did, trims
from none.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from fuel_ray.averages import FAST_EWMA_S, smoothed_rates
from fuel_ray.policies.anchor import at_work
from fuel_ray.policies.catalogue import (
    FAST_LOAD_TABLE,
    LOAD_TABLE,
    PREDICTIVE,
    PREDICTIVE_TRIM,
    RATE_REQUESTS_TABLE,
    REQUESTS_TABLE,
    REQUESTS_TRIM,
)
from fuel_ray.policies.models import token_limits
from fuel_ray.policies.rules import Key, Rule
from fuel_ray.policies.static import LoadTable
from fuel_ray.sim.pack import PerfModel
from fuel_ray.sim.program import TRIM
from fuel_ray.tuning.clock_search import allowed_penalty, find_load_table
from fuel_ray.tuning.evolution import evolved
from fuel_ray.tuning.runs import Runs, Score
from fuel_ray.tuning.search import TABLE_STRIDE, bisected
from fuel_ray.types import Policy

RULES = (FAST_LOAD_TABLE, REQUESTS_TABLE, RATE_REQUESTS_TABLE, REQUESTS_TRIM, PREDICTIVE, PREDICTIVE_TRIM)
CHEAP = (
    REQUESTS_TABLE,
    PREDICTIVE,
    PREDICTIVE_TRIM,
)  # of which, with the load table, the default run has the best
_FEW_SEEDS = 3  # of a search
_EVALUATIONS = 160  # of a search, each on those
_PRICE = 10.0  # of attainment, by energy: where an SLO is tight 0.1 point is worth 1 to 2 %
_STRETCHES = (0.1, 1.7)  # of the TPOT limit; where TTFT is what binds, far below 1
_KNOTS: dict[Key, tuple[float, ...]] = {  # quantiles of what is seen
    "arrival_rate": (0.05, 0.35, 0.65, 0.97),
    "in_system": (0.05, 0.35, 0.65, 0.9, 1.0),
}
_FINE_KNOTS: dict[Key, tuple[float, ...]] = {"in_system": (0.0, 0.1, 0.25, 0.4, 0.55, 0.7, 0.83, 0.95, 1.0)}


def tuned_rules(
    names: Iterable[str], tuning: Runs, slo: str, *, share: float, table: LoadTable, perf: PerfModel
) -> dict[str, LoadTable | Rule]:
    """The rules of these names, tuned; they take the batch limit of a load table, and a GPU's model."""
    search = _Search(tuning, slo, share, table, perf)
    make: Mapping[str, Callable[[], LoadTable | Rule]] = {
        FAST_LOAD_TABLE: search.fast_load_table,
        REQUESTS_TABLE: lambda: search.requests_table,
        RATE_REQUESTS_TABLE: partial(search.tabled, _KNOTS),
        REQUESTS_TRIM: lambda: search.trimmed(search.requests_table),
        PREDICTIVE: lambda: search.predictive,
        PREDICTIVE_TRIM: lambda: search.trimmed(search.predictive),
    }
    return {name: make[name]() for name in dict.fromkeys(names)}


def best_rule(
    rules: Mapping[str, LoadTable | Rule], tuning: Runs, slo: str, *, share: float, table: LoadTable
) -> tuple[str, LoadTable | Rule]:
    """The one of least energy at the share that was asked, by name; the load table is one of them."""
    everyone: dict[str, LoadTable | Rule] = {LOAD_TABLE: table, **rules}
    spec, limits = tuning.loop.node.spec, tuning.slos[slo]

    def rank(name: str) -> tuple[bool, float]:
        return tuning.score(at_work(everyone[name], spec, limits), slo, share=share).rank(share)

    best = min(everyone, key=rank)
    return best, everyone[best]


@dataclass(frozen=True)
class _Search:
    """What rules are tuned on."""

    tuning: Runs
    slo: str
    share: float
    table: LoadTable
    perf: PerfModel

    def fast_load_table(self) -> LoadTable:
        """A load table that sees a change of the load sooner."""
        return find_load_table(
            partial(self.tuning.traces, slo=self.slo),
            self.tuning.loop.node.spec.gpu_clocks_mhz,
            batch_limit=self._batch_limit,
            allowed=allowed_penalty(self.tuning.slos[self.slo], self.share),
            stride=TABLE_STRIDE,
            ewma_s=FAST_EWMA_S,
        )

    @cached_property
    def requests_table(self) -> Rule:
        return self.tabled(_FINE_KNOTS)

    @cached_property
    def predictive(self) -> Rule:
        """A prediction that stretches the TPOT limit as far as it may; without one its clocks are moved."""
        rule = Rule(self._batch_limit, perf=self.perf)
        if not math.isfinite(token_limits(self.tuning.slos[self.slo])[1]):
            return self._careful(rule, self._span_mhz)
        low, high = _STRETCHES
        return rule.stretched(-bisected(lambda x: self._rank(rule.stretched(-x)), -high, -low))

    def tabled(self, quantiles: Mapping[Key, tuple[float, ...]]) -> Rule:
        """A table with knots at these quantiles: the better of those nearest to two teachers, improved."""
        nearest = [self._nearest(quantiles, self._at_work(rule)) for rule in (self.table, self.predictive)]
        starts = [self._careful(rule, self._span_mhz / 4, few=True) for rule in nearest]
        start = min(starts, key=partial(self._rank, few=True))
        clocks_mhz = np.array(start.clocks_mhz)

        def make(x: np.ndarray) -> Rule:
            return replace(start, clocks_mhz=_rows(x.reshape(clocks_mhz.shape)))

        return self._improved(make, clocks_mhz.ravel())

    def trimmed(self, rule: Rule) -> Rule:
        """The rule with a trim of its own."""

        def make(x: np.ndarray) -> Rule:
            return replace(rule, trim_mhz=tuple(x[:TRIM].tolist())).shifted(float(x[TRIM]))

        return self._improved(make, np.zeros(TRIM + 1))

    def _nearest(self, quantiles: Mapping[Key, tuple[float, ...]], teacher: Policy) -> Rule:
        """The table nearest to the clocks that another policy chose, by least squares."""
        seen, clocks_mhz = self._watched(teacher)
        knots = {key: np.unique(np.quantile(seen[key], own)) for key, own in quantiles.items()}
        between = np.ones((len(clocks_mhz), 1))  # share of each knot in each window
        for key, own in knots.items():
            hats = np.array([np.interp(seen[key], own, row) for row in np.eye(len(own))]).T
            between = (between[:, :, None] * hats[:, None, :]).reshape(len(clocks_mhz), -1)
        mean_mhz, squares = clocks_mhz.mean(), between.T @ between + np.eye(between.shape[1])
        found = mean_mhz + np.linalg.solve(squares, between.T @ (clocks_mhz - mean_mhz))
        shape = (*(len(own) for own in knots.values()), 1)[:2]
        by_key = tuple(tuple(own.tolist()) for own in knots.values())
        return Rule(self._batch_limit, tuple(knots), by_key, _rows(found.reshape(shape)))

    def _watched(self, teacher: Policy) -> tuple[dict[Key, np.ndarray], np.ndarray]:
        """What a policy saw in each window, by key, and the clocks that it chose."""
        episodes = [self.tuning.episode(teacher, seed).windows for seed in self.tuning.seeds[:_FEW_SEEDS]]
        rates = [smoothed_rates(np.array([w.arrivals for w in windows]))[:-1] for windows in episodes]
        requests = [[float(w.running + w.waiting) for w in windows[:-1]] for windows in episodes]
        chosen = [[float(w.knobs.gpu_clock_mhz) for w in windows[1:]] for windows in episodes]
        seen: dict[Key, np.ndarray] = {
            "arrival_rate": np.concatenate(rates),
            "in_system": np.concatenate(requests),
        }
        return seen, np.concatenate(chosen)

    def _improved(self, make: Callable[[np.ndarray], Rule], start: np.ndarray) -> Rule:
        """The best rule found from a start, or this where nothing better was; as careful as asked."""
        first = self._score(make(start), few=True)

        def cost(x: np.ndarray) -> float:
            score = self._score(make(x), few=True)
            more = score.slo_attainment - first.slo_attainment
            return score.energy_j_per_request / first.energy_j_per_request - _PRICE * more

        found = evolved(cost, start, spread=self._span_mhz / 16, evaluations=_EVALUATIONS)
        rules = [self._careful(make(x), self._span_mhz / 6) for x in (start, found)]
        return min(rules, key=self._rank)

    def _careful(self, rule: Rule, most_mhz: float, *, few: bool = False) -> Rule:
        """The rule with its clocks moved by at most so much, so that it just meets the SLO."""
        move_mhz = bisected(lambda mhz: self._rank(rule.shifted(mhz), few=few), -most_mhz, most_mhz)
        return rule.shifted(move_mhz)

    def _rank(self, rule: Rule, *, few: bool = False) -> tuple[bool, float]:
        return self._score(rule, few=few).rank(self.share)

    def _score(self, rule: Rule, *, few: bool = False) -> Score:
        tuning = self.tuning.first(_FEW_SEEDS) if few else self.tuning
        return tuning.score(self._at_work(rule), self.slo, share=self.share)

    def _at_work(self, rule: LoadTable | Rule) -> Policy:
        return at_work(rule, self.tuning.loop.node.spec, self.tuning.slos[self.slo])

    @property
    def _batch_limit(self) -> int:
        return self.table.knobs[0].batch_limit

    @property
    def _span_mhz(self) -> float:
        clocks_mhz = self.tuning.loop.node.spec.gpu_clocks_mhz
        return float(clocks_mhz[-1] - clocks_mhz[0])


def _rows(clocks_mhz: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in clocks_mhz.tolist())
