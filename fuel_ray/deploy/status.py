"""What a deployment did in the last minute, in a line on the screen."""

import time
from collections.abc import Callable

from fuel_ray.control import StepRecord
from fuel_ray.deploy.deployment import Attached
from fuel_ray.errors import FuelRayError
from fuel_ray.metrics import EpisodeTotals, window_attainment
from fuel_ray.output import print_unless_blocked
from fuel_ray.report.wording import percent
from fuel_ray.types import Knobs, Slo

EVERY_S = 60.0


class Status:
    """Prints a line about the windows since the last one, once a minute; nothing while there are none."""

    def __init__(self, slo: Slo, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._slo, self._clock = slo, clock
        self._begin()

    def _begin(self) -> None:
        self._began_s, self._totals = self._clock(), EpisodeTotals()
        self._windows = self._lost = self._overruled = 0
        self._attained_s = self._judged_s = 0.0

    def attached(self, attached: Attached) -> None:
        """Begin a minute."""
        self._begin()

    def measured(self, record: StepRecord, *, decision_s: float, saved_j: float | None) -> None:
        """Add a window, and print the line if a minute is over."""
        window = record.metrics
        self._windows += 1
        self._totals.add(window)
        self._overruled += bool(record.verdict.reasons)
        attainment = window_attainment(window, self._slo)
        if attainment is not None:
            self._attained_s += attainment * window.duration_s
            self._judged_s += window.duration_s
        if self._clock() - self._began_s >= EVERY_S:
            print_unless_blocked(f"deploy  {self._line()}")
            self._begin()

    def lost(self, step: int, chosen: Knobs, error: FuelRayError) -> None:
        """Count a window that could not be measured."""
        self._lost += 1

    def detached(self, error: FuelRayError) -> None:
        """Say nothing: the recorder does."""

    def _line(self) -> str:
        totals = self._totals
        clock_mhz = totals.clock_mhz_s / totals.seconds
        lost = f", {self._lost} lost" if self._lost else ""
        attained = percent(self._attained_s / self._judged_s) if self._judged_s else "unknown"
        return (
            f"{self._windows} windows{lost}, {totals.energy_j:.0f} J, SLO attainment {attained}, "
            f"policy overruled {self._overruled} times, mean clock {clock_mhz:.0f} MHz"
        )
