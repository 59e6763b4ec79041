"""What NVML (``nvml``, the library) shows here: cards, their MIG instances and the processes on them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from fuel_ray.live.gpu.visible import Device

_RUNNING = (
    "nvmlDeviceGetComputeRunningProcesses",
    "nvmlDeviceGetComputeRunningProcesses_v2",
)  # v3 since R510


def devices(nvml: Any) -> list[Device]:
    """All cards and MIG instances in NVML's order; one that is lost has its error in place of its UUID."""
    found = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            card = nvml.nvmlDeviceGetHandleByIndex(index)
            uuid, name = text(nvml.nvmlDeviceGetUUID(card)), _name(nvml, card)
        except nvml.NVMLError as error:
            found.append(Device(f"({error})", f"({error})", index, ""))
            continue
        parts = {text(nvml.nvmlDeviceGetUUID(part)): _name(nvml, part) for part in _instances(nvml, card)}
        found.append(Device(uuid, uuid, index, name, tuple(parts)))
        found += [Device(part, uuid, index, of_part, tuple(parts)) for part, of_part in parts.items()]
    return found


def processes(nvml: Any, there: Iterable[Device]) -> dict[str, frozenset[int]]:
    """Pids that run on each card, by its UUID; without the cards of which NVML tells none."""
    found = {}
    for device in there:
        with suppress(nvml.NVMLError):
            card = nvml.nvmlDeviceGetHandleByIndex(device.index)
            pids = {pid for handle in (card, *_instances(nvml, card)) for pid in _pids(nvml, handle)}
            if device.is_card and pids:
                found[device.uuid] = frozenset(pids)
    return found


def text(value: str | bytes) -> str:
    """Text of NVML's, which pynvml before 11.5 gives as bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _name(nvml: Any, handle: Any) -> str:
    with suppress(nvml.NVMLError):
        return text(nvml.nvmlDeviceGetName(handle))
    return "unknown GPU"


def _instances(nvml: Any, card: Any) -> list[Any]:
    """Handles of a card's MIG instances; none where MIG is off, or not known to driver or pynvml."""
    found = []
    with suppress(nvml.NVMLError, AttributeError):
        for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(card)):
            with suppress(nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument):
                found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(card, number))
    return found


def _pids(nvml: Any, handle: Any) -> Iterator[int]:
    for name in _RUNNING:
        with suppress(nvml.NVMLError, AttributeError):
            running: Callable[[Any], Any] = getattr(nvml, name)
            yield from (process.pid for process in running(handle) if process.pid)
            return
