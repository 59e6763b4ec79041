"""Policies of a run: baselines tuned, trials run, checkpoints chosen, folders written."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fuel_ray.build.codec import build_codec, build_manifest
from fuel_ray.build.nodes import build_node, build_spec, twin_of
from fuel_ray.build.resolve import Learning, Resolved
from fuel_ray.cluster.jobs import in_parallel
from fuel_ray.codec import Codec
from fuel_ray.config import LearnConfig, to_dict
from fuel_ray.errors import ConfigError, PolicyError
from fuel_ray.flags import parse_serving, resumed
from fuel_ray.policies.anchor import Anchor
from fuel_ray.policies.learned import read_policy, save_policy
from fuel_ray.record import fetch, new_folder, origin, publish, read_json, write_json
from fuel_ray.sim.pack import load_pack
from fuel_ray.training.rounds import merged
from fuel_ray.training.trials import Trained, algorithm_of, run_trials, start_ray
from fuel_ray.tuning.episodes import EPISODE_S, TUNING_SEEDS
from fuel_ray.tuning.runs import Score
from fuel_ray.tuning.tuned import Tuned, score_weights, tune_anchor, tune_baselines

TRAINING_WEIGHT = 0.03  # of the anchor that a specialist is trained near to
_PATIENCE = ("node_wait_s", "node_failures")  # a run may be resumed with more of it


def parse_run(config_class: type[Learning], argv: list[str], *, prog: str) -> Learning:
    """Settings of a run; with --resume, those that it began with, which flags may repeat but not change.

    Raises:
        ConfigError: a flag is wrong, or differs from the run that is to be resumed.
    """
    config = parse_serving(config_class, argv, prog=prog)
    if config.resume is None:
        return config
    if config.storage is not None and not config.resume.exists():
        fetch(config.resume, config.storage)
    return resumed(config.resume, argv, prog=prog, base=config_class(), may_change=_PATIENCE)


def prepare(
    config: Learning, verb: str, workloads: Sequence[str], *, held_out: Sequence[int]
) -> tuple[Learning, Path]:
    """The settings with the block sizes that can be served, and the run's folder, which holds what is known.

    What cannot be served is said before anything is written.

    Raises:
        ConfigError: a setting is wrong, or the calibration pack is not the one that the run began with.
        PolicyError: the policy to start from is none, or does not fit.
        NodeError: a live server did not start, or can have none of the block sizes.
    """
    algorithm_of(config)
    if config.node == "ray":
        start_ray(config)
    if not config.live_server:
        for size in config.block_sizes:
            _check_start(config, build_codec(config, build_spec(config, size)))
            for workload in workloads:
                build_node(twin_of(config), size, horizon_s=float(EPISODE_S), workload=workload).reset(seed=0)
    elif config.node == "live":
        build_spec(config, config.block_sizes[0])  # no such GPU is said before anything is written
    run_dir = config.resume or _new_run(config, verb, held_out)
    facts = read_json(run_dir / "run.json")
    if facts.get("pack", {}).get("sha256") != load_pack(config.pack).sha256:
        raise ConfigError(f"--resume {run_dir}: pack {config.pack} is not the one that run began with")
    print(f"{verb}  {run_dir}: block sizes {', '.join(map(str, config.block_sizes))}, {config.workload}")
    return config, run_dir


@contextmanager
def resumable(verb: str, run_dir: Path, storage: str | None) -> Iterator[None]:
    """Say how to go on when the user stops the run; what there is then is in storage too, if there is one."""
    try:
        yield
        if storage is not None:
            publish(run_dir, storage)
    except (KeyboardInterrupt, SystemExit):
        print(f"\ninterrupted; to go on: fuel-ray {verb} --resume {run_dir}", flush=True)
        raise


def train_policies(
    found: Resolved[Learning], run_dir: Path, workloads: Sequence[str]
) -> dict[int, dict[str, Tuned]]:
    """Train, score every checkpoint on the tuning seeds of the twin, write the best as policy folders.

    Returns the baselines by block size and workload, which specialists are trained near to and all policies
    are told of.
    """
    config = found.config
    for setup in found.setups.values():
        _check_start(config, setup.codec)
    by_size = tuned_baselines(config, run_dir, workloads)
    home = {size: own[config.workload] for size, own in by_size.items()}
    anchors: dict[int, Anchor] = {}
    if config.mode == "specialist" and not config.conditional:
        anchors = {size: Anchor(tuned.table, TRAINING_WEIGHT) for size, tuned in home.items()}
    codecs = {size: setup.codec for size, setup in found.setups.items()}
    trained = run_trials(config, run_dir, codecs, anchors)
    scored = _scored(config, trained, home, anchors if config.anchor else {})
    curve: list[dict[str, Any]] = []
    for trial, own in zip(trained, scored, strict=True):
        curve += _curve(trial, own)
        share = _share(trial, home)
        best = min(range(len(own)), key=lambda k: (own[k][0].rank(share), k))
        _save(found, run_dir, trial, best, miss_price_j=own[best][1])
    merged(run_dir / "learning.csv", curve)
    _tell(config, run_dir, home)
    return by_size


def tuned_baselines(
    config: LearnConfig, run_dir: Path, workloads: Sequence[str]
) -> dict[int, dict[str, Tuned]]:
    """Baselines by block size and workload, on the twin; from the run's folder if they are there already."""
    path = run_dir / "baselines.json"
    raw = read_json(path) if path.exists() else {}
    left = [size for size in config.block_sizes if str(size) not in raw]
    if left:
        jobs = [(twin_of(config), size, load) for size in left for load in workloads]
        found = in_parallel("tune baselines", tune_baselines, jobs)
        for (_, size, workload), tuned in zip(jobs, found, strict=True):
            raw.setdefault(str(size), {})[workload] = tuned.to_dict()
        write_json(path, raw)
    return {
        size: {workload: Tuned.from_dict(tuned) for workload, tuned in raw[str(size)].items()}
        for size in config.block_sizes
    }


