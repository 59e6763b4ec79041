"""RLlib's own DQN whole, to have beside ours: its training step, runner, replay buffer, learner and loss.

Ours are the network, the environment and the settings. RLlib knows nothing of a rule, so what ``dqn``
does with one is not here: random actions are drawn evenly from the whole grid for a window each, the greedy
action is the highest Q without a charge for leaving the table, and so it is in the targets. An action of a
lower batch limit than the table's is served at the table's, which the environment sees to; runner and targets
take them for actions of their own. Evaluated, the policy is held near its table as that of ``dqn`` is.
A resumed training learns at once from the little that it has sampled since (that of ``dqn`` waits for more),
and RLlib's buffer waits for ever if a failure of a node leaves it no episode of ``n_step`` steps there.
"""

from collections.abc import Mapping
from typing import Any

from ray.rllib.algorithms.dqn import DQNConfig

from fuel_ray.config import LearnConfig
from fuel_ray.training.dqn import MAX_GRADIENT, fill


def rllib_dqn(config: LearnConfig, *, model: Mapping[str, Any]) -> DQNConfig:
    """RLlib's settings of its DQN, as far as another algorithm's differ; ``model`` is what the network is."""
    settings = config.train
    found = DQNConfig()
    fill(found, config, model=model)
    found.env_runners(num_envs_per_env_runner=settings.num_envs)
    round_steps = settings.num_envs * settings.fragment_steps
    found.training(
        lr=[[0, settings.lr], [config.steps, settings.lr * settings.lr_final_share]],
        training_intensity=settings.updates_per_round * settings.batch_size / round_steps,
        grad_clip=MAX_GRADIENT,
        grad_clip_by="global_norm",
        td_error_loss_fn="huber",
        double_q=True,
        num_atoms=1,
    )
    return found
