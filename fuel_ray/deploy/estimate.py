"""What another clock would have cost for the work of a window: modelled by a calibration pack."""

from fuel_ray.sim.pack import PerfModel, step_cost
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
        """Of the window's tokens in equal steps, and of idling in what is left of it."""
        idle_w = self._perf.idle_w
        if not window.output_tokens and not window.prompt_tokens:
            return idle_w * window.duration_s
        seqs = max(1, window.running)
        steps = max(1.0, window.output_tokens / seqs)
        step_s, power_w, _ = step_cost(
            self._perf, seqs, self._context(window), window.prompt_tokens / steps, clock_mhz
        )
        return steps * step_s * power_w + idle_w * max(0.0, window.duration_s - steps * step_s)

    def _context(self, window: WindowMetrics) -> float:
        """Tokens in the KV cache."""
        if self._spec.num_kv_blocks is None:
            return float(_CONTEXT * window.running)
        return window.kv_usage * self._spec.num_kv_blocks * self._spec.kv_block_size
