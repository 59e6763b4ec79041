"""One scenario: tune everybody on tuning seeds, evaluate everybody on held-out ones."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fuel_ray.arena.axes import axis_rows, on_other_axes, played
from fuel_ray.arena.comparison import attainment
from fuel_ray.arena.config import ArenaConfig
from fuel_ray.arena.scenarios import SCENARIOS, Scenario, SloName, serving, slo_of
from fuel_ray.build.nodes import Part, build_node
from fuel_ray.control import ControlLoop
from fuel_ray.metrics import latency
from fuel_ray.objective import Unscored
from fuel_ray.policies.catalogue import PUBLISHED, REFERENCES, SIMPLE, TUNED_STATIC, Case, Contender
from fuel_ray.policies.learned import LearnedPolicy
from fuel_ray.policies.static import Static
from fuel_ray.stages import timed
from fuel_ray.tuning.contenders import families, is_folder, of_size
from fuel_ray.tuning.episodes import TUNING_SEEDS, held_out_episodes, run_episode
from fuel_ray.tuning.hindsight import below, hindsight_points
from fuel_ray.tuning.rules import RULES
from fuel_ray.tuning.runs import Played, Runs, held_out, plays_of
from fuel_ray.tuning.search import LIMITS_SCARCE, SLACK, Setting, Swept, swept
from fuel_ray.tuning.tuned import perf_of, tune_on, tuned_case, with_rules
from fuel_ray.types import Slo

LIMITS_AMPLE = (48,)  # with ample KV the limit moves energy by 0.1 %
CHOSEN = "chosen: learned or static"  # by ``choose``
_RowsOf = Callable[[str, Sequence[Played], Sequence[Runs], str], list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Job:
    """A scenario and how it is run."""

    config: ArenaConfig
    scenario: Scenario

    @property
    def home(self) -> Scenario:
        """What is tuned on."""
        return SCENARIOS[self.scenario.tuned_on or self.scenario.name]


def run_scenario(job: Job, done: Sequence[SloName] = ()) -> Iterator[dict[str, Any]]:
    """A cell per SLO that is not ``done``, as plain data."""
    tuning = tuning_runs(job, loop_of(job, job.home))
    seeds, seconds = held_out_episodes(job.scenario.workload, job.config.seeds, job.config.seconds)
    judged = replace(job, config=replace(job.config, seeds=seeds, seconds=seconds))
    stage = loop_of(judged, job.scenario, part="second half")
    alone = held_out(stage, seeds, seconds=seconds, slos=tuning.slos)
    others = on_other_axes(judged.config, partial(_under_axis, judged), slos=tuning.slos)
    for slo in (name for name in job.config.slos if name not in done):
        began_s = time.monotonic()
        cell = _cell(job, slo, tuning, alone, others)
        yield {**cell, "wall_s": round(time.monotonic() - began_s, 1)}


def loop_of(job: Job, scenario: Scenario, *, part: Part = "first half") -> ControlLoop:
    """A node under the scenario's load, by default the part that is tuned on."""
    config = serving(scenario, job.config)
    node = build_node(config, job.config.block_sizes[0], horizon_s=float(job.config.seconds), part=part)
    return ControlLoop(node, Unscored())


def _under_axis(job: Job, clock_axis: str) -> ControlLoop:
    config = replace(job.config, clock_axis=clock_axis)
    return loop_of(replace(job, config=config), job.scenario, part="second half")


def tuning_runs(job: Job, loop: ControlLoop) -> Runs:
    """The tuning seeds of this load, and its SLOs."""
    seeds = TUNING_SEEDS[: job.config.tuning_seeds]
    fastest = Static(loop.node.spec.max_performance)
    episodes = [run_episode(loop, fastest, seed=seed, seconds=job.config.seconds) for seed in seeds]
    tpots_s = np.concatenate([episode.records.tpot_s for episode in episodes])
    tpot_p95_s = float(np.nanpercentile(tpots_s, 95))
    slos: dict[str, Slo] = {name: slo_of(name, tpot_p95_s) for name in job.config.slos}
    return Runs(loop, seeds=seeds, seconds=job.config.seconds, slos=slos)


