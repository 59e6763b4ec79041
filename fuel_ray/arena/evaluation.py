"""Policies on held-out seeds, of one block size."""

import contextlib
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np

from fuel_ray.arena.config import EvaluateConfig
from fuel_ray.arena.equal import Rows
from fuel_ray.build.nodes import build_loop, patience, served
from fuel_ray.build.recording import recorded_run
from fuel_ray.config import ServingConfig, SweepConfig
from fuel_ray.control import ControlLoop, StepRecord
from fuel_ray.errors import ConfigError, NodeError, UnsupportedError
from fuel_ray.metrics import EpisodeTotals
from fuel_ray.policies.anchor import at_work
from fuel_ray.policies.catalogue import BEST_RULE, LOAD_TABLE, MAX_PERFORMANCE, TUNED_STATIC, label
from fuel_ray.policies.learned import load_policy, read_manifest
from fuel_ray.policies.static import Static
from fuel_ray.record import step_line, summary_fields
from fuel_ray.report.wording import ascii_only, change, percent, slo_text, with_interval
from fuel_ray.sim.doubts import run_doubts
from fuel_ray.sim.pack import NOMINAL, load_pack
from fuel_ray.sim.recorded import trace_text
from fuel_ray.stats import relative_energy
from fuel_ray.tuning.contenders import of_size
from fuel_ray.tuning.episodes import EPISODE_S, HELD_OUT_SEED, Episode, held_out_episodes, run_episode
from fuel_ray.tuning.runs import Runs
from fuel_ray.tuning.tuned import Tuned, tuned_policies
from fuel_ray.types import NodeSpec, Policy, RequestRecords
from fuel_ray.workload.spec import parse_workload

