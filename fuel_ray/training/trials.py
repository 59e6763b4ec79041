"""DQNs trained by RLlib under Ray Tune, one trial per KV block size."""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from ray import tune
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.tune.registry import register_env

from fuel_ray.build.cluster import gpus_per_node
from fuel_ray.build.codec import build_codec
from fuel_ray.build.nodes import build_spec
from fuel_ray.cluster.hosts import NODE_RESOURCE, connect, driver_resource, require_nodes
from fuel_ray.config import LearnConfig, TrainConfig
from fuel_ray.errors import FuelRayError
from fuel_ray.policies.anchor import Anchor
from fuel_ray.training.checkpoint import q_network
from fuel_ray.training.dqn import FastDqn, FastDqnConfig
from fuel_ray.training.envs import learning_settings, make_env
from fuel_ray.training.progress import (
    EpisodeMetrics,
    NodeWatch,
    Progress,
    curve_row,
    progress_table,
    reason,
)
from fuel_ray.training.rl_module import DuelingDqnModule

_ENV_NAME = "fuel_ray_serving"


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
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")  # so that a kill costs a result or two
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the only output that takes columns of ours
    logging.getLogger("ray.rllib").setLevel(logging.ERROR)
    connect(cluster=config.node == "ray")
    if config.node == "ray":
        require_nodes(config.nodes_per_trial, gpus=gpus_per_node(config), wait_s=config.node_wait_s)


def trial_block_sizes(config: LearnConfig) -> list[list[int]]:
    """The block sizes of each trial: one each, or all in one for a conditional policy."""
    return [list(config.block_sizes)] if config.conditional else [[size] for size in config.block_sizes]


def run_trials(
    config: LearnConfig, run_dir: Path, anchors: Mapping[int, Anchor] = MappingProxyType({})
) -> list[Trained]:
    """Train a policy per block size; goes on where an earlier call on this folder was interrupted.

    ``anchors`` by block size are what specialists explore near to.

    Simulated nodes train side by side, live ones, which share the GPUs, one after the other.

    Raises:
        FuelRayError: a trial failed; the message has its error.
        KeyboardInterrupt: the user stopped it; what there is can be resumed.
    """
    register_env(_ENV_NAME, make_env)
    sizes = trial_block_sizes(config)
    space = dqn_config(config, tune.grid_search(sizes), anchors)
    callbacks: list[tune.Callback] = [Progress(config, trials=len(sizes))]
    if config.node == "ray":
        callbacks.append(NodeWatch(config))
    folder = str(run_dir.resolve()) if config.storage is None else f"{config.storage}/{run_dir.name}"
    if tune.Tuner.can_restore(f"{folder}/tune"):
        tuner = tune.Tuner.restore(
            f"{folder}/tune", FastDqn, param_space=space, resume_unfinished=True, resume_errored=True
        )
        tuner._local_tuner._run_config.callbacks = callbacks
    else:
        one = tune.TuneConfig(max_concurrent_trials=1 if config.node == "live" else None)
        settings = _run_settings(config, folder, callbacks)
        tuner = tune.Tuner(FastDqn, param_space=space, tune_config=one, run_config=settings)
    results = tuner.fit()
    for error in results.errors:
        raise FuelRayError(f"training failed: {reason(error)}")
    trained = [_trained(result) for result in results]
    if any(not t.results or t.results[-1].env_steps < config.steps for t in trained):
        raise KeyboardInterrupt  # Tune takes Ctrl-C as a wish to see what there is so far
    return trained


def _run_settings(config: LearnConfig, folder: str, callbacks: list[tune.Callback]) -> tune.RunConfig:
    """Of a new run; on a cluster a trial that lost its process or nodes goes on from its last checkpoint."""
    on_cluster = config.node == "ray"
    return tune.RunConfig(
        name="tune",
        storage_path=folder,
        stop={"num_env_steps_sampled_lifetime": config.steps},
        checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1, checkpoint_at_end=True),
        failure_config=tune.FailureConfig(max_failures=config.node_failures if on_cluster else 0),
        callbacks=callbacks,
        progress_reporter=progress_table(),
        verbose=1 if on_cluster else 0,
    )


