"""The best static pair, load table and setting of a policy on tuning seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

from fuel_ray.policies.catalogue import Contender, Learner
from fuel_ray.policies.static import Static
from fuel_ray.tuning.runs import Runs, Score, least_energy
from fuel_ray.types import Knobs, NodeSpec, Policy

LIMITS_SCARCE = (24, 32, 40, 48, 64)
SLACK = 0.005  # of attainment: what is called equal, and what is asked below the best there is
HALVINGS = 3  # of the distance between settings
BISECTIONS = 8
_AROUND_BISECTIONS = 5  # of the settings besides, which need not be at just what is asked
AROUND = (-0.01, -0.005, 0.005, 0.01)  # of the share asked: where a dial is set besides
TABLE_STRIDE = 4  # 60 MHz on a GPU with clocks 15 MHz apart


def tune_static_pair(tuning: Runs, slo: str, *, share: float, limits: Sequence[int]) -> tuple[Knobs, float]:
    """The best pair, and the share of requests that is asked of everybody.

    Where no pair meets the SLO for ``share``, everybody is asked for what the best one attains, less
    ``SLACK``.
    """
    spec = tuning.loop.node.spec
    lowest, highest = spec.batch_limits
    limits = sorted({highest, *(limit for limit in limits if lowest <= limit < highest)})
    fastest = [Static(Knobs(limit, spec.gpu_clocks_mhz[-1])) for limit in limits]
    reachable = max(tuning.score(policy, slo, share=share).slo_attainment for policy in fastest)
    asked = share
    if reachable < share:  # means are at share / reachable of what is asked
        asked = reachable - SLACK if tuning.slos[slo].share is not None else share * share / reachable + SLACK
    score = partial(tuning.score, slo=slo, share=asked)
    return tune_static(score, spec, share=asked, limits=limits), asked


def tune_static(
    score: Callable[[Policy], Score], spec: NodeSpec, *, share: float, limits: Sequence[int]
) -> Knobs:
    """The pair of least energy that meets the SLO for ``share`` of the requests.

    Walks down a coarse grid of clocks for every limit until attainment is lost, then the GPU's own grid
    around the best pair. Without any pair that meets the SLO, the one of highest attainment.
    """
    attempt = cache(lambda knobs: score(Static(knobs)))
    clocks, tried = spec.gpu_clocks_mhz, []
    stride = max(1, len(clocks) // 16)
    for limit in sorted(limits, reverse=True):
        for clock_mhz in clocks[::-1][::stride]:
            tried.append(Knobs(limit, clock_mhz))
            if attempt(tried[-1]).slo_attainment < share - 0.05:
                break
    coarse = min(tried, key=lambda knobs: attempt(knobs).rank(share))
    middle = clocks.index(coarse.gpu_clock_mhz)
    around = clocks[max(0, middle - stride + 1) : middle + stride]
    tried += [replace(coarse, gpu_clock_mhz=clock_mhz) for clock_mhz in around]
    return min(tried, key=lambda knobs: attempt(knobs).rank(share))


@dataclass(frozen=True, slots=True)
class Setting:
    """A policy at one setting of its dial, and the share of requests that this was searched for."""

    asked: float
    setting: float
    policy: Policy


@dataclass(frozen=True, slots=True)
class Swept:
    """A contender as tuned for what is asked, and at settings for a little less and more."""

    nominal: Setting
    around: tuple[Setting, ...] = ()  # none where there is nothing to set
    scores: tuple[Score, ...] = ()  # on the tuning seeds, of every setting tried

    @property
    def settings(self) -> tuple[Setting, ...]:
        """All of them."""
        return (self.nominal, *self.around)

    def rank(self, share: float) -> tuple[bool, float]:
        """Lower is better: as ``Score.rank``, with the energy at just this share."""
        return at_share(self.scores, share).rank(share)


def at_share(scores: Sequence[Score], share: float) -> Score:
    """What settings of one policy amount to at an attainment of ``share``; the highest if none reaches it.

    So a little luck in attainment decides between no two policies.
    """
    energy_j = least_energy([(s.slo_attainment, s.energy_j_per_request) for s in scores], share)
    if energy_j is None:
        return max(scores, key=lambda score: score.slo_attainment)
    return Score(energy_j, share)


def tuned(family: Sequence[Contender], tuning: Runs, slo: str, *, share: float) -> tuple[Policy, float]:
    """The variant, and its setting, that ranks best on the tuning seeds; a ``Learner`` has played them."""
    best, setting = _nominal([_Dial(contender, tuning, slo, share) for contender in family])
    return _learned(best.contender.make(setting), tuning), setting


def swept(family: Sequence[Contender], tuning: Runs, slo: str, *, share: float) -> Swept:
    """The same, with settings for shares ``AROUND`` what is asked, none above what can be reached."""
    best, setting = _nominal([_Dial(contender, tuning, slo, share) for contender in family])
    nominal = Setting(share, setting, _learned(best.contender.make(setting), tuning))
    if setting not in best.scores:
        best.scores[setting] = tuning.score(nominal.policy, slo, share=share)
    around: dict[float, Setting] = {}
    if len(best.contender.settings) > 1:
        fastest = Static(tuning.loop.node.spec.max_performance)
        reachable = tuning.score(fastest, slo, share=share).slo_attainment
        for asked in sorted({min(share + step, max(reachable, share)) for step in AROUND} - {share}):
            found = best.search(asked, bisections=_AROUND_BISECTIONS)
            around[found] = Setting(asked, found, best.contender.make(found))
    around.pop(setting, None)
    return Swept(nominal, tuple(around.values()), tuple(best.scores.values()))


class _Dial:
    """A contender on the tuning seeds; each setting is run once."""

    def __init__(self, contender: Contender, tuning: Runs, slo: str, share: float) -> None:
        self.contender, self.share = contender, share
        self.scores: dict[float, Score] = {}
        self._tuning, self._slo = tuning, slo

    def score(self, setting: float) -> Score:
        if setting not in self.scores:
            policy = self.contender.make(setting)
            self.scores[setting] = self._tuning.score(policy, self._slo, share=self.share)
        return self.scores[setting]

    def nominal(self) -> float:
        known = self.contender.nominal
        return self.search(self.share) if known is None else known

    def search(self, asked: float, *, bisections: int = BISECTIONS) -> float:
        """The setting that ranks best for this share."""
        return _search(self.contender, lambda x: self.score(x).rank(asked), bisections=bisections)


def _nominal(dials: Sequence[_Dial]) -> tuple[_Dial, float]:
    """The variant of least energy at just what is asked, and its setting; a single one is not compared."""
    settings = [dial.nominal() for dial in dials]
    if len(dials) == 1:
        return dials[0], settings[0]

    def rank(k: int) -> tuple[bool, float]:
        dials[k].score(settings[k])
        return at_share(tuple(dials[k].scores.values()), dials[k].share).rank(dials[k].share)

    best = min(range(len(dials)), key=rank)
    return dials[best], settings[best]


def _learned(policy: Policy, tuning: Runs) -> Policy:
    """The policy, which has played the tuning seeds if it is a ``Learner``."""
    if isinstance(policy, Learner):
        for seed in tuning.seeds:
            tuning.episode(policy, seed)
            policy.keep()
    return policy


def _search(contender: Contender, rank: Callable[[float], tuple[bool, float]], *, bisections: int) -> float:
    """The setting of lowest rank; where there is only one, it is not run.

    The settings listed are tried, then halfway to those beside the best, a few times: the SLO is often
    met on one side of a setting between them and missed on the other. A monotone one is bisected.
    """
    if len(contender.settings) == 1:
        return contender.settings[0]
    if contender.monotone:
        return bisected(rank, *contender.settings, times=bisections)
    tried = set(contender.settings)
    best = min(contender.settings, key=rank)
    for _ in range(HALVINGS):
        ascending = sorted(tried)
        at = ascending.index(best)
        beside = [(best + ascending[k]) / 2 for k in (at - 1, at + 1) if 0 <= k < len(ascending)]
        tried.update(beside)
        best = min((best, *beside), key=rank)
    return best


def bisected(
    rank: Callable[[float], tuple[bool, float]], low: float, high: float, *, times: int = BISECTIONS
) -> float:
    """The best setting seen while looking for the lowest one that meets the SLO."""
    ranks: dict[float, tuple[bool, float]] = {}
    for _ in range(times):
        middle = (low + high) / 2
        ranks[middle] = rank(middle)
        missed, _ = ranks[middle]
        low, high = (middle, high) if missed else (low, middle)
    return min(ranks, key=lambda setting: ranks[setting])
