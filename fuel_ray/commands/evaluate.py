"""Evaluate policies on held-out workload seeds, and tune the baselines on training seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fuel_ray.build import build_loop
from fuel_ray.config import SweepConfig
from fuel_ray.control import ControlLoop, StepRecord
from fuel_ray.metrics import EpisodeSummary, EpisodeTotals
from fuel_ray.policies.baselines import LoadTable, Score, Scorer, Static, tune_load_table, tune_static
from fuel_ray.types import Knobs, Policy
from fuel_ray.workload import parse_workload

EPISODE_S = 1200  # one period of the default workload
DRAIN_S = 120  # windows after the last arrival in which requests may finish
TUNING_SEEDS = tuple(range(1_000, 1_004))  # training draws its own seeds below 2**31 by chance
HELD_OUT_SEED = 2_000_000_000
STATIC_LIMITS = (24, 32, 40, 48, 64)


@dataclass(frozen=True, slots=True)
class Baselines:
    """The tuned rules for one block size."""

    static: Knobs
    table: LoadTable


def run_episode(
    loop: ControlLoop, policy: Policy, *, seed: int, seconds: int, observe: Callable[[StepRecord], None] | None = None
) -> tuple[EpisodeTotals, Any]:
    """Let a policy serve ``seconds`` of arrivals and drain the queue; totals and request records."""
    totals = EpisodeTotals()
    policy.reset()
    window = loop.reset(seed=seed)
    totals.add(window)
    for step in range(seconds + DRAIN_S):
        if step >= seconds and not window.running and not window.waiting:
            break
        record = loop.step(policy.decide(window))
        window = record.metrics
        totals.add(window)
        if observe is not None:
            observe(record)
    return totals, loop.node.take_records()


def episode_summary(config: SweepConfig, kv_block_size: int, policy: Policy, *, workload: str, seed: int,
    observe: Callable[[StepRecord], None] | None = None) -> EpisodeSummary:
    loop = build_loop(config, kv_block_size, horizon_s=float(EPISODE_S), workload=workload)
    totals, records = run_episode(loop, policy, seed=seed, seconds=EPISODE_S, observe=observe)
    return totals.summary(records, config.slo)


def scorer(config: SweepConfig, kv_block_size: int, seeds: Sequence[int]) -> Scorer:
    """Scores a policy on the training workload, averaged over seeds."""
    loop = build_loop(config, kv_block_size, horizon_s=float(EPISODE_S))

    def score(policy: Policy) -> Score:
        energy_j = requests = kept = 0.0
        for seed in seeds:
            totals, records = run_episode(loop, policy, seed=seed, seconds=EPISODE_S)
            energy_j += totals.energy_j
            requests += totals.arrivals
            kept += sum(map(config.slo.is_kept_by, records))
        return Score(energy_j / requests, kept / requests)

    return score


def tune_baselines(config: SweepConfig, kv_block_size: int) -> Baselines:
    """Tune the static pair and the load table on training seeds."""
    score = scorer(config, kv_block_size, TUNING_SEEDS)
    spec = build_loop(config, kv_block_size, horizon_s=1.0).node.spec
    static = tune_static(score, spec, share=config.tune_share, limits=STATIC_LIMITS)
    peak_rps = 2.0 * parse_workload(config.workload).mean_rate_rps
    rates = [peak_rps * share / 8 for share in range(1, 8)]
    return Baselines(static, tune_load_table(score, spec, share=config.tune_share, start=static, rates_rps=rates))