def policy_folder(config: LearnConfig, run_dir: Path, kv_block_size: int) -> Path:
    """Where the policy for this block size is, or will be."""
    return run_dir / "policies" / ("conditional" if config.conditional else f"block_{kv_block_size}")


def _scored(
    config: LearnConfig, trained: Sequence[Trained], home: Mapping[int, Tuned], near: Mapping[int, Anchor]
) -> list[list[tuple[Score, float]]]:
    """What each result of each trial does on the tuning seeds of the twin, and its price of a miss."""
    twin = twin_of(config)
    jobs = [
        (twin, trial.block_sizes, result.arrays, near.get(trial.block_sizes[0]), _share(trial, home))
        for trial in trained
        for result in trial.results
    ]
    scores = iter(in_parallel("score checkpoints", score_weights, jobs))
    return [[next(scores) for _ in trial.results] for trial in trained]


def _share(trial: Trained, home: Mapping[int, Tuned]) -> float:
    """Of requests, what is asked for of all of its block sizes."""
    return min(home[size].share for size in trial.block_sizes)


def _curve(trial: Trained, scores: Sequence[tuple[Score, float]]) -> Iterator[dict[str, Any]]:
    """Rows of learning.csv."""
    for result, (score, _) in zip(trial.results, scores, strict=True):
        yield {
            "block_size": "/".join(map(str, trial.block_sizes)),
            "env_steps": result.env_steps,
            "reward": result.reward,
            "energy_j_per_request": score.energy_j_per_request,
            "slo_attainment": score.slo_attainment,
        }


def _save(
    found: Resolved[Learning], run_dir: Path, trial: Trained, best: int, *, miss_price_j: float
) -> None:
    """Write a policy folder."""
    size = trial.block_sizes[0]
    setup = found.setups[size]
    sizes = trial.block_sizes
    manifest = build_manifest(found.config, setup.spec, block_sizes=sizes, engine=setup.engine)
    codec = replace(setup.codec, miss_price_j=miss_price_j)
    save_policy(policy_folder(found.config, run_dir, size), trial.results[best].arrays, codec, manifest)


def _tell(config: LearnConfig, run_dir: Path, tuned: Mapping[int, Tuned]) -> None:
    """Write into the policies what was tuned for their load: the static pair and, of one size, the anchor."""
    folders = {size: policy_folder(config, run_dir, size) for size in tuned}
    extra = config.extra_features
    policies = {size: read_policy(folder, extra_features=extra) for size, folder in folders.items()}
    anchors: dict[int, tuple[Anchor | None, float]] = {
        size: (None, policy.codec.miss_price_j) for size, policy in policies.items()
    }
    if config.anchor and not config.conditional:
        jobs = [(twin_of(config), size, policies[size], own) for size, own in tuned.items()]
        anchors = dict(zip(tuned, in_parallel("tune anchors", tune_anchor, jobs), strict=True))
    for size, policy in policies.items():
        anchor, price_j = anchors[size]
        alike = [tuned[other].static for other, folder in folders.items() if folder == folders[size]]
        manifest = replace(
            policy.manifest,
            tuned_static=max(alike, key=lambda knobs: (knobs.gpu_clock_mhz, knobs.batch_limit)),
            anchor=anchor,
        )
        save_policy(folders[size], policy.arrays, replace(policy.codec, miss_price_j=price_j), manifest)


def _check_start(config: LearnConfig, codec: Codec) -> None:
    """The policy that training begins with has to see and to choose the same."""
    if config.start_from is None:
        return
    start = read_policy(config.start_from, extra_features=config.extra_features)
    seen = replace(start.codec, miss_price_j=codec.miss_price_j)  # the price is found after training
    if start.manifest.head != config.train.head or seen.to_dict() != codec.to_dict():
        raise PolicyError(
            f"--start-from {config.start_from}: its features, scales, SLO, action grid or head are not those "
            f"of this training; it has {len(start.codec.grid)} actions, this training {len(codec.grid)}"
        )


def _new_run(config: LearnConfig, verb: str, held_out: Sequence[int]) -> Path:
    """Make the run's folder and write what is known of it beforehand."""
    run_dir = new_folder(config.out, verb)
    pack = load_pack(config.pack)
    facts = {
        "config": {**to_dict(config), "backend": "live" if config.live_server else "sim"},
        **origin(verb),
        "seeds": {
            "training": f"drawn from seed {config.seed}",
            "tuning": list(TUNING_SEEDS),
            "held_out": list(held_out),
        },
        "pack": {
            "name": pack.name,
            "sha256": pack.sha256,
            "notes": f"Measured: {pack.measured}. Transferred: {pack.transferred}.",
        },
        "engine": None,
        "unsupported": {},
        "nodes": {},
    }
    write_json(run_dir / "run.json", facts)
    if config.storage is not None:
        publish(run_dir, config.storage)
    return run_dir
