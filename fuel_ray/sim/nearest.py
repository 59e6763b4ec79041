"""Which shipped pack is nearest to a GPU and a model: for the clock axis, and for what a profile lacks."""

import math
import re
from collections.abc import Iterable

from fuel_ray.errors import ConfigError
from fuel_ray.sim.pack import Pack, load_pack, pack_names

_ARCHITECTURES = {
    "Hopper": "H100|H200|H800|H20|GH200",
    "Ampere": "A100|A800|A40|A30|A10|A6000|A5000|RTX 30",
    "Volta": "V100|V100S|TITAN V",
}
_SIZE = re.compile(r"(?<![\w.])(?:(\d+)x)?(\d+(?:\.\d+)?)([BM])(?![a-z])", re.IGNORECASE)


def same_architecture(gpu_name: str) -> str:
    """The shipped pack whose clock axis a GPU of this name shares: its own GPU's, else its architecture's.

    A pack that has its axis from another one gives none.

    Raises:
        ConfigError: none is of its architecture.
    """
    of = architecture(gpu_name)
    if of is None:
        known = "; ".join(f"{name}: {cards.replace('|', ', ')}" for name, cards in _ARCHITECTURES.items())
        raise ConfigError(
            f"no shipped pack has a clock axis for {gpu_name!r} (there are {known}): profile it at three "
            "clocks or more, and give the nearest pack with --clock-axis-from"
        )
    own_axis = [pack for pack in _shipped(of) if not pack.clock_axis_from]
    return _nearest(own_axis, gpu_name).name


def nearest_pack(gpu_name: str, model: str, *, default: str) -> str:
    """The shipped pack nearest to a model on a GPU: of that GPU, else of its architecture, and by size.

    ``default`` where none is of its architecture.
    """
    of = architecture(gpu_name)
    return default if of is None else _nearest(_shipped(of), gpu_name, model).name


def architecture(gpu_name: str) -> str | None:
    """NVIDIA's name of a GPU's architecture, of those that a shipped pack is of."""
    named = (name for name, cards in _ARCHITECTURES.items() if re.search(rf"\b({cards})", gpu_name))
    return next(named, None)


def parameters(model: str) -> float | None:
    """Billions of parameters that a model's name tells, as 8 of Qwen/Qwen3-8B."""
    found = _SIZE.search(model.rpartition("/")[2].replace("_", "-"))
    if found is None:
        return None
    experts, number, unit = found.groups()
    return float(number) * int(experts or 1) / (1000 if unit in "Mm" else 1)


def _shipped(of: str) -> list[Pack]:
    return [pack for pack in map(load_pack, pack_names()) if pack.architecture == of]


def _nearest(packs: Iterable[Pack], gpu_name: str, model: str = "") -> Pack:
    """By GPU before size; of equals the first by name, which is that with the fewest GPUs."""

    def distance(pack: Pack) -> tuple[bool, bool, float, str]:
        ours, theirs = parameters(model), parameters(pack.model)
        apart = abs(math.log(ours / theirs)) if ours and theirs else 0.0
        return pack.gpu_name != gpu_name, _card(pack.gpu_name) != _card(gpu_name), apart, pack.name

    return min(packs, key=distance)


def _card(gpu_name: str) -> str:
    """H100 of NVIDIA H100 80GB HBM3."""
    found = re.search(rf"\b({'|'.join(_ARCHITECTURES.values())})", gpu_name)
    return found[0] if found else gpu_name
