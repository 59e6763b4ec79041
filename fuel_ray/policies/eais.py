"""EAIS: batch and clock together, from fitted latency and energy models and the measured rate."""

from collections.abc import Sequence

from fuel_ray.averages import ArrivalRate
from fuel_ray.policies.models import BatchModel
from fuel_ray.types import Knobs, WindowMetrics


class Eais:
    """The (batch, clock) of least energy per request whose predicted latency keeps the SLO.

    The rule of GreenDLS's comparison (FACTS.md, section 4). With rate v, q requests queued and the oldest of
    age s: per clock, batches up to min(int(v (SLO - age) + q), max_batch); the largest b with
    1.2 (age + (b - q) / v) + latency(b) < 0.9 SLO, else 1; then the clock of least energy per request. Where
    even one request keeps the SLO at no clock, the highest clock. Theirs are clocks 120 MHz apart and at
    most 32 requests, the capacity of their server.
    """

    def __init__(self, models: Sequence[BatchModel], *, slo_s: float, max_batch: int = 32) -> None:
        """``slo_s`` is the limit on the time from arrival to the last token."""
        self._models, self._slo_s, self._max_batch = tuple(models), slo_s, max_batch
        self.reset()

    def reset(self) -> None:
        """Forget the past rate."""
        self._arrival_rate = ArrivalRate()

    def decide(self, window: WindowMetrics) -> Knobs:
        """The pair for the rate and the queue seen so far."""
        rate_rps = max(self._arrival_rate.update(window), 1e-3)
        choices = [(self._batch(model, window, rate_rps), model) for model in self._models]
        kept = [choice for choice in choices if self._delay_s(*choice, window, rate_rps) < 0.9 * self._slo_s]
        if not kept:
            batch, model = max(choices, key=lambda choice: choice[1].gpu_clock_mhz)
        else:
            batch, model = min(kept, key=lambda choice: choice[1].energy_j_per_request(choice[0]))
        return Knobs(batch, model.gpu_clock_mhz)

    def _batch(self, model: BatchModel, window: WindowMetrics, rate_rps: float) -> int:
        """The largest batch that keeps the SLO at this clock; the delay grows with it, so bisect."""
        low = 1
        arriving = rate_rps * (self._slo_s - window.oldest_wait_s)
        high = max(1, min(int(arriving + window.waiting), self._max_batch))
        while low < high:
            middle = (low + high + 1) // 2
            kept = self._delay_s(middle, model, window, rate_rps) < 0.9 * self._slo_s
            low, high = (middle, high) if kept else (low, middle - 1)
        return low

    @staticmethod
    def _delay_s(batch: int, model: BatchModel, window: WindowMetrics, rate_rps: float) -> float:
        filled_s = window.oldest_wait_s + (batch - window.waiting) / rate_rps
        return 1.2 * filled_s + model.latency_s(batch)
