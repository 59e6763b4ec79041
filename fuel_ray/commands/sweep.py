"""The main job: train a policy per KV block size, compare it with baselines, write policies and a report."""

import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray

from fuel_ray import __version__
from fuel_ray.build import build_codec, build_node
from fuel_ray.commands.evaluate import (
    EPISODE_S,
    HELD_OUT_SEED,
    TUNING_SEEDS,
    Tuned,
    evaluate_block_size,
    score_weights,
    tune_baselines,
)
from fuel_ray.commands.report import summary_table, write_report
from fuel_ray.commands.train import Trained, start_ray, train
from fuel_ray.config import SweepConfig, load_config, to_dict
from fuel_ray.errors import ConfigError
from fuel_ray.flags import parse_serving
from fuel_ray.policies.learned import Manifest, save_policy
from fuel_ray.record import new_folder, origin, read_json, write_csv, write_json, write_lines
from fuel_ray.sim.perf_model import load_pack
from fuel_ray.workload import parse_workload

Result = TypeVar("Result")


def parse(argv: list[str], *, prog: str) -> SweepConfig:
    """Settings from flags; with --resume, those of the run, which flags may repeat but not change.

    Raises:
        ConfigError: a flag is wrong, or differs from the run that is to be resumed.
    """
    config = parse_serving(SweepConfig, argv, prog=prog)
    if config.node != "sim":
        raise ConfigError("--node live: a sweep runs on simulated nodes; `fuel-ray evaluate` has live ones")
    if config.resume is None:
        return config
    if not (config.resume / "run.json").is_file():
        raise ConfigError(f"--resume {config.resume}: not the folder of a run, there is no run.json in it")
    recorded = load_config(config.resume / "run.json", base=SweepConfig())
    asked = parse_serving(SweepConfig, argv, prog=prog, default=recorded)
    for field in fields(SweepConfig):
        if field.name in ("out", "resume", "config"):
            continue
        old, new = getattr(recorded, field.name), getattr(asked, field.name)
        if old != new:
            raise ConfigError(f"--resume {config.resume}: that run has {field.name} = {old}, not {new}")
    return replace(recorded, resume=config.resume)


def run(config: SweepConfig) -> int:
    """Run or resume a sweep; prints a table and the path of the report."""
    for size in config.block_sizes:  # what cannot be simulated is said before anything is written
        for workload in _workloads(config):
            build_node(config, size, horizon_s=float(EPISODE_S), workload=workload).reset(seed=HELD_OUT_SEED)
    run_dir = config.resume or _new_run(config)
    began_with = read_json(run_dir / "run.json").get("pack", {}).get("sha256")
    if began_with != load_pack(config.pack).sha256:
        raise ConfigError(f"--resume {run_dir}: pack {config.pack} is not the one that run began with")
    print(f"sweep  {run_dir}: block sizes {', '.join(map(str, config.block_sizes))}, {config.workload}")
    try:
        _stages(config, run_dir)
    except KeyboardInterrupt:
        print(f"\ninterrupted; to go on: fuel-ray sweep --resume {run_dir}", flush=True)
        raise
    report = write_report(run_dir)
    print(f"\n{summary_table(run_dir)}\n\nreport    {report}\npolicies  {run_dir / 'policies'}")
    return 0


def _stages(config: SweepConfig, run_dir: Path) -> None:
    """Train, tune the baselines, choose checkpoints, evaluate; each leaves its files."""
    began_s = time.monotonic()
    facts = read_json(run_dir / "run.json")
    start_ray()
    trained = train(config, run_dir)
    tuned = _tune(config, run_dir)
    _choose(config, run_dir, trained)
    policies = run_dir / "policies"
    jobs = [(config, size, tuned[size], policies / _folder(config, size)) for size in config.block_sizes]
    evaluations = _in_parallel("evaluate", evaluate_block_size, jobs)
    write_csv(run_dir / "summary.csv", [row for e in evaluations for row in e.rows])
    write_lines(run_dir / "steps.jsonl", (line for e in evaluations for line in e.lines))
    facts["wall_time_s"] = facts.get("wall_time_s", 0.0) + time.monotonic() - began_s
    facts["tuned"] = {str(size): by_load[config.workload].to_dict() for size, by_load in tuned.items()}
    write_json(run_dir / "run.json", facts)


