"""What may be applied: rules that overrule a policy, each under a name by which it is counted."""

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fuel_ray.drift import DriftDetector
from fuel_ray.types import Knobs, LatencyName, NodeSpec, Slo, WindowMetrics

Reason = Literal["stale", "wait", "queue", "latency", "drift", "floor", "step", "dwell", "budget"]
BUDGET_S = 60.0
LATENCY_S = 30.0  # time constant over which met and missed limits are weighed


@dataclass(frozen=True, slots=True)
class Rules:
    """When a policy is overruled; None and 0 leave a rule out. Raising the clock is never held back."""

    max_wait_s: float | None = None  # shield: maximum performance while a request waits longer
    max_waiting: int | None = None  # shield: the same while more requests wait
    slo: Slo | None = None  # shield: the same while twice as many limits are missed as the SLO allows
    release_s: float = 10.0  # the shield holds until everything was calm for this long
    fallback: Knobs | None = None  # without telemetry and under drift; None: maximum performance
    floor_mhz: int | None = None  # no lower clock
    max_step_mhz: int | None = None  # largest fall of the clock per window
    dwell_s: float = 0.0  # a clock is not lowered sooner after it changed
    switches_per_minute: int | None = None  # once spent, clocks may only rise


@dataclass(frozen=True, slots=True)
class Verdict:
    """The knobs that may be applied, and by which rules they are not the policy's."""

    knobs: Knobs
    reasons: tuple[Reason, ...] = ()


class Guard:
    """Stands between a policy and the node, in training as in deployment."""

    def __init__(self, rules: Rules | None = None, *, drift: DriftDetector | None = None) -> None:
        self._rules = rules or Rules()
        self._drift = drift
        self.reset()

    @property
    def passive(self) -> bool:
        """Whether it has no rule to overrule a policy by."""
        return self._rules == Rules() and self._drift is None

    def reset(self) -> None:
        self._now_s, self._changed_s, self._calm_since_s = 0.0, -math.inf, -math.inf
        self._shield: Reason | None = None
        self._clock_mhz: int | None = None
        self._switches_s: deque[float] = deque()
        self._missed: dict[LatencyName, np.ndarray] = {}  # by limit: misses (or latency / limit), samples
        if self._drift is not None:
            self._drift.reset()

    def check(self, chosen: Knobs, *, last: WindowMetrics | None, spec: NodeSpec) -> Verdict:
        """What may be applied, after the window ``last``; None if it was lost.

        A window that does not say by how much the SLO was met is as good as lost.
        """
        verdict = self._wanted(chosen, last, spec)
        if self._shield is None:
            verdict = self._shaped(verdict, spec)
        self._switched(verdict.knobs.gpu_clock_mhz)
        return verdict

    def _wanted(self, chosen: Knobs, last: WindowMetrics | None, spec: NodeSpec) -> Verdict:
        fallback = self._rules.fallback or spec.max_performance
        if last is None:
            return Verdict(spec.max_performance if self._shield else fallback, ("stale",))
        self._now_s += last.duration_s
        self._observe(last)
        drifted = self._drift is not None and self._drift.update(last)
        if self._shield is not None:
            return Verdict(spec.max_performance, (self._shield,))
        if self._rules.slo is not None and not last.judged_by(self._rules.slo):
            return Verdict(fallback, ("stale",))
        return Verdict(fallback, ("drift",)) if drifted else Verdict(chosen)

    def _observe(self, window: WindowMetrics) -> None:
        """Raise the shield at a bound; let it go after a calm time, well below the bounds."""
        loads = self._loads(window)
        worst = max(loads, key=lambda reason: loads[reason], default=None)
        if worst is None:
            return
        if loads[worst] > 1.0:
            self._shield = worst
        if loads[worst] > 0.5:
            self._calm_since_s = self._now_s
        elif self._now_s - self._calm_since_s >= self._rules.release_s:
            self._shield = None

    def _loads(self, window: WindowMetrics) -> dict[Reason, float]:
        """How near each bound is: above 1 it is passed, below 0.5 it is calm."""
        rules, found = self._rules, dict[Reason, float]()
        if rules.max_wait_s:
            found["wait"] = window.oldest_wait_s / rules.max_wait_s
        if rules.max_waiting:
            found["queue"] = window.waiting / rules.max_waiting
        if rules.slo is not None:
            found["latency"] = self._misses(window, rules.slo) / 2
        return found

    def _misses(self, window: WindowMetrics, slo: Slo) -> float:
        """Misses that are certain as a multiple of what the SLO allows; a mean at its limit counts as 2."""
        worst, left = 0.0, math.exp(-window.duration_s / LATENCY_S)
        allowed = 0.5 if slo.share is None else max(1.0 - slo.share, 1e-3)
        for name, values_s, limit_s in slo.limited(window.latencies_s):
            missed, _ = window.misses(name, limit_s)
            now = (window.least_sum_s(name) / limit_s if slo.share is None else missed, len(values_s))
            self._missed[name] = left * self._missed.get(name, np.zeros(2)) + now
            misses, samples = self._missed[name].tolist()
            worst = max(worst, misses / allowed / max(samples, 20.0))
        return worst

    def _shaped(self, verdict: Verdict, spec: NodeSpec) -> Verdict:
        """The clock's floor, step, dwell time and budget of switches."""
        if len(spec.gpu_clocks_mhz) == 1:
            return verdict  # the clock is not ours
        now_mhz = spec.gpu_clocks_mhz[-1] if self._clock_mhz is None else self._clock_mhz
        rules, reasons, clock_mhz = self._rules, list(verdict.reasons), verdict.knobs.gpu_clock_mhz
        budget, dwells = rules.switches_per_minute, self._now_s - self._changed_s < rules.dwell_s
        spent = budget is not None and len(self._switches_s) >= budget
        lowest_mhz: dict[Reason, int] = {
            "floor": rules.floor_mhz or 0,
            "dwell": now_mhz if dwells else 0,
            "budget": now_mhz if spent else 0,
            "step": 0 if rules.max_step_mhz is None else now_mhz - rules.max_step_mhz,
        }
        for reason, bound_mhz in lowest_mhz.items():
            if clock_mhz < bound_mhz:
                clock_mhz = bound_mhz
                reasons.append(reason)
        return Verdict(replace(verdict.knobs, gpu_clock_mhz=clock_mhz), tuple(reasons))

    def _switched(self, clock_mhz: int) -> None:
        while self._switches_s and self._switches_s[0] <= self._now_s - BUDGET_S:
            self._switches_s.popleft()
        if self._clock_mhz is not None and clock_mhz != self._clock_mhz:
            self._changed_s = self._now_s
            self._switches_s.append(self._now_s)
        self._clock_mhz = clock_mhz
