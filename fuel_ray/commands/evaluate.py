"""Tune the baselines on training seeds, choose among checkpoints, evaluate policies on held-out seeds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fuel_ray.build import build_codec, build_loop, build_node
from fuel_ray.config import SweepConfig
from fuel_ray.control import ControlLoop, StepRecord
from fuel_ray.metrics import EpisodeTotals, latency
from fuel_ray.policies.baselines import LoadTable, Score, Scorer, Static, tune_load_table, tune_static
from fuel_ray.policies.learned import LearnedPolicy, load_policy
from fuel_ray.record import step_line, summary_fields
from fuel_ray.types import Knobs, NodeSpec, Policy, RequestRecords
from fuel_ray.workload import parse_workload

EPISODE_S = 1200  # one period of the default workload
DRAIN_S = 120  # windows after the last arrival in which requests may finish
TUNING_SEEDS = tuple(range(1_000, 1_008))
HELD_OUT_SEED = 2_000_000_000  # first of the held-out seeds; no training or tuning seed is one of them
STATIC_LIMITS = (24, 32, 40, 48, 64)
TABLE_ROWS = 8


@dataclass(frozen=True, slots=True)
class Tuned:
    """The baselines for one block size."""

    static: Knobs
    table: LoadTable

    def to_dict(self) -> dict[str, Any]:
        """As plain data; the last row of the load table has no upper rate."""
        rates = (*self.table.rates_rps, None)
        rows = [[r, k.batch_limit, k.gpu_clock_mhz] for r, k in zip(rates, self.table.knobs, strict=True)]
        return {"tuned_static": asdict(self.static), "load_table": rows}

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> "Tuned":
        """The inverse of ``to_dict``."""
        rows = raw["load_table"]
        table = LoadTable([row[0] for row in rows[:-1]], [Knobs(row[1], row[2]) for row in rows])
        return Tuned(Knobs(**raw["tuned_static"]), table)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What all policies did on held-out seeds for one block size."""

    rows: list[dict[str, Any]]  # of summary.csv
    lines: list[str]  # of steps.jsonl, for the first seed


def tune_baselines(config: SweepConfig, kv_block_size: int, workload: str) -> Tuned:
    """Tune the static pair and the load table for a workload on the tuning seeds."""
    score = _scorer(config, kv_block_size, workload)
    score_static = _scorer(config, kv_block_size, workload, interval_s=60.0)  # nothing changes in between
    spec = build_node(config, kv_block_size, horizon_s=1.0).spec
    static = tune_static(score_static, spec, share=config.tune_share, limits=STATIC_LIMITS)
    peak_rps = 2.0 * parse_workload(workload).mean_rate_rps
    rates = [peak_rps * row / TABLE_ROWS for row in range(1, TABLE_ROWS)]
    table = tune_load_table(score, spec, share=config.tune_share, start=static, rates_rps=rates)
    return Tuned(static, table)


def score_weights(config: SweepConfig, block_sizes: Sequence[int], arrays: Mapping[str, np.ndarray]) -> Score:
    """What the policy with these weights does on the tuning seeds, averaged over block sizes."""
    scores = []
    for size in block_sizes:
        spec = build_node(config, size, horizon_s=1.0).spec
        policy = LearnedPolicy(arrays, build_codec(config, spec), spec, head=config.train.head)
        scores.append(_scorer(config, size, config.workload)(policy))
    return Score(
        energy_j_per_request=float(np.mean([score.energy_j_per_request for score in scores])),
        slo_attainment=min(score.slo_attainment for score in scores),
    )


def evaluate_block_size(
    config: SweepConfig, kv_block_size: int, tuned: Mapping[str, Tuned], policy_folder: Path
) -> Evaluation:
    """Evaluate the learned policy and the baselines ``tuned`` for each workload on all held-out seeds."""
    evaluation = Evaluation([], [])
    for workload in tuned:
        loop = build_loop(config, kv_block_size, horizon_s=float(EPISODE_S), workload=workload)
        digest = parse_workload(workload).digest()
        for name, policy in _policies(loop.node.spec, tuned[workload], policy_folder).items():
            for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + config.seeds):
                labels = {
                    "block_size": kv_block_size,
                    "policy": name,
                    "workload": workload,
                    "seed": seed,
                }
                lines = evaluation.lines if seed == HELD_OUT_SEED else None
                figures = _evaluate(config, loop, policy, labels, lines)
                evaluation.rows.append({**labels, "workload_digest": digest, **figures})
    return evaluation


def run_episode(
    loop: ControlLoop, policy: Policy, *, seed: int, observe: Callable[[StepRecord], None] | None = None
) -> tuple[EpisodeTotals, RequestRecords]:
    """Let a policy serve ``EPISODE_S`` of arrivals and then drain the queue; totals and request records."""
    totals = EpisodeTotals()
    policy.reset()
    window = loop.reset(seed=seed)
    totals.add(window)
    while totals.seconds < EPISODE_S + DRAIN_S:
        if totals.seconds >= EPISODE_S and not window.running and not window.waiting:
            break
        record = loop.step(policy.decide(window))
        window = record.metrics
        totals.add(window)
        if observe is not None:
            observe(record)
    return totals, loop.node.take_records()


def _evaluate(
    config: SweepConfig, loop: ControlLoop, policy: Policy, labels: dict[str, Any], lines: list[str] | None
) -> dict[str, Any]:
    """What the summary says of one episode; step lines are added to ``lines`` where asked for."""

    def observe(record: StepRecord) -> None:
        if lines is not None:
            lines.append(step_line(record, time_s=float(record.step), labels=labels))

    totals, records = run_episode(loop, policy, seed=labels["seed"], observe=observe)
    return summary_fields(totals.summary(records, config.slo))


def _policies(spec: NodeSpec, tuned: Tuned, policy_folder: Path) -> dict[str, Policy]:
    return {
        "max_performance": Static(spec.max_performance),
        "tuned_static": Static(tuned.static),
        "load_table": tuned.table,
        "dqn": load_policy(policy_folder, spec),
    }


def _scorer(config: SweepConfig, kv_block_size: int, workload: str, *, interval_s: float = 1.0) -> Scorer:
    """Scores a policy on a workload, pooled over the tuning seeds."""
    loop = build_loop(
        config, kv_block_size, horizon_s=float(EPISODE_S), workload=workload, interval_s=interval_s
    )

    def score(policy: Policy) -> Score:
        energy_j = requests = kept = 0.0
        for seed in TUNING_SEEDS:
            totals, records = run_episode(loop, policy, seed=seed)
            energy_j += totals.energy_j
            requests += totals.arrivals
            kept += _kept(records, config)
        return Score(energy_j / requests, kept / requests)

    return score


def _kept(records: RequestRecords, config: SweepConfig) -> float:
    """Requests that kept the SLO; for a promise on means, a number whose share passes if it is kept."""
    slo = config.slo
    if slo.share is not None:
        return float(records.keeps(slo).sum())
    pairs = ((records.ttft_s, slo.ttft_s), (records.tpot_s, slo.tpot_s), (records.e2e_s, slo.e2e_s))
    means = [(latency(values).mean_s, limit) for values, limit in pairs if limit]
    ratios = [limit / mean_s for mean_s, limit in means if mean_s]
    return len(records) * min(1.0, config.tune_share * min(ratios, default=1.0))