def _workloads(config: SweepConfig) -> list[str]:
    loads = (config.workload, config.control_workload)
    return list(dict.fromkeys(load for load in loads if load is not None))


def _new_run(config: SweepConfig) -> Path:
    """Make the run's folder and write what is known of it beforehand."""
    run_dir = new_folder(config.out, "sweep")
    pack = load_pack(config.pack)
    facts = {
        "config": {**to_dict(config), "backend": config.node, "slo_attainment_target": config.slo_share},
        **origin("sweep"),
        "seeds": {
            "training": f"drawn from seed {config.seed}",
            "tuning": list(TUNING_SEEDS),
            "held_out": [HELD_OUT_SEED + i for i in range(config.seeds)],
        },
        "pack": {
            "name": pack.name,
            "sha256": pack.sha256,
            "notes": f"Measured: {pack.measured}. Transferred: {pack.transferred}.",
        },
    }
    write_json(run_dir / "run.json", facts)
    return run_dir


def _tune(config: SweepConfig, run_dir: Path) -> dict[int, dict[str, Tuned]]:
    """Baselines by block size and workload, from an earlier call if there was one."""
    path = run_dir / "baselines.json"
    if not path.exists():
        jobs = [(config, size, load) for size in config.block_sizes for load in _workloads(config)]
        found = _in_parallel("tune baselines", tune_baselines, jobs)
        raw: dict[str, dict[str, Any]] = {str(size): {} for size in config.block_sizes}
        for (_, size, workload), tuned in zip(jobs, found, strict=True):
            raw[str(size)][workload] = tuned.to_dict()
        write_json(path, raw)
    return {
        int(size): {workload: Tuned.from_dict(tuned) for workload, tuned in by_load.items()}
        for size, by_load in read_json(path).items()
    }


def _choose(config: SweepConfig, run_dir: Path, trained: Sequence[Trained]) -> None:
    """Score every checkpoint on the tuning seeds; write the scores and the best ones' policy folders."""
    jobs = [(config, t.block_sizes, result.arrays) for t in trained for result in t.results]
    scores = iter(_in_parallel("score checkpoints", score_weights, jobs))
    curve = []
    for trial in trained:
        ranked = []
        for result, score in zip(trial.results, scores, strict=False):
            curve.append(
                {
                    "block_size": "/".join(map(str, trial.block_sizes)),
                    "env_steps": result.env_steps,
                    "reward": result.reward,
                    "energy_j_per_request": score.energy_j_per_request,
                    "slo_attainment": score.slo_attainment,
                }
            )
            ranked.append(score.rank(config.tune_share))
        best = trial.results[ranked.index(min(ranked))]
        _save(config, run_dir, trial.block_sizes, best.arrays)
    write_csv(run_dir / "learning.csv", curve)


def _save(
    config: SweepConfig, run_dir: Path, block_sizes: tuple[int, ...], arrays: dict[str, np.ndarray]
) -> None:
    """Write a policy folder."""
    pack = load_pack(config.pack)
    spec = build_node(config, block_sizes[0], horizon_s=1.0).spec
    manifest = Manifest(
        kv_block_sizes=block_sizes,
        model=pack.model,
        gpu_name=pack.gpu_name,
        engine=pack.engine,
        pack=pack.name,
        pack_sha256=pack.sha256,
        reward=config.reward,
        workload=config.workload,
        workload_digest=parse_workload(config.workload).digest(),
        head=config.train.head,
        fuel_ray_version=__version__,
    )
    folder = run_dir / "policies" / _folder(config, block_sizes[0])
    save_policy(folder, arrays, build_codec(config, spec), manifest)


def _folder(config: SweepConfig, kv_block_size: int) -> str:
    return "conditional" if config.conditional else f"block_{kv_block_size}"


def _in_parallel(what: str, function: Callable[..., Result], jobs: Sequence[tuple[Any, ...]]) -> list[Result]:
    """Call a function once per job, one core each; results in the order of the jobs."""
    remote = ray.remote(function)
    pending = [remote.remote(*job) for job in jobs]
    references = list(pending)
    began_s = time.monotonic()
    while pending:
        _, pending = ray.wait(pending)
        done = len(references) - len(pending)
        if not pending or done % max(1, len(references) // 8) == 0:
            print(f"{what}  {done}/{len(references)}  {time.monotonic() - began_s:.0f} s", flush=True)
    results: list[Result] = ray.get(references)
    return results
