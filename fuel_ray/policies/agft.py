"""AGFT-style clock control: a contextual bandit that learns while it serves."""

import copy
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np

from fuel_ray.metrics import window_attainment
from fuel_ray.types import Knobs, NodeSpec, Slo, WindowMetrics

FEATURES = 8  # AGFT's seven and a constant
_RIDGE = 1.0
_MEMORY = ("_inverse", "_moment", "_tries", "_reward_sum", "_energy_j", "_tokens")  # what is learned


@dataclass(eq=False)
class AgftLinUcb:
    """LinUCB (Li et al., WWW 2010) over clocks with AGFT's features.

    Features: has-queue, prefill tokens/s, decode tokens/s, packing, concurrency, KV usage, prefix hit rate,
    scaled to about 0..1, and 1. AGFT decides every 0.8 s; this one decides per window. Reward, exploration
    and the rule of pruning are ours: minus the energy per output token by its average so far, minus
    ``miss_price`` times the share of samples that missed the SLO; a clock is dropped after ``prune_after``
    tries if its mean reward is more than ``prune_gap`` below the best one's. The highest clock is never
    dropped and is taken while requests wait longer than the TTFT limit.
    """

    spec: NodeSpec
    slo: Slo
    _: KW_ONLY
    batch_limit: int
    clocks_mhz: Sequence[int]  # the arms
    alpha: float = 0.3  # weighs exploration
    miss_price: float = 10.0
    prune_after: int = 20
    prune_gap: float = 0.5

    def __post_init__(self) -> None:
        self._clocks_mhz = tuple(sorted({*self.clocks_mhz, self.spec.gpu_clocks_mhz[-1]}))
        arms = len(self._clocks_mhz)
        self._inverse = np.tile(np.eye(FEATURES) / _RIDGE, (arms, 1, 1))
        self._moment = np.zeros((arms, FEATURES))
        self._tries, self._reward_sum = np.zeros(arms), np.zeros(arms)
        self._energy_j, self._tokens = 0.0, 0.0
        self._last: tuple[int, np.ndarray] | None = None
        self.keep()

    def reset(self) -> None:
        """Back to what was known when ``keep`` was last called: nothing, if it never was."""
        vars(self).update(copy.deepcopy(self._kept))
        self._last = None

    def keep(self) -> None:
        self._kept = copy.deepcopy({name: vars(self)[name] for name in _MEMORY})

    def decide(self, window: WindowMetrics) -> Knobs:
        if self._last is not None and (reward := self._reward(window)) is not None:
            self._learn(*self._last, reward)
        x = self._features(window)
        spread = np.sqrt(np.einsum("i,aij,j->a", x, self._inverse, x))
        mean = np.einsum("aij,aj,i->a", self._inverse, self._moment, x)
        arm = int(np.where(self._alive(), mean + self.alpha * spread, -np.inf).argmax())
        wait_limit_s = self.slo.wait_limit_s
        if wait_limit_s is not None and window.oldest_wait_s > wait_limit_s:
            arm = len(self._clocks_mhz) - 1
        self._last = (arm, x)
        return Knobs(self.batch_limit, self._clocks_mhz[arm])

    def _learn(self, arm: int, x: np.ndarray, reward: float) -> None:
        """Sherman and Morrison's update of one arm's inverse."""
        gain = self._inverse[arm] @ x
        self._inverse[arm] -= np.outer(gain, gain) / (1.0 + x @ gain)
        self._moment[arm] += reward * x
        self._tries[arm] += 1
        self._reward_sum[arm] += reward

    def _alive(self) -> np.ndarray:
        mean = self._reward_sum / np.maximum(self._tries, 1)
        tried = self._tries >= self.prune_after
        best = mean[tried].max(initial=-np.inf)
        alive: np.ndarray = ~(tried & (mean < best - self.prune_gap))
        alive[-1] = True
        return alive

    def _reward(self, window: WindowMetrics) -> float | None:
        attainment = window_attainment(window, self.slo)
        if attainment is None or window.limit_acknowledged is False:
            return None
        self._energy_j += window.energy_j
        self._tokens += window.output_tokens
        if not self._tokens:
            return 0.0
        reference_j = self._energy_j / self._tokens
        cost = window.energy_j / max(window.output_tokens, 1) / reference_j
        return -min(cost, 3.0) - self.miss_price * (1.0 - attainment)

    def _features(self, window: WindowMetrics) -> np.ndarray:
        seconds, capacity = window.duration_s, self.spec.batch_limits[-1]
        scheduled = window.prompt_tokens + window.output_tokens
        return np.array(
            [
                float(window.waiting > 0),
                window.prompt_tokens / seconds / 10_000,
                window.output_tokens / seconds / 5_000,
                window.output_tokens / scheduled if scheduled else 0.0,
                window.running / capacity,
                window.kv_usage,
                window.prefix_hit_rate or 0.0,
                1.0,
            ]
        )
