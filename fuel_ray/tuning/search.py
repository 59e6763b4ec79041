"""The best static pair, load table and setting of a policy on tuning seeds."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

from fuel_ray.policies.catalogue import Contender, Learner
from fuel_ray.policies.static import LoadTable, Static
from fuel_ray.tuning.clock_search import allowed_penalty, find_load_table
from fuel_ray.tuning.runs import Runs, Score
from fuel_ray.types import Knobs, NodeSpec, Policy

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


def tuned(family: Sequence[Contender], tuning: Runs, slo: str, *, share: float) -> tuple[Policy, float]:
    """The variant, and its setting, that ranks best on the tuning seeds; a ``Learner`` has played them.

    A load table with an average of its own is searched.
    """

    def rank_of(contender: Contender, setting: float) -> tuple[bool, float]:
        return tuning.score(contender.make(setting), slo, share=share).rank(share)

    if family[0].ewma_s is not None:
        return _load_table(family[0], tuning, slo, share=share), 0.0
    ranks = [cache(partial(rank_of, contender)) for contender in family]
    settings = [_search(contender, rank) for contender, rank in zip(family, ranks, strict=True)]
    best = min(range(len(family)), key=lambda k: ranks[k](settings[k])) if len(family) > 1 else 0
    policy = family[best].make(settings[best])
    if isinstance(policy, Learner):
        for seed in tuning.seeds:
            tuning.episode(policy, seed)
            policy.keep()
    return policy, settings[best]


def _load_table(contender: Contender, tuning: Runs, slo: str, *, share: float) -> LoadTable:
    start = contender.make(0.0)
    assert isinstance(start, LoadTable)
    return find_load_table(
        partial(tuning.traces, slo=slo),
        tuning.loop.node.spec.gpu_clocks_mhz,
        batch_limit=start.knobs[0].batch_limit,
        allowed=allowed_penalty(tuning.slos[slo], share),
        stride=TABLE_STRIDE,
        ewma_s=start.ewma_s,
    )


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
