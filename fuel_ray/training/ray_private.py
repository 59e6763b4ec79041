"""Everything that is used of Ray beyond its public API, so that one place is read when Ray is upgraded.

All of it was seen in Ray 2.60.0, the release that pyproject.toml asks for; whether earlier ones have it was
not looked at. tests/test_ray_private.py names what an upgrade took away.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from ray import tune
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.execution.rollout_ops import synchronous_parallel_sample
from ray.tune import PlacementGroupFactory

DECISIONS = "_cached_trial_decisions"  # in ``runner_data`` of Tune's state: trials that it wanted to stop


def local_module(algorithm: Algorithm) -> Any:
    """The module that the one local learner trains; the learner group has no public way to it."""
    return algorithm.learner_group._learner.module[DEFAULT_MODULE_ID].unwrapped()


def local_optimizer(algorithm: Algorithm) -> torch.optim.Optimizer:
    """The optimiser of that module, whose state RLlib's checkpoints keep."""
    learner = algorithm.learner_group._learner
    ((_, optimizer),) = learner.get_optimizers_for_module(DEFAULT_MODULE_ID)
    return optimizer


def sampled(algorithm: Algorithm) -> tuple[list[Any], list[Any]]:
    """Episodes that the runners sample next, and their metrics, as RLlib's own DQN asks for them."""
    episodes, metrics = synchronous_parallel_sample(
        worker_set=algorithm.env_runner_group,
        concat=True,
        sample_timeout_s=algorithm.config.sample_timeout_s,
        _uses_new_env_runners=True,
        _return_metrics=True,
    )
    return episodes, metrics


def reseed(runner: Any, *, steps: int) -> None:
    """Let a runner that has not sampled yet begin with other arrivals than at the start of the training.

    Its first reset takes ``_seed``, which is that of the settings whatever checkpoint was loaded.
    """
    runner._seed += steps


def replace_callbacks(tuner: tune.Tuner, callbacks: Sequence[tune.Callback]) -> None:
    """Give a restored Tuner callbacks; ``Tuner.restore`` takes none, and those of before were pickled."""
    tuner._local_tuner._run_config.callbacks = list(callbacks)


def with_resources(
    algorithm: type[Algorithm], request: Callable[[Any], PlacementGroupFactory]
) -> type[Algorithm]:
    """The algorithm, whose trials ask for other resources; Ray still names their processes after it.

    ``tune.with_resources`` makes a subclass with a qualified name of its own.
    """
    found: type[Algorithm] = tune.with_resources(algorithm, request)
    found.__qualname__ = algorithm.__qualname__
    return found


def before_tune() -> None:
    """Let Tune save its state every second, so that a kill costs a result or two, and print old tables.

    No others take columns of ours. Trials stay in the working directory, where packs and traces that flags
    name are. Tune reads all of it from the environment, and documents the meaning of the last alone.
    """
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
