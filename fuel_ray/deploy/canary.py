"""A policy on trial: it rules in some blocks of time, drawn by chance, and the difference is measured."""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from fuel_ray.metrics import window_attainment
from fuel_ray.stats import Interval
from fuel_ray.types import Knobs, Policy, Slo, WindowMetrics

WASHOUT_S = 3.0  # at the begin of a block: requests that the other side admitted are still running
MAX_BLOCKS = 20_000  # a week of 30 s


@dataclass(slots=True)
class _Block:
    on_trial: bool
    energy_j: float = 0.0
    output_tokens: int = 0
    attainment_s: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Difference:
    """What the trial has shown so far; negative energy is a saving."""

    blocks: tuple[int, int]  # with the policy, without it
    energy: Interval | None  # change of joules per output token, as a share; None before both sides have some
    attainment: Interval | None  # change of the share of limits met


class Canary:
    """Applies a policy in one of every ``1 / share`` blocks, rounded up, and a reference in the others.

    The policy sees every window, so that it has its memory when a block of its own begins.
    """

    def __init__(self, *, share: float, block_s: float, slo: Slo, rng: np.random.Generator) -> None:
        self._policy: Policy | None = None
        self._reference: Knobs | None = None
        self._group = max(2, math.ceil(1.0 / share - 1e-9))
        self._block_s, self._slo, self._rng = block_s, slo, rng
        self._done: deque[_Block] = deque(maxlen=MAX_BLOCKS)
        self._drawn: list[bool] = []  # sides of the blocks that are left in this group
        self._block = self._next_block()
        self._elapsed_s = 0.0

    def over(self, policy: Policy, reference: Knobs) -> "Canary":
        """Itself, for this policy and these knobs from here on; what was measured stays."""
        self._policy, self._reference = policy, reference
        return self

    def reset(self) -> None:
        """Begin a new block after a gap; what was measured stays."""
        assert self._policy is not None
        self._policy.reset()
        self._block, self._elapsed_s = self._next_block(), 0.0

    def decide(self, window: WindowMetrics) -> Knobs:
        """The policy's knobs or the reference."""
        assert self._policy is not None
        assert self._reference is not None
        self._count(window)
        chosen = self._policy.decide(window)
        return chosen if self._block.on_trial else self._reference

    def difference(self, *, resamples: int = 2000) -> Difference:
        """The policy's blocks against the others, with 95 % bootstrap intervals over blocks."""
        sides = [[b for b in self._done if b.on_trial == side and b.seconds] for side in (True, False)]
        counts = len(sides[0]), len(sides[1])
        energy = [
            np.array([(b.energy_j, b.output_tokens) for b in side if b.output_tokens]) for side in sides
        ]
        met = [np.array([(b.attainment_s, b.seconds) for b in side]) for side in sides]
        return Difference(
            counts,
            energy=_compared(energy[0], energy[1], np.divide, self._rng, resamples),
            attainment=_compared(met[0], met[1], np.subtract, self._rng, resamples),
        )

    def _count(self, window: WindowMetrics) -> None:
        self._elapsed_s += window.duration_s
        if self._elapsed_s > WASHOUT_S:
            block = self._block
            block.energy_j += window.energy_j
            block.output_tokens += window.output_tokens
            block.attainment_s += window_attainment(window, self._slo) * window.duration_s
            block.seconds += window.duration_s
        if self._elapsed_s >= self._block_s:
            self._done.append(self._block)
            self._block, self._elapsed_s = self._next_block(), 0.0

    def _next_block(self) -> _Block:
        if not self._drawn:
            self._drawn = [False] * self._group
            self._drawn[int(self._rng.integers(self._group))] = True
        return _Block(self._drawn.pop())


def _compared(
    trial: np.ndarray, others: np.ndarray, compare: np.ufunc, rng: np.random.Generator, resamples: int
) -> Interval | None:
    """Ratio of sums of one side against the other's; a division is given as a change, less 1."""
    if len(trial) < 1 or len(others) < 1 or (compare is np.divide and not others[:, 0].any()):
        return None
    offset = 1.0 if compare is np.divide else 0.0
    mean = float(compare(_ratio(trial.sum(axis=0)), _ratio(others.sum(axis=0)))) - offset
    if len(trial) < 2 or len(others) < 2:
        return Interval(mean, None, None)
    drawn = [
        _ratio(side[rng.integers(len(side), size=(resamples, len(side)))].sum(axis=1))
        for side in (trial, others)
    ]
    low, high = np.percentile(compare(drawn[0], drawn[1]) - offset, (2.5, 97.5))
    return Interval(mean, float(low), float(high))


def _ratio(sums: np.ndarray) -> np.ndarray:
    return np.asarray(sums[..., 0] / sums[..., 1])
