"""GPU, CPU and KV cache recorded beside each other while something else runs, as far as each can be."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fuel_ray.errors import ConfigError, GpuError, NodeError
from fuel_ray.live.cpu import CpuMeter, CpuReading
from fuel_ray.live.gpu.nvml import GpuReading, Gpus
from fuel_ray.live.gpu.placement import placement_of
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

    name: str = ""  # of the card
    uuid: str = ""
    memory_bytes: int | None = None
    first_j: float | None = None
    last_j: float | None = None
    notes: list[str] = field(default_factory=list)  # why the counter could not be read


@dataclass(slots=True)
class Measured:
    """What the monitors saw; times are monotonic. Energy counters were read as it began and as it ended."""

    began_s: float
    ended_s: float = 0.0
    gpu_ids: list[str] = field(default_factory=list)  # asked for: index, or name if it is not there
    gpus: dict[int, GpuTrack] = field(default_factory=dict)  # of those that there are
    cpu: Track[CpuReading] | None = None  # None: not asked for, as below
    cpu_modelled: bool = False
    cpu_reason: str | None = None  # why it is
    kv: Track[MetricsSnapshot] | None = None
    kv_interval_s: float | None = None
    missing: list[str] = field(default_factory=list)  # what is not recorded at all, and why


@contextlib.contextmanager
def monitors(
    base_url: str | Endpoint,
    *,
    gpu_ids: Sequence[str] | None,
    gpu_interval_s: float,
    cpu: bool,
    kv_interval_s: float | None,
) -> Iterator[Measured]:
    """Everything that samples, while the block runs; the samples are there after it, whatever failed."""
    found = Measured(time.monotonic(), kv_interval_s=kv_interval_s)
    with contextlib.ExitStack() as stack:
        gpus = _opened(gpu_ids, stack, found)
        found.missing += _elsewhere(gpus, base_url)
        found.gpus = {index: _track(opened) for index, opened in gpus.items()}
        found.began_s = time.monotonic()
        for index, track in found.gpus.items():
            track.first_j = _counter_j(gpus[index], track, "beginning")
        samplers = {
            index: stack.enter_context(
                Sampler(opened.read, gpu_interval_s, name=f"GPU {index}", capacity=CAPACITY)
            )
            for index, opened in gpus.items()
        }
        meter = CpuMeter()
        cpu_sampler = Sampler(meter.read, gpu_interval_s, name="CPU", capacity=CAPACITY)
        if cpu:
            stack.enter_context(cpu_sampler)
        kv = stack.enter_context(KVCacheMonitor(base_url, kv_interval_s)) if kv_interval_s else None
        try:
            yield found
        finally:
            found.ended_s = time.monotonic()
            found.cpu_modelled, found.cpu_reason = meter.modelled, meter.reason
            for index, track in found.gpus.items():
                track.last_j = _counter_j(gpus[index], track, "end")
            for index, track in found.gpus.items():
                track.samples, track.failures = samplers[index].kept()
            if cpu:
                found.cpu = Track(*cpu_sampler.kept())
            if kv is not None:
                snapshots = tuple(Sample(at_s, at_s, snapshot) for at_s, snapshot in kv.trace())
                found.kv = Track(snapshots, kv.failures())


def _elsewhere(gpus: dict[int, Gpus], server: str | Endpoint) -> Iterator[str]:
    """A line unless the server is seen to be on these cards."""
    if gpus:
        url = server.url if isinstance(server, Endpoint) else server
        with contextlib.suppress(GpuError), contextlib.ExitStack() as stack:  # lost since: its samples say so
            together = Gpus([opened.devices[0].uuid for opened in gpus.values()])
            stack.callback(_close, together)
            found = placement_of(together, url)
            if found.found == "wrong":
                yield found.text
            elif found.found == "unknown":
                yield f"{found.text}; the energy is that of this machine's GPU"


def _opened(gpu_ids: Sequence[str] | None, stack: contextlib.ExitStack, found: Measured) -> dict[int, Gpus]:
    """The GPUs that there are, by NVML's index; the others are noted as missing."""
    gpus: dict[int, Gpus] = {}
    each = ([name] for entry in gpu_ids or () for name in entry.split(","))
    for which in ([],) if gpu_ids is None else each:
        try:
            opened = Gpus(which, default=1)
            stack.callback(_close, opened)
        except GpuError as error:
            name, why = ", ".join(which), str(error).removeprefix("cannot start NVML: ")
            found.missing.append(f"{f'GPU {name} is not' if name else 'no GPU is'} recorded: {why}")
            found.gpu_ids.append(name or "by default")
            continue
        (device,) = opened.devices
        if device.index in gpus:
            raise ConfigError(f"--gpu-ids: GPU {device.index} ({device.uuid}) is given twice; give it once")
        gpus[device.index] = opened
        found.gpu_ids.append(str(device.index))
    return gpus


def _track(gpus: Gpus) -> GpuTrack:
    memory_bytes = None
    with contextlib.suppress(GpuError):  # lost since: its samples say so
        memory_bytes = gpus.memory_bytes()
    return GpuTrack(name=gpus.name, uuid=gpus.uuids[0], memory_bytes=memory_bytes)


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
