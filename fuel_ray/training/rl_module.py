"""The Q network as an RLlib module. Only training imports this; acting needs ``network.q_values``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ray.rllib.algorithms.dqn.dqn_learner import QF_NEXT_PREDS, QF_PREDS, QF_TARGET_NEXT_PREDS
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.utils import make_target_network
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI, QNetAPI, TargetNetworkAPI
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from ray.rllib.utils.schedules.scheduler import Scheduler
from torch import nn

from fuel_ray.policies.learned import read_policy
from fuel_ray.policies.network import BUMPS, ENERGY_J, Head, bumps


class DuelingQNet(nn.Module):
    """State value plus advantages; all heads but the joint one add one per limit and one per clock.

    Duelling: Wang et al., ICML 2016. Additive advantages share what is learned of a clock across limits
    (Tavakoli et al., AAAI 2018, call the idea action branching). A smooth head is an additive one whose
    advantages of the clocks are sums of a few bumps. A priced head is a smooth one that says energy and
    misses each by itself; the observation has the price at which they add up to Q.
    """

    def __init__(
        self,
        features: int,
        *,
        limits: int,
        clocks: int,
        hidden: tuple[int, ...],
        head: Head,
        price_feature: int | None = None,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = features
        for units in hidden:
            layers += [nn.Linear(width, units), nn.ReLU()]
            width = units
        self.trunk = nn.Sequential(*layers)
        self.value = nn.Linear(width, 1)
        self.head, self._price_feature = head, price_feature
        if head == "joint":
            self.advantage = nn.Linear(width, limits * clocks)
        elif head == "priced":
            self.limit_costs = nn.Linear(width, 2 * limits)
            self.clock_costs = nn.Linear(width, 2 * BUMPS)
        else:
            self.limit_advantage = nn.Linear(width, limits)
        if head == "additive":
            self.clock_advantage = nn.Linear(width, clocks)
        elif head == "smooth":
            self.clock_bumps = nn.Linear(width, BUMPS)
        if head in ("smooth", "priced"):
            self.register_buffer("basis", torch.from_numpy(bumps(clocks).T.copy()), persistent=False)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """Q of every action: (batch, features) -> (batch, actions)."""
        hidden = self.trunk(observations)
        if self.head == "joint":
            advantage = self.advantage(hidden)
        elif self.head == "priced":
            advantage = self._priced(observations, *self._costs(hidden))
        else:
            smooth = self.head == "smooth"
            clocks = self.clock_bumps(hidden) @ self.basis if smooth else self.clock_advantage(hidden)
            advantage = (self.limit_advantage(hidden).unsqueeze(-1) + clocks.unsqueeze(-2)).flatten(-2)
        q: torch.Tensor = self.value(hidden) + advantage - advantage.mean(-1, keepdim=True)
        return q

    def costs(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a priced head, what actions cost more than others: energy in ``ENERGY_J``, and misses.

        (batch, features) -> (batch, actions) each.
        """
        return self._costs(self.trunk(observations))

    def _costs(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        limits, clocks = (
            costs(hidden).unflatten(-1, (2, -1)) for costs in (self.limit_costs, self.clock_costs)
        )
        joint = limits.unsqueeze(-1) + (clocks @ self.basis).unsqueeze(-2)
        energy, misses = joint.flatten(-2).unbind(-2)
        return energy, misses

    def _priced(self, observations: torch.Tensor, energy: torch.Tensor, misses: torch.Tensor) -> torch.Tensor:
        """As ``network.worth`` has it, with the price that each observation shows."""
        at = self._price_feature
        assert at is not None, "a priced head is shown the price"
        price_j = torch.expm1(10.0 * observations[:, at : at + 1])
        return -(ENERGY_J * energy + price_j * misses) / (300.0 * (1.0 + price_j / 200.0))


def built(
    features: int, *, start_from: str | None, extra_features: Sequence[str] = (), **model: Any
) -> DuelingQNet:
    """The network of a module's ``model_config``, with the weights of the policy that it starts from."""
    names = ("limits", "clocks", "hidden", "head", "price_feature")
    network = DuelingQNet(features, **{name: model[name] for name in names if name in model})
    if start_from is not None:
        arrays = read_policy(Path(start_from), extra_features=extra_features).arrays
        network.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return network


class DuelingDqnModule(TorchRLModule, InferenceOnlyAPI, TargetNetworkAPI, QNetAPI):
    """What RLlib's DQN asks of a module: Q values, a target network, epsilon-greedy exploration."""

    def setup(self) -> None:
        """Build the networks from ``model_config``."""
        self.q = built(self.observation_space.shape[0], **self.model_config)
        epsilon = self.model_config["epsilon"]
        self.epsilon_schedule = Scheduler(fixed_value_or_schedule=epsilon, framework="torch")

    def get_non_inference_attributes(self) -> list[str]:
        """What an actor's copy goes without."""
        return ["_target_q"]

    def make_target_networks(self) -> None:
        self._target_q = make_target_network(self.q)

    def get_target_network_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.q, self._target_q)]

    def compute_q_values(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {QF_PREDS: self.q(batch[Columns.OBS])}

    def forward_target(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {QF_PREDS: self._target_q(batch[Columns.OBS])}

    def _forward_train(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        """What the loss of RLlib's own learner takes; nothing of the next state has a gradient."""
        following = batch[Columns.NEXT_OBS]
        with torch.no_grad():
            ahead = {QF_NEXT_PREDS: self.q(following), QF_TARGET_NEXT_PREDS: self._target_q(following)}
        return {QF_PREDS: self.q(batch[Columns.OBS]), **ahead}

    def _forward_inference(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {Columns.ACTIONS: self.q(batch[Columns.OBS]).argmax(-1)}

    def _forward_exploration(self, batch: dict[str, Any], t: int = 0, **_: Any) -> dict[str, Any]:
        q = self.q(batch[Columns.OBS])
        self.epsilon_schedule.update(t)
        explore = torch.rand(len(q)) < self.epsilon_schedule.get_current_value()
        random = torch.randint(q.shape[-1], (len(q),))
        return {Columns.ACTIONS: torch.where(explore, random, q.argmax(-1))}
