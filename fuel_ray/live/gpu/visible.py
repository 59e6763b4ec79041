"""Which GPU is meant: from what a user, a scheduler or Ray says to devices, and to a server's environment.

An index is always NVML's, the one of nvidia-smi, in PCI order; it never counts within CUDA_VISIBLE_DEVICES,
which only says which cards this process may use.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fuel_ray.errors import ConfigError, GpuError

VARIABLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
PCI_ORDER = "PCI_BUS_ID"
_CONTAINER = "NVIDIA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Device:
    """What a server can run on: a card, or a part of one (a MIG instance)."""

    uuid: str  # as CUDA takes it: GPU-... or MIG-...
    card: str  # UUID of the card: power, energy and clocks are the card's
    index: int  # NVML's, of the card
    name: str
    instances: tuple[str, ...] = ()  # UUIDs of all MIG instances of the card; empty where MIG is off

    @property
    def is_card(self) -> bool:
        """Whether it is a whole card."""
        return self.uuid == self.card


def select(
    which: Sequence[str | int],
    devices: Sequence[Device],
    environ: Mapping[str, str],
    *,
    default: int | None = None,
) -> tuple[Device, ...]:
    """The devices that are named, in that order; of no name the first ``default`` that may be used.

    A name is NVML's index of a card, or a UUID or an unambiguous beginning of one. A ``default`` of None
    means all.

    Raises:
        GpuError: there is no such GPU, or none that may be used.
        ConfigError: CUDA_VISIBLE_DEVICES leaves it out, it is named twice, or its name fits several.
    """
    names = [part.strip() for name in which for part in str(name).split(",")]
    seen = _visible(devices, environ, ordered=not names)
    if names:
        chosen = [_allowed(name, devices, seen, environ) for name in names]
    else:
        chosen = list(_cards(devices) if seen is None else seen)[:default]
        if len(chosen) < (default or 1):
            raise GpuError(_too_few(len(chosen), default or 1, environ))
    for index in {device.index for device in chosen}:
        if len(twice := [device.uuid for device in chosen if device.index == index]) > 1:
            raise ConfigError(
                f"GPUs {', '.join(names) or environ[VARIABLE]}: GPU {index} is given twice "
                f"({', '.join(twice)}); give each card once, because power and clock are those of the card"
            )
    return tuple(chosen)


def listed(devices: Iterable[Device]) -> str:
    """What there is, for a message."""
    shown = (f"{d.index} = {d.uuid}" if d.is_card else f"{d.uuid} (MIG, of {d.index})" for d in devices)
    return ", ".join(shown) or "none"


def server_environment(devices: Sequence[Device], *, by_index: bool = False) -> dict[str, str]:
    """Variables by which a server that is started uses these devices and no other, in this order.

    ``by_index`` names cards by number, for a vLLM that takes no UUIDs (before mid-2026, vLLM issue 41848).

    Raises:
        ConfigError: a card is split into several MIG instances, of which one is to be named, or ``by_index``
            is asked for a MIG instance.
    """
    used = [_started_on(device) for device in devices]
    if by_index and not all(device.is_card and not device.instances for device in devices):
        raise ConfigError(
            f"this vLLM accepts no UUIDs in {VARIABLE}, so it cannot use the MIG instance {used[0]}: use a "
            "newer vLLM, or a whole card"
        )
    names = [str(device.index) for device in devices] if by_index else used
    return {VARIABLE: ",".join(names), ORDER: PCI_ORDER}


def _started_on(device: Device) -> str:
    if not device.is_card or not device.instances:
        return device.uuid
    if len(device.instances) > 1:
        raise ConfigError(
            f"GPU {device.index} is split into MIG instances; give the one to serve on: "
            + ", ".join(device.instances)
        )
    return device.instances[0]


def _cards(devices: Iterable[Device]) -> list[Device]:
    return [device for device in devices if device.is_card]


def _visible(
    devices: Sequence[Device], environ: Mapping[str, str], *, ordered: bool
) -> tuple[Device, ...] | None:
    """What CUDA_VISIBLE_DEVICES shows, by CUDA's rules; None if it is not set."""
    text = environ.get(VARIABLE)
    if text is None:
        return None
    entries = [entry.strip() for entry in text.split(",")]
    cards = _cards(devices)
    _check_order(entries, cards, environ, ordered=ordered)
    found: list[Device] = []
    for entry in entries:
        matches = _named(entry, devices)
        if len(matches) != 1:  # the first that is invalid hides those behind it: -1, NoDevFiles, none
            break
        found += matches
    return tuple(found) if len(set(found)) == len(found) else ()  # CUDA shows none if one is there twice


def _check_order(
    entries: Sequence[str], cards: Sequence[Device], environ: Mapping[str, str], *, ordered: bool
) -> None:
    """Without PCI_BUS_ID CUDA counts the fastest card first, which is another order where cards differ."""
    names = {card.name for card in cards if card.name}
    indices = {int(entry) for entry in entries if entry.isdecimal()}
    if environ.get(ORDER) == PCI_ORDER or len(names) < 2 or not indices:
        return
    if not ordered and indices == {card.index for card in cards}:
        return
    raise ConfigError(
        f"{VARIABLE}={environ[VARIABLE]} is ambiguous: CUDA counts the fastest card first, and this host has "
        f"different cards ({', '.join(sorted(names))}); set {ORDER}={PCI_ORDER}, or use UUIDs"
    )


def _named(name: str, devices: Sequence[Device]) -> list[Device]:
    if name.isdecimal():
        return [card for card in _cards(devices) if card.index == int(name)]
    exact = [device for device in devices if device.uuid == name]
    if exact or not name.startswith(("GPU-", "MIG-")):
        return exact
    return [device for device in devices if device.uuid.startswith(name)]


def _allowed(
    name: str, devices: Sequence[Device], seen: Sequence[Device] | None, environ: Mapping[str, str]
) -> Device:
    """The one device of this name that may be used; of a card of which MIG instances are shown, the one."""
    matches = _named(name, devices) or _named(name[:4].upper() + name[4:].lower(), devices)
    if len(matches) > 1:
        raise ConfigError(f"GPU {name} is ambiguous: {listed(matches)}; give more of the UUID")
    if not matches:
        raise GpuError(f"there is no GPU {name} on this host; it has {listed(devices)}")
    (device,) = matches
    if seen is None or device in seen or any(shown.is_card and shown.card == device.card for shown in seen):
        return device
    parts = [shown for shown in seen if shown.card == device.card] if device.is_card else []
    if len(parts) == 1:
        return parts[0]
    raise ConfigError(
        f"GPU {name} ({device.uuid}) is excluded by {VARIABLE}={environ[VARIABLE]}; this process may use "
        f"{listed(seen)} (indices are nvidia-smi's)"
    )


def _too_few(found: int, wanted: int, environ: Mapping[str, str]) -> str:
    if VARIABLE in environ:
        return (
            f"{VARIABLE}={environ[VARIABLE]!r} gives this process {found or 'no'} GPU, and it needs {wanted}"
        )
    hint = f" ({_CONTAINER}={environ[_CONTAINER]})" if _CONTAINER in environ else ""
    return f"the NVIDIA driver finds {f'{found} GPU, and {wanted} are needed' if found else 'no GPU'}{hint}"
