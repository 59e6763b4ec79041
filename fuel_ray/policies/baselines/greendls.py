"""GreenDLS's network under the Policy protocol; it is trained elsewhere."""

from collections.abc import Mapping

import numpy as np

from fuel_ray.codec import GREENDLS_FEATURES, GREENDLS_GRID, Codec, Encoder
from fuel_ray.types import Knobs, NodeSpec, Slo, WindowMetrics

GREENDLS_SLO = Slo(e2e_s=10.0, share=None)  # FACTS.md, section 4
GREENDLS_CODEC = Codec(GREENDLS_FEATURES, GREENDLS_GRID, GREENDLS_SLO)
SHAPES = {
    "trunk.0.weight": (32, 4), "trunk.0.bias": (32,), "trunk.2.weight": (32, 32), "trunk.2.bias": (32,),
    "value.weight": (1, 32), "value.bias": (1,), "advantage.weight": (198, 32), "advantage.bias": (198,),
}  # fmt: skip


class GreenDlsNet:
    """4 features -> 32 ReLU -> 32 Tanh -> value (1) and advantages (198), as in GreenDLS (LLM).

    The nearest supported clock is the node's to choose: GreenDLS's clocks are a V100S's, 517 to 1537 MHz.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], spec: NodeSpec) -> None:
        """``arrays`` are float32 of ``SHAPES``.

        Raises:
            ValueError: an array is missing or of another shape.
        """
        for name, shape in SHAPES.items():
            if name not in arrays or arrays[name].shape != shape:
                raise ValueError(f"{name} must have shape {shape}")
        self._arrays = arrays
        self._encoder = Encoder(GREENDLS_CODEC, spec)

    def reset(self) -> None:
        """Forget the past."""
        self._encoder.reset()

    def decide(self, window: WindowMetrics) -> Knobs:
        """The action of highest advantage, which is that of highest Q."""
        a = self._arrays
        hidden = np.maximum(a["trunk.0.weight"] @ self._encoder.encode(window) + a["trunk.0.bias"], 0.0)
        hidden = np.tanh(a["trunk.2.weight"] @ hidden + a["trunk.2.bias"])
        return GREENDLS_GRID.decode(int((a["advantage.weight"] @ hidden + a["advantage.bias"]).argmax()))
