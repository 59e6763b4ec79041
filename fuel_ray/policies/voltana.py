"""VoltanaLLM-style frequency control: feed forward, from a model of the step time."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from fuel_ray.policies.models import StepModel
from fuel_ray.types import Knobs, Policy, WindowMetrics

_IDLE_S = 5.0  # without new metrics for longer than this: the lowest clock
_MAX_KV_USAGE = 0.95


@dataclass(eq=False)
class VoltanaLlm:
    """The lowest clock whose predicted latencies meet their limits.

    VoltanaLLM's order: load over a threshold: highest clock; no new metrics: keep the
    clock, after 5 s the lowest; requests waiting: highest; else the lowest clock with
    prediction <= limit (1 + margin) - offset, else the highest. It controls servers that only prefill or
    only decode; this one does both, so the predicted ITL is stretched by the share of time that the window's
    prefills take. Threshold (share of the KV blocks), margin and offset are ours.
    """

    models: Sequence[StepModel]  # ascending by clock
    _: KW_ONLY
    ttft_s: float
    tpot_s: float
    batch_limit: int
    kv_tokens: int  # in the KV pool
    margin: float = 0.0
    offset_s: float = 0.0

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._idle_s = 0.0

    def decide(self, window: WindowMetrics) -> Knobs:
        return Knobs(self.batch_limit, self._clock_mhz(window))

    def _clock_mhz(self, window: WindowMetrics) -> int:
        highest_mhz = self.models[-1].gpu_clock_mhz
        idle = not (window.arrivals or window.output_tokens or window.running or window.waiting)
        self._idle_s = self._idle_s + window.duration_s if idle else 0.0
        if window.kv_usage > _MAX_KV_USAGE:
            return highest_mhz
        if idle:
            over = self._idle_s > _IDLE_S
            return self.models[0].gpu_clock_mhz if over else window.knobs.gpu_clock_mhz
        if window.waiting:
            return highest_mhz
        good = (model.gpu_clock_mhz for model in self.models if self._meets(model, window))
        return next(good, highest_mhz)

    def _meets(self, model: StepModel, window: WindowMetrics) -> bool:
        prefills = max(window.arrivals, 1) if window.prompt_tokens else 0
        prefill_s = model.prefill_s(window.prompt_tokens / max(prefills, 1))
        prefilling = min(prefills * prefill_s / window.duration_s, 0.9)
        itl_s = model.itl_s(window.running, window.kv_usage * self.kv_tokens) / (1.0 - prefilling)
        ttft_s, tpot_s = (
            limit_s * (1 + self.margin) - self.offset_s for limit_s in (self.ttft_s, self.tpot_s)
        )
        return itl_s <= tpot_s and prefill_s <= ttft_s


@dataclass(eq=False)
class Dwell:
    """Takes a policy's lower clocks only when ``dwell_s`` have passed since the last change, higher at once.

    Clock writes take 23 to 200 ms to act and cost the GPU, measured on an H100.
    """

    policy: Policy
    dwell_s: float
    since_s: float = 0.0

    def reset(self) -> None:
        self.policy.reset()
        self.since_s = 0.0

    def decide(self, window: WindowMetrics) -> Knobs:
        wished, clock_mhz = self.policy.decide(window), window.knobs.gpu_clock_mhz
        self.since_s += window.duration_s
        if wished.gpu_clock_mhz < clock_mhz and self.since_s < self.dwell_s:
            return Knobs(wished.batch_limit, clock_mhz)
        if wished.gpu_clock_mhz != clock_mhz:
            self.since_s = 0.0
        return wished
