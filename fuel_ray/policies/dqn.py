"""RLlib's DQN with a vectorised replay buffer and update loop.

RLlib's own buffer and learner took 30 ms per update of 128 transitions, this loop 4 ms per update of 256
(both with the sampling that goes with it; ray 2.60, one shared core, 300 and 640 updates). Sampling, module,
optimiser, checkpoints, callbacks and Tune are RLlib's. It needs one local learner, which is also what is
fastest on a small machine.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ray.rllib.algorithms.dqn import DQN, DQNConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.execution.rollout_ops import synchronous_parallel_sample
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    ENV_RUNNER_SAMPLING_TIMER,
    LEARNER_RESULTS,
    LEARNER_UPDATE_TIMER,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    SYNCH_WORKER_WEIGHTS_TIMER,
    TIMERS,
)
from ray.tune import PlacementGroupFactory

from fuel_ray.env import NODE_FAILURE
from fuel_ray.policies.replay import Batch, ReplayBuffer


class FastDqnConfig(DQNConfig):
    """DQNConfig with the number of updates per round of sampling and the length of the training."""

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or FastDqn)
        self.updates_per_round = 8
        self.total_steps = 100_000
        self.lr_final_share = 0.1
        self.node_bundles: list[dict[str, float]] = []

    def fast(
        self, *, updates_per_round: int, total_steps: int, node_bundles: Sequence[dict[str, float]] = ()
    ) -> "FastDqnConfig":
        """Set what DQNConfig does not know; ``node_bundles`` are resources of actors that a trial makes."""
        self.updates_per_round = updates_per_round
        self.total_steps = total_steps
        self.node_bundles = list(node_bundles)
        return self


class FastDqn(DQN):
    """Double, duelling, n-step DQN with prioritised replay."""

    @classmethod
    def get_default_config(cls) -> FastDqnConfig:
        """RLlib's hook."""
        return FastDqnConfig()

    @classmethod
    def default_resource_request(cls, config: Any) -> PlacementGroupFactory:
        """RLlib's hook: a trial begins once the cluster has its process and its nodes free."""
        request = super().default_resource_request(config)
        return PlacementGroupFactory([*request.bundles, *config["node_bundles"]], strategy=request.strategy)

    def setup(self, config: Any) -> None:
        """RLlib's hook: build everything, then the replay buffer."""
        super().setup(config)
        c = self.config
        self._buffer = ReplayBuffer(
            c.replay_buffer_config["capacity"],
            self.env_runner.module.observation_space.shape[0],
            gamma=c.gamma,
            n_step=c.n_step,
            rng=np.random.default_rng(c.seed),
        )
        self._updates = 0

    def training_step(self) -> None:
        """One round: sample, update ``updates_per_round`` times, hand the weights to the sampler."""
        c = self.config
        with self.metrics.log_time((TIMERS, ENV_RUNNER_SAMPLING_TIMER)):
            episodes, results = synchronous_parallel_sample(
                worker_set=self.env_runner_group,
                concat=True,
                sample_timeout_s=c.sample_timeout_s,
                _uses_new_env_runners=True,
                _return_metrics=True,
            )
        self.metrics.aggregate(results, key=ENV_RUNNER_RESULTS)
        for episode in episodes:
            steps = len(episode)
            if steps and NODE_FAILURE in episode.get_infos(-1):
                steps -= 1  # nothing was measured in it
            if steps:
                self._buffer.add(
                    np.asarray(episode.get_observations())[: steps + 1],
                    np.asarray(episode.get_actions())[:steps],
                    np.asarray(episode.get_rewards(), np.float32)[:steps],
                )
        if len(self._buffer) < c.num_steps_sampled_before_learning_starts:
            return
        sampled = self.metrics.peek((ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME), default=0)
        with self.metrics.log_time((TIMERS, LEARNER_UPDATE_TIMER)):
            figures = self._update(min(sampled / c.total_steps, 1.0))
        self.metrics.log_dict(figures, key=(LEARNER_RESULTS, DEFAULT_MODULE_ID), window=20)
        with self.metrics.log_time((TIMERS, SYNCH_WORKER_WEIGHTS_TIMER)):
            self.env_runner_group.sync_weights(
                from_worker_or_learner_group=self.learner_group, inference_only=True
            )

    def _update(self, progress: float) -> dict[str, float]:
        """A round of gradient updates; ``progress`` through the training lowers the step size."""
        c = self.config
        learner = self.learner_group._learner
        module = learner.module[DEFAULT_MODULE_ID].unwrapped()
        ((_, optimizer),) = learner.get_optimizers_for_module(DEFAULT_MODULE_ID)
        for group in optimizer.param_groups:
            group["lr"] = c.lr * (1.0 - progress * (1.0 - c.lr_final_share))
        self._buffer.refresh()
        for _ in range(c.updates_per_round):
            batch = self._buffer.sample(c.train_batch_size_per_learner)
            errors, loss = _loss(module, batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.q.parameters(), 10.0)
            optimizer.step()
            self._buffer.set_priorities(batch.index, errors)
            self._updates += 1
            if self._updates % c.target_network_update_freq == 0:
                module._target_q.load_state_dict(module.q.state_dict())
        return {
            "loss": float(loss),
            "td_error_mean": float(np.abs(errors).mean()),
            "learning_rate": group["lr"],
        }


def _loss(module: Any, batch: Batch) -> tuple[np.ndarray, torch.Tensor]:
    """Temporal-difference errors, and their weighted Huber loss (van Hasselt et al., AAAI 2016)."""
    following = torch.from_numpy(batch.next_observations)
    with torch.no_grad():
        best = module.q(following).argmax(-1, keepdim=True)
        value = module._target_q(following).gather(-1, best).squeeze(-1)
        target = torch.from_numpy(batch.returns) + torch.from_numpy(batch.discounts) * value
    actions = torch.from_numpy(batch.actions).unsqueeze(-1)
    q = module.q(torch.from_numpy(batch.observations)).gather(-1, actions).squeeze(-1)
    errors = (q - target).detach().numpy()
    huber = torch.nn.functional.smooth_l1_loss(q, target, reduction="none")
    return errors, (torch.from_numpy(batch.weights) * huber).mean()
