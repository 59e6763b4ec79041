"""One scenario: tune everybody on tuning seeds, evaluate everybody on held-out ones."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fuel_ray.arena.axes import axis_rows, on_other_axes
from fuel_ray.arena.comparison import attainment
from fuel_ray.arena.config import ArenaConfig
from fuel_ray.arena.scenarios import SCENARIOS, Scenario, SloName, serving, slo_of
from fuel_ray.build.nodes import Part, build_node
from fuel_ray.control import ControlLoop
from fuel_ray.objective import Unscored
from fuel_ray.policies.catalogue import LOAD_TABLE, PUBLISHED, REFERENCES, TUNED_STATIC, Case, Contender
from fuel_ray.policies.learned import LearnedPolicy
from fuel_ray.policies.static import Static
from fuel_ray.record import summary_fields
from fuel_ray.tuning.contenders import case_of, families, is_folder, of_size
from fuel_ray.tuning.episodes import TUNING_SEEDS, run_episode
from fuel_ray.tuning.hindsight import below, hindsight_points, schedules_of
from fuel_ray.tuning.runs import Runs, held_out
from fuel_ray.tuning.search import LIMITS_SCARCE, SLACK, TABLE_STRIDE, tuned
from fuel_ray.tuning.tuned import tune_on
from fuel_ray.types import Knobs, Policy, Slo

LIMITS_AMPLE = (48,)  # with ample KV the limit moves energy by 0.1 %
CHOSEN = "chosen: learned or static"  # by ``choose``
TABLE_BUDGET = 30  # runs spent on single moves
_RECORDED = ("energy_j", "requests", "slo_attainment", "slo_met", "ttft_p50_s", "tpot_p50_s", "e2e_mean_s",
             "preemptions", "mean_gpu_clock_mhz", "mean_batch_limit", "clock_switches")  # fmt: skip


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
    stage = loop_of(job, job.scenario, part="second half")
    alone = held_out(stage, job.config.seeds, seconds=job.config.seconds, slos=tuning.slos)
    others = on_other_axes(job.config, partial(_under_axis, job), slos=tuning.slos)
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
    spec = tuning.loop.node.spec
    limits = LIMITS_AMPLE if job.scenario.kv_tokens is None else LIMITS_SCARCE
    base = tune_on(tuning, slo, share=job.config.tune_share, limits=limits, budget=TABLE_BUDGET)
    static, share = base.static, base.share
    case = case_of(job.config, spec, slo=tuning.slos[slo], static=static, table=base.table)
    policies: dict[str, Policy] = {}
    settings: dict[str, dict[str, float]] = {}
    for family in _contenders(job.config, case):
        name = family[0].name
        policy, setting = tuned(family, tuning, slo, share=share)
        policies[name], settings[name] = policy, {"setting": setting}
        if isinstance(policy, LearnedPolicy) and policy.anchor is not None:
            settings[name]["anchor"] = policy.anchor.weight
    rows = [row for name, policy in policies.items() for row in held_out_rows(name, policy, alone, slo)]
    own = of_size(job.config.policies, spec.kv_block_size)
    deployable = [TUNED_STATIC, *(name for name, entry in own.items() if is_folder(entry))]
    chosen = choose(tuning, slo, {name: policies[name] for name in deployable}, share=share)
    axes = {
        axis: [row for name, policy in policies.items() for row in axis_rows(name, policy, under, slo)]
        for axis, under in others.items()
    }
    if len(deployable) > 1:
        for found in (rows, *axes.values()):
            found += [{**row, "policy": CHOSEN} for row in found if row["policy"] == chosen]
    hindsight = _hindsight(alone, slo, policies, rows) if job.config.oracle else []
    return {
        "scenario": job.scenario.name,
        "slo": slo,
        "limits": asdict(tuning.slos[slo]),
        "share": share,
        "static": asdict(static),
        "table": base.table.to_dict(),
        "settings": settings,
        "chosen": chosen,
        "rows": rows,
        "axes": axes,
        "hindsight": hindsight,
        "below_hindsight": below(hindsight, rows),
        "lowest_clock_mhz": spec.gpu_clocks_mhz[0],
        "frontier": frontier(alone, slo, {static.batch_limit, spec.batch_limits[-1]}),
    }


def choose(tuning: Runs, slo: str, policies: Mapping[str, Policy], *, share: float) -> str:
    """The name of the policy that ranks best on the tuning seeds: what would be deployed."""
    return min(policies, key=lambda name: tuning.score(policies[name], slo, share=share).rank(share))


def _contenders(config: ArenaConfig, case: Case) -> list[tuple[Contender, ...]]:
    """The references, the published rules if they take part, and whatever else is named."""
    known = {name: name for name in (*REFERENCES, *(PUBLISHED if config.peers else ()))}
    entries = known | of_size(config.policies, case.spec.kv_block_size)
    return [family for name, entry in entries.items() for family in families(name, entry, case)]


def held_out_rows(name: str, policy: Policy, alone: Sequence[Runs], slo: str) -> list[dict[str, Any]]:
    """One row per held-out seed."""
    rows = []
    for runs in alone:
        (seed,) = runs.seeds
        episode = runs.episode(policy, seed)
        fields = summary_fields(episode.totals.summary(episode.records, runs.slos[slo]))
        rows.append({"policy": name, "seed": seed, **{key: fields[key] for key in _RECORDED}})
    return rows


def _hindsight(
    alone: Sequence[Runs], slo: SloName, policies: Mapping[str, Policy], rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The bound about where the load table is, searched from what every policy chose on each seed."""
    attained = attainment([row for row in rows if row["policy"] == LOAD_TABLE])
    schedules = {name: schedules_of(policy, alone) for name, policy in policies.items()}
    return hindsight_points(alone, slo, schedules, (attained - SLACK, attained + SLACK))


def frontier(alone: Sequence[Runs], slo: str, batch_limits: Iterable[int]) -> list[dict[str, Any]]:
    """What fixed pairs do on the held-out seeds, per seed: energy, requests and penalty."""
    clocks = alone[0].loop.node.spec.gpu_clocks_mhz[::-1][::TABLE_STRIDE]
    rows = []
    for knobs in (Knobs(limit, clock_mhz) for limit in sorted(batch_limits) for clock_mhz in clocks):
        traces = [t for runs in alone for t in runs.traces(Static(knobs), slo)]
        rows.append(
            {
                **asdict(knobs),
                "energy_j": [float(t.energy_j.sum()) for t in traces],
                "requests": [t.arrivals for t in traces],
                "badness": [float(t.penalty.sum()) for t in traces],
            }
        )
    return rows
