"""The main job: train a policy per KV block size, compare it with baselines, write policies and a report."""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from fuel_ray.arena.evaluation import evaluate_block_size
from fuel_ray.build.cluster import gpus_per_node
from fuel_ray.build.nodes import build_spec, twin_of
from fuel_ray.build.resolve import Resolved
from fuel_ray.cluster.hosts import num_nodes
from fuel_ray.cluster.jobs import in_parallel
from fuel_ray.config import SweepConfig
from fuel_ray.policies.learned import read_manifest
from fuel_ray.progress import Bar
from fuel_ray.record import read_json, update_csv, update_lines, write_json
from fuel_ray.report.sections import summary_table, write_report
from fuel_ray.report.wording import slo_text
from fuel_ray.training.policies import policy_folder, train_policies
from fuel_ray.training.run import expected_s, in_rounds, parse_run, running, shown
from fuel_ray.tuning.contenders import check
from fuel_ray.tuning.episodes import HELD_OUT_SEED
from fuel_ray.tuning.tuned import Tuned


def parse(argv: list[str], *, prog: str) -> SweepConfig:
    """Settings from flags; with --resume, those of the run, which flags may repeat but not change."""
    config = parse_run(SweepConfig, argv, prog=prog)
    if config.policies:
        twin = twin_of(config)
        check("--policies", config.policies, twin, [build_spec(twin, size) for size in config.block_sizes])
    return config


def run(config: SweepConfig) -> int:
    """Run or resume a sweep; prints a table and the path of the report."""
    held_out = range(HELD_OUT_SEED, HELD_OUT_SEED + config.seeds)
    with running(config, "sweep", _workloads(config), held_out=held_out) as run_dir:
        print(f"SLO    {slo_text(config.slo)}")
        with Bar({**expected_s(config), "evaluation": _evaluation_s(config)}) as bar:
            _stages(config, run_dir, bar)
        report = write_report(run_dir)
    print(f"\n{summary_table(run_dir)}\n\nreport    {report}\npolicies  {run_dir / 'policies'}")
    return 0


def _stages(config: SweepConfig, run_dir: Path, bar: Bar) -> None:
    """Train and choose checkpoints, tune the baselines, evaluate; each leaves its files."""
    began_s = time.monotonic()
    in_rounds(config, run_dir, partial(_round, run_dir=run_dir, bar=bar), table="summary.csv", bar=bar)
    facts = read_json(run_dir / "run.json")
    facts["wall_time_s"] = facts.get("wall_time_s", 0.0) + time.monotonic() - began_s
    write_json(run_dir / "run.json", facts)


def _round(found: Resolved[SweepConfig], run_dir: Path, bar: Bar) -> None:
    """A round of block sizes from their baselines to the rows of the summary."""
    config = found.config
    tuned = train_policies(found, run_dir, _workloads(config), bar)
    facts = read_json(run_dir / "run.json")
    facts["tuned"] = facts.get("tuned", {}) | {
        str(size): {**by_load[config.workload].to_dict(), "anchor_weight": _weight(config, run_dir, size)}
        for size, by_load in tuned.items()
    }
    write_json(run_dir / "run.json", facts)
    if config.policies:
        names = ", ".join(config.policies)
        print(f"also compared: {names}; those that need tuning are tuned on the twin's tuning seeds")
    with shown(run_dir, bar, "evaluation"):
        _evaluate(config, run_dir, tuned, bar)


def _evaluation_s(config: SweepConfig) -> float:
    """Seconds that the held-out seeds are expected to take, on two cores or in real time."""
    episodes = config.seeds * len(_workloads(config)) * len(config.block_sizes) * (5 + len(config.policies))
    return episodes * (config.live_seconds if config.live_server else 0.1)


def _weight(config: SweepConfig, run_dir: Path, kv_block_size: int) -> float | None:
    """How much holds the policy to its load table; None if it is free."""
    anchor = read_manifest(policy_folder(config, run_dir, kv_block_size)).anchor
    return None if anchor is None else anchor.weight


def _workloads(config: SweepConfig) -> list[str]:
    loads = (config.workload, config.control_workload)
    return list(dict.fromkeys(load for load in loads if load is not None))


def _evaluate(config: SweepConfig, run_dir: Path, tuned: Mapping[int, Mapping[str, Tuned]], bar: Bar) -> None:
    """Serve the held-out seeds, block sizes side by side."""
    jobs = [(config, size, tuned[size], policy_folder(config, run_dir, size)) for size in config.block_sizes]
    at_once = max(1, num_nodes(gpus_per_node(config))) if config.node == "ray" else None
    found = in_parallel(
        "evaluate", evaluate_block_size, jobs, at_once=at_once, here=config.node != "sim", bar=bar
    )
    update_lines(run_dir / "steps.jsonl", [line for e in found for line in e.lines])
    if rows := [row for e in found for row in e.axis_rows]:
        update_csv(run_dir / "clock_axes.csv", rows)
    update_csv(run_dir / "summary.csv", [row for e in found for row in e.rows])  # last: what is in it is done
