"""Readings at a steady rate, and what a window of them says.

Sensors step: an H100's power and energy change every 100 ms and its utilisation every 200 ms, so a faster
sampler sees each value several times. Means are therefore weighted by the time that a value was held.
"""

import logging
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

from fuel_ray.errors import ConfigError, NodeError, TelemetryError

logger = logging.getLogger(__name__)

T = TypeVar("T")

SWITCH_S = 0.001
GAP_S = 0.5  # how long a sensor's value counts without another
LEAST_SHARE = 0.9  # of a window's time in which power must be known
JOIN_S = 2.0  # stop() leaves a read that hangs longer behind; its thread is a daemon


@dataclass(frozen=True, slots=True)
class Sample(Generic[T]):
    """One good reading; times are the sampler's clock's."""

    due_s: float  # the deadline
    at_s: float  # when the read began
    value: T


@dataclass(frozen=True, slots=True)
class Missing:
    """A read that failed."""

    at_s: float  # when it began
    error: Exception


class Sampler(Generic[T]):
    """Calls ``read`` every ``interval_s`` in a thread of its own and keeps the last ``capacity`` samples.

    Deadlines are absolute. Those missed by a slow read are skipped and counted, never made up for in a bunch.
    A read that raises NodeError leaves a missing sample; any other exception is a bug and ends the thread.

    ``start`` lowers the interpreter's switch interval to 1 ms for the whole process: with Python's default of
    5 ms a busy thread, such as a load generator, makes samples late by as much (p99 6.6 ms against 3.5 ms).
    """

    def __init__(
        self,
        read: Callable[[], T],
        interval_s: float,
        *,
        name: str = "sampler",
        clock: Callable[[], float] = time.monotonic,
        capacity: int = 20_000,
    ):
        if not (math.isfinite(interval_s) and interval_s > 0):
            raise ConfigError(f"the interval of {name} is {interval_s} s; it must be above 0")
        self.name, self.interval_s = name, interval_s
        self.skipped = 0  # deadlines
        self.failed = 0  # reads
        self._read, self._clock = read, clock
        self._ring: deque[Sample[T] | Missing] = deque(maxlen=capacity)
        self._news = threading.Condition()
        self._began_s = math.inf
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._bug: Exception | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin, with a first sample at once; a sampler that runs goes on."""
        if self._thread is not None:
            return
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_S))
        self._stop, self._bug, self._began_s = threading.Event(), None, self._clock()
        self._thread = threading.Thread(target=self._run, args=(self._stop,), name=self.name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and keep the samples; safe to call twice."""
        thread, self._thread = self._thread, None
        self._stop.set()
        if thread is None:
            return
        thread.join(JOIN_S)
        if thread.is_alive():
            logger.warning("a read of %s hangs; its thread is left behind", self.name)

    def sample(self, due_s: float | None = None) -> None:
        """Read once into the ring, in the caller's thread."""
        at_s = self._clock()
        entry: Sample[T] | Missing
        try:
            entry = Sample(at_s if due_s is None else due_s, at_s, self._read())
        except NodeError as error:
            entry = Missing(at_s, error)
            self.failed += 1
        with self._news:
            self._ring.append(entry)
            self._news.notify_all()

    def since(self, begin_s: float) -> tuple[Sample[T], ...]:
        """Good samples read at or after ``begin_s``, oldest first; at least one.

        Raises:
            TelemetryError: there is none; the message says what failed.
        """
        entries = [entry for entry in self._entries() if entry.at_s >= begin_s]
        good = tuple(entry for entry in entries if isinstance(entry, Sample))
        if not good:
            raise self._nothing(entries)
        return good

    def samples(self) -> tuple[Sample[T], ...]:
        """All good samples that are kept, oldest first."""
        return tuple(entry for entry in self._entries() if isinstance(entry, Sample))

    def kept(self) -> tuple[tuple[Sample[T], ...], tuple[Missing, ...]]:
        """All good samples and all failed reads that are kept, oldest first, whatever ended the thread."""
        with self._news:
            entries = list(self._ring)
        good = tuple(entry for entry in entries if isinstance(entry, Sample))
        return good, tuple(entry for entry in entries if isinstance(entry, Missing))

    def latest(self, *, timeout_s: float) -> Sample[T]:
        """The newest sample; the first one after ``start`` is waited for; TelemetryError if it failed."""
        if self._thread is None:
            raise TelemetryError(f"{self.name} is not running: call start()")
        with self._news:
            self._news.wait_for(lambda: self._ring and self._ring[-1].at_s >= self._began_s, timeout_s)
        newest = self._entries()[-1:]
        if newest and isinstance(newest[0], Sample):
            return newest[0]
        raise self._nothing(newest)

    def _entries(self) -> list[Sample[T] | Missing]:
        if self._bug is not None:
            raise TelemetryError(f"{self.name} ended: {self._bug!r}") from self._bug
        with self._news:
            return list(self._ring)

    def _nothing(self, entries: Sequence[Sample[T] | Missing]) -> TelemetryError:
        errors = [entry.error for entry in entries if isinstance(entry, Missing)]
        if not errors:
            return TelemetryError(f"{self.name} has no reading: it ran too short a time, or its read hangs")
        problem = TelemetryError(f"{self.name} has no reading, {len(errors)} failed: {errors[-1]}")
        problem.__cause__ = errors[-1]
        return problem

    def _run(self, stop: threading.Event) -> None:
        due_s = self._clock()
        try:
            while not stop.wait(max(0.0, due_s - self._clock())):
                self.sample(due_s)
                due_s, skipped = next_deadline(due_s, now_s=self._clock(), interval_s=self.interval_s)
                self.skipped += skipped
        except Exception as error:  # a bug in read: kept for since()
            logger.exception("%s ended", self.name)
            self._bug = error
            with self._news:
                self._ring.append(Missing(self._clock(), error))


