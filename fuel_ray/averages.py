"""Moving averages of a node's load: its rate over the last seconds, its requests over the last ones."""

import math
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from fuel_ray.types import WindowMetrics

EWMA_S = 10.0  # time constant of the arrival rate's, unless another is named
FAST_EWMA_S = 4.0  # of one that sees a change of the load sooner
GAP_EWMA_S = (3.0, 8.0)  # of times between tokens: about as long as requests live
EWMA_REQUESTS = 50.0  # the same of the requests', and how many there must have been


class ArrivalRate:
    """Exponentially weighted moving average of the arrival rate, with a time constant."""

    def __init__(self, ewma_s: float = EWMA_S) -> None:
        self._ewma_s = ewma_s
        self._rate_rps: float | None = None

    def update(self, window: WindowMetrics) -> float:
        """The rate in req/s after one more window; the first window's own rate at the start."""
        rate_rps = window.arrivals / window.duration_s
        if self._rate_rps is not None:
            share = -math.expm1(-window.duration_s / self._ewma_s)
            rate_rps = self._rate_rps + (rate_rps - self._rate_rps) * share
        self._rate_rps = rate_rps
        return rate_rps


def smoothed_rates(arrivals: np.ndarray, ewma_s: float = EWMA_S) -> list[float]:
    """What ``ArrivalRate`` says after each of these windows of 1 s."""
    share = -math.expm1(-1.0 / ewma_s)
    return list(accumulate(arrivals.tolist(), lambda rate_rps, count: rate_rps + (count - rate_rps) * share))


class TokenGaps:
    """Time between a request's tokens over the last ``GAP_EWMA_S`` seconds, one mean for each.

    TPOT is a mean over seconds: what was fast lately may be slow now without missing.
    """

    def __init__(self) -> None:
        self._gaps_s: list[float] = []

    def update(self, window: WindowMetrics) -> tuple[float, ...]:
        """The means in s after one more window; of windows without tokens nothing is known."""
        if window.output_tokens and window.running:
            gap_s = window.running * window.duration_s / window.output_tokens
            before = self._gaps_s or [gap_s] * len(GAP_EWMA_S)
            shares = [-math.expm1(-window.duration_s / average_s) for average_s in GAP_EWMA_S]
            self._gaps_s = [old + (gap_s - old) * share for old, share in zip(before, shares, strict=True)]
        return tuple(self._gaps_s) or (0.0,) * len(GAP_EWMA_S)


class PromptPerArrival:
    """Prompt tokens computed per arrival, over about the last 20 windows in which somebody came.

    Known from the first window on, and before those whose prompts they are have a first token.
    """

    def __init__(self) -> None:
        self._tokens = 512.0

    def update(self, window: WindowMetrics) -> float:
        """The mean after one more window."""
        if window.arrivals:
            tokens = min(max(window.prompt_tokens / window.arrivals, 16.0), 4000.0)
            self._tokens += 0.05 * (tokens - self._tokens)
        return self._tokens


@dataclass(frozen=True, slots=True)
class RequestMeans:
    """What requests were like lately; None before there were enough of them."""

    prompt_tokens: float | None = None  # those found in the prefix cache too
    output_tokens: float | None = None
    prefix_hit_rate: float | None = None  # share of the prompt tokens found in the cache


class RecentRequests:
    """Tokens per request that got its first token, over about the last ``EWMA_REQUESTS`` of them."""

    def __init__(self) -> None:
        self._seen = 0
        self._sums = np.zeros(4)  # requests, their prompt tokens, those of them in the cache, output tokens

    def update(self, window: WindowMetrics) -> RequestMeans:
        """The means after one more window; none if it does not say how many requests began in it."""
        if not window.measured("ttft"):
            return RequestMeans()
        begun, hit_rate = len(window.ttfts_s), min(window.prefix_hit_rate or 0.0, 0.99)
        prompt = window.prompt_tokens / (1.0 - hit_rate)
        self._seen += begun
        self._sums *= math.exp(-begun / EWMA_REQUESTS)
        self._sums += begun, prompt, prompt * hit_rate, window.output_tokens
        if self._seen < EWMA_REQUESTS:
            return RequestMeans()
        requests, prompt, hits, output = self._sums.tolist()
        return RequestMeans(prompt / requests, output / requests, hits / max(prompt, 1.0))
