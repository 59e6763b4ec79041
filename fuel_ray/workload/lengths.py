"""How long requests are, and which of them begin alike."""

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

PROMPT_TOKENS, OUTPUT_TOKENS = 512, 220  # means of a workload that says nothing else


@dataclass(frozen=True, slots=True)
class ClippedLognormal:
    """Token counts of a lognormal clipped to [low, high], with ``mean`` the mean after clipping."""

    mean: float
    sigma: float  # standard deviation of the logarithm
    low: int
    high: int

    def sample(self, n: int, *, rng: np.random.Generator) -> np.ndarray:
        """Token counts (n,), int64."""
        mu = _mu_after_clipping(self.mean, self.sigma, self.low, self.high)
        tokens = np.exp(mu + self.sigma * rng.standard_normal(n)).clip(self.low, self.high)
        return np.asarray(np.rint(tokens), np.int64)


@dataclass(frozen=True, slots=True)
class Independent:
    """Prompt and output lengths drawn independently of each other."""

    prompt: ClippedLognormal
    output: ClippedLognormal

    def sample(self, n: int, *, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Prompt tokens (n,) and output tokens (n,), int64."""
        return self.prompt.sample(n, rng=rng), self.output.sample(n, rng=rng)


@dataclass(frozen=True, slots=True, eq=False)
class Resampled:
    """Pairs drawn with replacement from those listed; a single one makes all requests equally long."""

    prompt_tokens: np.ndarray
    output_tokens: np.ndarray

    def sample(self, n: int, *, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Prompt tokens (n,) and output tokens (n,), int64."""
        drawn = rng.integers(len(self.prompt_tokens), size=n)
        return self.prompt_tokens[drawn], self.output_tokens[drawn]


Lengths = Independent | Resampled


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """Prefixes put in front of a share of the prompts; the k-th is drawn in proportion to 1/k (Zipf)."""

    count: int
    tokens: int
    share: float  # of requests, 0..1

    def sample(self, n: int, *, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Prefix ids (n,), -1 where there is none, and prefix tokens (n,)."""
        popularity = 1 / np.arange(1, self.count + 1)
        drawn = rng.choice(self.count, size=n, p=popularity / popularity.sum())
        shares = rng.random(n) < self.share
        return np.where(shares, drawn, -1), np.where(shares, self.tokens, 0)


@lru_cache
def _mu_after_clipping(mean: float, sigma: float, low: int, high: int) -> float:
    """The mean logarithm that makes the clipped lognormal's mean come true, by bisection."""
    below, above = math.log(low) - 10 * sigma, math.log(high) + 10 * sigma
    for _ in range(60):
        mu = (below + above) / 2
        below, above = (mu, above) if _clipped_mean(mu, sigma, low, high) < mean else (below, mu)
    return mu


def _clipped_mean(mu: float, sigma: float, low: int, high: int) -> float:
    cdf = NormalDist().cdf
    a, b = (math.log(low) - mu) / sigma, (math.log(high) - mu) / sigma
    between = math.exp(mu + sigma**2 / 2) * (cdf(b - sigma) - cdf(a - sigma))
    return low * cdf(a) + between + high * (1 - cdf(b))