logger = logging.getLogger(__name__)
_SOON_S = 4.0
_COMPILES = "the first run compiles the simulator, which takes up to a minute"
_NAME_LETTERS = 120  # of the policy, in the name of a file
_SHOWN = ("energy_j_per_request", "slo_attainment", "ttft_p50_s", "tpot_p50_s", "e2e_mean_s")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What all policies did on held-out seeds for one block size."""

    rows: list[dict[str, Any]]  # of summary.csv
    lines: list[str]  # of steps.jsonl, for the first seed
    axis_rows: list[dict[str, Any]] = field(default_factory=list)  # of clock_axes.csv
    traces: dict[str, str] = field(default_factory=dict)  # of each episode, by file name


def static_name(text: str) -> str:
    """What an entry of --static is called."""
    return MAX_PERFORMANCE if text == "max" else f"static {text}"


def comparison(rows: Rows, config: EvaluateConfig, *, partial: bool) -> str:
    """A table of the policies, means over the seeds; changes are paired, with 95 % intervals."""
    first = static_name(config.static[0])
    width = max(20, *(len(label(row["policy"])) + 1 for row in rows))
    against = f"vs {label(first)}"
    changes = max(26, len(against) + 2)
    lines = [
        _conditions(config, partial=partial),
        f"{'block size':>10}  {'policy':<{width}}{'J/request':>10}  {against:<{changes}}"
        f"{'SLO attainment':>14}{'TTFT p50':>10}{'TPOT p50':>10}{'mean e2e':>10}",
    ]
    for size, policy in dict.fromkeys((row["block_size"], row["policy"]) for row in rows):
        reference = _by_seed(rows, size, first)
        own = {seed: row for seed, row in _by_seed(rows, size, policy).items() if seed in reference}
        shown = "-" if policy == first else _change(own, reference)
        known = {name: [row[name] for row in own.values() if row[name] is not None] for name in _SHOWN}
        mean = {name: float(np.mean(values or [np.nan])) for name, values in known.items()}
        lines.append(
            f"{size:>10}  {label(policy):<{width}}{mean['energy_j_per_request']:>10.2f}  {shown:<{changes}}"
            f"{percent(mean['slo_attainment']):>14}{mean['ttft_p50_s'] * 1e3:>7.0f} ms"
            f"{mean['tpot_p50_s'] * 1e3:>7.1f} ms{mean['e2e_mean_s']:>8.2f} s"
        )
    lines.append(
        "vs: change in J/request on the same requests (95 % interval over the seeds). SLO: "
        f"{slo_text(config.slo)}."
    )
    return "\n".join(lines)


def _conditions(config: EvaluateConfig, *, partial: bool) -> str:
    """What was served, how often, and whether that was measured."""
    axis = "" if config.clock_axis == NOMINAL else f", clock axis {config.clock_axis}"
    kind = "measured on a live node" if config.live_server else f"modelled, pack {config.pack}{axis}"
    seeds, seconds = held_out_episodes(config.workload, config.seeds, config.seconds)
    return (
        f"workload {config.workload}, n = {seeds} held-out seeds of {seconds} s, {kind}"
        f"{', partial' if partial else ''}"
    )


def _by_seed(rows: Rows, kv_block_size: int, policy: str) -> dict[int, Mapping[str, Any]]:
    """Rows of one policy that have an energy per request: an episode without requests has none."""
    of_policy = (row for row in rows if (row["block_size"], row["policy"]) == (kv_block_size, policy))
    return {row["seed"]: row for row in of_policy if row["energy_j_per_request"] is not None}


def _change(*pair: Mapping[int, Mapping[str, Any]]) -> str:
    own, reference = ({seed: row["energy_j_per_request"] for seed, row in rows.items()} for rows in pair)
    ratio = relative_energy(own, reference)
    return "-" if ratio is None else ascii_only(with_interval(ratio, change))


def evaluate_block_size(
    config: SweepConfig, kv_block_size: int, tuned: Mapping[str, Tuned], policy_folder: Path
) -> Evaluation:
    """Evaluate the learned policy, the baselines ``tuned`` for each workload and whoever plays also.

    On the workload that was trained for, all of them on the first seeds once more under each other clock axis
    of the pack; nothing is trained or tuned again.
    """
    evaluation = Evaluation([], [])
    also, learned = of_size(config.policies, kv_block_size), read_manifest(policy_folder).algorithm
    for workload, own in tuned.items():

        @cache
        def policies(spec: NodeSpec, workload: str = workload, own: Tuned = own) -> dict[str, Policy]:
            return {
                MAX_PERFORMANCE: Static(spec.max_performance),
                TUNED_STATIC: Static(own.static),
                LOAD_TABLE: own.table,
                BEST_RULE: at_work(own.rule, spec, config.slo),
                learned: load_policy(policy_folder, spec, extra_features=config.extra_features),
                **tuned_policies(
                    config, workload, spec, also, share=own.share, tuned=own, seeds=config.tuning_seeds
                ),
            }

        evaluate_policies(
            config,
            kv_block_size,
            workload,
            policies,
            seeds=config.seeds,
            seconds=config.live_seconds if config.live_server else EPISODE_S,
            into=evaluation,
        )
        if workload == config.workload:
            evaluation.axis_rows.extend(_axis_rows(config, kv_block_size, policies))
    return evaluation


def _axis_rows(
    config: SweepConfig, kv_block_size: int, policies: Callable[[NodeSpec], Mapping[str, Policy]]
) -> list[dict[str, Any]]:
    """Rows as those of summary.csv with their clock axis; none of a live node, which has but its own."""
    axes = () if config.live_server or not config.axis_seeds else load_pack(config.pack).clock_axes
    rows = []
    for axis in axes if len(axes) > 1 else ():
        found = Evaluation([], [])
        own, seeds = replace(config, clock_axis=axis), min(config.seeds, config.axis_seeds)
        evaluate_policies(
            own, kv_block_size, config.workload, policies, seeds=seeds, seconds=EPISODE_S, into=found
        )
        rows += [{"clock_axis": axis, **row} for row in found.rows]
    return rows


def evaluate_policies(
    config: ServingConfig,
    kv_block_size: int,
    workload: str,
    policies: Callable[[NodeSpec], Mapping[str, Policy]],
    *,
    seeds: int,
    seconds: int,
    into: Evaluation,
    say: Callable[[str], None] = lambda line: None,
    traces: bool = False,
) -> None:
    """Let each policy serve the same arrivals, seed after seed; rows and lines are added as they come.

    ``traces`` adds what each episode was, as a file that `validate` reads.

    Raises:
        NodeError: a window could not be measured; what was added before stays.
    """
    digest = parse_workload(workload).digest()
    seeds, seconds = held_out_episodes(workload, seeds, seconds)
    with contextlib.ExitStack() as opened:
        own = opened.enter_context(served(config, kv_block_size))
        loop = build_loop(own, kv_block_size, horizon_s=float(seconds), workload=workload, part="second half")
        opened.callback(loop.node.close)
        there = policies(loop.node.spec)
        late = Timer(_SOON_S, say, [_COMPILES])
        opened.callback(late.cancel)
        late.daemon = True
        if not config.live_server:
            late.start()
        runs = Runs(loop, seeds=(), seconds=seconds, slos={})
        for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + seeds):
            for name, policy in there.items():
                labels = {"block_size": kv_block_size, "policy": name, "workload": workload, "seed": seed}
                totals, records, episode = _totals(config, runs, policy, labels, into=into, traces=traces)
                figures = summary_fields(totals.summary(records, config.slo))
                into.rows.append({**labels, "workload_digest": digest, **figures})
                late.cancel()
                say(_progress(into.rows[-1]))
                if traces and episode is not None:
                    _add_trace(config, loop, episode, labels, into=into, say=say)


def _totals(
    config: ServingConfig,
    runs: Runs,
    policy: Policy,
    labels: dict[str, Any],
    *,
    into: Evaluation,
    traces: bool,
) -> tuple[EpisodeTotals, RequestRecords, Episode | None]:
    """What an episode amounts to; the episode itself too, if its windows were looked at.

    They need not be where neither a trace nor step lines, which the first seed has, are kept.
    """
    played = None if traces or labels["seed"] == HELD_OUT_SEED else runs.fast(policy, labels["seed"])
    if played is not None:
        return played.totals, played.records, None
    episode, lines = _episode(config, runs.loop, policy, labels, seconds=runs.seconds)
    into.lines.extend(lines)
    return episode.totals, episode.records, episode


def _add_trace(
    config: ServingConfig,
    loop: ControlLoop,
    episode: Episode,
    labels: Mapping[str, Any],
    *,
    into: Evaluation,
    say: Callable[[str], None],
) -> None:
    """The episode's trace; none, and why is said, where nobody could replay it."""
    policy = re.sub(r"[^\w.@+-]+", "-", str(labels["policy"]))[-_NAME_LETTERS:]
    number = labels["seed"] - HELD_OUT_SEED
    name = f"block{labels['block_size']}-{policy}-seed{number}.json"
    origin = (
        "measured" if config.live_server else f"modelled, pack {config.pack}, clock axis {config.clock_axis}"
    )
    run = recorded_run(loop, episode.windows, episode.records)
    try:
        into.traces[name] = trace_text(run, origin=origin, **labels)
    except ConfigError as error:
        say(f"no trace  {name}: {error}")
        return
    for line in run_doubts(run):
        say(f"trace  {name}: {line}")


