"""The heart: set a node once per window, measure it, score it. Everything else calls ``ControlLoop.step``."""

from dataclasses import dataclass

from fuel_ray.objective import Objective
from fuel_ray.types import Knobs, Node, NodeSpec, Policy, WindowMetrics


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One control window: what was chosen, what was in force, what was measured, how it scored."""

    step: int
    chosen: Knobs
    applied: Knobs
    metrics: WindowMetrics
    reward: float


@dataclass(frozen=True, slots=True)
class Guard:
    """Overrides a policy that lets requests wait too long, by maximum performance."""

    max_wait_s: float | None = None  # None: never override

    def check(self, chosen: Knobs, *, last: WindowMetrics | None, spec: NodeSpec) -> Knobs:
        """The knobs that may be applied."""
        if self.max_wait_s is not None and last is not None and last.oldest_wait_s > self.max_wait_s:
            return spec.max_performance
        return chosen


class ControlLoop:
    """Drives one node: the same code in training, evaluation, profiling and deployment."""

    def __init__(
        self, node: Node, objective: Objective, *, interval_s: float = 1.0, guard: Guard | None = None
    ) -> None:
        self.node = node
        self._objective = objective
        self._interval_s = interval_s
        self._guard = guard or Guard()
        self._last: WindowMetrics | None = None
        self._step = 0

    def reset(self, *, seed: int) -> WindowMetrics:
        """Start the node afresh and measure a first window at maximum performance."""
        self.node.reset(seed=seed)
        self._last, self._step = None, 0
        return self.step(self.node.spec.max_performance).metrics

    def step(self, chosen: Knobs) -> StepRecord:
        """Apply the knobs for one window and measure it.

        Raises:
            NodeError: the node could not be set or measured.
        """
        permitted = self._guard.check(chosen, last=self._last, spec=self.node.spec)
        applied = self.node.apply(permitted)
        metrics = self.node.measure(self._interval_s)
        record = StepRecord(self._step, chosen, applied, metrics, self._objective.reward(metrics))
        self._last, self._step = metrics, self._step + 1
        return record


def run_policy(loop: ControlLoop, policy: Policy, *, seed: int, steps: int) -> list[StepRecord]:
    """Let a policy control the node for ``steps`` windows; the records, in order."""
    policy.reset()
    window = loop.reset(seed=seed)
    records = []
    for _ in range(steps):
        record = loop.step(policy.decide(window))
        window = record.metrics
        records.append(record)
    return records
