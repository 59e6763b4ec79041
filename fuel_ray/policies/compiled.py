"""A network's side of a program."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fuel_ray.codec import ActionGrid, Codec, Context
from fuel_ray.sim.program import FEATURES, SIGHT, TABLE, Program, program
from fuel_ray.types import NodeSpec

LAYERS = ("trunk.0", "trunk.2", "limit_advantage", "clock_advantage")
_NAMES = ("{}_1", "{}_2", "limit_{}", "clock_{}")
_FIXED = ("tpot_limit", "miss_price", "kv_block_size")  # features that no window changes
KNOWN = frozenset((*FEATURES, *_FIXED))  # features that can be compiled
_TIMES = frozenset(("oldest_wait", "token_gap", "token_gap_3s", "token_gap_8s"))  # by limits on tokens


def network_parts(arrays: Mapping[str, np.ndarray], codec: Codec, spec: NodeSpec) -> dict[str, Any] | None:
    """The fields of a ``Program`` that are the network's, of ``folded`` arrays; None where it has none.

    It needs two hidden layers, advantages per limit and per clock, fixed scales and known features; under an
    end-to-end limit the times among them mean something else.
    """
    unknown = set(codec.features) - (KNOWN if codec.slo.e2e_s is None else KNOWN - _TIMES)
    layers = {name.rsplit(".", 1)[0] for name in arrays}
    if unknown or codec.running_scale is not None or layers != {*LAYERS, "value"}:
        return None
    parts: dict[str, Any] = {}
    for layer, name in zip(LAYERS, _NAMES, strict=True):
        parts[name.format("weight")] = np.ascontiguousarray(arrays[f"{layer}.weight"].T, float)
        parts[name.format("bias")] = np.ascontiguousarray(arrays[f"{layer}.bias"], float)
    codes = [0 if name in _FIXED else FEATURES.index(name) for name in codec.features]
    context: Any = Context(spec, codec.slo, 0.0, codec.miss_price_j)
    window: Any = None
    fixed = [
        min(max(f.scaled(window, context) or 0.0, 0.0), f.high) if name in _FIXED else 0.0
        for name, f in ((name, codec.table[name]) for name in codec.features)
    ]
    return {
        **parts,
        "features": np.array(codes, np.int64),
        "fixed": np.array(fixed, float),
        "grid_limits": np.array(codec.grid.batch_limits, float),
        "grid_mhz": np.array(codec.grid.gpu_clocks_mhz, float),
    }


def untethered(grid: ActionGrid) -> tuple[Program, None]:
    """A base from which a network without an anchor may take any action."""
    lowest = np.full((1, 1), float(grid.gpu_clocks_mhz[0]))
    return program(base=TABLE, mhz=lowest, batch_limit=grid.batch_limits[0]), None


def room(p: Program) -> tuple[np.ndarray, np.ndarray]:
    """A sight that has seen nothing, and room for the network's layers."""
    biases = (p.bias_1, p.bias_2, p.limit_bias, p.clock_bias)
    units = max(1, len(p.features), *map(len, biases))
    return np.zeros(SIGHT), np.zeros((3, units))
