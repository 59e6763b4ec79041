"""CPU energy and utilisation: RAPL where the kernel gives it, else a stated model of the utilisation."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from fuel_ray.errors import TelemetryError

POWERCAP = Path("/sys/class/powercap")
IDLE_W, SPAN_W = 60.0, 140.0  # of the model: all CPUs idle, and what is added at full use; one 200 W socket


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

    ``modelled`` says that there is no RAPL and ``reason`` why. Read RAPL at least once per wrap of its
    counter, about 20 minutes at 200 W.
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
        try:
            self._packages = _packages(root)
        except TelemetryError as error:
            self.reason = str(error)
        self._clock, self._times = clock, times
        self._read_at_s, (self._busy_s, self._all_s) = clock(), times()
        self._modelled_j = 0.0

    @property
    def modelled(self) -> bool:
        """Whether the energy is the utilisation model's, not RAPL's."""
        return not self._packages

    def read(self) -> CpuReading:
        """Energy so far, and the utilisation since the last call; TelemetryError where RAPL has gone."""
        util = self._advance()
        energy_j = sum(package.read_j() for package in self._packages) if self._packages else self._modelled_j
        return CpuReading(energy_j=energy_j, util=util)

    def _advance(self) -> float | None:
        busy_s, all_s = self._times()
        if all_s <= self._all_s:
            return None  # ticks are 10 ms: the time is left for the next call
        util = min(1.0, max(0.0, (busy_s - self._busy_s) / (all_s - self._all_s)))
        now_s = self._clock()
        self._modelled_j += (IDLE_W + SPAN_W * util) * (now_s - self._read_at_s)
        self._read_at_s, self._busy_s, self._all_s = now_s, busy_s, all_s
        return util


class _Package:
    """One RAPL package's counter, unwrapped."""

    def __init__(self, folder: Path):
        self._counter = folder / "energy_uj"
        self._range_uj = _number(folder / "max_energy_range_uj")
        self._last_uj = _number(self._counter)
        self._sum_uj = 0

    def read_j(self) -> float:
        now_uj = _number(self._counter)
        wrapped_uj = self._range_uj if now_uj < self._last_uj else 0
        self._sum_uj += now_uj - self._last_uj + wrapped_uj
        self._last_uj = now_uj
        return self._sum_uj / 1e6


def _packages(root: Path) -> tuple[_Package, ...]:
    """Counters of intel-rapl:N named package-N (AMD's too); psys, which holds them, is left out."""
    folders = sorted(folder for folder in root.glob("intel-rapl:*") if folder.name.count(":") == 1)
    found = tuple(_Package(folder) for folder in folders if _text(folder / "name").startswith("package"))
    if not found:
        raise TelemetryError(f"there is no RAPL package in {root}")
    return found


def _number(path: Path) -> int:
    text = _text(path)
    if not text.isdecimal():
        raise TelemetryError(f"{path} holds {text[:40]!r}, not a number")
    return int(text)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except PermissionError as error:
        raise TelemetryError(f"{path} cannot be read; `sudo chmod a+r {path}` allows it") from error
    except OSError as error:
        raise TelemetryError(f"{path} cannot be read: {error.strerror}") from error
