"""Which (block size, policy) pair to deploy for a load and an SLO; tuned static where none is better."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from fuel_ray.arena.cell import exam
from fuel_ray.arena.config import RecommendConfig
from fuel_ray.build.nodes import build_loop
from fuel_ray.codec import Codec
from fuel_ray.policies.anchor import Anchor
from fuel_ray.policies.learned import (
    LearnedPolicy,
    distinct_names,
    read_manifest,
    read_policy,
    save_policy,
)
from fuel_ray.policies.static import Static
from fuel_ray.stats import Interval, paired_ratio
from fuel_ray.tuning.contenders import learned
from fuel_ray.tuning.episodes import HELD_OUT_SEED, TUNING_SEEDS
from fuel_ray.tuning.runs import Runs
from fuel_ray.tuning.search import LIMITS_SCARCE, SLACK, best_tuned, tune_static_pair, tune_table
from fuel_ray.types import Knobs, Policy
from fuel_ray.workload.spec import parse_workload

STATIC = "tuned static"
_ASKED = "asked"


@dataclass(frozen=True, slots=True)
class Told:
    """A learned policy as it was tuned here: where it came from, and what it is told."""

    folder: Path
    codec: Codec
    anchor: Anchor | None
    static: Knobs


@dataclass(frozen=True, slots=True)
class Pair:
    """One policy at one block size: what it did on the tuning seeds together and on each held-out seed."""

    kv_block_size: int
    policy: str
    asked: float  # share of requests in tuning; less than the settings say where that is not to be had
    tuned_rank: tuple[bool, float]  # ``Score.rank`` of that
    energy_j: tuple[float, ...]
    requests: tuple[int, ...]
    attained: float
    met: bool  # the promise, on most seeds
    how: str  # what was tuned
    told: Told | None = None  # of a learned policy

    @property
    def energy_j_per_request(self) -> float:
        """Pooled over the seeds."""
        return sum(self.energy_j) / sum(self.requests)

    def against(self, other: "Pair") -> Interval:
        """Energy by the other's, paired by seed."""
        return paired_ratio(self.energy_j, other.energy_j, rng=np.random.default_rng(0))


def of_size(config: RecommendConfig, kv_block_size: int) -> tuple[Path, ...]:
    """Policy folders for this block size."""
    return tuple(f for f in config.policies if kv_block_size in read_manifest(f).kv_block_sizes)


def save(pair: Pair, told: Told, config: RecommendConfig) -> None:
    """The policy, told what was tuned; for its block size alone, since the static pair and the table are."""
    assert config.save is not None
    policy = read_policy(told.folder, extra_features=config.extra_features)
    manifest = replace(
        policy.manifest,
        kv_block_sizes=(pair.kv_block_size,),
        workload=config.workload,
        workload_digest=parse_workload(config.workload).digest(),
        tuned_static=told.static,
        slo=config.slo,
        anchor=told.anchor,
    )
    save_policy(config.save, policy.arrays, told.codec, manifest)


def by_size(config: RecommendConfig) -> Iterator[list[Pair]]:
    """The pairs of one block size after the other."""
    if config.workers == 1 or len(config.block_sizes) == 1:
        yield from (_pairs(config, size) for size in config.block_sizes)
        return
    with ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_pairs, [config] * len(config.block_sizes), config.block_sizes)


def _pairs(config: RecommendConfig, kv_block_size: int) -> list[Pair]:
    """Tuned static and every policy at one block size."""
    build = partial(build_loop, config, kv_block_size, horizon_s=float(config.seconds))
    loop, stage = build(part="first half"), build(part="second half")
    slos = {_ASKED: config.slo}
    practice = Runs(loop, seeds=TUNING_SEEDS[: config.tuning_seeds], seconds=config.seconds, slos=slos)
    alone = [
        Runs(stage, seeds=[HELD_OUT_SEED + i], seconds=config.seconds, slos=slos) for i in range(config.seeds)
    ]
    knobs, share = tune_static_pair(practice, _ASKED, share=config.tune_share, limits=LIMITS_SCARCE)
    table = tune_table(practice, _ASKED, knobs, share=share)
    how = f"limit {knobs.batch_limit} at {knobs.gpu_clock_mhz} MHz"

    def pair(name: str, policy: Policy, how: str, told: Told | None = None) -> Pair:
        rows = exam(name, policy, alone, _ASKED)
        requests = tuple(row["requests"] for row in rows)
        return Pair(
            kv_block_size=kv_block_size,
            policy=name,
            asked=share,
            tuned_rank=practice.score(policy, _ASKED, share=share).rank(share),
            energy_j=tuple(row["energy_j"] for row in rows),
            requests=requests,
            attained=float(np.average([row["slo_attainment"] for row in rows], weights=requests)),
            met=bool(np.mean([row["slo_met"] for row in rows]) > 0.5),
            how=how,
            told=told,
        )

    pairs = [pair(STATIC, Static(knobs), how)]
    names = dict(zip(config.policies, distinct_names(config.policies), strict=True))
    for folder in of_size(config, kv_block_size):
        (family, *_) = learned((folder,), loop.node.spec, config.slo, table, config.extra_features)
        policy, _ = best_tuned(family, practice, _ASKED, share=share)
        assert isinstance(policy, LearnedPolicy)
        told = Told(folder, policy.codec, policy.anchor, knobs)
        pairs.append(pair(names[folder], policy, _how(policy), told))
    return pairs


