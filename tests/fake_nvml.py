"""A stand-in for the pynvml module at its ctypes edge: real error classes and constants, GPUs made of Python.

monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu(), privileged=False))
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pynvml


@dataclass
class FakeGpu:
    uuid: str = "GPU-0"
    name: str = "NVIDIA H100 80GB HBM3"
    power_mw: int = 400_000
    power_limit_mw: int = 700_000
    energy_mj: int | None = 5_000_000  # None: no counter
    gpu_percent: int = 90
    memory_percent: int = 40
    sm_clock_mhz: int = 1980
    highest_clock_mhz: int | None = None
    clocks_mhz: tuple[int, ...] = tuple(range(1980, 330, -15))
    lost: bool = False
    faults: dict[str, int] = field(default_factory=dict)  # NVML error by the function that raises it
    pids: tuple[int, ...] = ()
    instances: tuple["FakeGpu", ...] = ()  # of MIG
    as_bytes: bool = False
    lockable: bool = True
    locked_mhz: tuple[int, int] | None = None
    calls: list[str] = field(default_factory=list)


class FakeNvml:
    """Raises what the real module raises; everything but functions comes from the real module."""

    def __init__(self, *gpus: FakeGpu, privileged: bool = True, driver: bool = True):
        self.gpus = gpus
        self.privileged = privileged
        self.driver = driver
        self.inits = 0

    def __getattr__(self, name):
        real = getattr(pynvml, name)
        if name.startswith("nvml") and callable(real):
            raise AttributeError(f"FakeNvml has no {name}")
        return real

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if not name.startswith("nvmlDevice"):
            return found

        def call(*args, **kwargs):
            if args and isinstance(args[0], FakeGpu) and name in args[0].faults:
                raise pynvml.NVMLError(args[0].faults[name])
            return found(*args, **kwargs)

        return call

    def nvmlInit(self):  # noqa: N802
        if not self.driver:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
        self.inits += 1

    def nvmlShutdown(self):  # noqa: N802
        self._alive()
        self.inits -= 1

    def nvmlSystemGetDriverVersion(self):  # noqa: N802
        self._alive()
        return "580.95.05"

    def nvmlDeviceGetCount(self):  # noqa: N802
        self._alive()
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        self._alive()
        if not 0 <= index < len(self.gpus):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return self._alive(self.gpus[index])

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        self._alive()
        found = [gpu for gpu in self.gpus if gpu.uuid == uuid]
        if not found:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return self._alive(found[0])

    def nvmlDeviceGetUUID(self, gpu):  # noqa: N802
        return self._text(self._alive(gpu), gpu.uuid)

    def nvmlDeviceGetName(self, gpu):  # noqa: N802
        return self._text(self._alive(gpu), gpu.name)

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu):  # noqa: N802
        return 7 if self._alive(gpu).instances else 0

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu, index):  # noqa: N802
        if index >= len(self._alive(gpu).instances):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return gpu.instances[index]

    def nvmlDeviceGetComputeRunningProcesses(self, gpu):  # noqa: N802
        return [SimpleNamespace(pid=pid, usedGpuMemory=None) for pid in self._alive(gpu).pids]

    def nvmlDeviceGetSupportedMemoryClocks(self, gpu):  # noqa: N802
        return [2619, 1593] if self._having(gpu, gpu.clocks_mhz or None) else []

    def nvmlDeviceGetSupportedGraphicsClocks(self, gpu, memory_clock_mhz):  # noqa: N802
        return list(self._having(gpu, gpu.clocks_mhz)) if memory_clock_mhz == 2619 else [345]

    def nvmlDeviceSetGpuLockedClocks(self, gpu, low_mhz, high_mhz):  # noqa: N802
        self._may_set(gpu)
        gpu.locked_mhz = (low_mhz, high_mhz)

    def nvmlDeviceResetGpuLockedClocks(self, gpu):  # noqa: N802
        self._may_set(gpu)
        gpu.calls.append("reset")
        gpu.locked_mhz = None

    def nvmlDeviceGetPowerUsage(self, gpu):  # noqa: N802
        return self._alive(gpu).power_mw

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu):  # noqa: N802
        return self._alive(gpu).power_limit_mw

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu):  # noqa: N802
        gpu.calls.append("energy")
        return self._having(gpu, gpu.energy_mj)

    def nvmlDeviceGetUtilizationRates(self, gpu):  # noqa: N802
        self._alive(gpu)
        return SimpleNamespace(gpu=gpu.gpu_percent, memory=gpu.memory_percent)

    def nvmlDeviceGetMaxClockInfo(self, gpu, type):  # noqa: N802
        return self._having(gpu, gpu.highest_clock_mhz)

    def nvmlDeviceGetClockInfo(self, gpu, type):  # noqa: N802
        assert type == pynvml.NVML_CLOCK_SM
        return self._alive(gpu).sm_clock_mhz

    @staticmethod
    def _text(gpu, text):
        return text.encode() if gpu.as_bytes else text

    def _alive(self, gpu=None):
        if not self.inits:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        if gpu is not None and gpu.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return gpu

    def _having(self, gpu, value):
        self._alive(gpu)
        if value is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value

    def _may_set(self, gpu):
        self._alive(gpu)
        if not self.privileged:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
        if not gpu.lockable:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
