"""Policies on held-out seeds, of one block size."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fuel_ray.arena.config import EvaluateConfig
from fuel_ray.build.nodes import build_loop
from fuel_ray.config import ServingConfig, SweepConfig
from fuel_ray.control import ControlLoop, StepRecord
from fuel_ray.errors import NodeError, UnsupportedError
from fuel_ray.policies.learned import (
    load_policy,
)
from fuel_ray.policies.static import Static
from fuel_ray.record import step_line, summary_fields
from fuel_ray.stats import paired_ratio
from fuel_ray.tuning.episodes import EPISODE_S, HELD_OUT_SEED, run_episode
from fuel_ray.tuning.tuned import Tuned
from fuel_ray.types import NodeSpec, Policy
from fuel_ray.workload.spec import parse_workload

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What all policies did on held-out seeds for one block size."""

    rows: list[dict[str, Any]]  # of summary.csv
    lines: list[str]  # of steps.jsonl, for the first seed


def comparison(rows: Sequence[Mapping[str, Any]], config: EvaluateConfig, *, partial: bool) -> str:
    """A table of the policies, means over the seeds; savings are paired, with 95 % bootstrap intervals."""
    first = f"static {config.static[0]}"
    kind = "measured on a live node" if config.live_server else f"modelled, pack {config.pack}"
    lines = [
        f"{config.workload}, n = {config.seeds} x {config.seconds} s, {kind}{', partial' if partial else ''}",
        f"{'block':>5}  {'policy':<20}{'J/request':>10}  {'saving (95 %)':<26}{'of SLO':>7}"
        f"{'TTFT p50':>10}{'TPOT p50':>10}{'mean e2e':>10}",
    ]
    for key in dict.fromkeys((row["block_size"], row["policy"]) for row in rows):
        own = _by_seed(rows, *key)
        paired = {seed: row for seed, row in _by_seed(rows, key[0], first).items() if seed in own}
        own = {seed: own[seed] for seed in paired}
        saving = _saving(
            [own[seed]["energy_j_per_request"] for seed in paired],
            [row["energy_j_per_request"] for row in paired.values()],
        )
        mean = {name: _mean_of(own.values(), name) for name in _SHOWN}
        lines.append(
            f"{key[0]:>5}  {key[1]:<20}{mean['energy_j_per_request']:>10.2f}  {saving:<26}"
            f"{mean['slo_attainment']:>7.3f}{mean['ttft_p50_s'] * 1e3:>7.0f} ms"
            f"{mean['tpot_p50_s'] * 1e3:>7.1f} ms{mean['e2e_mean_s']:>8.2f} s"
        )
    return "\n".join(lines)


_SHOWN = ("energy_j_per_request", "slo_attainment", "ttft_p50_s", "tpot_p50_s", "e2e_mean_s")


def _by_seed(
    rows: Sequence[Mapping[str, Any]], kv_block_size: int, policy: str
) -> dict[int, Mapping[str, Any]]:
    """Rows of one policy that have an energy per request: an episode without requests has none."""
    return {
        row["seed"]: row
        for row in rows
        if (row["block_size"], row["policy"]) == (kv_block_size, policy)
        and row["energy_j_per_request"] is not None
    }


def _saving(energy_j: Sequence[float], reference_j: Sequence[float]) -> str:
    if not energy_j or list(energy_j) == list(reference_j):
        return "-"
    ratio = paired_ratio(energy_j, reference_j, rng=np.random.default_rng(0))
    if ratio.low is None or ratio.high is None:
        return f"{1 - ratio.mean:+.1%}"
    return f"{1 - ratio.mean:+.1%} ({1 - ratio.high:+.1%}..{1 - ratio.low:+.1%})"


def _mean_of(rows: Iterable[Mapping[str, Any]], name: str) -> float:
    values = [row[name] for row in rows if row[name] is not None]
    return float(np.mean(values)) if values else float("nan")


