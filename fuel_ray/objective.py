"""The named rewards. Each scores one window; none of them depends on how the knobs were chosen."""

from dataclasses import dataclass
from typing import Protocol

from fuel_ray.outside import made
from fuel_ray.types import Slo, WindowMetrics

GREENDLS_K = 150.0  # GreenDLS, llm/src/scheduler.py: weight of energy efficiency


class Objective(Protocol):
    """Scores a window; higher is better. None: it cannot be judged, and nobody is to learn from it."""

    def reward(self, window: WindowMetrics) -> float | None: ...


def from_outside(name: str, slo: Slo, *, miss_price_j: float) -> Objective:
    """The objective that a ``package.module:Class`` makes of the SLO and the price of a miss."""
    found: Objective = made(name, needs=("reward",), slo=slo, miss_price_j=miss_price_j)
    return found


class Unscored:
    """For loops whose rewards nobody reads."""

    def reward(self, window: WindowMetrics) -> float:
        return 0.0


def greendls_reward(delay_ms: float, energy_mj: float, slo_target_ms: float, k: float = GREENDLS_K) -> float:
    """GreenDLS: k delay / energy within the SLO, SLO - delay (ms) beyond it.

    By Little's law delay / energy per request is requests in the system / power, so this pays for slowness
    until the SLO. It is kept to the letter for comparison.
    """
    if delay_ms <= slo_target_ms:
        return k * delay_ms / energy_mj
    return slo_target_ms - delay_ms


def greendls_kv_reward(
    delay_ms: float, energy_mj: float, kv_cache_usage: float, slo_target_ms: float, k: float = GREENDLS_K
) -> float:
    """The GreenDLS reward with a penalty, within the SLO, for KV usage (0..1) below 0.5 or above 0.9."""
    reward = greendls_reward(delay_ms, energy_mj, slo_target_ms, k)
    if delay_ms > slo_target_ms:
        return reward
    return reward - 5.0 * max(0.5 - kv_cache_usage, 0.0) - 10.0 * max(kv_cache_usage - 0.9, 0.0)


@dataclass(frozen=True, slots=True)
class GreenDls:
    """The GreenDLS rewards on a window: mean e2e of what finished against GPU energy per finished request.

    A window in which nothing finished scores 0 if nobody waits. If somebody does it is stalled, and scores as
    if the latency were the SLO plus the oldest wait.
    """

    slo_e2e_s: float
    kv: bool  # with the KV usage term
    normalized: bool  # divided by 50 and clipped to [-2, 2]

    def reward(self, window: WindowMetrics) -> float | None:
        if not window.measured("e2e"):
            return None
        slo_ms = self.slo_e2e_s * 1000
        if window.completed:
            delay_ms = sum(window.e2es_s) / window.completed * 1000
            energy_mj = window.energy_j / window.completed * 1000
        elif window.waiting:
            delay_ms = slo_ms + window.oldest_wait_s * 1000
            energy_mj = window.energy_j * 1000
        else:
            return 0.0
        raw = greendls_reward(delay_ms, energy_mj, slo_ms)
        if self.kv:
            raw = greendls_kv_reward(delay_ms, energy_mj, window.kv_usage, slo_ms)
        return min(max(raw / 50.0, -2.0), 2.0) if self.normalized else raw


@dataclass(frozen=True, slots=True)
class Energy:
    """Joules saved against a reference price per token, less a price for each request that misses the SLO.

    reward = (token_price_j * output tokens - energy - miss_price_j * misses) / (scale_w * duration)

    Summed over an episode that serves all its arrivals the first term is a constant, so this ranks policies
    by energy plus miss_price_j per miss; it only takes the load's variance out of the reward. Under overload,
    where more speed serves more, it is Dinkelbach's form of "least joules per token" at the price of the
    reference (W. Dinkelbach, Management Science 13, 1967).
    """

    slo: Slo
    token_price_j: float  # J per output token that a good static setting pays
    miss_price_j: float  # J per missed limit
    scale_w: float  # typical power, so that rewards are of order 1
    # A window cannot score worse: one burst should not drown everything else. Misses beyond that are not
    # seen, which at a high price of a miss are many where the load is more than the node can serve
    lowest: float = -4.0

    def reward(self, window: WindowMetrics) -> float | None:
        if not window.judged_by(self.slo):
            return None
        saved_j = self.token_price_j * window.output_tokens - window.energy_j
        score = (saved_j - self.miss_price_j * self.misses(window)) / (self.scale_w * window.duration_s)
        return max(score, self.lowest)

    def misses(self, window: WindowMetrics) -> float:
        """Limits missed in this window, an estimate where its samples are.

        One on TTFT is missed in the window in which it passes, so that serving slowly does not put the miss
        off; the others when the request finishes. Where it is not known how long each request waits, or no
        limit is on TTFT, one on TTFT is missed when the first token comes, and in a window in which nothing
        finishes the waiting requests count by the oldest wait.
        """
        missed, wait_limit_s = 0.0, self.slo.wait_limit_s
        for _, values_s, limit_s in self.slo.limited(window.latencies_s):
            missed += sum(value_s > limit_s for value_s in values_s)
        if self.slo.ttft_s is not None and (overdue := window.newly_overdue(self.slo.ttft_s)) is not None:
            return missed + overdue
        if wait_limit_s is not None and not window.completed and window.waiting:
            missed += window.waiting * min(1.0, window.oldest_wait_s / wait_limit_s)
        return missed