def figures(samples: Iterable[Sample[Any]], name: str) -> list[Sample[float]]:
    """The samples of one figure of their readings, but for readings that lack it."""
    known = ((sample, getattr(sample.value, name)) for sample in samples)
    return [Sample(sample.due_s, sample.at_s, value) for sample, value in known if value is not None]


def next_deadline(due_s: float, *, now_s: float, interval_s: float) -> tuple[float, int]:
    """The next deadline on the grid of ``due_s`` that is still to come, and how many were missed."""
    missed = max(0, math.floor((now_s - due_s) / interval_s))
    return due_s + (missed + 1) * interval_s, missed


def held_s(
    samples: Sequence[Sample[float]], *, begin_s: float, end_s: float, gap_s: float = GAP_S
) -> Iterator[float]:
    """How long each value was held within the window, in s.

    A value holds until the next sample, and the first one also back to the window's begin, but never for more
    than ``gap_s``, so that a gap in the samples is left out rather than filled.
    """
    for index, sample in enumerate(samples):
        until_s = samples[index + 1].at_s if index + 1 < len(samples) else end_s
        from_s = begin_s if index == 0 else sample.at_s
        low_s = max(begin_s, from_s, sample.at_s - gap_s)
        yield max(0.0, min(end_s, until_s, sample.at_s + gap_s) - low_s)


def held_mean(
    samples: Sequence[Sample[float]], *, begin_s: float, end_s: float, gap_s: float = GAP_S
) -> float | None:
    """Mean over the window, weighted by the time each value was held; None if the samples miss the window."""
    weights_s = tuple(held_s(samples, begin_s=begin_s, end_s=end_s, gap_s=gap_s))
    if not sum(weights_s):
        return None
    return sum(s.value * weight_s for s, weight_s in zip(samples, weights_s, strict=True)) / sum(weights_s)


def window_energy_j(
    power_w: Sequence[Sample[float]],
    *,
    begin_s: float,
    end_s: float,
    counter_j: tuple[float | None, float | None] = (None, None),
) -> float:
    """Energy of the window: the counter's difference where there is one, else the integrated power.

    The counter itself steps every 100 ms, so a window is off by up to 100 ms of power at either end; the sum
    of windows that share the readings between them is not. Power that covers nine tenths of the window is
    scaled up to all of it.

    Raises:
        TelemetryError: the counter ran backwards, or power is missing for more of the window.
    """
    first_j, last_j = counter_j
    if first_j is not None and last_j is not None:
        if last_j < first_j:
            raise TelemetryError(f"the energy counter fell from {first_j} to {last_j} J: driver reloaded")
        return last_j - first_j
    duration_s = end_s - begin_s
    covered_s = sum(held_s(power_w, begin_s=begin_s, end_s=end_s))
    mean_w = held_mean(power_w, begin_s=begin_s, end_s=end_s)
    if mean_w is None or covered_s < LEAST_SHARE * duration_s:
        raise TelemetryError(f"power is known for {covered_s:.2f} s of the window's {duration_s:.2f} s")
    return mean_w * duration_s
