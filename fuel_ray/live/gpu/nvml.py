"""One node's GPUs through NVML: clocks that are pinned and given back, and readings in our units.

Reads cost 2-10 us on an H100, the energy counter 3 ms (p99 16 ms), so it has a method of its own.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import pynvml

from fuel_ray.errors import GpuError, PrivilegeError
from fuel_ray.live.gpu.cards import devices, processes, text
from fuel_ray.live.gpu.clock_client import clock_client
from fuel_ray.live.gpu.visible import Device, select
from fuel_ray.live.processes import holds_sys_admin

logger = logging.getLogger(__name__)

T = TypeVar("T")
Handle = Any  # a ctypes pointer to NVML's opaque device

ADVICE = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "no NVIDIA driver on this host (a container needs `--gpus all`)",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is not loaded; `sudo modprobe nvidia` loads it",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "NVML and the loaded driver have different versions; reboot",
    pynvml.NVML_ERROR_NO_PERMISSION: "it needs root or CAP_SYS_ADMIN (a container: `--cap-add SYS_ADMIN`), "
    "or do it by hand: `sudo nvidia-smi -lgc MHZ,MHZ`, and `sudo nvidia-smi -rgc` to reset",
    pynvml.NVML_ERROR_GPU_IS_LOST: "the GPU is lost; `dmesg | grep Xid` says why; reboot to recover it",
    pynvml.NVML_ERROR_RESET_REQUIRED: "the GPU needs a reset: `sudo nvidia-smi --gpu-reset`",
    pynvml.NVML_ERROR_NOT_SUPPORTED: "this GPU or its driver does not support it",
    pynvml.NVML_ERROR_UNINITIALIZED: "NVML is closed",
}


GONE = frozenset(  # whatever is read then, there is nothing to be had; all else is one reading's matter
    {
        pynvml.NVML_ERROR_UNINITIALIZED,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
        pynvml.NVML_ERROR_GPU_IS_LOST,
        pynvml.NVML_ERROR_RESET_REQUIRED,
        pynvml.NVML_ERROR_GPU_NOT_FOUND,
    }
)
_SAID: set[tuple[str, str]] = set()  # cards and their missing readings that this process has logged
NOT_AVAILABLE = (2**32 - 1, 2**64 - 1)  # NVML_VALUE_NOT_AVAILABLE, as a value


@dataclass(frozen=True, slots=True)
class GpuReading:
    """What is cheap to read, over all GPUs of the node; None where one of them does not give it."""

    power_w: float | None  # summed; NVML's own average (1 s since Ampere, but instantaneous on GA100)
    gpu_util: float | None  # mean share of time in which a kernel ran, 0..1
    mem_util: float | None  # mean busy share of the memory controllers, 0..1
    sm_clock_mhz: float | None  # mean


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Let NVML's errors leave as ours: PrivilegeError where the process may not, else GpuError."""
    try:
        yield
    except pynvml.NVMLError as error:
        kind = PrivilegeError if error.value == pynvml.NVML_ERROR_NO_PERMISSION else GpuError
        raise kind(f"cannot {doing}: {ADVICE.get(error.value, str(error))}") from error


