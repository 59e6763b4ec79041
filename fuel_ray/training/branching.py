"""The DQN on a twin: it learns from branches what an action is worth, where live nodes show only one outcome.

The best simple rule plays fresh arrivals. Every few windows the engine is copied, another action is held and
the rule goes on; and once more with the rule's own. The difference in energy and misses under the same
arrivals is the target of the Q network's difference between the two actions: the advantage of one step away
from the rule, without bootstrapping. At acting the network may leave the rule by as much as was tried.
"""

from typing import Any

import numpy as np
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    ENV_RUNNER_SAMPLING_TIMER,
    LEARNER_RESULTS,
    LEARNER_UPDATE_TIMER,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    TIMERS,
)

from fuel_ray.build.codec import build_codec
from fuel_ray.build.nodes import build_node
from fuel_ray.policies.anchor import REACH_MHZ, Anchor
from fuel_ray.policies.learned import LearnedPolicy
from fuel_ray.policies.network import ENERGY_J
from fuel_ray.sim.branches import Plan, Samples, collect, start
from fuel_ray.sim.node import SimulatedNode
from fuel_ray.sim.program import base_alone
from fuel_ray.sim.snapshot import limits_of
from fuel_ray.training.dqn import MAX_GRADIENT, FastDqn, follow
from fuel_ray.training.ray_private import local_module, local_optimizer
from fuel_ray.tuning.episodes import HELD_OUT_SEED, TUNING_SEEDS

EPISODE_S = 600
_SOFT = 0.03  # share of a limit around it over which a request counts as missed in part
_NOISE_MHZ = 150.0
_LOG_PRICES = (1.0, 3.7)  # log10 of the prices of a miss that the network is shown


