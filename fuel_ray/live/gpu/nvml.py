"""One node's GPUs through NVML: clocks that are pinned and given back, and readings in our units.

Reads cost 2-10 us on an H100, the energy counter 3 ms (p99 16 ms), so it has a method of its own.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import pynvml

from fuel_ray.errors import ConfigError, GpuError, PrivilegeError
from fuel_ray.live.gpu.clock_client import clock_client
from fuel_ray.live.processes import holds_sys_admin

logger = logging.getLogger(__name__)

T = TypeVar("T")
Handle = Any  # a ctypes pointer to NVML's opaque device

ADVICE = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "no NVIDIA driver here (a container needs `--gpus all`)",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is not loaded; `sudo modprobe nvidia` loads it",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "NVML and the loaded driver differ in version; reboot",
    pynvml.NVML_ERROR_NO_PERMISSION: "run as root (a container: `--cap-add SYS_ADMIN`, for CAP_SYS_ADMIN) "
    "or by hand `sudo nvidia-smi -lgc MHZ,MHZ`, given back by `sudo nvidia-smi -rgc`",
    pynvml.NVML_ERROR_GPU_IS_LOST: "the GPU is lost; `dmesg | grep Xid` says why, a reboot brings it back",
    pynvml.NVML_ERROR_RESET_REQUIRED: "the GPU needs a reset: `sudo nvidia-smi --gpu-reset`",
    pynvml.NVML_ERROR_NOT_SUPPORTED: "this GPU or its driver does not support it",
    pynvml.NVML_ERROR_UNINITIALIZED: "NVML is closed",
}


@dataclass(frozen=True, slots=True)
class GpuReading:
    """What is cheap to read, over all GPUs of the node."""

    power_w: float  # summed; NVML's own average (1 s since Ampere, but instantaneous on GA100)
    gpu_util: float  # mean share of time in which a kernel ran, 0..1
    mem_util: float  # mean busy share of the memory controllers, 0..1
    sm_clock_mhz: float  # mean


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Let NVML's errors leave as ours: PrivilegeError where the process may not, else GpuError."""
    try:
        yield
    except pynvml.NVMLError as error:
        kind = PrivilegeError if error.value == pynvml.NVML_ERROR_NO_PERMISSION else GpuError
        raise kind(f"cannot {doing}: {ADVICE.get(error.value, str(error))}") from error


class Gpus(AbstractContextManager["Gpus"]):
    """One node's GPUs, by UUID or by NVML index (PCI order, whatever CUDA_VISIBLE_DEVICES says); default all.

    Power and energy are summed; utilisations and clocks are means. ``supported_clocks_mhz`` ascend,
    are supported by every GPU, and are empty where NVML lists none. Clocks are set by the clock helper that
    FUEL_RAY_CLOCK_SOCKET names, unless ``direct``.

    Raises:
        GpuError: no driver, or no such GPU; the message lists those that there are.
        ConfigError: a GPU is named twice.
    """

    def __init__(self, which: Sequence[str | int] = (), *, direct: bool = False):
        with translated("start NVML"):
            pynvml.nvmlInit()
        self._open = True
        self._helper = None if direct else clock_client()
        self._locked: set[str] = set()
        try:
            self._handles = _select(which)
            self.uuids = tuple(self._handles)
            self.name = " + ".join(dict.fromkeys(self._each("read the name", pynvml.nvmlDeviceGetName)))
            lists = self._each("list the supported clocks", _supported(_clocks_mhz))
            self.supported_clocks_mhz = tuple(sorted(set.intersection(*(set(mhz or ()) for mhz in lists))))
            with translated("read the driver version"):
                self.driver_version: str = pynvml.nvmlSystemGetDriverVersion()
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
        """Those that may be chosen; one, the highest, if clocks are not ours to set."""
        if wanted and self.can_set_clocks():
            return self.supported_clocks_mhz
        if wanted:
            logger.warning("the clocks of %s may not be set here: they are left alone", self.name)
        return self.supported_clocks_mhz[-1:] or (round(self.read().sm_clock_mhz),)

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
        """Everything cheap at once."""
        rates = self._each("read the utilisation", pynvml.nvmlDeviceGetUtilizationRates)
        sm_clock = partial(pynvml.nvmlDeviceGetClockInfo, type=pynvml.NVML_CLOCK_SM)
        return GpuReading(
            power_w=sum(self._each("read the power", pynvml.nvmlDeviceGetPowerUsage)) / 1000,
            gpu_util=fmean(rate.gpu for rate in rates) / 100,
            mem_util=fmean(rate.memory for rate in rates) / 100,
            sm_clock_mhz=fmean(self._each("read the SM clock", sm_clock)),
        )

    def energy_j(self) -> float | None:
        """Energy since the driver was loaded, None where there is no counter (before Volta). Costs 3 ms."""
        counter = _supported(pynvml.nvmlDeviceGetTotalEnergyConsumption)
        values_mj = self._each("read the energy counter", counter)
        return None if None in values_mj else sum(filter(None, values_mj)) / 1000

    def _each(self, doing: str, call: Callable[[Handle], T]) -> list[T]:
        values = []
        for uuid, handle in self._handles.items():
            with translated(f"{doing} of GPU {uuid}"):
                values.append(call(handle))
        return values

    def _snapped(self, clock_mhz: float) -> int:
        if not self.supported_clocks_mhz:
            raise GpuError(f"cannot lock {clock_mhz} MHz: no clock is supported by all of {self.uuids}")
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


def _select(which: Sequence[str | int]) -> dict[str, Handle]:
    with translated("list the GPUs"):
        handles = [_handle(key) for key in which or range(pynvml.nvmlDeviceGetCount())]
        selected = {pynvml.nvmlDeviceGetUUID(handle): handle for handle in handles}
    if not selected:
        raise GpuError("the NVIDIA driver shows no GPU")
    if len(selected) < len(handles):
        raise ConfigError(f"GPUs {list(which)} name one GPU twice; each may be named once")
    return selected


def _handle(key: str | int) -> Handle:
    try:
        if str(key).isdecimal():
            return pynvml.nvmlDeviceGetHandleByIndex(int(key))
        return pynvml.nvmlDeviceGetHandleByUUID(str(key))
    except (pynvml.NVMLError_NotFound, pynvml.NVMLError_InvalidArgument) as error:
        there = ", ".join(f"{i} = {_uuid(i)}" for i in range(pynvml.nvmlDeviceGetCount())) or "none"
        raise GpuError(f"there is no GPU {key}; there are: {there}") from error


def _uuid(index: int) -> str:
    try:
        return pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index))
    except pynvml.NVMLError as error:
        return f"({error})"


def _supported(call: Callable[[Handle], T]) -> Callable[[Handle], T | None]:
    """``call``, with None where the GPU or an older driver does not have it."""

    def asked(handle: Handle) -> T | None:
        try:
            return call(handle)
        except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound):
            return None

    return asked


def _clocks_mhz(handle: Handle) -> list[int]:
    """SM clocks at the highest memory clock, the one that a loaded GPU runs at."""
    memory_clock_mhz = max(pynvml.nvmlDeviceGetSupportedMemoryClocks(handle), default=0)
    return pynvml.nvmlDeviceGetSupportedGraphicsClocks(handle, memory_clock_mhz) if memory_clock_mhz else []
