"""Prioritised n-step replay in numpy: a batch takes microseconds, one from Python episodes milliseconds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BETA = 0.4  # exponent of the weights that make up for drawing by priority (Schaul et al., ICLR 2016)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Transitions, first axis the batch; ``index`` and ``weights`` come from the priorities."""

    observations: np.ndarray  # (b, features) float32
    actions: np.ndarray  # (b,) int64
    returns: np.ndarray  # (b,) float32, discounted rewards until ``next_observations``
    discounts: np.ndarray  # (b,) float32, of the value of ``next_observations``; serving never terminates
    next_observations: np.ndarray  # (b, features) float32
    weights: np.ndarray  # (b,) float32, importance sampling
    index: np.ndarray  # (b,) places in the buffer
    next_penalties: np.ndarray  # (b, actions) float32, what Q loses there; (b, 1) zeros if nothing is held


class ReplayBuffer:
    """A ring of transitions, drawn in proportion to priority ** alpha (Schaul et al., ICLR 2016)."""

    def __init__(
        self,
        capacity: int,
        features: int,
        *,
        gamma: float,
        n_step: int,
        rng: np.random.Generator,
        alpha: float = 0.6,
        beta: float = BETA,
        penalties: np.ndarray | None = None,
    ) -> None:
        """``penalties[a]`` is what Q loses, per action, where the rule would take the action a."""
        self._capacity, self._gamma, self._n_step = capacity, gamma, n_step
        self._rng, self._alpha, self._beta = rng, alpha, beta
        self._observations = np.zeros((capacity, features), np.float32)
        self._next_observations = np.zeros((capacity, features), np.float32)
        self._penalties = np.zeros((1, 1), np.float32) if penalties is None else penalties.astype(np.float32)
        self._next_bases = np.zeros(capacity, np.int64)
        self._actions = np.zeros(capacity, np.int64)
        self._returns = np.zeros(capacity, np.float32)
        self._discounts = np.zeros(capacity, np.float32)
        self._priorities = np.zeros(capacity)
        self._drawn_by, self._cumulative = np.zeros(0), np.zeros(0)
        self._highest = 1.0
        self._next = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(
        self,
        observations: Sequence[np.ndarray],
        actions: Sequence[np.int64],
        rewards: Sequence[float],
        *,
        bases: Sequence[int] = (),
    ) -> None:
        """Add t consecutive steps of one episode: (t + 1, features), (t,), (t,), arrays or what makes them.

        ``bases`` (t + 1,) are the actions that the rule would take; empty: nothing is held to one.
        The last n_step - 1 of them are bootstrapped sooner, from the last observation.
        """
        steps = len(actions)
        start = np.arange(steps)
        end = np.minimum(start + self._n_step, steps)
        padded = np.concatenate((np.asarray(rewards, np.float32), np.zeros(self._n_step, np.float32)))
        at = (self._next + start) % self._capacity
        seen = np.asarray(observations)
        self._observations[at], self._next_observations[at] = seen[:-1], seen[end]
        self._next_bases[at] = np.asarray(bases)[end] if bases else 0
        self._actions[at] = actions
        self._returns[at] = sum(self._gamma**k * padded[start + k] for k in range(self._n_step))
        self._discounts[at] = self._gamma ** (end - start)
        self._priorities[at] = self._highest
        self._next = (self._next + steps) % self._capacity
        self._size = min(self._size + steps, self._capacity)

    def refresh(self) -> None:
        """Take the priorities as they are for the draws to come; once per round of updates is enough."""
        self._drawn_by = self._priorities[: self._size] ** self._alpha
        self._cumulative = np.cumsum(self._drawn_by)

    def sample(self, size: int) -> Batch:
        """Draw ``size`` transitions."""
        total = self._cumulative[-1]
        index = np.searchsorted(self._cumulative, self._rng.random(size) * total, side="right")
        index = np.minimum(index, len(self._cumulative) - 1)
        share = self._drawn_by[index] / total
        weights = (self._size * np.maximum(share, 1e-12)) ** -self._beta
        return Batch(
            observations=self._observations[index],
            actions=self._actions[index],
            returns=self._returns[index],
            discounts=self._discounts[index],
            next_observations=self._next_observations[index],
            weights=(weights / weights.max()).astype(np.float32),
            index=index,
            next_penalties=self._penalties[self._next_bases[index]],
        )

    def set_priorities(self, index: np.ndarray, errors: np.ndarray) -> None:
        """Give transitions the priority of their temporal-difference error."""
        self._priorities[index] = np.abs(errors) + 1e-3
        self._highest = max(self._highest, float(self._priorities[index].max()))