def dqn_config(
    config: LearnConfig, block_sizes: Any, anchors: Mapping[int, Anchor] = MappingProxyType({})
) -> FastDqnConfig:
    """RLlib's settings of a trial; ``block_sizes`` may be a Tune search space over lists of sizes."""
    settings = _train_settings(config)
    round_steps = settings.num_envs * settings.fragment_steps
    rounds = math.ceil(config.steps / settings.iterations / round_steps)
    dqn = FastDqnConfig().fast(
        updates_per_round=settings.updates_per_round,
        total_steps=config.steps,
        node_bundles=_node_bundles(config),
        make_env=make_env if config.node == "sim" else None,
        num_envs=settings.num_envs,
        hold_steps=settings.hold_steps,
        priority=settings.priority,
        lr_final_share=settings.lr_final_share,
        epsilon_initial=settings.epsilon_initial,
        epsilon_final=settings.epsilon_final,
        epsilon_share=settings.epsilon_share,
    )
    env_config = {
        "config": learning_settings(config),
        "block_sizes": block_sizes,
        "anchors": {str(size): anchor.to_dict() for size, anchor in anchors.items()},
    }
    dqn.environment(_ENV_NAME, env_config=env_config)
    dqn.env_runners(
        num_env_runners=0,
        num_envs_per_env_runner=1 if config.node == "sim" else settings.num_envs,
        rollout_fragment_length=settings.fragment_steps,
        gym_env_vectorize_mode="vector_entry_point" if config.nodes_per_trial > 1 else "sync",
    )
    if config.node == "ray" and config.storage is None:  # this machine's disk has the run's folder
        dqn.resources(num_cpus_for_main_process=1)
        dqn.custom_resources_for_main_process = driver_resource()
    dqn.learners(num_learners=0)
    dqn.training(
        lr=settings.lr,
        gamma=settings.gamma,
        n_step=settings.n_step,
        train_batch_size_per_learner=settings.batch_size,
        target_network_update_freq=settings.target_update_updates,
        num_steps_sampled_before_learning_starts=settings.learning_starts,
        replay_buffer_config={"type": "PrioritizedEpisodeReplayBuffer", "capacity": settings.buffer_size},
    )
    dqn.rl_module(rl_module_spec=_module_spec(config))
    dqn.callbacks(EpisodeMetrics)
    dqn.reporting(
        min_sample_timesteps_per_iteration=rounds * round_steps,
        min_time_s_per_iteration=0,
        metrics_num_episodes_for_smoothing=50,
    )
    dqn.debugging(seed=config.seed, log_level="ERROR")
    return dqn


def _module_spec(config: LearnConfig) -> RLModuleSpec:
    """The Q network for these settings, and how it explores where RLlib's runner steps it."""
    settings = _train_settings(config)
    grid = build_codec(config, build_spec(config, config.block_sizes[0])).grid
    return RLModuleSpec(
        module_class=DuelingDqnModule,
        model_config={
            "limits": len(grid.batch_limits),
            "clocks": len(grid.gpu_clocks_mhz),
            "hidden": settings.hidden,
            "head": settings.head,
            "extra_features": config.extra_features,
            "start_from": None if config.start_from is None else str(config.start_from.resolve()),
            "epsilon": [
                [0, settings.epsilon_initial],
                [int(config.steps * settings.epsilon_share), settings.epsilon_final],
            ],
        },
    )


def _train_settings(config: LearnConfig) -> TrainConfig:
    """Those asked for, but that a short training begins to learn sooner; a real node is one environment."""
    few = min(max(config.train.batch_size, config.steps // 10), config.train.buffer_size)
    train = replace(config.train, learning_starts=min(config.train.learning_starts, few))
    return train if config.node == "sim" else replace(train, num_envs=config.nodes_per_trial)


def _node_bundles(config: LearnConfig) -> list[dict[str, float]]:
    """What the actors of a trial's nodes take from the cluster."""
    if config.node != "ray":
        return []
    gpus = gpus_per_node(config)
    bundle = {NODE_RESOURCE: 1.0, "GPU": float(gpus)} if gpus else {NODE_RESOURCE: 1.0}
    return [bundle] * config.nodes_per_trial


def _trained(result: Any) -> Trained:
    found = [
        Checkpointed(row["env_steps"], row["reward"], _arrays(checkpoint))
        for checkpoint, row in ((c, curve_row(metrics)) for c, metrics in result.best_checkpoints)
    ]
    settings = result.config["env_config"]
    found.sort(key=lambda checkpointed: checkpointed.env_steps)
    last = settings["config"]["train"]["average_results"]
    return Trained(tuple(settings["block_sizes"]), tuple(averaged(found, last=last)))


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


def _arrays(checkpoint: tune.Checkpoint) -> dict[str, np.ndarray]:
    with checkpoint.as_directory() as folder:  # a copy, if the run's storage is not a local one
        return q_network(Path(folder))
