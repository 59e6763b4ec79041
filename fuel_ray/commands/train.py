"""Train DQNs with RLlib under Ray Tune, one trial per KV block size."""

import math
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fuel_ray.build import build_env
from fuel_ray.config import SweepConfig, from_dict, PRESETS, to_dict

MODULE_STATE = Path("learner_group/learner/rl_module/default_policy/module_state.pkl")


def make_env(settings: Mapping[str, Any]) -> Any:
    """RLlib's environment creator."""
    config = from_dict(settings["config"], base=PRESETS["default"], source="env_config")
    return build_env(config, settings["block_sizes"])


def dqn_config(config: SweepConfig, block_sizes: Any) -> Any:
    """RLlib's settings for one trial; ``block_sizes`` may be a Tune search space over lists of sizes."""
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec

    from fuel_ray.policies.dqn import FastDqnConfig
    from fuel_ray.policies.rl_module import DuelingDqnModule

    train = config.train
    env = build_env(config, [config.block_sizes[0]])
    grid = env.codec.grid
    round_steps = train.num_envs * train.fragment_steps
    rounds = math.ceil(config.steps / train.iterations / round_steps)
    explored = int(config.steps * train.epsilon_share)
    return (
        FastDqnConfig()
        .fast(updates_per_round=train.updates_per_round, total_steps=config.steps)
        .environment(make_env_name(), env_config={"config": to_dict(config), "block_sizes": block_sizes})
        .env_runners(
            num_env_runners=0,
            num_envs_per_env_runner=train.num_envs,
            rollout_fragment_length=train.fragment_steps,
        )
        .learners(num_learners=0)
        .training(
            lr=train.lr,
            gamma=train.gamma,
            n_step=train.n_step,
            double_q=True,
            dueling=True,
            train_batch_size_per_learner=train.batch_size,
            target_network_update_freq=train.target_update_updates,
            num_steps_sampled_before_learning_starts=train.learning_starts,
            replay_buffer_config={"type": "PrioritizedEpisodeReplayBuffer", "capacity": train.buffer_size},
        )
        .rl_module(rl_module_spec=RLModuleSpec(module_class=DuelingDqnModule, model_config={
            "limits": len(grid.batch_limits), "clocks": len(grid.gpu_clocks_mhz), "hidden": train.hidden, "head": train.head,
            "epsilon": [[0, 1.0], [explored, train.epsilon_final]], "double_q": True}))
        .reporting(min_sample_timesteps_per_iteration=rounds * round_steps, min_time_s_per_iteration=0, metrics_num_episodes_for_smoothing=50)
        .debugging(seed=config.seed, log_level="ERROR")
    )


def make_env_name() -> str:
    from ray.tune.registry import register_env
    register_env("fuel_ray_serving", make_env)
    return "fuel_ray_serving"
