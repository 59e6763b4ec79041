"""RLlib's PPO on the network of the DQN, as EnergyLLM tunes clocks by PPO."""

from collections.abc import Mapping
from typing import Any

import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule

from fuel_ray.config import LearnConfig
from fuel_ray.training.rl_module import built

LAMBDA, CLIP = 0.95, 0.2  # Schulman et al., 2017
ENTROPY = 0.01  # its weight at the start of the training; it falls linearly to 0
FRAGMENTS, EPOCHS = 4, 20  # of --train.fragment-steps in a batch, and passes over it


def ppo(config: LearnConfig, *, model: Mapping[str, Any]) -> PPOConfig:
    """RLlib's settings of PPO, as far as another algorithm's differ; ``model`` is what the network is."""
    settings = config.train
    steps = FRAGMENTS * settings.fragment_steps
    batch = settings.num_envs * steps
    found = PPOConfig()
    found.env_runners(num_envs_per_env_runner=settings.num_envs, rollout_fragment_length=steps)
    found.training(
        lr=[[0, settings.lr], [config.steps, settings.lr * settings.lr_final_share]],
        gamma=settings.gamma,
        lambda_=LAMBDA,
        clip_param=CLIP,
        vf_clip_param=float("inf"),  # prices of a miss differ by a factor of 400, and values with them
        use_kl_loss=False,
        entropy_coeff=[[0, ENTROPY], [config.steps, 0.0]],
        grad_clip=0.5,
        train_batch_size_per_learner=batch,
        minibatch_size=min(settings.batch_size, batch),
        num_epochs=EPOCHS,
    )
    found.rl_module(rl_module_spec=RLModuleSpec(ActorCritic, model_config=dict(model)))
    return found


class ActorCritic(TorchRLModule, ValueFunctionAPI):
    """The duelling network as actor and critic: advantages are logits, the state value is the critic's.

    A softmax is the same whatever is added to all of its logits, so Q itself may be them.
    """

    def setup(self) -> None:
        """Build the network from ``model_config``."""
        self.q = built(self.observation_space.shape[0], **self.model_config)

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {Columns.ACTION_DIST_INPUTS: self.q(batch[Columns.OBS])}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> torch.Tensor:
        """Value of the states: (batch,)."""
        values: torch.Tensor = self.q.value(self.q.trunk(batch[Columns.OBS])).squeeze(-1)
        return values
