"""A control loop as a Gymnasium environment."""

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np

from fuel_ray.codec import Codec, Encoder
from fuel_ray.control import ControlLoop
from fuel_ray.metrics import window_attainment


class ServingEnv(gymnasium.Env[np.ndarray, np.int64]):
    """Observe a serving node, choose (batch limit, GPU clock) for the next window.

    Observations are the codec's features, actions the indices of its grid. Serving never terminates; an
    episode is truncated after ``steps`` windows. Given several loops (servers of several block sizes), each
    episode takes one.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  (Gymnasium's own name and type)

    def __init__(self, loops: Sequence[ControlLoop], codec: Codec, *, steps: int) -> None:
        self.codec = codec
        self._loops = [(loop, Encoder(codec, loop.node.spec)) for loop in loops]
        self._loop, self._encoder = self._loops[0]
        self._steps = steps
        self._step = 0
        self.observation_space = gymnasium.spaces.Box(codec.low, codec.high, dtype=np.float32)
        self.action_space = gymnasium.spaces.Discrete(len(codec.grid))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode on a node drawn by chance, with requests drawn by chance."""
        super().reset(seed=seed)
        self._loop, self._encoder = self._loops[int(self.np_random.integers(len(self._loops)))]
        self._encoder.reset()
        self._step = 0
        window = self._loop.reset(seed=int(self.np_random.integers(2**31)))
        return self._encoder.encode(window), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Apply an action for one window; ``info`` has what a trainer wants to log."""
        record = self._loop.step(self.codec.grid.decode(int(action)))
        self._step += 1
        window = record.metrics
        info = {
            "energy_j": window.energy_j,
            "arrivals": window.arrivals,
            "slo_attainment": window_attainment(window, self.codec.slo),
            "gpu_clock_mhz": record.applied.gpu_clock_mhz,
        }
        return self._encoder.encode(window), record.reward, False, self._step >= self._steps, info

    def close(self) -> None:
        """Release the nodes."""
        for loop, _ in self._loops:
            loop.node.close()
