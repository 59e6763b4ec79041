"""The duelling Q network: in torch for training, in numpy for acting, with the same arrays."""

from collections.abc import Mapping
from typing import Literal

import numpy as np

Head = Literal["joint", "additive"]


def q_values(arrays: Mapping[str, np.ndarray], observation: np.ndarray, *, head: Head) -> np.ndarray:
    """Q of every action: (features,) -> (actions,).

    Args:
        arrays: weights by name: ``trunk.{0,2,..}.{weight,bias}``, ``value.*`` and ``advantage.*`` or, for an
        additive     head, ``limit_advantage.*`` and ``clock_advantage.*``.
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
