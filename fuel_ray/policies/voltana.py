"""VoltanaLLM-style frequency control: feed forward, from a model of the step time."""

from collections.abc import Sequence

from fuel_ray.policies.models import StepModel
from fuel_ray.types import Knobs, Policy, WindowMetrics

_IDLE_S = 5.0  # without new metrics for longer than this: the lowest clock


class VoltanaLlm:
    """The lowest clock whose predicted latencies keep their limits.

    VoltanaLLM's order: load over a threshold: highest clock; no new metrics: keep the
    clock, after 5 s the lowest; requests waiting: highest; else the lowest clock with
    prediction <= limit (1 + margin) - offset, else the highest. It controls servers that only prefill or
    only decode; this one does both, so the predicted ITL is stretched by the share of time that the window's
    prefills take. Threshold (share of the KV blocks), margin and offset are ours.
    """

    def __init__(
        self,
        models: Sequence[StepModel],
        *,
        ttft_s: float,
        tpot_s: float,
        batch_limit: int,
        kv_tokens: int,
        margin: float = 0.0,
        offset_s: float = 0.0,
        max_kv_usage: float = 0.95,
    ) -> None:
        """``kv_tokens`` is the size of the KV pool, which turns its usage into tokens."""
        self._models = sorted(models, key=lambda model: model.gpu_clock_mhz)
        self._ttft_s = ttft_s * (1 + margin) - offset_s
        self._tpot_s = tpot_s * (1 + margin) - offset_s
        self._batch_limit, self._kv_tokens, self._max_kv_usage = batch_limit, kv_tokens, max_kv_usage
        self.reset()

    def reset(self) -> None:
        """Forget how long the node has been idle."""
        self._idle_s = 0.0

    def decide(self, window: WindowMetrics) -> Knobs:
        """The clock for the load at the window's end."""
        return Knobs(self._batch_limit, self._clock_mhz(window))

    def _clock_mhz(self, window: WindowMetrics) -> int:
        highest_mhz = self._models[-1].gpu_clock_mhz
        idle = not (window.arrivals or window.output_tokens or window.running or window.waiting)
        self._idle_s = self._idle_s + window.duration_s if idle else 0.0
        if window.kv_usage > self._max_kv_usage:
            return highest_mhz
        if idle:
            over = self._idle_s > _IDLE_S
            return self._models[0].gpu_clock_mhz if over else window.knobs.gpu_clock_mhz
        if window.waiting:
            return highest_mhz
        kept = (model.gpu_clock_mhz for model in self._models if self._keeps(model, window))
        return next(kept, highest_mhz)

    def _keeps(self, model: StepModel, window: WindowMetrics) -> bool:
        prefills = max(window.arrivals, 1) if window.prompt_tokens else 0
        prefill_s = model.prefill_s(window.prompt_tokens / max(prefills, 1))
        prefilling = min(prefills * prefill_s / window.duration_s, 0.9)
        itl_s = model.itl_s(window.running, window.kv_usage * self._kv_tokens) / (1.0 - prefilling)
        return itl_s <= self._tpot_s and prefill_s <= self._ttft_s


class Dwell:
    """Takes a policy's lower clocks only when ``dwell_s`` have passed since the last change, higher at once.

    Clock writes take 23 to 200 ms to act and cost the GPU, measured on an H100.
    """

    def __init__(self, policy: Policy, *, dwell_s: float) -> None:
        self._policy, self._dwell_s = policy, dwell_s
        self._since_s = 0.0

    def reset(self) -> None:
        """Forget the past."""
        self._policy.reset()
        self._since_s = 0.0

    def decide(self, window: WindowMetrics) -> Knobs:
        """The policy's limit, and its clock if that may be taken already."""
        wished, clock_mhz = self._policy.decide(window), window.knobs.gpu_clock_mhz
        self._since_s += window.duration_s
        if wished.gpu_clock_mhz < clock_mhz and self._since_s < self._dwell_s:
            return Knobs(wished.batch_limit, clock_mhz)
        if wished.gpu_clock_mhz != clock_mhz:
            self._since_s = 0.0
        return wished
