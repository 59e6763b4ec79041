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
from fuel_ray.policies.network import BUMPS, Head, bumps


class DuelingQNet(nn.Module):
    """State value plus advantages; all heads but the joint one add one per limit and one per clock.

    Duelling: Wang et al., ICML 2016. Additive advantages share what is learned of a clock across limits
    (Tavakoli et al., AAAI 2018, call the idea action branching). A smooth head is an additive one whose
    advantages of the clocks are sums of a few bumps.
    """

    def __init__(
        self, features: int, *, limits: int, clocks: int, hidden: tuple[int, ...], head: Head
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = features
        for units in hidden:
            layers += [nn.Linear(width, units), nn.ReLU()]
            width = units
        self.trunk = nn.Sequential(*layers)
        self.value = nn.Linear(width, 1)
        self.head = head
        if head == "joint":
            self.advantage = nn.Linear(width, limits * clocks)
        else:
            self.limit_advantage = nn.Linear(width, limits)
        if head == "additive":
            self.clock_advantage = nn.Linear(width, clocks)
        elif head == "smooth":
            self.clock_bumps = nn.Linear(width, BUMPS)
            self.register_buffer("basis", torch.from_numpy(bumps(clocks).T.copy()), persistent=False)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """Q of every action: (batch, features) -> (batch, actions)."""
        hidden = self.trunk(observations)
        if self.head == "joint":
            advantage = self.advantage(hidden)
        else:
            smooth = self.head == "smooth"
            clocks = self.clock_bumps(hidden) @ self.basis if smooth else self.clock_advantage(hidden)
            advantage = (self.limit_advantage(hidden).unsqueeze(-1) + clocks.unsqueeze(-2)).flatten(-2)
        q: torch.Tensor = self.value(hidden) + advantage - advantage.mean(-1, keepdim=True)
        return q


def built(
    features: int, *, start_from: str | None, extra_features: Sequence[str] = (), **model: Any
) -> DuelingQNet:
    """The network of a module's ``model_config``, with the weights of the policy that it starts from."""
    names = ("limits", "clocks", "hidden", "head")
    network = DuelingQNet(features, **{name: model[name] for name in names})
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
