"""Double, duelling, n-step DQN with prioritised replay, in RLlib's frame; RLlib's own is rllib_dqn.py.

RLlib's are the life of a training (``Algorithm`` as Tune's trainable, checkpoints, metrics, callbacks), the
module and its optimiser, and where nodes are live the runner that steps them. Ours are the training step, the
sampling on simulated nodes (rollout.py), the replay buffer (replay.py) and the loss below: RLlib's buffer and
learner took 30 ms per update of 128 transitions, this loop 4 ms per update of 256 (both with the sampling
that goes with it; ray 2.60, one shared core, 300 and 640 updates). It needs one local learner, which is also
what is fastest on a small machine.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from ray.rllib.algorithms.dqn import DQN, DQNConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    ENV_RUNNER_SAMPLING_TIMER,
    LEARNER_RESULTS,
    LEARNER_UPDATE_TIMER,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    SYNCH_WORKER_WEIGHTS_TIMER,
    TIMERS,
)

from fuel_ray.algorithms import branches
from fuel_ray.config import LearnConfig
from fuel_ray.training.envs import make_env
from fuel_ray.training.progress import figures
from fuel_ray.training.ray_private import local_module, local_optimizer, sampled
from fuel_ray.training.replay import BETA, Batch, ReplayBuffer
from fuel_ray.training.rl_module import DuelingDqnModule
from fuel_ray.training.rollout import Exploration, Sampler, near

MAX_GRADIENT = 10.0  # norm to which gradients are cut


def dqn(config: LearnConfig, *, model: Mapping[str, Any]) -> "FastDqnConfig":
    """RLlib's settings of a DQN, as far as another algorithm's differ; ``model`` is what the network is."""
    found = FastDqnConfig(learner_of(config))
    found.learn = config
    fill(found, config, model=model)
    found.env_runners(num_envs_per_env_runner=1 if config.node == "sim" else config.train.num_envs)
    found.training(lr=config.train.lr)
    return found


def learner_of(config: LearnConfig) -> "type[FastDqn]":
    """Who learns under these settings."""
    from fuel_ray.training.branching import BranchedDqn  # noqa: PLC0415  (it builds on this module)

    return BranchedDqn if branches(config) else FastDqn


def fill(found: DQNConfig, config: LearnConfig, *, model: Mapping[str, Any]) -> None:
    """Set what this DQN and RLlib's own have in common."""
    settings = config.train
    few = min(max(settings.batch_size, config.steps // 10), settings.buffer_size)
    found.env_runners(rollout_fragment_length=settings.fragment_steps)
    found.training(
        gamma=settings.gamma,
        n_step=settings.n_step,
        train_batch_size_per_learner=settings.batch_size,
        tau=1.0 / settings.target_update_updates,
        target_network_update_freq=0,  # after every update
        num_steps_sampled_before_learning_starts=min(settings.learning_starts, few),
        replay_buffer_config={
            "type": "PrioritizedEpisodeReplayBuffer",
            "capacity": settings.buffer_size,
            "alpha": settings.priority,
            "beta": BETA,
        },
    )
    falls_until = int(config.steps * settings.epsilon_share)
    epsilon = [[0, settings.epsilon_initial], [falls_until, settings.epsilon_final]]
    found.rl_module(rl_module_spec=RLModuleSpec(DuelingDqnModule, model_config={**model, "epsilon": epsilon}))


class FastDqnConfig(DQNConfig):
    """DQNConfig with what the loop below needs to know besides."""

    learn = LearnConfig()


class FastDqn(DQN):
    """Double, duelling, n-step DQN with prioritised replay."""

    @classmethod
    def get_default_config(cls) -> FastDqnConfig:
        return FastDqnConfig(FastDqn)

    def setup(self, config: Any) -> None:
        super().setup(config)
        c = self.config
        # RLlib's runner of simulated nodes only says what the spaces are
        own = c.learn.train.num_envs if c.learn.node == "sim" and not branches(c.learn) else 0
        envs: list[Any] = [make_env(c.env_config) for _ in range(own)]
        self._envs = envs
        self._sampler: Sampler | None = None
        self._buffer = ReplayBuffer(
            c.replay_buffer_config["capacity"],
            self.env_runner.module.observation_space.shape[0],
            gamma=c.gamma,
            n_step=c.n_step,
            rng=np.random.default_rng(c.seed),
            alpha=c.replay_buffer_config["alpha"],
            penalties=envs[0].penalties if envs else None,
        )

    def _own_sampler(self, done: int) -> Sampler:
        """What steps simulated nodes; a training resumed after ``done`` steps begins with new arrivals."""
        # (seed, 0) is seed itself to numpy
        envs, rng = self._envs, np.random.default_rng((self.config.seed, done))
        grid, hold_steps = envs[0].codec.grid, self.config.learn.train.hold_steps
        exploration = Exploration(len(envs), len(grid), hold_steps=hold_steps, rng=rng, near=near(grid))
        return Sampler(envs, exploration, seed=int(rng.integers(2**31)))

    def training_step(self) -> None:
        """One round: sample, update ``updates_per_round`` times, hand the weights to the sampler."""
        c = self.config
        done = self.metrics.peek((ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME), default=0)
        progress = min(done / c.learn.steps, 1.0)
        with self.metrics.log_time((TIMERS, ENV_RUNNER_SAMPLING_TIMER)):
            if not self._envs:
                self._sample_by_runner()
            else:
                self._sampler = self._sampler or self._own_sampler(int(done))
                self._sample(self._sampler, progress)
        if len(self._buffer) < c.num_steps_sampled_before_learning_starts:
            return
        with self.metrics.log_time((TIMERS, LEARNER_UPDATE_TIMER)):
            losses = self._update(progress)
        self.metrics.log_dict(losses, key=(LEARNER_RESULTS, DEFAULT_MODULE_ID), window=20)
        if not self._envs:
            with self.metrics.log_time((TIMERS, SYNCH_WORKER_WEIGHTS_TIMER)):
                self.env_runner_group.sync_weights(
                    from_worker_or_learner_group=self.learner_group, inference_only=True
                )

    def _sample_by_runner(self) -> None:
        """Live nodes, whose windows pass at the same time and may fail, are RLlib's runner's to step."""
        episodes, results = sampled(self)
        self.metrics.aggregate(results, key=ENV_RUNNER_RESULTS)
        for episode in episodes:
            if len(episode):
                self._buffer.add(episode.get_observations(), episode.get_actions(), episode.get_rewards())

    def _sample(self, sampler: Sampler, progress: float) -> None:
        """Simulated nodes are stepped here, in a quarter of the time; counts what a runner counts."""
        c = self.config.learn.train
        left = max(0.0, 1.0 - progress / c.epsilon_share)
        epsilon = c.epsilon_final + (c.epsilon_initial - c.epsilon_final) * left
        fragments = sampler.sample(self._greedy, steps=c.fragment_steps, epsilon=epsilon)
        for fragment in fragments:
            self._buffer.add(fragment.observations, fragment.actions, fragment.rewards, bases=fragment.bases)
        infos = [info for fragment in fragments for info in fragment.infos]
        steps = {NUM_ENV_STEPS_SAMPLED_LIFETIME: len(infos)}
        self.metrics.log_dict(steps, key=ENV_RUNNER_RESULTS, reduce="lifetime_sum")
        rewards = np.concatenate([np.array(fragment.rewards, np.float32) for fragment in fragments])
        shown = figures(infos, reward=float(rewards.mean()))
        self.metrics.log_dict(shown, key=(ENV_RUNNER_RESULTS, "fuel"), window=20)

    def _greedy(self, observations: np.ndarray, penalties: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            q = local_module(self).q(torch.from_numpy(observations)).numpy()
        return np.asarray((q - penalties.reshape(len(q), -1)).argmax(-1))

    def _update(self, progress: float) -> dict[str, float]:
        """A round of gradient updates; ``progress`` through the training lowers the step size."""
        c, module, optimizer = self.config, local_module(self), local_optimizer(self)
        for group in optimizer.param_groups:
            group["lr"] = c.lr * (1.0 - progress * (1.0 - c.learn.train.lr_final_share))
        self._buffer.refresh()
        for _ in range(c.learn.train.updates_per_round):
            batch = self._buffer.sample(c.train_batch_size_per_learner)
            errors, loss = _loss(module, batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.q.parameters(), MAX_GRADIENT)
            optimizer.step()
            self._buffer.set_priorities(batch.index, errors)
            follow(module._target_q, module.q, c.tau)
        return {
            "loss": loss.item(),
            "td_error_mean": float(np.abs(errors).mean()),
            "learning_rate": group["lr"],
        }


def follow(target: torch.nn.Module, online: torch.nn.Module, share: float) -> None:
    """Move the target network by this share of the way to the online one."""
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), share)


def _loss(module: Any, batch: Batch) -> tuple[np.ndarray, torch.Tensor]:
    """Temporal-difference errors, and their weighted Huber loss (van Hasselt et al., AAAI 2016).

    The next action is the one that would be taken: held to the load table, as acting is.
    """
    following = torch.from_numpy(batch.next_observations)
    with torch.no_grad():
        held = module.q(following) - torch.from_numpy(batch.next_penalties)
        best = held.argmax(-1, keepdim=True)
        value = module._target_q(following).gather(-1, best).squeeze(-1)
        target = torch.from_numpy(batch.returns) + torch.from_numpy(batch.discounts) * value
    actions = torch.from_numpy(batch.actions).unsqueeze(-1)
    q = module.q(torch.from_numpy(batch.observations)).gather(-1, actions).squeeze(-1)
    errors = (q - target).detach().numpy()
    huber = torch.nn.functional.smooth_l1_loss(q, target, reduction="none")
    return errors, (torch.from_numpy(batch.weights) * huber).mean()
