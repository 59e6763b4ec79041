"""Steps many environments together and explores: a window costs 0.1 ms here and 0.4 ms in RLlib's runner."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fuel_ray.codec import ActionGrid
from fuel_ray.env import ServingEnv, unlearnable
from fuel_ray.policies.anchor import REACH_MHZ


@dataclass(slots=True, eq=False)
class Fragment:
    """Consecutive steps of one episode, which grow: one observation more than actions, rewards and infos.

    ``bases`` are the actions that the rule would take after each observation; empty without one.
    """

    observations: list[np.ndarray]
    bases: list[int] = field(default_factory=list)
    actions: list[np.int64] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    infos: list[Mapping[str, Any]] = field(default_factory=list)


class Exploration:
    """Random actions for a share epsilon of the time, each held for ``hold_steps`` on average.

    Held exploration: Dabney et al., ICLR 2021. A request lives for several windows, so one window at another
    clock says little about it.
    """

    def __init__(
        self,
        envs: int,
        actions: int,
        *,
        hold_steps: int,
        rng: np.random.Generator,
        near: np.ndarray | None = None,
    ) -> None:
        """``near[a]`` are the actions, padded by repeating some, that random ones around a are drawn from."""
        self._actions, self._hold, self._rng, self._near = actions, hold_steps, rng, near
        self._held, self._left = np.zeros(envs, np.int64), np.zeros(envs, np.int64)

    def choose(
        self,
        greedy: np.ndarray,
        epsilon: float,
        bases: np.ndarray | None = None,
        *,
        penalties: np.ndarray | None = None,
    ) -> np.ndarray:
        """The greedy actions (envs,), or the random ones that are held; drawn near ``bases`` if there are.

        A random action of infinite ``penalties`` (envs, actions) is not taken, and not held any longer.
        """
        n = len(greedy)
        begin = epsilon / (epsilon + (1.0 - epsilon) * self._hold)
        start = (self._left == 0) & (self._rng.random(n) < begin)
        if bases is None or self._near is None:
            drawn = self._rng.integers(self._actions, size=n)
        else:
            drawn = self._near[bases, self._rng.integers(self._near.shape[1], size=n)]
        self._held = np.where(start, drawn, self._held)
        self._left = np.where(start, self._rng.integers(1, 2 * self._hold, size=n), self._left)
        if penalties is not None:
            self._left[np.isinf(penalties[np.arange(n), self._held])] = 0
        chosen = np.where(self._left > 0, self._held, greedy)
        self._left = np.maximum(self._left - 1, 0)
        return chosen


class Sampler:
    """Environments that are reset when an episode ends, and what they have seen since the last call."""

    def __init__(self, envs: Sequence[ServingEnv], exploration: Exploration, *, seed: int) -> None:
        self._envs, self._exploration = envs, exploration
        self._seen = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])

    def sample(
        self, greedy: Callable[[np.ndarray, np.ndarray], np.ndarray], *, steps: int, epsilon: float
    ) -> list[Fragment]:
        """Take ``steps`` steps in each environment; ``greedy`` maps observations and penalties to actions."""
        fragments = [Fragment([self._seen[i].copy()], _base(env)) for i, env in enumerate(self._envs)]
        done = []
        for _ in range(steps):
            penalties = np.array([env.penalty for env in self._envs], np.float32)
            bases = [env.base for env in self._envs]
            around = None if None in bases else np.array(bases)
            best = greedy(self._seen, penalties)
            held = penalties if penalties.ndim > 1 else None
            actions = self._exploration.choose(best, epsilon, around, penalties=held)
            for i, env in enumerate(self._envs):
                observation, reward, _, truncated, info = env.step(actions[i])
                fragment = fragments[i]
                if not (truncated and unlearnable(info)):
                    fragment.observations.append(observation)
                    fragment.bases += _base(env)
                    fragment.actions.append(actions[i])
                    fragment.rewards.append(reward)
                    fragment.infos.append(info)
                if truncated:
                    done.append(fragment)
                    observation, _ = env.reset()
                    fragments[i] = Fragment([observation], _base(env))
                self._seen[i] = observation
        return [fragment for fragment in (*done, *fragments) if fragment.actions]


def _base(env: ServingEnv) -> list[int]:
    return [] if env.base is None else [env.base]


def near(grid: ActionGrid) -> np.ndarray:
    """Per action, those whose clock is within ``REACH_MHZ``: (actions, the most that any has).

    None has a lower batch limit, as the policy never takes one lower than its table's. Those of its own are
    there eighteen times or more, and rows with fewer repeat theirs.
    """
    clocks, limits = np.array(grid.gpu_clocks_mhz), len(grid.batch_limits)
    within = [np.flatnonzero(np.abs(clocks - clock) <= REACH_MHZ) for clock in clocks]
    width = max(map(len, within))
    rows = np.stack([np.resize(places, width) for places in within])
    drawn = [[*range(limit, limits), *[limit] * (17 + limit)] for limit in range(limits)]
    return np.concatenate([np.hstack([k * len(clocks) + rows for k in own]) for own in drawn])
