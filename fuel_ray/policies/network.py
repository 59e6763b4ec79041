"""The duelling Q network: in torch for training, in numpy for acting, with the same arrays."""

from collections.abc import Mapping
from typing import Literal

import numpy as np

Head = Literal["joint", "additive", "smooth"]
BUMPS = 10  # that a smooth head has across the clocks


def bumps(clocks: int) -> np.ndarray:
    """Overlapping Gaussian bumps over the clock index: (clocks, bumps), rows of unit sum."""
    centres = np.linspace(0.0, clocks - 1, BUMPS)
    width = max((clocks - 1) / (BUMPS - 1), 0.5)
    basis = np.exp(-0.5 * ((np.arange(clocks)[:, None] - centres) / width) ** 2)
    return np.asarray(basis / basis.sum(axis=1, keepdims=True), np.float32)


def folded(arrays: Mapping[str, np.ndarray], *, clocks: int) -> dict[str, np.ndarray]:
    """The weights as ``q_values`` reads them: those of a smooth head become the additive head's it equals."""
    kept = {name: array for name, array in arrays.items() if not name.startswith("clock_bumps.")}
    for kind in ("weight", "bias"):
        if f"clock_bumps.{kind}" in arrays:
            kept[f"clock_advantage.{kind}"] = bumps(clocks) @ arrays[f"clock_bumps.{kind}"]
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