class BranchedDqn(FastDqn):
    """DQN whose targets are the differences between branches of a simulated node."""

    def setup(self, config: Any) -> None:
        super().setup(config)
        c, learn = self.config, self.config.learn
        size = c.env_config["block_sizes"][0]
        self._node = build_node(
            learn,
            size,
            horizon_s=EPISODE_S + 1.0,
            workload=learn.workload,
            random_start=True,
            part="first half",
        )
        self._seen = Seen(c.replay_buffer_config["capacity"], len(learn.features))
        self._programs = self._rule(Anchor.from_dict(c.env_config["anchors"][str(size)]))
        self._rng: np.random.Generator | None = None

    def _rule(self, anchor: Anchor) -> Any:
        """The rule as a program, the same with a network, which knows what is seen, and the server."""
        learn, spec = self.config.learn, self._node.spec
        q = local_module(self).q.state_dict()
        arrays = {name: np.zeros(tuple(values.shape), np.float32) for name, values in q.items()}
        policy = LearnedPolicy(arrays, build_codec(learn, spec), spec, head=learn.train.head, anchor=anchor)
        found = policy.compiled(spec)
        assert found is not None, "branches() knows what can be compiled"
        seen, server = found
        return base_alone(seen), seen, server

    def training_step(self) -> None:
        """One round: an episode with its branches, then updates on what all of them showed."""
        done = int(self.metrics.peek((ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME), default=0))
        if self._rng is None:  # a resumed training goes on with new arrivals
            self._rng = np.random.default_rng((self.config.seed or 0, done))
        with self.metrics.log_time((TIMERS, ENV_RUNNER_SAMPLING_TIMER)):
            self._branch(self._rng)
        with self.metrics.log_time((TIMERS, LEARNER_UPDATE_TIMER)):
            losses = self._learn(self._rng, min(done / self.config.learn.steps, 1.0))
        self.metrics.log_dict(losses, key=(LEARNER_RESULTS, DEFAULT_MODULE_ID), window=20)

    def _branch(self, rng: np.random.Generator) -> None:
        node, train = self._node, self.config.learn.train
        assert isinstance(node, SimulatedNode)
        node.reset(seed=int(rng.integers(max(TUNING_SEEDS) + 1, HELD_OUT_SEED)))
        plan = Plan(
            every=train.branch_every,
            tries=train.branch_tries,
            hold=train.branch_hold,
            horizon=train.branch_horizon,
            within_mhz=REACH_MHZ,
            other_limit=train.branch_other_limit,
            soft=_SOFT,
            noise_mhz=_NOISE_MHZ,
        )
        most = (EPISODE_S // train.branch_every + 1) * train.branch_tries
        new, totals = empty(most, self._seen.features), np.zeros(3)
        state, limits = start(node.inside), limits_of(self.config.learn.slo)
        draws = rng.random(4 * EPISODE_S)
        n = collect(*state, *self._programs, limits, plan, EPISODE_S, draws, new, totals)
        self._seen.add(new, n)
        records = node.take_records()
        shown = {
            "energy_j_per_request": totals[0] / max(totals[1], 1.0),
            "slo_attainment": float(records.meets(self.config.learn.slo).mean()) if len(records) else np.nan,
            "mean_gpu_clock_mhz": totals[2] / EPISODE_S,
        }
        steps = {NUM_ENV_STEPS_SAMPLED_LIFETIME: EPISODE_S}
        self.metrics.log_dict(steps, key=ENV_RUNNER_RESULTS, reduce="lifetime_sum")
        self.metrics.log_dict(shown, key=(ENV_RUNNER_RESULTS, "fuel"), window=20)

    def _learn(self, rng: np.random.Generator, progress: float) -> dict[str, float]:
        """A round of gradient updates; ``progress`` through the training lowers the step size."""
        c, module, optimizer = self.config, local_module(self), local_optimizer(self)
        price = c.learn.features.index("miss_price")
        for group in optimizer.param_groups:
            group["lr"] = c.lr * (1.0 - progress * (1.0 - c.learn.train.lr_final_share))
        scale = self._seen.spread()
        for _ in range(c.learn.train.updates_per_round):
            batch = self._seen.sample(c.train_batch_size_per_learner, rng)
            log_prices = rng.uniform(*_LOG_PRICES, len(batch.action))
            batch.observation[:, price] = np.log1p(10.0**log_prices) / 10.0
            loss = branch_loss(module.q, batch, scale)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(module.q.parameters(), MAX_GRADIENT)
            optimizer.step()
            follow(module._target_q, module.q, c.tau)
        return {"loss": loss.item(), "learning_rate": group["lr"]}


class Seen:
    """A ring of what branches showed."""

    def __init__(self, capacity: int, features: int) -> None:
        self._samples, self.features = empty(capacity, features), features
        self._next = self._size = 0

    def add(self, new: Samples, n: int) -> None:
        """Take in the first n samples."""
        capacity = len(self._samples.action)
        at = (self._next + np.arange(n)) % capacity
        for own, seen in zip(self._samples, new, strict=True):
            own[at] = seen[:n]
        self._next, self._size = (self._next + n) % capacity, min(self._size + n, capacity)

    def spread(self) -> tuple[float, float]:
        """Standard deviations of energy, in ``ENERGY_J``, and of misses."""
        energy, misses = self._samples.energy_j[: self._size], self._samples.misses[: self._size]
        return float(energy.std()) / ENERGY_J + 1e-6, float(misses.std()) + 1e-6

    def sample(self, size: int, rng: np.random.Generator) -> Samples:
        """So many of them, each as likely."""
        at = rng.integers(self._size, size=size)
        return Samples(*(own[at] for own in self._samples))


def empty(n: int, features: int) -> Samples:
    """Room for n samples."""
    return Samples(
        observation=np.zeros((n, features), np.float32),
        action=np.zeros(n, np.int64),
        base=np.zeros(n, np.int64),
        energy_j=np.zeros(n),
        misses=np.zeros(n),
    )


def branch_loss(q: Any, batch: Samples, scale: tuple[float, float]) -> torch.Tensor:
    """Squared errors of what the network says the action costs more than the rule's, by their spreads."""
    seen = torch.from_numpy(batch.observation)
    taken, own = (torch.from_numpy(actions).unsqueeze(-1) for actions in (batch.action, batch.base))
    wanted = (batch.energy_j / ENERGY_J, batch.misses)
    energy, misses = (
        ((costs.gather(-1, taken) - costs.gather(-1, own)).squeeze(-1) - torch.from_numpy(more).float())
        / spread
        for costs, more, spread in zip(q.costs(seen), wanted, scale, strict=True)
    )
    return (energy**2).mean() + (misses**2).mean()