def evaluate_block_size(
    config: SweepConfig, kv_block_size: int, tuned: Mapping[str, Tuned], policy_folder: Path
) -> Evaluation:
    """Evaluate the learned policy and the baselines ``tuned`` for each workload on all held-out seeds."""
    evaluation = Evaluation([], [])
    for workload in tuned:

        def policies(spec: NodeSpec, baselines: Tuned = tuned[workload]) -> dict[str, Policy]:
            policy = load_policy(policy_folder, spec, extra_features=config.extra_features)
            return {**_baselines(spec, baselines), "dqn": policy}

        evaluate_policies(
            config,
            kv_block_size,
            workload,
            policies,
            seeds=config.seeds,
            seconds=config.live_seconds if config.live_server else EPISODE_S,
            into=evaluation,
        )
    return evaluation


def evaluate_policies(
    config: ServingConfig,
    kv_block_size: int,
    workload: str,
    policies: Callable[[NodeSpec], Mapping[str, Policy]],
    *,
    seeds: int,
    seconds: float,
    into: Evaluation,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Let each policy serve the same arrivals, seed after seed; rows and lines are added as they come.

    Raises:
        NodeError: a window could not be measured; what was added before stays.
    """
    horizon_s = float(seconds)
    loop = build_loop(config, kv_block_size, horizon_s=horizon_s, workload=workload, part="second half")
    digest = parse_workload(workload).digest()
    with contextlib.closing(loop.node):
        there = policies(loop.node.spec)
        for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + seeds):
            for name, policy in there.items():
                labels = {"block_size": kv_block_size, "policy": name, "workload": workload, "seed": seed}
                lines = into.lines if seed == HELD_OUT_SEED else None
                figures = _persistently(config, loop, policy, labels, lines, seconds=seconds)
                into.rows.append({**labels, "workload_digest": digest, **figures})
                say(_progress(into.rows[-1]))


def _progress(row: Mapping[str, Any]) -> str:
    energy_j = row["energy_j_per_request"]
    return (
        f"evaluate  block {row['block_size']:>3}  seed {row['seed'] - HELD_OUT_SEED:>2}  {row['policy']:<20}"
        f"  {'-' if energy_j is None else format(energy_j, '.2f'):>7} J/request"
        f"  {row['slo_attainment']:.3f} of SLO"
    )


def _persistently(
    config: ServingConfig,
    loop: ControlLoop,
    policy: Policy,
    labels: dict[str, Any],
    lines: list[str] | None,
    *,
    seconds: float,
) -> dict[str, Any]:
    """As ``_evaluate``; on a cluster an episode whose node was lost is begun again on another."""
    for left in reversed(range(config.node_failures if config.node == "ray" else 1)):
        of_this_try: list[str] | None = None if lines is None else []
        try:
            figures = _evaluate(config, loop, policy, labels, of_this_try, seconds=seconds)
        except NodeError as error:
            if not left or isinstance(error, UnsupportedError):
                raise
            logger.warning(
                "block %s, seed %s is begun again: %s", labels["block_size"], labels["seed"], error
            )
            continue
        if lines is not None:
            lines += of_this_try or []
        return figures
    raise AssertionError("the last try returns or raises")


def _evaluate(
    config: ServingConfig,
    loop: ControlLoop,
    policy: Policy,
    labels: dict[str, Any],
    lines: list[str] | None,
    *,
    seconds: float,
) -> dict[str, Any]:
    """What the summary says of one episode; step lines are added to ``lines`` where asked for."""

    def observe(record: StepRecord) -> None:
        if lines is not None:
            lines.append(step_line(record, time_s=float(record.step), labels=labels))

    episode = run_episode(loop, policy, seed=labels["seed"], seconds=seconds, observe=observe)
    return summary_fields(episode.totals.summary(episode.records, config.slo))


def _baselines(spec: NodeSpec, tuned: Tuned) -> dict[str, Policy]:
    return {
        "max_performance": Static(spec.max_performance),
        "tuned_static": Static(tuned.static),
        "load_table": tuned.table,
    }
