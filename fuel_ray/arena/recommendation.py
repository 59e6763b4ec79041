"""Which (block size, policy) pair to deploy for a load and an SLO; tuned static where none is better."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fuel_ray import __version__
from fuel_ray.arena.axes import axis_rows, on_other_axes, played
from fuel_ray.arena.cell import held_out_rows
from fuel_ray.arena.comparison import attainment
from fuel_ray.arena.config import RecommendConfig
from fuel_ray.arena.equal import Rows, Sweep, enough, iso, raw, sweep_of
from fuel_ray.arena.pool import in_processes
from fuel_ray.build.nodes import build_loop, build_spec
from fuel_ray.codec import ActionGrid, Codec
from fuel_ray.control import ControlLoop
from fuel_ray.drift import Range, observed_ranges
from fuel_ray.policies.anchor import Anchor
from fuel_ray.policies.catalogue import MAX_PERFORMANCE, SIMPLE, TUNED_STATIC
from fuel_ray.policies.learned import LearnedPolicy, Manifest, read_policy, save_policy, save_rule
from fuel_ray.policies.rules import Rule, RulePolicy
from fuel_ray.policies.static import LoadTable, Static
from fuel_ray.sim.pack import load_pack
from fuel_ray.stats import Interval
from fuel_ray.tuning.contenders import families, of_size
from fuel_ray.tuning.episodes import TUNING_SEEDS, held_out_episodes
from fuel_ray.tuning.runs import Runs, held_out, plays_of
from fuel_ray.tuning.search import SLACK, Swept, swept
from fuel_ray.tuning.tuned import perf_of, tune_on, tuned_case
from fuel_ray.types import Knobs, Policy
from fuel_ray.workload.spec import parse_workload

_ASKED = "asked"


@dataclass(frozen=True, slots=True)
class Fitted:
    """A learned policy as it was tuned here: where it came from, and what was tuned."""

    folder: Path
    codec: Codec
    anchor: Anchor | None
    static: Knobs


@dataclass(frozen=True, slots=True)
class FittedRule:
    """A simple rule as it was tuned here."""

    rule: LoadTable | Rule
    static: Knobs
    ranges: Mapping[str, Range]  # of the load, as it was tuned on


@dataclass(frozen=True, slots=True)
class Pair:
    """One policy at one block size: what it did on the tuning seeds together and on each held-out seed."""

    kv_block_size: int
    policy: str
    asked: float  # share of requests in tuning; less than the settings say where that is not to be had
    tuned_rank: tuple[bool, float]  # ``Swept.rank`` of that
    energy_j: tuple[float, ...]
    requests: tuple[int, ...]
    attained: float
    met: bool  # the SLO, on most seeds
    how: str  # what was tuned
    fitted: Fitted | FittedRule | None = None  # of a learned policy or a simple rule
    axes: Mapping[str, "Pair"] = field(default_factory=dict)  # under the pack's others, on the first seeds
    attained_change: float = 0.0  # of one of these, by its axis, on the same seeds
    swept: Sweep | None = None  # at all settings; None: as tuned alone

    @property
    def energy_j_per_request(self) -> float:
        """Pooled over the seeds."""
        return sum(self.energy_j) / sum(self.requests)

    @property
    def sweep(self) -> Sweep:
        """What it did, at all settings that were played."""
        met = [self.attained * requests for requests in self.requests]
        setting = {"energy_j": self.energy_j, "requests": self.requests, "met": met}
        return self.swept or sweep_of([setting], enough=enough(self.asked, of_means=False))

    def against(self, other: "Pair") -> Interval:
        """Energy by the other's at the attainment that this has as tuned.

        As both are where that is more than ``SLACK`` above every setting, or the other is a server without
        control: what is saved is then what the tuned setting saves.
        """
        same = None
        if other.policy != MAX_PERFORMANCE:
            same = iso([self.sweep], other.sweep, reached=SLACK).ratio
        return same or raw([self.sweep], other.sweep)

    def band_against(self, other: "Pair") -> tuple[float, float] | None:
        """Lowest and highest of that over the clock axes; None where there is one.

        Each is moved by what its axis changes on the seeds that it was played on.
        """
        ratio, ratios = self.against(other).mean, []
        for axis, pair in self.axes.items():
            n = len(pair.energy_j)
            same = self._first(n).against(other._first(n)).mean
            ratios.append(ratio + pair.against(other.axes[axis]).mean - same)
        return (min(ratio, *ratios), max(ratio, *ratios)) if ratios else None

    def _first(self, n: int) -> "Pair":
        """On the first seeds."""
        return replace(
            self, energy_j=self.energy_j[:n], requests=self.requests[:n], swept=self.sweep.first(n)
        )


def save(pair: Pair, fitted: Fitted | FittedRule, config: RecommendConfig) -> None:
    """The policy with what was tuned, for its block size alone, since the static pair and the rules are."""
    assert config.save is not None
    if isinstance(fitted, FittedRule):
        _save_rule(config.save, pair, fitted, config)
        return
    policy = read_policy(fitted.folder, extra_features=config.extra_features)
    manifest = replace(
        policy.manifest,
        kv_block_sizes=(pair.kv_block_size,),
        workload=config.workload,
        workload_digest=parse_workload(config.workload).digest(),
        tuned_static=fitted.static,
        slo=config.slo,
        anchor=fitted.anchor,
    )
    save_policy(config.save, policy.arrays, fitted.codec, manifest)


def _save_rule(folder: Path, pair: Pair, fitted: FittedRule, config: RecommendConfig) -> None:
    spec, pack = build_spec(config, pair.kv_block_size), load_pack(config.pack)
    manifest = Manifest(
        kv_block_sizes=(pair.kv_block_size,),
        model=spec.model,
        gpu_name=spec.gpu_name,
        engine=pack.engine,
        pack=pack.name,
        pack_sha256=pack.sha256,
        reward="energy",
        workload=config.workload,
        workload_digest=parse_workload(config.workload).digest(),
        head="additive",
        fuel_ray_version=__version__,
        algorithm=pair.policy,
        tuned_static=fitted.static,
        feature_ranges=fitted.ranges,
    )
    save_rule(folder, fitted.rule, manifest, slo=config.slo, clock_mhz=spec.max_performance.gpu_clock_mhz)


def by_size(config: RecommendConfig) -> Iterator[list[Pair]]:
    """The pairs of each block size, as they come."""
    return in_processes(_pairs, [(config, size) for size in config.block_sizes], workers=config.workers)


def _pairs(config: RecommendConfig, kv_block_size: int) -> list[Pair]:
    """Tuned static, the simple rules and every policy at one block size."""
    loop = build_loop(config, kv_block_size, horizon_s=float(config.seconds), part="first half")
    slos = {_ASKED: config.slo}
    tuning = Runs(loop, seeds=TUNING_SEEDS[: config.tuning_seeds], seconds=config.seconds, slos=slos)
    seeds, seconds = held_out_episodes(config.workload, config.seeds, config.seconds)
    judged = replace(config, seeds=seeds, seconds=seconds)
    stage = build_loop(judged, kv_block_size, horizon_s=float(seconds), part="second half")
    alone = held_out(stage, seeds, seconds=seconds, slos=slos)
    base = tune_on(tuning, _ASKED, share=config.tune_share, perf=perf_of(config))
    case = tuned_case(config, loop.node.spec, base)
    others = on_other_axes(judged, partial(_under_axis, judged, kv_block_size), slos=slos)
    pairs = []
    known = {name: name for name in (TUNED_STATIC, *SIMPLE)}
    for name, entry in (known | of_size(config.policies, kv_block_size)).items():
        (family, *_) = families(name, entry, case)
        found = swept(family, tuning, _ASKED, share=base.share)
        policy = found.nominal.policy
        rows = held_out_rows(name, plays_of(policy, alone), alone, _ASKED)
        pair = Pair(
            kv_block_size=kv_block_size,
            policy=name,
            asked=base.share,
            tuned_rank=found.rank(base.share),
            **_outcome(found, rows, alone),
            how=_how(policy),
            fitted=_fitted(entry, policy, base.static, tuning),
        )
        under = {axis: axis_rows(name, plays_of(policy, runs), runs, _ASKED) for axis, runs in others.items()}
        axes = {
            axis: _under(pair, rows[: len(own)], own, _outcome(found, own, others[axis]))
            for axis, own in under.items()
        }
        pairs.append(replace(pair, axes=axes))
    return pairs


def _fitted(entry: str, policy: Policy, static: Knobs, tuning: Runs) -> Fitted | FittedRule | None:
    """What is to be saved of a policy; None where that is nothing."""
    if isinstance(policy, LearnedPolicy):
        return Fitted(Path(entry), policy.codec, policy.anchor, static)
    rule = policy.rule if isinstance(policy, RulePolicy) else policy
    if isinstance(rule, Static) and entry == TUNED_STATIC:
        rule = LoadTable((), (rule.knobs,))
    if not isinstance(rule, LoadTable | Rule):
        return None
    spec, slo = tuning.loop.node.spec, tuning.slos[_ASKED]
    codec = Codec(("waiting",), ActionGrid((1,), (1,)), slo)  # the load has the same features for any
    windows = (tuning.episode(policy, seed).windows for seed in tuning.seeds)
    return FittedRule(rule, static, observed_ranges(codec, spec, windows))


def _under_axis(config: RecommendConfig, kv_block_size: int, clock_axis: str) -> ControlLoop:
    config = replace(config, clock_axis=clock_axis)
    return build_loop(config, kv_block_size, horizon_s=float(config.seconds), part="second half")


def _under(pair: Pair, same: Rows, own: Rows, outcome: Mapping[str, Any]) -> Pair:
    """The pair under another clock axis, and what it did on the same seeds under the twin's."""
    return replace(pair, **outcome, attained_change=attainment(own) - attainment(same))


def _outcome(found: Swept, rows: Rows, alone: Sequence[Runs]) -> dict[str, Any]:
    most = enough(found.nominal.asked, of_means=alone[0].slos[_ASKED].share is None)
    return {
        "energy_j": tuple(row["energy_j"] for row in rows),
        "requests": tuple(row["requests"] for row in rows),
        "attained": attainment(rows),
        "met": bool(np.mean([row["slo_met"] for row in rows]) > 0.5),
        "swept": sweep_of(played(found, rows, alone, _ASKED), enough=most),
    }


def _how(policy: Policy) -> str:
    """What was tuned."""
    if isinstance(policy, Static):
        return f"batch limit {policy.knobs.batch_limit} at {policy.knobs.gpu_clock_mhz} MHz"
    if not isinstance(policy, LearnedPolicy):
        return ""
    parts = [f"price of a miss {policy.codec.miss_price_j:.0f} J"] if policy.priced else []
    if policy.anchor is not None and policy.anchor.weight > 0.0:
        parts.append(f"anchor weight {policy.anchor.weight:g}")
    return ", ".join(parts)
