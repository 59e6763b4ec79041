"""The heart: set a node once per window, measure it, score it. Everything else calls ``ControlLoop.step``."""

from dataclasses import dataclass

from fuel_ray.guard import Guard, Verdict
from fuel_ray.objective import Objective
from fuel_ray.types import Knobs, Node, Policy, WindowMetrics


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One control window: what was chosen, what was in force, what was measured, how it scored."""

    step: int
    chosen: Knobs
    applied: Knobs  # in force in the window, as the GPU and the scheduler acknowledge it
    metrics: WindowMetrics
    reward: float | None  # None: the window cannot be judged, and nobody is to learn from it
    verdict: Verdict  # of the guard: what it let be applied, and why that is not what was chosen


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

    @property
    def guarded(self) -> bool:
        """Whether the guard may override a policy."""
        return not self._guard.passive

    def reset(self, *, seed: int) -> WindowMetrics:
        """Start the node afresh and measure a first window at maximum performance."""
        self.node.reset(seed=seed)
        self._guard.reset()
        self._step = 0
        most = self.node.spec.max_performance
        return self._window(most, Verdict(most)).metrics

    def step(self, chosen: Knobs) -> StepRecord:
        """Apply the knobs for one window and measure it.

        Raises:
            NodeError: the node could not be set or measured.
        """
        verdict = self._guard.check(chosen, last=self._last, spec=self.node.spec)
        return self._window(chosen, verdict)

    def _window(self, chosen: Knobs, verdict: Verdict) -> StepRecord:
        self._last = None  # until there is another one
        applied = self.node.apply(verdict.knobs)
        metrics = self.node.measure(self._interval_s)
        if metrics.limit_acknowledged is not None:
            applied = metrics.knobs  # by now the scheduler has said, or should have
        reward = self._objective.reward(metrics)
        record = StepRecord(self._step, chosen, applied, metrics, reward, verdict)
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
