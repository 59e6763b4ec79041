"""EAIS: batch and clock together, from fitted latency and energy models and the measured rate."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from fuel_ray.averages import ArrivalRate
from fuel_ray.policies.models import BatchModel
from fuel_ray.types import Knobs, WindowMetrics


@dataclass(eq=False)
class Eais:
    """The (batch, clock) of least energy per request whose predicted latency meets the SLO.

    The rule of GreenDLS's comparison. With rate v, q requests queued and the oldest of age s: per clock,
    batches up to min(int(v (SLO - age) + q), max_batch); the largest b with
    1.2 (age + (b - q) / v) + latency(b) < 0.9 SLO, else 1; then the clock of least energy per request. Where
    even one request meets the SLO at no clock, the highest clock. Theirs are clocks 120 MHz apart and at
    most 32 requests, the capacity of their server.
    """

    models: Sequence[BatchModel]
    slo_s: float  # limit on the time from arrival to the last token
    max_batch: int = 32
    arrival_rate: ArrivalRate = field(default_factory=ArrivalRate)

    def reset(self) -> None:
        self.arrival_rate = ArrivalRate()

    def decide(self, window: WindowMetrics) -> Knobs:
        rate_rps = max(self.arrival_rate.update(window), 1e-3)
        choices = [(self._batch(model, window, rate_rps), model) for model in self.models]
        good = [choice for choice in choices if self._meets(*choice, window, rate_rps)]
        if not good:
            batch, model = max(choices, key=lambda choice: choice[1].gpu_clock_mhz)
        else:
            batch, model = min(good, key=lambda choice: choice[1].energy_j_per_request(choice[0]))
        return Knobs(batch, model.gpu_clock_mhz)

    def _batch(self, model: BatchModel, window: WindowMetrics, rate_rps: float) -> int:
        """The largest batch that meets the SLO at this clock; the delay grows with it, so bisect."""
        arriving = rate_rps * (self.slo_s - window.oldest_wait_s)
        more = range(2, min(int(arriving + window.waiting), self.max_batch) + 1)
        return 1 + bisect_left(more, True, key=lambda b: not self._meets(b, model, window, rate_rps))

    def _meets(self, batch: int, model: BatchModel, window: WindowMetrics, rate_rps: float) -> bool:
        filled_s = window.oldest_wait_s + (batch - window.waiting) / rate_rps
        return 1.2 * filled_s + model.latency_s(batch) < 0.9 * self.slo_s