def _cell(
    job: Job, slo: SloName, tuning: Runs, alone: Sequence[Runs], others: Mapping[str, Sequence[Runs]]
) -> dict[str, Any]:
    spec, perf = tuning.loop.node.spec, perf_of(job.config)
    limits = LIMITS_AMPLE if job.scenario.kv_tokens is None else LIMITS_SCARCE
    seconds: dict[str, float] = {}
    with timed(seconds, "baselines"):
        base = tune_on(tuning, slo, share=job.config.tune_share, perf=perf, limits=limits, rules=())
    with timed(seconds, "rules"):
        base = with_rules(base, RULES, tuning, slo, perf=perf)
    static, share = base.static, base.share
    case = tuned_case(job.config, spec, base, slo=tuning.slos[slo])
    with timed(seconds, "sweep"):
        found = {f[0].name: swept(f, tuning, slo, share=share) for f in _contenders(job.config, case)}
    own = of_size(job.config.policies, spec.kv_block_size)
    folders = [name for name, entry in own.items() if is_folder(entry)]
    chosen = choose({name: found[name] for name in (TUNED_STATIC, *folders)}, share=share)
    best_rule = choose({name: found[name] for name in SIMPLE if name in found}, share=share)
    with timed(seconds, "held_out"):
        plays = {name: plays_of(own.nominal.policy, alone) for name, own in found.items()}
        rows, played_at = _on_held_out(found, plays, alone, slo, held_out_rows)
    axes = {}
    with timed(seconds, "axes"):
        for axis, under in others.items():
            there = {name: plays_of(own.nominal.policy, under) for name, own in found.items()}
            axes[axis] = _on_held_out(found, there, under, slo, axis_rows)
    with timed(seconds, "hindsight"):
        hindsight = _hindsight(alone, slo, plays, rows, best_rule) if job.config.oracle else []
    below_hindsight = below(hindsight, rows)
    deployed = found | ({CHOSEN: found[chosen]} if folders else {})
    if folders:
        for of_policies, settings in ((rows, played_at), *axes.values()):
            of_policies += [{**row, "policy": CHOSEN} for row in of_policies if row["policy"] == chosen]
            settings[CHOSEN] = settings[chosen]
    return {
        "scenario": job.scenario.name,
        "slo": slo,
        "limits": asdict(tuning.slos[slo]),
        "share": share,
        "static": asdict(static),
        "table": base.table.to_dict(),
        "settings": {name: _settings(own.nominal) for name, own in found.items()},
        "learned": [name for name, own in deployed.items() if isinstance(own.nominal.policy, LearnedPolicy)],
        "chosen": chosen,
        "best_rule": best_rule,
        "rows": rows,
        "swept": played_at,
        "axes": {axis: rows for axis, (rows, _) in axes.items()},
        "swept_axes": {axis: played_there for axis, (_, played_there) in axes.items()},
        "hindsight": hindsight,
        "below_hindsight": below_hindsight,
        "lowest_clock_mhz": spec.gpu_clocks_mhz[0],
        "seconds": seconds,
    }


def choose(found: Mapping[str, Swept], *, share: float) -> str:
    """The name of what ranks best on the tuning seeds, each at just the share that is asked."""
    return min(found, key=lambda name: found[name].rank(share))


def _settings(nominal: Setting) -> dict[str, float]:
    """What was tuned."""
    policy = nominal.policy
    if isinstance(policy, LearnedPolicy) and policy.anchor is not None:
        return {"setting": nominal.setting, "anchor": policy.anchor.weight}
    return {"setting": nominal.setting}


def _on_held_out(
    found: Mapping[str, Swept],
    plays: Mapping[str, Sequence[Played]],
    alone: Sequence[Runs],
    slo: str,
    rows_of: _RowsOf,
) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Rows of every policy as it was tuned, and what each did at all of its settings."""
    rows, settings = [], {}
    for name, own in found.items():
        of_policy = rows_of(name, plays[name], alone, slo)
        rows += of_policy
        settings[name] = played(own, of_policy, alone, slo)
    return rows, settings


def _contenders(config: ArenaConfig, case: Case) -> list[tuple[Contender, ...]]:
    """The references, the simple rules, the published ones if they take part, and whatever else is named."""
    known = {name: name for name in (*REFERENCES, *SIMPLE, *(PUBLISHED if config.peers else ()))}
    entries = known | of_size(config.policies, case.spec.kv_block_size)
    return [family for name, entry in entries.items() for family in families(name, entry, case)]


def held_out_rows(
    name: str, plays: Sequence[Played], alone: Sequence[Runs], slo: str
) -> list[dict[str, Any]]:
    """The same as under a clock axis, and what else is told of an episode: one row per held-out seed."""
    rows = axis_rows(name, plays, alone, slo)
    return [{**row, **_told(own)} for row, own in zip(rows, plays, strict=True)]


def _told(own: Played) -> dict[str, Any]:
    records = own.records
    return {
        "ttft_p50_s": latency(records.ttft_s).p50_s,
        "tpot_p50_s": latency(records.tpot_s).p50_s,
        "e2e_mean_s": latency(records.e2e_s).mean_s,
        "preemptions": own.preemptions,
        "mean_gpu_clock_mhz": float(own.clocks_mhz.mean()),
        "mean_batch_limit": float(own.limits.mean()),
        "clock_switches": int((np.diff(own.clocks_mhz) != 0).sum()),
    }


def _hindsight(
    alone: Sequence[Runs],
    slo: SloName,
    plays: Mapping[str, Sequence[Played]],
    rows: Sequence[Mapping[str, Any]],
    best_rule: str,
) -> list[dict[str, Any]]:
    """The bound about where the best rule is, searched from what every policy chose on each seed."""
    attained = attainment([row for row in rows if row["policy"] == best_rule])
    schedules = {name: [own.schedule for own in of_policy] for name, of_policy in plays.items()}
    return hindsight_points(alone, slo, schedules, (attained - SLACK, attained + SLACK))