def _how(policy: LearnedPolicy) -> str:
    parts = [f"a miss costs {policy.codec.miss_price_j:.0f} J"] if policy.priced else []
    if policy.anchor is not None and policy.anchor.weight > 0.0:
        parts.append(f"{policy.anchor.weight:g} per 100 MHz off the load table")
    return ", ".join(parts) or "as trained"


def line(pair: Pair) -> str:
    """One pair, for the terminal."""
    return (
        f"recommend  block {pair.kv_block_size:>3}  {pair.policy:<16}"
        f" {pair.energy_j_per_request:7.2f} J/request  {pair.attained:.3f} of SLO  ({pair.how})"
    )


def recommendation(pairs: Sequence[Pair], *, share: float | None) -> tuple[Pair, str]:
    """The pair to deploy and a sentence or two; chosen on the tuning seeds, judged on the held-out ones.

    A pair is one of least energy that keeps what was asked on the tuning seeds; a block size at which less
    can be had than at another counts as missing it. The learned one is deployed if on the held-out seeds it
    keeps the promise, or as much of it as tuned static, within ``SLACK``, and surely beats it: the interval
    of the difference excludes none.
    """
    bar = (min if share is None else max)(pair.asked for pair in pairs)

    def rank(pair: Pair) -> tuple[bool, bool, float]:
        missed, figure = pair.tuned_rank
        return abs(pair.asked - bar) > SLACK, missed, figure

    ranked = sorted(pairs, key=rank)
    static = next(pair for pair in ranked if pair.policy == STATIC)
    best = next((pair for pair in ranked if pair.policy != STATIC), None)
    if best is None or any(rank(best)[:2]) or not _keeps(best, static, share):
        sentence = f"Recommended: {_named(static)}. No learned policy keeps the promise."
        return static, sentence + _warning(static, share)
    change = best.against(static)
    if change.high is None or change.high >= 1.0:
        return static, (
            f"Recommended: {_named(static)}. No learned policy beats it: the best, {_named(best)}, uses "
            f"{_percent(change)} energy.{_warning(static, share)}"
        )
    others = [pair for pair in ranked if pair is not best]
    runner_up = f" Runner-up: {_named(others[0])}, {_percent(others[0].against(best))}." if others else ""
    saved = f"{_percent(change)} energy against {_named(static)}"
    return best, f"Recommended: {_named(best)}: {saved}.{runner_up}{_warning(best, share)}"


def _keeps(pair: Pair, static: Pair, share: float | None) -> bool:
    """Whether the promise is kept on held-out seeds, or as well as by tuned static."""
    if share is None:
        return pair.met or not static.met
    return pair.attained >= min(share, static.attained) - SLACK


def _warning(pair: Pair, share: float | None) -> str:
    if pair.met if share is None else pair.attained >= share - SLACK:
        return ""
    promised = "the promise" if share is None else f"the {share:.0%} that are promised"
    return f" It does not keep {promised}: the load is more than this node can serve so."


def _named(pair: Pair) -> str:
    return f"{pair.policy} at block size {pair.kv_block_size} ({pair.how}, {pair.attained:.1%} of SLO)"


def _percent(ratio: Interval) -> str:
    if ratio.low is None or ratio.high is None:
        return f"{ratio.mean - 1:+.1%}"
    return f"{ratio.mean - 1:+.1%} ({ratio.low - 1:+.1%} to {ratio.high - 1:+.1%})"