def _progress(row: Mapping[str, Any]) -> str:
    energy_j = row["energy_j_per_request"]
    return (
        f"evaluate  block {row['block_size']:>3}  seed {row['seed'] - HELD_OUT_SEED:>2}"
        f"  {label(row['policy']):<20}  {'-' if energy_j is None else format(energy_j, '.2f'):>7} J/request"
        f"  SLO attainment {percent(row['slo_attainment'])}"
    )


def _episode(
    config: ServingConfig, loop: ControlLoop, policy: Policy, labels: dict[str, Any], *, seconds: float
) -> tuple[Episode, list[str]]:
    """One episode, and of the first seed the step lines.

    On a cluster an episode whose node was lost is begun again on another.
    """
    for left in reversed(range(patience(config))):
        lines: list[str] = []

        def observe(record: StepRecord, lines: list[str] = lines) -> None:
            if labels["seed"] == HELD_OUT_SEED:
                lines.append(step_line(record, time_s=float(record.step), labels=labels))

        try:
            episode = run_episode(loop, policy, seed=labels["seed"], seconds=seconds, observe=observe)
        except NodeError as error:
            if not left or isinstance(error, UnsupportedError):
                raise
            logger.warning(
                "block size %s, seed %s: started again: %s", labels["block_size"], labels["seed"], error
            )
            continue
        return episode, lines
    raise AssertionError("the last try returns or raises")
