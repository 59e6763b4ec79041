"""A policy in front of real traffic: one decision per window, through whatever can happen to a server."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from fuel_ray.control import ControlLoop, StepRecord
from fuel_ray.errors import FuelRayError, NodeError, PolicyError
from fuel_ray.types import Knobs, Policy

PATIENCE_S = 5.0  # without a window, before clocks and limit are given back
RETRY_S = (0.5, 10.0)  # between two tries to attach: the first wait, and the longest


@dataclass(frozen=True, slots=True)
class Attached:
    """A policy and the node that it controls."""

    loop: ControlLoop
    policy: Policy
    check: Callable[[], None]  # raises PolicyError if the server is no longer the one that the policy fits
    saved_j: Callable[[StepRecord], float | None]  # modelled, over maximum performance; None without a model
    judged: tuple[str, ...] = ()  # how each limit of the SLO will be, for people


class Observer(Protocol):
    """Hears of everything that happens; every window is either measured or lost."""

    def attached(self, attached: Attached) -> None: ...

    def measured(self, record: StepRecord, *, decision_s: float, saved_j: float | None) -> None: ...

    def lost(self, step: int, chosen: Knobs, error: FuelRayError) -> None: ...

    def detached(self, error: FuelRayError) -> None: ...


class Deployment:
    """Controls a node once per interval until it is stopped.

    A window that cannot be measured is lost and the next one is tried. After ``PATIENCE_S`` without any, the
    node is closed, which gives clocks and limit back, and attached to again as soon as that works.
    """

    def __init__(
        self,
        attach: Callable[[], Attached],
        observers: Sequence[Observer],
        *,
        interval_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._attach, self._observers, self._interval_s = attach, observers, interval_s
        self._clock, self._sleep = clock, sleep
        self._step = 0  # windows so far, lost ones too

    def run(self, first: Attached, *, max_steps: int | None = None) -> None:
        """Control until ``max_steps`` windows are over; by default until a signal ends the process.

        Raises:
            NodeError: the node could not be set or measured at first, or clocks or limit could not be given
                back at the end.
        """
        attached = first
        while True:
            try:
                with contextlib.closing(attached.loop.node):
                    for observer in self._observers:
                        observer.attached(attached)
                    self._control(attached, max_steps)
                return
            except (NodeError, PolicyError) as error:
                if not self._step or self._over(max_steps):
                    raise
                for observer in self._observers:
                    observer.detached(error)
            attached = self._attached_again()

    def _over(self, max_steps: int | None) -> bool:
        return max_steps is not None and self._step >= max_steps

    def _control(self, attached: Attached, max_steps: int | None) -> None:
        attached.policy.reset()
        window = attached.loop.reset(seed=0)
        while not self._over(max_steps):
            begin_s = self._clock()
            chosen = attached.policy.decide(window)
            decision_s = self._clock() - begin_s
            record = self._next(attached, chosen, max_steps)
            if record is None:
                return
            for observer in self._observers:
                observer.measured(record, decision_s=decision_s, saved_j=attached.saved_j(record))
            window = record.metrics

    def _next(self, attached: Attached, chosen: Knobs, max_steps: int | None) -> StepRecord | None:
        """The next window that can be measured; None if there was none up to ``max_steps``."""
        deadline_s = self._clock() + self._interval_s + PATIENCE_S
        lost = 0
        while not self._over(max_steps):
            begin_s, step = self._clock(), self._step
            self._step += 1
            try:
                record = replace(attached.loop.step(chosen), step=step)
                if lost:
                    attached.check()
                return record
            except (NodeError, PolicyError) as error:
                for observer in self._observers:
                    observer.lost(step, chosen, error)
                lost += 1
                if isinstance(error, PolicyError):
                    raise
                if self._clock() > deadline_s:
                    raise NodeError(
                        f"no control window could be measured for {PATIENCE_S:g} s: {error}"
                    ) from error
                self._sleep(max(0.0, begin_s + self._interval_s - self._clock()))
        return None

    def _attached_again(self) -> Attached:
        wait_s, longest_s = RETRY_S
        while True:
            self._sleep(wait_s)
            try:
                return self._attach()
            except FuelRayError as error:
                for observer in self._observers:
                    observer.detached(error)
                wait_s = min(2 * wait_s, longest_s)
