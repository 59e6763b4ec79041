"""GPU, CPU and KV cache recorded beside each other while something else runs."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fuel_ray.errors import ConfigError, GpuError, TelemetryError
from fuel_ray.live.cpu import CpuMeter, CpuReading
from fuel_ray.live.gpu.nvml import GpuReading, Gpus
from fuel_ray.live.gpu.placement import placement_of
from fuel_ray.live.sampling import Sample, Sampler
from fuel_ray.live.vllm.kv_monitor import KVCacheMonitor, TimedSnapshot


@dataclass(slots=True)
class Measured:
    """What the monitors saw; times are monotonic."""

    began_s: float
    ended_s: float = 0.0
    gpus: dict[int, tuple[Sample[GpuReading], ...]] = field(default_factory=dict)
    energy_j: Mapping[int, tuple[float | None, float | None]] = field(default_factory=dict)  # first, last
    cpu: tuple[Sample[CpuReading], ...] = ()
    cpu_modelled: bool = False
    cpu_reason: str | None = None  # why it is
    kv: tuple[TimedSnapshot, ...] = ()
    kv_interval_s: float | None = None
    missing: list[str] = field(
        default_factory=list
    )  # GPUs that are not recorded, and why; a server elsewhere


@contextlib.contextmanager
def monitors(
    base_url: str,
    *,
    gpu_ids: Sequence[str] | None,
    gpu_interval_s: float,
    cpu: bool,
    kv_interval_s: float | None,
) -> Iterator[Measured]:
    """Everything that samples, while the block runs; the samples are there after it."""
    found = Measured(began_s=time.monotonic(), kv_interval_s=kv_interval_s)
    with contextlib.ExitStack() as stack:
        gpus = _opened(gpu_ids, stack, found)
        found.missing += _elsewhere(gpus, base_url)
        samplers = {
            index: stack.enter_context(Sampler(opened.read, gpu_interval_s)) for index, opened in gpus.items()
        }
        first_j = {index: opened.energy_j() for index, opened in gpus.items()}
        meter = CpuMeter()
        cpu_sampler = stack.enter_context(Sampler(meter.read, gpu_interval_s, name="CPU")) if cpu else None
        kv = stack.enter_context(KVCacheMonitor(base_url, kv_interval_s)) if kv_interval_s else None
        try:
            yield found
        finally:
            found.ended_s = time.monotonic()
            found.cpu_modelled, found.cpu_reason = meter.modelled, meter.reason
            found.energy_j = {index: (first_j[index], opened.energy_j()) for index, opened in gpus.items()}
            for index, sampler in samplers.items():
                with contextlib.suppress(TelemetryError):  # no sample at all shows as none in the result
                    found.gpus[index] = sampler.since(found.began_s)
            with contextlib.suppress(TelemetryError):
                found.cpu = cpu_sampler.since(found.began_s) if cpu_sampler is not None else ()
            found.kv = kv.trace() if kv is not None else ()


def _elsewhere(gpus: dict[int, Gpus], base_url: str) -> Iterator[str]:
    """A line if the server is seen to be on other cards than these."""
    if gpus:
        with Gpus([opened.devices[0].uuid for opened in gpus.values()]) as together:
            found = placement_of(together, base_url)
        if found.found == "wrong":
            yield found.text


def _opened(gpu_ids: Sequence[str] | None, stack: contextlib.ExitStack, found: Measured) -> dict[int, Gpus]:
    """The GPUs that there are, by NVML's index; the others are noted as missing."""
    gpus: dict[int, Gpus] = {}
    for which in ([],) if gpu_ids is None else ([name] for name in gpu_ids):
        try:
            opened = stack.enter_context(Gpus(which, default=1))
        except GpuError as error:
            found.missing.append(f"GPU {', '.join(map(str, which)) or 'by default'} is not recorded: {error}")
            continue
        (device,) = opened.devices
        if device.index in gpus:
            raise ConfigError(f"--gpu-ids name GPU {device.index} twice ({device.uuid})")
        gpus[device.index] = opened
    return gpus
