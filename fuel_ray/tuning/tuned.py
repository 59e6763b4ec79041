"""What is tuned on tuning seeds: the baselines, a policy's price and anchor, the score of its weights."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fuel_ray.build.codec import build_codec
from fuel_ray.build.nodes import build_loop, twin_of, twinned
from fuel_ray.config import LearnConfig, ServingConfig
from fuel_ray.errors import ConfigError
from fuel_ray.policies.anchor import Anchor, rule_of
from fuel_ray.policies.catalogue import CATALOGUE, LOAD_TABLE, Case, Learner
from fuel_ray.policies.learned import LearnedPolicy, PolicyFolder
from fuel_ray.policies.rules import Rule
from fuel_ray.policies.static import LoadTable
from fuel_ray.record import read_json
from fuel_ray.sim.pack import PerfModel, load_pack
from fuel_ray.tuning import search
from fuel_ray.tuning.clock_search import allowed_penalty, find_load_table
from fuel_ray.tuning.contenders import LOG_PRICES, case_of, kept_near, resolve
from fuel_ray.tuning.episodes import EPISODE_S, TUNING_SEEDS
from fuel_ray.tuning.rules import CHEAP, RULES, best_rule, tuned_rules
from fuel_ray.tuning.runs import Runs, Score
from fuel_ray.tuning.search import LIMITS_SCARCE, TABLE_STRIDE, bisected, tune_static_pair
from fuel_ray.types import Knobs, NodeSpec, Policy, Slo

_ASKED = "asked"  # the SLO of the settings


@dataclass(frozen=True, slots=True)
class Tuned:
    """The baselines for one block size, the simple rules among them."""

    static: Knobs
    table: LoadTable
    share: float  # of requests that was asked for
    rules: Mapping[str, LoadTable | Rule] = field(default_factory=dict)  # by name
    best_rule: str = LOAD_TABLE  # the name of the best of them and the table

    @property
    def rule(self) -> LoadTable | Rule:
        """The best simple rule of the load."""
        return self.rules.get(self.best_rule, self.table)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        rules = {name: rule.to_dict() for name, rule in self.rules.items()}
        return {
            "tuned_static": asdict(self.static),
            "load_table": self.table.to_dict(),
            "share": self.share,
            "rules": rules,
            "best_rule": self.best_rule,
        }

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> "Tuned":
        """The inverse of ``to_dict``; older runs had no other rule than the load table."""
        table = LoadTable.from_dict(raw["load_table"])
        rules = {name: rule_of(rule) for name, rule in raw.get("rules", {}).items()}
        best = raw.get("best_rule", LOAD_TABLE)
        return Tuned(Knobs(**raw["tuned_static"]), table, raw["share"], rules, best)


def tune_baselines(config: LearnConfig, kv_block_size: int, workload: str) -> Tuned:
    """Tune the static pair and the load table for a workload on the tuning seeds.

    Where it is trained for, also the simple rules that cost little: who learns is held by the best of them.
    """
    runs, perf = _tuning_runs(config, kv_block_size, workload, seeds=config.tuning_seeds), perf_of(config)
    rules = CHEAP if workload == config.workload else ()
    return tune_on(runs, _ASKED, share=config.tune_share, rules=rules, perf=perf)


def read_baselines(
    path: Path, block_sizes: Sequence[int], workloads: Sequence[str]
) -> dict[int, dict[str, Tuned]]:
    """Those of a run's baselines.json for these block sizes and workloads.

    Raises:
        ConfigError: the file is not there or no such file, or lacks one of them.
    """
    raw = read_json(path)
    try:
        known = {size: dict(raw.get(str(size), {})) for size in block_sizes}
        lacking = [
            f"{load} at block size {size}" for size in known for load in workloads if load not in known[size]
        ]
        if lacking:
            raise ConfigError(f"--baselines {path}: has no baselines for {', '.join(lacking)}")
        return {size: {load: Tuned.from_dict(own[load]) for load in workloads} for size, own in known.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"--baselines {path}: not the baselines.json of a run: {error!r}") from error


def tune_on(
    runs: Runs,
    slo: str,
    *,
    share: float,
    perf: PerfModel,
    limits: Sequence[int] = LIMITS_SCARCE,
    rules: Collection[str] = RULES,
) -> Tuned:
    """The same on any tuning seeds, for one of their SLOs, with the ``rules`` that are named."""
    static, asked = tune_static_pair(runs, slo, share=share, limits=limits)
    table = find_load_table(
        partial(runs.traces, slo=slo),
        runs.loop.node.spec.gpu_clocks_mhz,
        batch_limit=static.batch_limit,
        allowed=allowed_penalty(runs.slos[slo], asked),
        stride=TABLE_STRIDE,
    )
    return with_rules(Tuned(static, table, asked), rules, runs, slo, perf=perf)


def with_rules(tuned: Tuned, names: Collection[str], runs: Runs, slo: str, *, perf: PerfModel) -> Tuned:
    """The same with the rules of these names, of which those that it has are not tuned again."""
    left = [name for name in names if name not in tuned.rules]
    if not left:
        return tuned
    own = tuned_rules(left, runs, slo, share=tuned.share, table=tuned.table, perf=perf)
    rules = {**tuned.rules, **own}
    best, _ = best_rule(rules, runs, slo, share=tuned.share, table=tuned.table)
    return replace(tuned, rules=rules, best_rule=best)


def perf_of(config: ServingConfig) -> PerfModel:
    """The model of a node's GPU that predictions use."""
    return load_pack(config.pack, config.clock_axis).perf


