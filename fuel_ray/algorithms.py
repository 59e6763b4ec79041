"""How policies are learned: the algorithms by name, and which settings each has a use for."""

from collections.abc import Sequence

from fuel_ray.config import PRESETS, LearnConfig, TrainConfig
from fuel_ray.errors import ConfigError
from fuel_ray.policies.compiled import KNOWN

ALGORITHMS = {
    "dqn": "fuel_ray.training.dqn:dqn",
    "rllib-dqn": "fuel_ray.training.rllib_dqn:rllib_dqn",
    "ppo": "fuel_ray.training.ppo:ppo",
}
_BRANCHING = ("branch_every", "branch_hold", "branch_horizon", "branch_other_limit")
_EXPLORING = ("hold_steps", "epsilon_initial", "epsilon_final", "epsilon_share")
_REPLAY = ("learning_starts", "n_step", "priority", "target_update_updates")
_UNUSED = {
    "rllib-dqn": ("hold_steps", "branch_tries", *_BRANCHING),
    "ppo": ("updates_per_round", "buffer_size", *_REPLAY, *_EXPLORING, "branch_tries", *_BRANCHING),
}
_UNUSED_BY_BRANCHES = (*_REPLAY, *_EXPLORING, "gamma", "num_envs", "fragment_steps", "episode_steps")


def branches(config: LearnConfig) -> bool:
    """Whether a training with these settings branches a twin; else it learns from what its nodes did."""
    train = config.train
    return (
        train.algorithm == "dqn"
        and train.branch_tries > 0
        and config.node == "sim"
        and config.mode == "specialist"
        and not config.conditional
        and config.reward == "energy"
        and config.slo.share is not None
        and config.slo.e2e_s is None
        and config.grid == "node"
        and config.normalisation == "fixed"
        and train.head == "priced"
        and len(train.hidden) == 2
        and set(config.features) <= KNOWN
    )


def check_algorithm(config: LearnConfig) -> None:
    """Check that the algorithm is one, and that its settings fit together.

    Raises:
        ConfigError: names the first setting that is wrong.
    """
    train = config.train
    if train.algorithm not in ALGORITHMS and ":" not in train.algorithm:
        allowed = f"{', '.join(ALGORITHMS)} or package.module:NAME"
        raise ConfigError(f"--train.algorithm {train.algorithm}: unknown; choose from {allowed}")
    if train.branch_hold > train.branch_horizon:
        longest = f"--train.branch-horizon {train.branch_horizon}"
        raise ConfigError(f"--train.branch-hold {train.branch_hold}: must be at most {longest}")
    if train.algorithm in ("dqn", "rllib-dqn") and train.fragment_steps < train.n_step:
        raise ConfigError(
            f"--train.fragment-steps {train.fragment_steps}: must be at least --train.n-step {train.n_step}"
        )


def check_used(config: LearnConfig) -> None:
    """Check that who learns has a use for every setting of ``train`` that was changed.

    Raises:
        ConfigError: names the first setting that is unused.
    """
    kept = (TrainConfig(), PRESETS[config.preset].train)
    for name in _unused(config):
        if getattr(config.train, name) not in [getattr(own, name) for own in kept]:
            raise ConfigError(
                f"--train.{name.replace('_', '-')}: {_who(config)} does not use it; leave it out"
            )


def _unused(config: LearnConfig) -> Sequence[str]:
    """Settings of ``train`` that do nothing under the others."""
    if branches(config):
        return _UNUSED_BY_BRANCHES
    return _BRANCHING if config.train.algorithm == "dqn" else _UNUSED.get(config.train.algorithm, ())


def _who(config: LearnConfig) -> str:
    if branches(config):
        return "training with branches (--train.branch-tries 0 turns them off)"
    if config.train.algorithm == "dqn":
        return "training without branches"
    return f"--train.algorithm {config.train.algorithm}"
