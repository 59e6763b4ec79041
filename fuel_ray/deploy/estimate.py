"""What another clock would have cost for the work of a window: modelled by a calibration pack."""

from fuel_ray.sim.pack import PerfModel
from fuel_ray.types import Knobs, NodeSpec, WindowMetrics

_CONTEXT = 700  # tokens per request where the size of the KV pool is not known


class SavingEstimate:
    """Compares clocks at equal work; the batch limit is taken to make no difference."""

    def __init__(self, perf: PerfModel, spec: NodeSpec) -> None:
        self._perf, self._spec = perf, spec

    def saved_j(self, window: WindowMetrics, knobs: Knobs, *, reference: Knobs) -> float:
        """Joules that ``knobs`` save over ``reference`` in such a window: the model's share of its energy."""
        in_force_j, reference_j, knobs_j = (
            self._energy_j(window, each.gpu_clock_mhz) for each in (window.knobs, reference, knobs)
        )
        return window.energy_j * (reference_j - knobs_j) / in_force_j

    def _energy_j(self, window: WindowMetrics, clock_mhz: int) -> float:
        """Of the window's tokens in equal steps, of launching its prompts, and of idling in what is left."""
        at = self._perf.at(clock_mhz)
        if not window.output_tokens and not window.prompt_tokens:
            return at.rest_w * window.duration_s
        # requests stay longer at a slower clock, so that more of them share a step
        slower = (
            self._step(window, 1.0, clock_mhz)[0] / self._step(window, 1.0, window.knobs.gpu_clock_mhz)[0]
        )
        step_s, power_w, steps = self._step(window, slower, clock_mhz)
        left_s = max(0.0, window.duration_s - steps * step_s)
        launch_s = max(0.0, self._perf.constants.launch_pieces_s - step_s)
        stall_s = min(left_s, window.arrivals * launch_s)
        return steps * step_s * power_w + stall_s * at.stall_w + (left_s - stall_s) * at.rest_w

    def _step(self, window: WindowMetrics, more: float, clock_mhz: int) -> tuple[float, float, float]:
        """Seconds, watts and number of the window's steps with so many times its running requests."""
        seqs = more * max(1, window.running)
        steps = max(1.0, window.output_tokens / seqs)
        context = more * self._context(window)
        step_s, power_w, _ = self._perf.step_cost(seqs, context, window.prompt_tokens / steps, clock_mhz)
        return step_s, power_w, steps

    def _context(self, window: WindowMetrics) -> float:
        """Tokens in the KV cache."""
        if self._spec.num_kv_blocks is None:
            return float(_CONTEXT * window.running)
        return window.kv_usage * self._spec.num_kv_blocks * self._spec.kv_block_size
