"""The functions of a calibration pack, compiled for the simulator."""

import math

from numba import njit

from fuel_ray.sim import pack
from fuel_ray.sim.compilation import kept
from fuel_ray.sim.pack import Constants

HOST_STEPS = 1000  # that a host keeps its speed
_GOLDEN_RATIO = (1 + math.sqrt(5)) / 2

step_cost = kept(_nrt=False)(pack.step_cost)


@njit(inline="always")
def launch_cost(m: Constants, seqs: float, prefill: float, step: int) -> float:
    """Seconds the host takes to compose and launch a step; the clock of the GPU does not matter.

    The number of the step decides how much the host's other work delays it: multiples of the golden ratio are
    spread evenly over 0..1, and minus their logarithm exponentially. That of its thousand decides whether the
    host is slow.
    """
    slow = step // HOST_STEPS * _GOLDEN_RATIO % 1.0 < m.host_slow_share
    speed = 1.0 + m.host_slow if slow else 1.0
    if prefill == 0:
        return m.launch_graph_s * speed
    mean = m.launch_pieces_s if seqs + prefill <= m.graph_max_tokens else m.launch_eager_s
    delay = -math.log(1.0 - step * _GOLDEN_RATIO % 1.0)
    return mean * (1.0 - m.launch_spread + m.launch_spread * delay) * speed