class Gpus(AbstractContextManager["Gpus"]):
    """One node's GPUs, by UUID or NVML index, of those that CUDA_VISIBLE_DEVICES shows (``visible.select``).

    ``devices`` are what a server runs on, ``uuids`` the cards that they are or, being MIG instances, are
    parts of: readings and clocks are the cards'. Power and energy are summed; utilisations and clocks are
    means. What one card does not give is None for all, and a process says it once.
    ``supported_clocks_mhz`` ascend, are supported by every GPU, and are empty where NVML lists none. Clocks
    are set by the clock helper that FUEL_RAY_CLOCK_SOCKET names, unless ``direct``.

    Args:
        which: indices and UUIDs.
        default: how many of the first, where none is named; None: all.
        hidden: whether CUDA_VISIBLE_DEVICES does not matter, as for giving clocks back.
        direct: past the clock helper.

    Raises:
        GpuError: no driver, or no such GPU; the message lists those that there are.
        ConfigError: a GPU is named twice, or CUDA_VISIBLE_DEVICES leaves it out.
    """

    def __init__(
        self,
        which: Sequence[str | int] = (),
        *,
        default: int | None = None,
        hidden: bool = False,
        direct: bool = False,
    ):
        with translated("start NVML"):
            pynvml.nvmlInit()
        self._open = True
        self._helper = None if direct else clock_client()
        self._locked: set[str] = set()
        try:
            with translated("list the GPUs"):
                self._there = devices(pynvml)
            self.devices = select(which, self._there, {} if hidden else os.environ, default=default)
            self._handles = _handles(self.devices)
            self.uuids = tuple(self._handles)
            self.name = " + ".join(dict.fromkeys(device.name for device in self.devices))
            lists = self._each("supported clocks", _clocks_mhz)
            self.supported_clocks_mhz = tuple(sorted(set.intersection(*(set(mhz or ()) for mhz in lists))))
            self.driver_version = _driver_version()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Give pinned clocks back and end NVML; safe to call twice.

        Raises:
            GpuError: a GPU did not take its clocks back; NVML is ended all the same.
        """
        if not self._open:
            return
        self._open = False
        try:
            self._reset(tuple(self._locked))
        finally:
            if self._helper is not None:
                self._helper.close()
            with translated("end NVML"):
                pynvml.nvmlShutdown()

    def can_set_clocks(self, *, proc: Path = Path("/proc/self")) -> bool:
        """Whether clocks may be pinned.

        NVML has no question for this and nothing is written. It takes clocks that NVML lists, and either
        CAP_SYS_ADMIN, as the kernel driver does, or a clock helper for these GPUs. A hypervisor can still
        refuse.
        """
        if not self.supported_clocks_mhz:
            return False
        if self._helper is not None:
            return all(map(self._helper.serves, self.uuids))
        return holds_sys_admin(proc)

    def settable_clocks_mhz(self, *, wanted: bool) -> tuple[int, ...]:
        """Those that may be chosen; one, the highest, if clocks cannot be set."""
        if wanted and self.can_set_clocks():
            for line in self.shared:
                logger.warning("%s", line)
            return self.supported_clocks_mhz
        if wanted:
            logger.warning("this process may not set the clocks of %s, so they are not changed", self.name)
        if self.supported_clocks_mhz:
            return self.supported_clocks_mhz[-1:]
        clock_mhz = self.read().sm_clock_mhz or _all(self._each("highest SM clock", _highest_clock_mhz))
        if not clock_mhz:
            raise GpuError(
                f"{self.name} reports neither its supported clocks nor its current or highest SM clock"
            )
        return (round(clock_mhz if isinstance(clock_mhz, float) else min(clock_mhz)),)

    @property
    def shared(self) -> tuple[str, ...]:
        """A line per card of which the node has but a MIG instance: what it shares with the others."""
        return tuple(
            f"GPU {device.card}: the node has one of {len(device.instances)} MIG instances, but power, "
            "energy and clock are those of the whole card; setting the clock affects the other instances too"
            for device in self.devices
            if len(device.instances) > 1
        )

    def pin(self, clock_mhz: float) -> int:
        """Pin the SM clocks at the supported clock nearest to ``clock_mhz``, and return that clock.

        Where one GPU refuses, the others get their clocks back.

        Raises:
            PrivilegeError: the process may not set clocks.
            GpuError: clocks are not supported, or a GPU is lost.
        """
        snapped_mhz = self._snapped(clock_mhz)
        self._lock(snapped_mhz)
        return snapped_mhz

    def reset(self) -> None:
        """Give all clocks back, whoever locked them, on every GPU even if one fails; then GpuError."""
        self._reset(self.uuids)

    def read(self) -> GpuReading:
        """Everything cheap at once; GpuError where a GPU is lost."""
        rates = _all(self._each("utilisation", _utilisation))
        power_mw = _all(self._each("power", _power_mw))
        clocks_mhz = _all(self._each("SM clock", _sm_clock_mhz))
        return GpuReading(
            power_w=None if power_mw is None else sum(power_mw) / 1000,
            gpu_util=None if rates is None else fmean(rate.gpu for rate in rates) / 100,
            mem_util=None if rates is None else fmean(rate.memory for rate in rates) / 100,
            sm_clock_mhz=None if clocks_mhz is None else fmean(clocks_mhz),
        )

    def energy_j(self) -> float | None:
        """Energy since the driver was loaded, None where a card has no counter that counts. Costs 3 ms."""
        values_mj = _all(self._each("energy counter", _energy_mj))
        return None if values_mj is None else sum(values_mj) / 1000

    def memory_bytes(self) -> int | None:
        """Memory of the smallest card; None where one does not say it."""
        return min(_all(self._each("memory", _memory_bytes)) or (), default=None)

    def power_limit_w(self) -> float | None:
        """The sum of the limits in force; None where a card does not say."""
        values_mw = _all(self._each("power limit", _power_limit_mw))
        return None if values_mw is None else sum(values_mw) / 1000

    def lacking(self) -> dict[str, tuple[str, ...]]:
        """UUIDs of the cards that do not give a reading at this moment, by the reading."""
        values = {name: self._each(name, read) for name, read in READINGS.items()}
        lacks = {
            name: tuple(uuid for uuid, value in zip(self.uuids, found, strict=True) if value is None)
            for name, found in values.items()
        }
        return {name: uuids for name, uuids in lacks.items() if uuids}

    def require_energy(self) -> None:
        """Return if the node's energy can be had, from its cards' counters or from their power.

        Raises:
            GpuError: it cannot; the message names the cards.
        """
        lacking = self.lacking()
        counters, power = lacking.get("energy counter", ()), lacking.get("power", ())
        if counters and power:
            raise GpuError(
                f"the energy of {self.name} cannot be measured: no energy counter on GPU "
                f"{', '.join(counters)}, no power reading on GPU {', '.join(power)}. All cards of a node "
                "need the same one of the two: update the driver, or leave that card out (see `fuel-ray "
                "doctor`)"
            )

    def processes(self) -> dict[str, frozenset[int]]:
        """Pids on each card of this host, by UUID; without the cards of which NVML tells none."""
        return processes(pynvml, self._there)

    def _each(self, what: str, read: Callable[[Handle], T | None]) -> list[T | None]:
        """What each card says, None where it does not; the first time of each in this process is logged."""
        return [self._one(what, read, uuid) for uuid in self._handles]

    def _one(self, what: str, read: Callable[[Handle], T | None], uuid: str) -> T | None:
        reason: object = "NVML has no value"
        try:
            value = read(self._handles[uuid])
        except (pynvml.NVMLError, AttributeError) as error:  # an old pynvml has no such function
            if isinstance(error, pynvml.NVMLError) and error.value in GONE:
                with translated(f"read the {what} of GPU {uuid}"):
                    raise
            value, reason = None, error
        if value is not None and value not in NOT_AVAILABLE:
            return value
        if (uuid, what) not in _SAID:
            _SAID.add((uuid, what))
            logger.warning("GPU %s does not report its %s: %s", uuid, what, reason)
        return None

    def _snapped(self, clock_mhz: float) -> int:
        if not self.supported_clocks_mhz:
            raise GpuError(
                f"cannot lock {clock_mhz} MHz: the GPUs {', '.join(self.uuids)} have no supported clock in "
                "common"
            )
        return min(self.supported_clocks_mhz, key=lambda supported_mhz: abs(supported_mhz - clock_mhz))

    def _lock(self, clock_mhz: int) -> None:
        held = frozenset(self._locked)
        try:
            for uuid, handle in self._handles.items():
                self._locked.add(uuid)  # before the call, so that an interrupt in it is made good by close()
                with translated(f"lock the clock at {clock_mhz} MHz on GPU {uuid}"):
                    if self._helper is not None:
                        self._helper.pin(uuid, clock_mhz)
                    else:
                        pynvml.nvmlDeviceSetGpuLockedClocks(handle, clock_mhz, clock_mhz)
        except GpuError:
            with suppress(GpuError):  # the refusal is what to raise; close() tries this once more
                self._reset(tuple(self._locked))
            self._locked -= {uuid} - held
            raise
        logger.info("locked %s at %d MHz", self.uuids, clock_mhz)

    def _reset(self, uuids: Sequence[str]) -> None:
        failures = []
        for uuid in uuids:
            try:
                with translated(f"reset the clocks of GPU {uuid}"):
                    if self._helper is not None:
                        self._helper.reset(uuid)
                    else:
                        pynvml.nvmlDeviceResetGpuLockedClocks(self._handles[uuid])
                self._locked.discard(uuid)
            except GpuError as error:
                failures.append(error)
        if failures:
            raise failures[0]


def _handles(devices: Sequence[Device]) -> dict[str, Handle]:
    """Of the cards, by UUID; GpuError for one that is lost."""
    handles = {}
    for device in devices:
        with translated(f"open GPU {device.index}"):
            handle = pynvml.nvmlDeviceGetHandleByIndex(device.index)
            handles[text(pynvml.nvmlDeviceGetUUID(handle))] = handle
    return handles


def _all(values: Sequence[T | None]) -> list[T] | None:
    """None if one is missing: a sum without it would be another number."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


