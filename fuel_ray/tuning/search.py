"""The best static pair, load table and setting of a policy on tuning seeds."""

from collections.abc import Callable, Sequence
from functools import cache, partial

from fuel_ray.policies.catalogue import Contender, Learner
from fuel_ray.policies.static import LoadTable, Static
from fuel_ray.tuning.clock_search import allowed_penalty, find_load_table
from fuel_ray.tuning.runs import Runs
from fuel_ray.tuning.static_pair import Score, tune_static
from fuel_ray.types import Knobs, Policy, Slo

LIMITS_SCARCE = (24, 32, 40, 48, 64)
SLACK = 0.005  # of attainment: what is called equal, and what is asked below the best there is
HALVINGS = 3  # of the distance between settings
BISECTIONS = 8
TABLE_STRIDE = 4  # 60 MHz on a GPU with clocks 15 MHz apart


def tune_static_pair(tuning: Runs, slo: str, *, share: float, limits: Sequence[int]) -> tuple[Knobs, float]:
    """The best pair, and the share of requests that is asked of everybody.

    Where no pair meets the SLO for ``share``, everybody is asked for what the best one attains, less
    ``SLACK``.
    """
    spec = tuning.loop.node.spec
    highest = spec.batch_limits[-1]
    limits = sorted({highest, *(limit for limit in limits if limit < highest)})

    def score(policy: Policy, share: float) -> Score:
        return tuning.score(policy, slo, share=share)

    fastest = [Static(Knobs(limit, spec.gpu_clocks_mhz[-1])) for limit in limits]
    reachable = max(score(policy, share).slo_attainment for policy in fastest)
    asked = share if reachable >= share else asked_less(tuning.slos[slo], share, reachable)
    return tune_static(partial(score, share=asked), spec, share=asked, limits=limits), asked


def asked_less(slo: Slo, share: float, reachable: float) -> float:
    """What to ask for where the best there is attains only ``reachable`` by ``share``: a little less."""
    if slo.share is None:  # means, which are at share / reachable of what is asked
        return share * share / reachable + SLACK
    return reachable - SLACK


def tune_table(tuning: Runs, slo: str, static: Knobs, *, share: float, budget: int = 60) -> LoadTable:
    """The best load table at this pair's limit; ``budget`` runs are spent on single moves."""
    return find_load_table(
        tuning.runner(slo),
        tuning.loop.node.spec.gpu_clocks_mhz,
        batch_limit=static.batch_limit,
        allowed=allowed_penalty(tuning.slos[slo], share),
        stride=TABLE_STRIDE,
        budget=budget,
    )


def tuned(family: Sequence[Contender], tuning: Runs, slo: str, *, share: float) -> tuple[Policy, float]:
    """The variant, and its setting, that ranks best on the tuning seeds; a ``Learner`` has played them."""
    ranks = [_ranker(contender, tuning, slo, share) for contender in family]
    settings = [_search(contender, rank) for contender, rank in zip(family, ranks, strict=True)]
    best = 0
    if len(family) > 1:
        best = min(range(len(family)), key=lambda k: ranks[k](settings[k]))
    policy = family[best].make(settings[best])
    if isinstance(policy, Learner):
        for seed in tuning.seeds:
            tuning.episode(policy, seed)
            policy.keep()
    return policy, settings[best]


def _ranker(
    contender: Contender, tuning: Runs, slo: str, share: float
) -> Callable[[float], tuple[bool, float]]:
    """How the contender ranks with a setting, run once per setting."""
    return cache(lambda setting: tuning.score(contender.make(setting), slo, share=share).rank(share))


def _search(contender: Contender, rank: Callable[[float], tuple[bool, float]]) -> float:
    """The setting of lowest rank; where there is only one, it is not run.

    The settings listed are tried, then halfway to those beside the best, a few times: the SLO is often
    met on one side of a setting between them and missed on the other. A monotone one is bisected.
    """
    if len(contender.settings) == 1:
        return contender.settings[0]
    if contender.monotone:
        return bisected(rank, *contender.settings)
    tried = set(contender.settings)
    best = min(contender.settings, key=rank)
    for _ in range(HALVINGS):
        ascending = sorted(tried)
        at = ascending.index(best)
        beside = [(best + ascending[k]) / 2 for k in (at - 1, at + 1) if 0 <= k < len(ascending)]
        tried.update(beside)
        best = min((best, *beside), key=rank)
    return best


def bisected(rank: Callable[[float], tuple[bool, float]], low: float, high: float) -> float:
    """The best setting seen while looking for the lowest one that meets the SLO."""
    ranks: dict[float, tuple[bool, float]] = {}
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        ranks[middle] = rank(middle)
        missed, _ = ranks[middle]
        low, high = (middle, high) if missed else (low, middle)
    return min(ranks, key=lambda setting: ranks[setting])
