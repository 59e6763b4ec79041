"""Simple rules that look at their node, tuned on tuning seeds.

Shapes are searched by an evolution strategy on a few of the seeds; how careful a rule is, its dial, is bisected
on all of them, so that it just meets the SLO as asked.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from fuel_ray.averages import smoothed_rates
from fuel_ray.policies.rules import Key, Rule, RulePolicy
from fuel_ray.policies.static import Static
from fuel_ray.sim.pack import PerfModel
from fuel_ray.sim.program import TRIM
from fuel_ray.tuning.runs import Runs, Score
from fuel_ray.tuning.search import bisected
from fuel_ray.types import Knobs

FEW_SEEDS = 3  # of a search
EVALUATIONS = 160  # of a search
_OFFSPRING, _PARENTS = 10, 4
_STRETCHES = (0.3, 1.7)
_MISS_PRICE, _MISS_STEP = 40.0, 0.002  # of energy, per share of requests below what is asked


@dataclass(frozen=True, slots=True)
class RuleSearch:
    """What rules are tuned for: an SLO for a share of the requests, beside a tuned static pair."""

    tuning: Runs
    slo: str
    share: float
    static: Knobs
    perf: PerfModel | None = None

    def requests_table(self) -> Rule:
        """Clocks by requests in the system."""
        (knots,) = self._knots(("in_system",), ((0.0, 0.1, 0.25, 0.4, 0.55, 0.7, 0.83, 0.95, 1.0),))
        return self._table(("in_system",), (knots,))

    def rate_requests_table(self) -> Rule:
        """Clocks by arrival rate and requests in the system."""
        keys: tuple[Key, ...] = ("arrival_rate", "in_system")
        return self._table(keys, self._knots(keys, ((0.05, 0.35, 0.65, 0.97), (0.05, 0.35, 0.65, 0.9, 1.0))))

    def predictive(self) -> Rule:
        """Clocks by prediction."""
        return self.dialed(Rule(self.static.batch_limit, perf=self.perf), 0.0, 0.0)

    def trimmed(self, rule: Rule, evaluations: int = EVALUATIONS) -> Rule:
        """The rule with a linear trim."""

        def make(x: np.ndarray) -> Rule:
            return replace(rule, trim_mhz=tuple(x[:TRIM].tolist()), shift_mhz=rule.shift_mhz + float(x[TRIM]))

        best = self._evolved(make, np.zeros(TRIM + 1), spread_mhz=self._span_mhz / 16, evaluations=evaluations)
        return self.dialed(best, -120.0, 120.0)

    def _table(self, keys: tuple[Key, ...], knots: tuple[tuple[float, ...], ...], evaluations=EVALUATIONS) -> Rule:
        clocks = self.tuning.loop.node.spec.gpu_clocks_mhz
        line = np.linspace(clocks[0], clocks[-1], len(knots[-1]))
        shape = (len(knots[0]), len(knots[1])) if len(keys) == 2 else (len(knots[0]), 1)
        start = np.broadcast_to(line, shape) if len(keys) == 2 else line[:, None]
        plain = Rule(self.static.batch_limit, keys, knots, _rows(start))
        careful = self.dialed(plain, -self._span_mhz / 2, self._span_mhz)

        def make(x: np.ndarray) -> Rule:
            return replace(careful, clocks_mhz=_rows(x.reshape(shape)), shift_mhz=0.0)

        first = start + careful.shift_mhz
        best = self._evolved(make, first.ravel(), spread_mhz=self._span_mhz / 8, evaluations=evaluations)
        return self.dialed(best, -120.0, 120.0)

    def score(self, rule: Rule, few: bool = False) -> Score:
        tuning = self.tuning.first(FEW_SEEDS) if few else self.tuning
        return tuning.score(RulePolicy(rule, tuning.loop.node.spec, tuning.slos[self.slo]), self.slo, share=self.share)

    def dialed(self, rule: Rule, low: float, high: float) -> Rule:
        if rule.perf is not None and low == high:
            x = bisected(lambda x: self.score(rule.stretched(-x)).rank(self.share), -_STRETCHES[1], -_STRETCHES[0])
            return rule.stretched(-x)
        x = bisected(lambda x: self.score(rule.shifted(x)).rank(self.share), low, high)
        return rule.shifted(x)

    def _evolved(
        self, make: Callable[[np.ndarray], Rule], start: np.ndarray, *, spread_mhz: float, evaluations: int
    ) -> Rule:
        def cost(x: np.ndarray) -> float:
            score = self.score(make(x), few=True)
            return score.energy_j_per_request / first.energy_j_per_request - price * score.slo_attainment

        first, dearer = (self.score(make(start).shifted(mhz), few=True) for mhz in (0.0, self._span_mhz / 16))
        more = dearer.slo_attainment - first.slo_attainment
        price = (dearer.energy_j_per_request / first.energy_j_per_request - 1.0) / max(more, 1e-4)
        price = min(max(price, 1.0), 60.0)
        if DBG: print("price", price, first, dearer)
        if CMA: return make(by_cma(cost,start,spread_mhz,evaluations))
        return make(evolved(cost, start, spread=spread_mhz, evaluations=evaluations, rng=np.random.default_rng(0)))

    def _knots(self, keys, quantiles):
        seen = {"in_system": [], "arrival_rate": []}
        for seed in self.tuning.seeds[:2]:
            windows = self.tuning.episode(Static(self.static), seed).windows
            seen["in_system"] += [float(w.running + w.waiting) for w in windows]
            seen["arrival_rate"] += smoothed_rates(np.array([w.arrivals for w in windows]))
        return tuple(tuple(np.unique(np.quantile(seen[k], q)).tolist()) for k, q in zip(keys, quantiles))

    @property
    def _span_mhz(self) -> float:
        clocks = self.tuning.loop.node.spec.gpu_clocks_mhz
        return float(clocks[-1] - clocks[0])


def evolved(cost, start, *, spread: float, evaluations: int, rng) -> np.ndarray:
    best, least, mean, sigma = start, cost(start), start, np.full(len(start), spread)
    weights = np.log(_PARENTS + 0.5) - np.log(np.arange(1, _PARENTS + 1))
    weights /= weights.sum()
    for _ in range(evaluations // _OFFSPRING):
        steps = rng.standard_normal((_OFFSPRING, len(start)))
        costs = [cost(mean + step * sigma) for step in steps]
        parents = steps[np.argsort(costs)[:_PARENTS]]
        if min(costs) < least:
            best, least = mean + sigma * steps[int(np.argmin(costs))], min(costs)
        mean = mean + sigma * (weights @ parents)
        sigma = sigma * np.exp(0.25 * (weights @ parents**2 - 1.0))
        sigma = np.maximum(sigma, spread / 15)
    return best


CMA=False; DBG=True
def by_cma(cost,start,spread,evaluations):
    import cma
    es=cma.CMAEvolutionStrategy(start,spread,{"seed":1,"verbose":-9,"maxfevals":evaluations,"popsize":10,"CMA_diagonal":DIAG})
    while not es.stop():
        X=es.ask(); es.tell(X,[cost(x) for x in X])
    return es.result.xfavorite if FAV else es.result.xbest
DIAG=True; FAV=False
def _rows(clocks_mhz: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in clocks_mhz.tolist())
