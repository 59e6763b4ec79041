"""Moving averages of a node's load: its rate over the last seconds, its requests over the last ones."""

import math
from dataclasses import dataclass

import numpy as np

from fuel_ray.types import WindowMetrics

EWMA_S = 10.0  # time constant of the arrival rate's
EWMA_REQUESTS = 50.0  # the same of the requests', and how many there must have been


class ArrivalRate:
    """Exponentially weighted moving average of the arrival rate, time constant ``EWMA_S``."""

    def __init__(self) -> None:
        self._rate_rps: float | None = None

    def reset(self) -> None:
        """Forget the past."""
        self._rate_rps = None

    def update(self, window: WindowMetrics) -> float:
        """The rate in req/s after one more window; the first window's own rate at the start."""
        rate_rps = window.arrivals / window.duration_s
        if self._rate_rps is not None:
            rate_rps = self._rate_rps + (rate_rps - self._rate_rps) * -math.expm1(-window.duration_s / EWMA_S)
        self._rate_rps = rate_rps
        return rate_rps


def smoothed_rates(arrivals: np.ndarray, *, window_s: float = 1.0) -> list[float]:
    """What ``ArrivalRate`` says after each of these windows."""
    share = -math.expm1(-window_s / EWMA_S)
    rates: list[float] = []
    for count in arrivals.tolist():
        rate_rps = count / window_s
        if rates:
            rate_rps = rates[-1] + (rate_rps - rates[-1]) * share
        rates.append(rate_rps)
    return rates


@dataclass(frozen=True, slots=True)
class RequestMeans:
    """What requests were like lately; None before there were enough of them."""

    prompt_tokens: float | None = None  # those found in the prefix cache too
    output_tokens: float | None = None
    prefix_hit_rate: float | None = None  # share of the prompt tokens found in the cache


class RecentRequests:
    """Tokens per request that got its first token, over about the last ``EWMA_REQUESTS`` of them."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the past."""
        self._seen, self._begun, self._prompt, self._hits, self._output = 0, 0.0, 0.0, 0.0, 0.0

    def update(self, window: WindowMetrics) -> RequestMeans:
        """The means after one more window."""
        begun, hit_rate = len(window.ttfts_s), min(window.prefix_hit_rate or 0.0, 0.99)
        hits = window.prompt_tokens * hit_rate / (1.0 - hit_rate)
        left = math.exp(-begun / EWMA_REQUESTS)
        self._seen += begun
        self._begun = self._begun * left + begun
        self._prompt = self._prompt * left + window.prompt_tokens + hits
        self._hits = self._hits * left + hits
        self._output = self._output * left + window.output_tokens
        if self._seen < EWMA_REQUESTS:
            return RequestMeans()
        return RequestMeans(
            self._prompt / self._begun, self._output / self._begun, self._hits / max(self._prompt, 1.0)
        )
