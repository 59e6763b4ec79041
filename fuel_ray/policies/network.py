"""The duelling Q network: in torch for training, in numpy for acting, with the same arrays."""

from collections.abc import Mapping
from typing import Literal

import numpy as np

Head = Literal["joint", "additive", "smooth", "priced"]
BUMPS = 10  # that a smooth head has across the clocks
ENERGY_J = 100.0  # of one unit of a priced head's energy; its misses are counted


def bumps(clocks: int) -> np.ndarray:
    """Overlapping Gaussian bumps over the clock index: (clocks, bumps), rows of unit sum."""
    centres = np.linspace(0.0, clocks - 1, BUMPS)
    width = max((clocks - 1) / (BUMPS - 1), 0.5)
    basis = np.exp(-0.5 * ((np.arange(clocks)[:, None] - centres) / width) ** 2)
    return np.asarray(basis / basis.sum(axis=1, keepdims=True), np.float32)


def worth(miss_price_j: float) -> tuple[float, float]:
    """What a unit of a priced head's energy, and a miss, are worth in Q; of one size at any price."""
    size_j = 300.0 * (1.0 + miss_price_j / 200.0)
    return -ENERGY_J / size_j, -miss_price_j / size_j


def folded(
    arrays: Mapping[str, np.ndarray], *, clocks: int, miss_price_j: float = 0.0
) -> dict[str, np.ndarray]:
    """The weights as ``q_values`` reads them: smooth and priced heads become the additive ones they equal.

    A priced one does so at a price of a miss: ``limit_costs`` and ``clock_costs`` have rows for energy and
    then as many for misses.
    """
    heads = ("clock_bumps.", "limit_costs.", "clock_costs.")
    kept = {name: array for name, array in arrays.items() if not name.startswith(heads)}
    energy, miss = worth(miss_price_j)
    for kind in ("weight", "bias"):
        if f"clock_bumps.{kind}" in arrays:
            kept[f"clock_advantage.{kind}"] = bumps(clocks) @ arrays[f"clock_bumps.{kind}"]
        if f"clock_costs.{kind}" in arrays:
            limits, clock = (np.split(arrays[f"{knob}_costs.{kind}"], 2) for knob in ("limit", "clock"))
            kept[f"limit_advantage.{kind}"] = energy * limits[0] + miss * limits[1]
            kept[f"clock_advantage.{kind}"] = bumps(clocks) @ (energy * clock[0] + miss * clock[1])
    return kept


def q_values(arrays: Mapping[str, np.ndarray], observation: np.ndarray, *, head: Head) -> np.ndarray:
    """Q of every action: (features,) -> (actions,).

    Args:
        arrays: weights by name: ``trunk.{0,2,..}.{weight,bias}``, ``value.*`` and ``advantage.*`` or, for all
            but a joint head, ``limit_advantage.*`` and ``clock_advantage.*``.
        observation: (features,) float32.
        head: as the network was trained.
    """
    hidden = observation
    layer = 0
    while f"trunk.{layer}.weight" in arrays:
        weight, bias = arrays[f"trunk.{layer}.weight"], arrays[f"trunk.{layer}.bias"]
        hidden = np.maximum(weight @ hidden + bias, 0.0)
        layer += 2  # an activation stands between two linear layers

    def linear(name: str) -> np.ndarray:
        product: np.ndarray = arrays[f"{name}.weight"] @ hidden
        return product + arrays[f"{name}.bias"]

    if head == "joint":
        advantage = linear("advantage")
    else:
        advantage = (linear("limit_advantage")[:, None] + linear("clock_advantage")[None, :]).ravel()
    q: np.ndarray = linear("value") + advantage - advantage.mean()
    return q
