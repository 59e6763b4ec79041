"""CPU energy and utilisation: RAPL where the kernel gives it, else a stated model of the utilisation."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from fuel_ray.errors import TelemetryError

POWERCAP = Path("/sys/class/powercap")
IDLE_W, SPAN_W = 60.0, 140.0  # of the model: all CPUs idle, and what is added at full use; one 200 W socket

STUCK_S = 2.5  # real counters move every 1 ms, a virtual machine's (QEMU) every 1 s
MOST_W, SLACK_S = 2000.0, 0.2  # of a package, and the time by which a counter and a clock may differ


@dataclass(frozen=True, slots=True)
class CpuReading:
    """What a meter has seen."""

    energy_j: float  # since the meter was made
    util: float | None  # busy share of all cores since the last reading, 0..1; None if no tick has passed


def cpu_times() -> tuple[float, float]:
    """Seconds in which cores were busy, and all of the cores' seconds, since boot."""
    times = psutil.cpu_times()
    guest_s = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # Linux counts it as user too
    all_s = sum(times) - guest_s
    return all_s - times.idle - getattr(times, "iowait", 0.0), all_s


class CpuMeter:
    """Energy and utilisation of the machine's CPUs; each reader needs a meter of its own.

    ``modelled`` says that the energy is, or is in part, the utilisation model's, and ``reason`` why: there is
    no RAPL, a package's counter has not moved yet, or one stood still, jumped or was refused, and is believed
    no more. Read RAPL at least once per wrap of its counter, about 20 minutes at 200 W.
    """

    def __init__(
        self,
        *,
        root: Path = POWERCAP,
        clock: Callable[[], float] = time.monotonic,
        times: Callable[[], tuple[float, float]] = cpu_times,
    ):
        self.reason: str | None = None
        self._packages: tuple[_Package, ...] = ()
        self._clock, self._times = clock, times
        self._read_at_s, (self._busy_s, self._all_s) = clock(), times()
        try:
            self._packages = _packages(root, now_s=self._read_at_s)
        except TelemetryError as error:
            self.reason = str(error)
        self._modelled_j = 0.0
        self._sure = _Sure(self._read_at_s, 0.0, 0.0)
        self._energy_j = 0.0

    @property
    def modelled(self) -> bool:
        """Whether the energy is the utilisation model's, not RAPL's."""
        return self.reason is not None

    @property
    def waits(self) -> bool:
        """Whether there is a counter that has not moved yet, and may still."""
        return self.modelled and bool(self._packages)

    def read(self) -> CpuReading:
        """Energy so far, and the utilisation since the last call; TelemetryError where RAPL has gone."""
        util = self._advance()
        if self._packages:
            self._look(self._clock())
        if self.modelled:
            self._rise(self._sure.energy_j + self._modelled_j - self._sure.modelled_j)
        return CpuReading(energy_j=self._energy_j, util=util)

    def _look(self, now_s: float) -> None:
        """Read the counters; once each has moved they are the energy, and one that is not right ends that."""
        try:
            for package in self._packages:
                package.read(now_s)
        except _DisbelievedError as error:
            self._packages, self.reason = (), str(error)
            return
        silent = [package for package in self._packages if not package.sum_uj]
        self.reason = f"{silent[0].counter} has not moved yet" if silent else None
        if silent:
            return
        self._rise(sum(package.sum_uj for package in self._packages) / 1e6)
        if min(package.moved_s for package in self._packages) > self._sure.at_s:
            self._sure = _Sure(now_s, self._energy_j, self._modelled_j)

    def _rise(self, energy_j: float) -> None:
        self._energy_j = max(self._energy_j, energy_j)

    def _advance(self) -> float | None:
        busy_s, all_s = self._times()
        if all_s <= self._all_s:
            return None  # ticks are 10 ms: the time is left for the next call
        util = min(1.0, max(0.0, (busy_s - self._busy_s) / (all_s - self._all_s)))
        now_s = self._clock()
        self._modelled_j += (IDLE_W + SPAN_W * util) * (now_s - self._read_at_s)
        self._read_at_s, self._busy_s, self._all_s = now_s, busy_s, all_s
        return util


@dataclass(frozen=True, slots=True)
class _Sure:
    """When all counters had last moved, and both energies then: what the model goes on from."""

    at_s: float
    energy_j: float
    modelled_j: float


class _DisbelievedError(Exception):
    """A counter cannot be right; the message says why."""


class _Package:
    """One RAPL package's counter, unwrapped."""

    def __init__(self, folder: Path, *, now_s: float):
        self.counter = folder / "energy_uj"
        self.sum_uj = 0
        self.moved_s = now_s
        self._range_uj = _range(folder / "max_energy_range_uj")
        self._last_uj = _number(self.counter)

    def read(self, now_s: float) -> None:
        """Add what was used since the last call.

        Raises:
            _DisbelievedError: it stands still, or this is no energy that a CPU uses, or it is refused.
            TelemetryError: it has gone.
        """
        since_s = now_s - self.moved_s
        added_uj = self._added_uj()
        if not added_uj:
            if since_s > STUCK_S:
                raise _DisbelievedError(f"{self.counter} has not moved for {since_s:.1f} s")
            return
        if added_uj / 1e6 > MOST_W * (since_s + SLACK_S):
            raise _DisbelievedError(f"{self.counter} jumped by {added_uj / 1e6:.4g} J in {since_s:.2g} s")
        self.sum_uj += added_uj
        self.moved_s = now_s

    def _added_uj(self) -> int:
        try:
            now_uj = _number(self.counter)
        except TelemetryError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise
            raise _DisbelievedError(str(error)) from error
        last_uj, self._last_uj = self._last_uj, now_uj
        if now_uj >= last_uj:
            return now_uj - last_uj
        if self._range_uj is None or self._range_uj < last_uj:
            raise _DisbelievedError(
                f"{self.counter} fell from {last_uj} to {now_uj} and does not say its range"
            )
        return now_uj - last_uj + self._range_uj


def _packages(root: Path, *, now_s: float) -> tuple[_Package, ...]:
    """Counters of intel-rapl:N named package-N (AMD's too); psys, which holds them, is left out."""
    folders = sorted(folder for folder in root.glob("*-rapl:*") if folder.name.count(":") == 1)
    names = {folder: _text(folder / "name") for folder in folders}
    found = tuple(_Package(folder, now_s=now_s) for folder in folders if names[folder].startswith("package"))
    if not found:
        raise TelemetryError(f"there is no RAPL package in {root}")
    return found


def _range(path: Path) -> int | None:
    """None where it is missing or 0: the counter can be read until it wraps."""
    try:
        return _number(path) or None
    except TelemetryError:
        return None


def _number(path: Path) -> int:
    text = _text(path)
    if not text.isdecimal():
        raise TelemetryError(f"{path} holds {text[:40]!r}, not a number")
    return int(text)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except PermissionError as error:
        raise TelemetryError(f"{path} is not readable; `sudo chmod a+r {path}` makes it so") from error
    except OSError as error:
        raise TelemetryError(f"{path} cannot be read: {error.strerror}") from error
