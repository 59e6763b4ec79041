"""A reward from outside: --reward examples.outside.rewards:EnergyDelay."""

from dataclasses import dataclass

from fuel_ray.types import Slo, WindowMetrics


@dataclass(frozen=True, slots=True)
class EnergyDelay:
    """Minus power times the mean time per output token, less a price for each request late to begin."""

    slo: Slo
    miss_price_j: float

    def reward(self, window: WindowMetrics) -> float:
        """Score of one window."""
        power_w = window.energy_j / window.duration_s
        tpot_s = sum(window.tpots_s) / len(window.tpots_s) if window.tpots_s else 0.0
        late = sum(ttft_s > (self.slo.ttft_s or float("inf")) for ttft_s in window.ttfts_s)
        return -power_w * tpot_s / 10.0 - self.miss_price_j * late / 1000.0
