"""Policies trained by RLlib under Ray Tune, one trial per KV block size; by which algorithm is a setting."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.tune import PlacementGroupFactory
from ray.tune.registry import register_env

from fuel_ray import outside
from fuel_ray.algorithms import ALGORITHMS
from fuel_ray.build.cluster import gpus_per_node
from fuel_ray.build.nodes import is_kept
from fuel_ray.cluster.hosts import NODE_RESOURCE, connect, driver_resource, require_nodes
from fuel_ray.codec import ActionGrid
from fuel_ray.config import LearnConfig
from fuel_ray.errors import ConfigError, FuelRayError
from fuel_ray.policies.anchor import Anchor
from fuel_ray.progress import UNSEEN, Bar
from fuel_ray.training.checkpoint import q_network
from fuel_ray.training.envs import learning_settings, make_env
from fuel_ray.training.progress import Episodes, NodeWatch, Progress, curve_row, reason
from fuel_ray.training.ray_private import before_tune, replace_callbacks, with_resources
from fuel_ray.training.storage import disk_faults_told, forget_stop, whole_files
from fuel_ray.training.trackers import trackers

_ENV_NAME = "fuel_ray_serving"
_STEPS = "num_env_steps_sampled_lifetime"


@dataclass(frozen=True, slots=True)
class Trained:
    """One finished trial."""

    block_sizes: tuple[int, ...]
    results: tuple["Checkpointed", ...]  # oldest first


@dataclass(frozen=True, slots=True)
class Checkpointed:
    """A training result and the weights that it left."""

    env_steps: int
    reward: float | None  # mean per window of the training episodes, with their random actions
    arrays: dict[str, np.ndarray]  # of ``checkpoint.q_network``


def start_ray(config: LearnConfig) -> None:
    """Start a local Ray, or join a cluster.

    Raises:
        ConfigError: RAY_ADDRESS names no cluster, or it has too few nodes for a trial.
    """
    before_tune()
    logging.getLogger("ray.rllib").setLevel(logging.ERROR)
    connect(cluster=config.node == "ray")
    if config.node == "ray":
        require_nodes(config.nodes_per_trial, gpus=gpus_per_node(config), wait_s=config.node_wait_s)


def run_trials(
    config: LearnConfig,
    run_dir: Path,
    grid: ActionGrid,
    anchors: Mapping[int, Anchor],
    bar: Bar = UNSEEN,
) -> list[Trained]:
    """Train a policy per block size; goes on where an earlier call on this folder was interrupted.

    Near ``anchors``, by block size, specialists explore.

    Raises:
        DiskError: a disk took no more; what there is can be resumed.
        FuelRayError: a trial failed; the message has its error.
        KeyboardInterrupt: the user stopped it; what there is can be resumed.
    """
    register_env(_ENV_NAME, make_env)
    sizes = [list(config.block_sizes)] if config.conditional else [[size] for size in config.block_sizes]
    space = _settings(config, tune.grid_search(sizes), grid, anchors)
    algorithm = _with_nodes(space.algo_class, config)
    watch = [NodeWatch(config)] if config.node == "ray" else []
    extra = [*watch, *trackers(config.callbacks, run_dir)]
    callbacks = [Progress(config, trials=len(sizes), bar=bar), *extra]
    folder = str(run_dir.resolve()) if config.storage is None else f"{config.storage}/{run_dir.name}"
    name = f"tune-{'-'.join(map(str, config.block_sizes))}" if config.live_server else "tune"
    path = f"{folder}/{name}"
    files = None if "://" in path else whole_files()
    where = {"name": name, "storage_path": folder, "storage_filesystem": files}
    with disk_faults_told(path):
        if tune.Tuner.can_restore(path, storage_filesystem=files):
            forget_stop(Path(path))
            going_on: dict[str, Any] = {"resume_unfinished": True, "resume_errored": True}
            tuner = tune.Tuner.restore(
                path, algorithm, param_space=space, storage_filesystem=files, **going_on
            )
            replace_callbacks(tuner, callbacks)
        else:
            settings = _run_settings(config, callbacks, **where)
            tuner = tune.Tuner(algorithm, param_space=space, run_config=settings)
        return _finished(config, tuner.fit())


def _finished(config: LearnConfig, results: tune.ResultGrid) -> list[Trained]:
    for error in results.errors:
        raise FuelRayError(f"training failed: {reason(error)}")
    trained = [_trained(result, last=config.train.average_results) for result in results]
    if any(not t.results or t.results[-1].env_steps < config.steps for t in trained):
        raise KeyboardInterrupt  # Tune takes Ctrl-C as a wish to see what there is so far
    return trained


def _run_settings(config: LearnConfig, callbacks: list[tune.Callback], **where: Any) -> tune.RunConfig:
    """Of a new run; on a cluster a trial that lost its process or nodes goes on from its last checkpoint."""
    on_cluster = config.node == "ray"
    return tune.RunConfig(
        **where,
        stop={_STEPS: config.steps},
        checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1, checkpoint_at_end=True),
        failure_config=tune.FailureConfig(max_failures=config.node_failures if on_cluster else 0),
        callbacks=callbacks,
        progress_reporter=tune.CLIReporter(
            parameter_columns={"env_config/block_sizes": "block size"},
            metric_columns={
                _STEPS: "steps",
                "env_runners/fuel/energy_j_per_request": "J/request",
                "env_runners/fuel/slo_attainment": "SLO attainment",
                "env_runners/fuel/reward": "reward",
            },
            max_report_frequency=30,  # s
        ),
        verbose=1 if on_cluster else 0,
    )


def algorithm_of(config: LearnConfig) -> Callable[..., AlgorithmConfig]:
    """What makes RLlib's settings of the algorithm, called with ``config`` and the network's ``model``.

    The module in them keeps a ``DuelingQNet`` as ``q``, whose weights become the policy's.

    Raises:
        ConfigError: there is no such code, or it is not called so.
    """
    name = config.train.algorithm
    found: Callable[..., AlgorithmConfig] = outside.called(ALGORITHMS.get(name, name), config, model={})
    return found


def _settings(
    config: LearnConfig, block_sizes: Any, grid: ActionGrid, anchors: Mapping[int, Anchor]
) -> AlgorithmConfig:
    """RLlib's settings of a trial; ``block_sizes`` may be a Tune search space over lists of sizes."""
    nodes = config.train.num_envs if config.node == "sim" else config.nodes_per_trial
    train = replace(config.train, num_envs=nodes)
    found = algorithm_of(config)(replace(config, train=train), model=_model(config, grid))
    if not isinstance(found, AlgorithmConfig):
        raise ConfigError(f"{train.algorithm} makes a {type(found).__name__}, not RLlib's AlgorithmConfig")
    env_config = {
        "config": learning_settings(config),
        "block_sizes": block_sizes,
        "anchors": {str(size): anchor.to_dict() for size, anchor in anchors.items()},
    }
    found.environment(_ENV_NAME, env_config=env_config)
    found.env_runners(
        num_env_runners=0,
        gym_env_vectorize_mode="vector_entry_point" if config.nodes_per_trial > 1 else "sync",
    )
    if config.node == "ray" and config.storage is None:  # this machine's disk has the run's folder
        found.resources(num_cpus_for_main_process=1)
        found.custom_resources_for_main_process = driver_resource()
    round_steps = nodes * found.get_rollout_fragment_length()
    rounds = math.ceil(config.steps / train.iterations / round_steps)
    found.learners(num_learners=0)
    found.callbacks(Episodes)
    found.reporting(
        min_sample_timesteps_per_iteration=rounds * round_steps,
        min_time_s_per_iteration=0,
        metrics_num_episodes_for_smoothing=50,
    )
    found.debugging(seed=config.seed, log_level="ERROR")
    return found