def _driver_version() -> str:
    try:
        return text(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return "unknown"


def _power_mw(handle: Handle) -> int:
    return pynvml.nvmlDeviceGetPowerUsage(handle)


def _power_limit_mw(handle: Handle) -> int:
    return pynvml.nvmlDeviceGetEnforcedPowerLimit(handle)


def _energy_mj(handle: Handle) -> int | None:
    return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) or None  # one that says 0 has not counted


def _memory_bytes(handle: Handle) -> int:
    return int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)


def _utilisation(handle: Handle) -> Any:
    return pynvml.nvmlDeviceGetUtilizationRates(handle)


def _sm_clock_mhz(handle: Handle) -> int:
    return pynvml.nvmlDeviceGetClockInfo(handle, type=pynvml.NVML_CLOCK_SM)


def _highest_clock_mhz(handle: Handle) -> int:
    return pynvml.nvmlDeviceGetMaxClockInfo(handle, type=pynvml.NVML_CLOCK_SM)


def _clocks_mhz(handle: Handle) -> list[int]:
    """SM clocks at the highest memory clock, the one that a loaded GPU runs at."""
    memory_clock_mhz = max(pynvml.nvmlDeviceGetSupportedMemoryClocks(handle), default=0)
    return pynvml.nvmlDeviceGetSupportedGraphicsClocks(handle, memory_clock_mhz) if memory_clock_mhz else []


READINGS: dict[str, Callable[[Handle], Any]] = {
    "energy counter": _energy_mj,
    "power": _power_mw,
    "utilisation": _utilisation,
    "SM clock": _sm_clock_mhz,
}
