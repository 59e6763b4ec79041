"""From settings to policy folders: tune baselines, run trials, choose checkpoints, tune their anchors."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from fuel_ray.build.codec import build_manifest
from fuel_ray.build.nodes import twin_of
from fuel_ray.build.resolve import Learning, Resolved
from fuel_ray.cluster.jobs import in_parallel
from fuel_ray.config import LearnConfig
from fuel_ray.policies.anchor import REACH_MHZ, Anchor
from fuel_ray.policies.learned import PolicyFolder, read_policy, save_policy
from fuel_ray.progress import UNSEEN, Bar
from fuel_ray.record import read_json, update_csv, write_json
from fuel_ray.training.run import check_start, shown
from fuel_ray.training.trials import Trained, run_trials
from fuel_ray.tuning.runs import Score
from fuel_ray.tuning.tuned import Tuned, read_baselines, score_weights, tune_anchor, tune_baselines

TRAINING_WEIGHT = 0.03  # of the anchor that a specialist is trained near to
Scored = tuple[Score, float]  # a result on the tuning seeds of the twin, and its price of a miss


def train_policies(
    found: Resolved[Learning], run_dir: Path, workloads: Sequence[str], bar: Bar = UNSEEN
) -> dict[int, dict[str, Tuned]]:
    """Train, score every checkpoint on the tuning seeds of the twin, write the best as policy folders.

    Returns the baselines by block size and workload; specialists are trained near to the best simple rules.
    """
    config = found.config
    for setup in found.setups.values():
        check_start(config, setup.codec)
    with shown(run_dir, bar, "baselines"):
        by_size = tuned_baselines(config, run_dir, workloads, bar)
    home = {size: own[config.workload] for size, own in by_size.items()}
    anchors: dict[int, Anchor] = {}
    if config.mode == "specialist" and not config.conditional:
        near = partial(Anchor, weight=TRAINING_WEIGHT, reach_mhz=REACH_MHZ)
        lower = config.train.lower_limits
        anchors = {size: near(tuned.rule, lower_limits=lower) for size, tuned in home.items()}
    with shown(run_dir, bar, "training"):
        trained = run_trials(config, run_dir, found.setups[config.block_sizes[0]].codec.grid, anchors, bar)
    shares = [min(home[size].share for size in trial.block_sizes) for trial in trained]
    with shown(run_dir, bar, "scoring"):
        scored = _scored(config, trained, shares, anchors if config.anchor else {}, bar)
    results = list(zip(trained, scored, shares, strict=True))
    with shown(run_dir, bar, "anchors"):
        _add_tuned(config, [_chosen(found, run_dir, *result) for result in results], home, bar)
    update_csv(run_dir / "learning.csv", [row for trial, own, _ in results for row in _curve(trial, own)])
    return by_size


def tuned_baselines(
    config: LearnConfig, run_dir: Path, workloads: Sequence[str], bar: Bar = UNSEEN
) -> dict[int, dict[str, Tuned]]:
    """Baselines by block size and workload, on the twin; from the run's folder if they are there already.

    Raises:
        ConfigError: those that --baselines names are none, or of other block sizes or workloads.
    """
    path, sizes = run_dir / "baselines.json", config.block_sizes
    raw = read_json(path) if path.exists() else {}
    left = [size for size in sizes if str(size) not in raw]
    if left and config.baselines is not None:
        given = read_baselines(config.baselines, left, workloads)
        raw |= {str(size): {load: own.to_dict() for load, own in given[size].items()} for size in left}
    elif left:
        jobs = [(twin_of(config), size, load) for size in left for load in workloads]
        found = in_parallel("tune baselines", tune_baselines, jobs, bar=bar)
        for (_, size, workload), tuned in zip(jobs, found, strict=True):
            raw.setdefault(str(size), {})[workload] = tuned.to_dict()
    write_json(path, raw)
    return read_baselines(path, sizes, workloads)


def policy_folder(config: LearnConfig, run_dir: Path, kv_block_size: int) -> Path:
    """Where the policy for this block size is, or will be."""
    return run_dir / "policies" / ("conditional" if config.conditional else f"block_{kv_block_size}")


def _scored(
    config: LearnConfig,
    trained: Sequence[Trained],
    shares: Sequence[float],
    near: Mapping[int, Anchor],
    bar: Bar,
) -> list[list[Scored]]:
    """The results of each trial."""
    twin = twin_of(config)
    jobs = [
        (twin, trial.block_sizes, result.arrays, near.get(trial.block_sizes[0]), share)
        for trial, share in zip(trained, shares, strict=True)
        for result in trial.results
    ]
    scores = iter(in_parallel("score checkpoints", score_weights, jobs, bar=bar))
    return [[next(scores) for _ in trial.results] for trial in trained]


def _curve(trial: Trained, scores: Sequence[Scored]) -> list[dict[str, Any]]:
    """Rows of learning.csv."""
    size = "/".join(map(str, trial.block_sizes))
    return [
        {"block_size": size, "env_steps": result.env_steps, "reward": result.reward, **asdict(score)}
        for result, (score, _) in zip(trial.results, scores, strict=True)
    ]


def _chosen(
    found: Resolved[Learning],
    run_dir: Path,
    trial: Trained,
    scores: Sequence[Scored],
    share: float,
) -> PolicyFolder:
    """The policy folder of the best result."""
    sizes = trial.block_sizes
    setup, folder = found.setups[sizes[0]], policy_folder(found.config, run_dir, sizes[0])
    pairs = zip(trial.results, scores, strict=True)
    best, (_, price_j) = min(pairs, key=lambda pair: pair[1][0].rank(share))
    manifest = build_manifest(found.config, setup.spec, block_sizes=sizes, engine=setup.engine)
    save_policy(folder, best.arrays, replace(setup.codec, miss_price_j=price_j), manifest)
    return read_policy(folder, extra_features=found.config.extra_features)


def _add_tuned(
    config: LearnConfig, policies: Sequence[PolicyFolder], tuned: Mapping[int, Tuned], bar: Bar
) -> None:
    """Write into the policies what is tuned for their load: the static pair and, of one size, the anchor."""
    held: Sequence[tuple[Anchor | None, float]] = [(None, p.codec.miss_price_j) for p in policies]
    if config.anchor and not config.conditional:
        of_size = {policy.manifest.kv_block_sizes[0]: policy for policy in policies}
        jobs = [(twin_of(config), size, policy, tuned[size]) for size, policy in of_size.items()]
        held = in_parallel("tune anchors", tune_anchor, jobs, bar=bar)
    for policy, (anchor, price_j) in zip(policies, held, strict=True):
        pairs = [tuned[size].static for size in policy.manifest.kv_block_sizes]
        fastest = max(pairs, key=lambda knobs: (knobs.gpu_clock_mhz, knobs.batch_limit))
        manifest = replace(policy.manifest, tuned_static=fastest, anchor=anchor)
        save_policy(policy.path, policy.arrays, replace(policy.codec, miss_price_j=price_j), manifest)