def _model(config: LearnConfig, grid: ActionGrid) -> dict[str, Any]:
    """What the network is."""
    return {
        "limits": len(grid.batch_limits),
        "clocks": len(grid.gpu_clocks_mhz),
        "hidden": config.train.hidden,
        "head": config.train.head,
        "price_feature": config.features.index("miss_price") if "miss_price" in config.features else None,
        "extra_features": config.extra_features,
        "start_from": None if config.start_from is None else str(config.start_from.resolve()),
    }


def _with_nodes(algorithm: type[Algorithm], config: LearnConfig) -> type[Algorithm]:
    """The algorithm, a trial of which begins once the cluster has its process and its nodes free."""
    if config.node != "ray" or is_kept(config):
        return algorithm
    gpus = gpus_per_node(config)
    bundle = {NODE_RESOURCE: 1.0, "GPU": float(gpus)} if gpus else {NODE_RESOURCE: 1.0}

    def request(settings: Any) -> PlacementGroupFactory:
        own = algorithm.default_resource_request(settings)
        bundles = [*own.bundles, *[bundle] * config.nodes_per_trial]
        return PlacementGroupFactory(bundles, strategy=own.strategy)

    return with_resources(algorithm, request)


def _trained(result: Any, *, last: int) -> Trained:
    found = []
    for checkpoint, metrics in result.best_checkpoints:
        local = Path(checkpoint.path)
        with nullcontext(local) if local.is_dir() else checkpoint.as_directory() as folder:  # else a copy
            row = curve_row(metrics)
            found.append(Checkpointed(row["env_steps"], row["reward"], q_network(Path(folder))))
    found.sort(key=lambda checkpointed: checkpointed.env_steps)
    return Trained(tuple(result.config["env_config"]["block_sizes"]), tuple(averaged(found, last=last)))


def averaged(results: Sequence[Checkpointed], *, last: int) -> list[Checkpointed]:
    """Each with the mean of its own weights and those just before it, ``last`` together.

    Izmailov et al., UAI 2018: the average of what a noisy training passes through is better than its end.
    """
    means = []
    for k, result in enumerate(results):
        near = [r.arrays for r in results[max(0, k + 1 - last) : k + 1]]
        arrays = {name: np.asarray(np.mean([a[name] for a in near], axis=0)) for name in result.arrays}
        means.append(replace(result, arrays=arrays))
    return means
