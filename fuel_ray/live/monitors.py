"""GPU, CPU and KV cache recorded beside each other while something else runs, as far as each can be."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fuel_ray.errors import GpuError, NodeError
from fuel_ray.live.cpu import CpuMeter, CpuReading
from fuel_ray.live.gpu.nvml import GpuReading, Gpus
from fuel_ray.live.sampling import Missing, Sample, Sampler
from fuel_ray.live.vllm.endpoint import Endpoint
from fuel_ray.live.vllm.kv_monitor import KVCacheMonitor
from fuel_ray.live.vllm.metrics import MetricsSnapshot

CAPACITY = 2_000_000  # samples of a monitor: a day at the default interval

T = TypeVar("T")


@dataclass(slots=True)
class Track(Generic[T]):
    """What one monitor saw, and the reads of it that failed."""

    samples: tuple[Sample[T], ...] = ()
    failures: tuple[Missing, ...] = ()


@dataclass(slots=True)
class GpuTrack(Track[GpuReading]):
    """The same of a GPU, with its energy counter at both ends; None where it could not be read."""

    first_j: float | None = None
    last_j: float | None = None
    notes: list[str] = field(default_factory=list)  # why the counter could not be read


@dataclass(slots=True)
class Measured:
    """What the monitors saw; times are monotonic."""

    began_s: float
    gpu_ids: tuple[int, ...]  # asked for
    ended_s: float = 0.0
    gpus: dict[int, GpuTrack] = field(default_factory=dict)  # of those that there are
    cpu: Track[CpuReading] | None = None  # None: not asked for, as below
    cpu_modelled: bool = False
    kv: Track[MetricsSnapshot] | None = None
    kv_interval_s: float | None = None
    missing: list[str] = field(default_factory=list)  # what is not recorded at all, and why


@contextlib.contextmanager
def monitors(
    base_url: str | Endpoint,
    *,
    gpu_ids: Sequence[int],
    gpu_interval_s: float,
    cpu: bool,
    kv_interval_s: float | None,
) -> Iterator[Measured]:
    """Everything that samples, while the block runs; the samples are there after it, whatever failed."""
    found = Measured(time.monotonic(), tuple(dict.fromkeys(gpu_ids)), kv_interval_s=kv_interval_s)
    with contextlib.ExitStack() as stack:
        gpus = _opened(stack, found)
        samplers = {
            index: stack.enter_context(
                Sampler(opened.read, gpu_interval_s, name=f"GPU {index}", capacity=CAPACITY)
            )
            for index, opened in gpus.items()
        }
        for index, opened in gpus.items():
            found.gpus[index] = track = GpuTrack()
            track.first_j = _counter_j(opened, track, "beginning")
        meter = CpuMeter()
        found.cpu_modelled = meter.modelled
        cpu_sampler = Sampler(meter.read, gpu_interval_s, name="CPU", capacity=CAPACITY)
        if cpu:
            stack.enter_context(cpu_sampler)
        kv = stack.enter_context(KVCacheMonitor(base_url, kv_interval_s)) if kv_interval_s else None
        try:
            yield found
        finally:
            found.ended_s = time.monotonic()
            for index, track in found.gpus.items():
                track.samples, track.failures = samplers[index].kept()
                track.last_j = _counter_j(gpus[index], track, "end")
            if cpu:
                found.cpu = Track(*cpu_sampler.kept())
            if kv is not None:
                snapshots = tuple(Sample(at_s, at_s, snapshot) for at_s, snapshot in kv.trace())
                found.kv = Track(snapshots, kv.failures())


def _opened(stack: contextlib.ExitStack, found: Measured) -> dict[int, Gpus]:
    """The GPUs that there are, by index; the others are noted as missing."""
    gpus = {}
    for index in found.gpu_ids:
        try:
            gpus[index] = Gpus([index])
            stack.callback(_close, gpus[index])
        except GpuError as error:
            found.missing.append(f"GPU {index} is not recorded: {error}")
    return gpus


def _close(gpus: Gpus) -> None:
    """Nothing was set on it, and what was measured is worth more than an orderly end of NVML."""
    with contextlib.suppress(GpuError):
        gpus.close()


def _counter_j(gpus: Gpus, track: GpuTrack, when: str) -> float | None:
    try:
        return gpus.energy_j()
    except NodeError as error:
        track.notes.append(f"its energy counter could not be read at the {when}: {error}")
        return None
