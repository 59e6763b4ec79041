"""A policy on trial: it is in control in random blocks of time, and the difference is measured."""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from fuel_ray.metrics import attainment_bounds, window_attainment
from fuel_ray.stats import Interval
from fuel_ray.types import Knobs, Policy, Slo, WindowMetrics

WASHOUT_S = 3.0  # at the begin of a block: requests that the other side admitted are still running
MAX_BLOCKS = 20_000  # a week of 30 s


@dataclass(slots=True)
class _Block:
    on_trial: bool
    energy_j: float = 0.0
    output_tokens: int = 0
    attainment_s: float = 0.0  # an estimate, between the two below
    lowest_s: float = 0.0
    highest_s: float = 0.0
    judged_s: float = 0.0  # of windows whose attainment is known
    seconds: float = 0.0

    @property
    def energies(self) -> tuple[float, ...]:
        return (*[self.energy_j] * 3, self.output_tokens)

    @property
    def attainments(self) -> tuple[float, ...]:
        return self.attainment_s, self.lowest_s, self.highest_s, self.judged_s


@dataclass(frozen=True, slots=True)
class Difference:
    """What the trial has shown so far; negative energy is a saving."""

    blocks: tuple[int, int]  # with the policy, without it
    energy: Interval | None  # change of joules per output token, as a share; None before both sides have some
    attainment: Interval | None  # change of the share of limits met; its interval is of what is certain


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
        energy = [np.array([b.energies for b in side if b.output_tokens]) for side in sides]
        met = [np.array([b.attainments for b in side if b.judged_s]) for side in sides]
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
            block.seconds += window.duration_s
            self._judge(window)
        if self._elapsed_s >= self._block_s:
            self._done.append(self._block)
            self._block, self._elapsed_s = self._next_block(), 0.0

    def _judge(self, window: WindowMetrics) -> None:
        """Add what is known of the window's attainment; an unknown one is left out."""
        attainment, bounds = window_attainment(window, self._slo), attainment_bounds(window, self._slo)
        if attainment is not None and bounds is not None:
            self._block.attainment_s += attainment * window.duration_s
            self._block.lowest_s += bounds[0] * window.duration_s
            self._block.highest_s += bounds[1] * window.duration_s
            self._block.judged_s += window.duration_s

    def _next_block(self) -> _Block:
        if not self._drawn:
            self._drawn = [False] * self._group
            self._drawn[int(self._rng.integers(self._group))] = True
        return _Block(self._drawn.pop())


def _compared(
    trial: np.ndarray, others: np.ndarray, compare: np.ufunc, rng: np.random.Generator, resamples: int
) -> Interval | None:
    """Ratio of sums of one side against the other's; a division is given as a change, less 1.

    Columns are an estimate, its lowest and highest value, and what they are divided by. The interval is of
    what is certain: of one side at its lowest and the other at its highest, and the other way round.
    """
    if len(trial) < 1 or len(others) < 1 or (compare is np.divide and not others[:, 0].any()):
        return None
    offset = 1.0 if compare is np.divide else 0.0
    mean = float(compare(_ratio(trial.sum(axis=0)), _ratio(others.sum(axis=0)))[0]) - offset
    if len(trial) < 2 or len(others) < 2:
        return Interval(mean, None, None)
    drawn = [
        _ratio(side[rng.integers(len(side), size=(resamples, len(side)))].sum(axis=1))
        for side in (trial, others)
    ]
    low = np.percentile(compare(drawn[0][:, 1], drawn[1][:, 2]) - offset, 2.5)
    high = np.percentile(compare(drawn[0][:, 2], drawn[1][:, 1]) - offset, 97.5)
    return Interval(mean, float(low), float(high))


def _ratio(sums: np.ndarray) -> np.ndarray:
    return np.asarray(sums[..., :-1] / sums[..., -1:])