def tuned_policies(
    config: ServingConfig,
    workload: str,
    spec: NodeSpec,
    entries: Mapping[str, str],
    *,
    share: float,
    tuned: Tuned | None = None,
    seeds: int = len(TUNING_SEEDS),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Policy]:
    """The policies that entries of --policies stand for, by name, at work on a node.

    What they need is tuned on the tuning seeds of the node's twin, the baselines too unless they are
    ``tuned`` already.
    """
    case = case_of(config, spec)
    policies = {name: resolve(entry, case).make(0.0) for name, entry in entries.items()}
    known = {name for name, entry in CATALOGUE.items() if entry.tuned}
    needing = [name for name, policy in policies.items() if name in known or isinstance(policy, Learner)]
    if not needing:
        return policies
    say(f"tune  block {spec.kv_block_size:>3}  {', '.join(needing)}: on the tuning seeds of the twin")
    tuning = _tuning_runs(twin_of(twinned(config, [spec])), spec.kv_block_size, workload, seeds=seeds)
    perf, asked = perf_of(config), [name for name in RULES if name in entries.values()]
    if tuned is None:
        tuned = tune_on(tuning, _ASKED, share=share, rules=(), perf=perf)
    tuned = with_rules(tuned, asked, tuning, _ASKED, perf=perf)
    case = tuned_case(config, spec, tuned)
    for name in needing:
        family = [resolve(entries[name], case)]
        policies[name], _ = search.tuned(family, tuning, _ASKED, share=tuned.share)
    return policies


def tuned_case(config: ServingConfig, spec: NodeSpec, tuned: Tuned, *, slo: Slo | None = None) -> Case:
    """What policies are made for on a node where this was tuned."""
    return case_of(
        config,
        spec,
        slo=slo,
        static=tuned.static,
        table=tuned.table,
        rules=tuned.rules,
        best_rule=tuned.rule,
    )


def tune_anchor(
    config: LearnConfig, kv_block_size: int, policy: PolicyFolder, tuned: Tuned
) -> tuple[Anchor, float]:
    """How near to the best simple rule a policy does best on tuning seeds, and its price of a miss then."""
    tuning = _tuning_runs(config, kv_block_size, config.workload, seeds=config.tuning_seeds)
    own, lower = policy.policy(tuning.loop.node.spec), config.train.lower_limits
    variants = kept_near("", own, config.slo, tuned.rule, lower_limits=lower)
    best, _ = search.tuned(variants, tuning, _ASKED, share=tuned.share)
    assert isinstance(best, LearnedPolicy) and best.anchor is not None
    return best.anchor, best.codec.miss_price_j


def score_weights(
    config: LearnConfig,
    block_sizes: Sequence[int],
    arrays: Mapping[str, np.ndarray],
    anchor: Anchor | None,
    share: float,
) -> tuple[Score, float]:
    """What the policy with these weights does on the tuning seeds, averaged over block sizes, and its price.

    A policy that was trained for many prices of a miss is scored at just the share that is asked, between
    those found on both sides of it; others have that of their training.
    """
    tunings = [_tuning_runs(config, s, config.workload, seeds=config.tuning_seeds) for s in block_sizes]

    def score_at(miss_price_j: float) -> Score:
        found = []
        for tuning in tunings:
            spec = tuning.loop.node.spec
            codec = replace(build_codec(config, spec), miss_price_j=miss_price_j)
            policy = LearnedPolicy(arrays, codec, spec, head=config.train.head, anchor=anchor)
            found.append(tuning.score(policy, _ASKED, share=share))
        return Score(
            energy_j_per_request=float(np.mean([score.energy_j_per_request for score in found])),
            slo_attainment=min(score.slo_attainment for score in found),
        )

    if "miss_price" not in config.features:
        return score_at(config.miss_price_j), config.miss_price_j
    scores: dict[float, Score] = {}

    def rank(log_price: float) -> tuple[bool, float]:
        scores[log_price] = score_at(10.0**log_price)
        return scores[log_price].rank(share)

    price_j = 10.0 ** bisected(rank, *LOG_PRICES)
    return search.at_share(tuple(scores.values()), share), price_j


def _tuning_runs(config: ServingConfig, kv_block_size: int, workload: str, *, seeds: int) -> Runs:
    """So many tuning seeds of a workload."""
    horizon_s = float(EPISODE_S)
    loop = build_loop(config, kv_block_size, horizon_s=horizon_s, workload=workload, part="first half")
    return Runs(loop, seeds=TUNING_SEEDS[:seeds], seconds=EPISODE_S, slos={_ASKED: config.slo})
