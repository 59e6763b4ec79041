"""A workload that is another one each time: what a policy is trained on that is to serve any load."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fuel_ray.types import Requests
from fuel_ray.workload.arrivals import Arrivals, Diurnal, Mmpp, Piecewise
from fuel_ray.workload.identity import digest
from fuel_ray.workload.lengths import (
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    ClippedLognormal,
    Independent,
    Lengths,
    SharedPrefixes,
)
from fuel_ray.workload.synthetic import Synthetic

_TOKENS = float(PROMPT_TOKENS + OUTPUT_TOKENS)  # per request; rates fall as requests get longer


@dataclass(frozen=True, slots=True)
class Mixed:
    """Each call draws a pattern (steady, sinusoid or two states), rates, lengths and shared prefixes anew.

    Half of the draws have the default workload's lengths, a quarter shared prefixes. The highest rate is
    drawn up to ``high_rps`` for requests of the default's length, and in proportion for others.
    """

    name: str
    high_rps: float
    period_s: ClassVar[None] = None
    halves: ClassVar[None] = None

    @property
    def mean_rate_rps(self) -> float:
        return self.high_rps / 2

    def generate(self, duration_s: float, *, rng: np.random.Generator, start_s: float = 0.0) -> Requests:
        """Requests of one draw; ``start_s`` is drawn too."""
        lengths, tokens = _lengths(rng)
        prefixes = None
        if rng.random() < 0.25:
            prefixes = SharedPrefixes(8, 500, share=float(rng.uniform(0.4, 0.9)))
        high_rps = self.high_rps * float(rng.uniform(0.08, 1.0)) * _TOKENS / tokens
        arrivals = _arrivals(high_rps, rng)
        drawn = Synthetic(self.name, arrivals, lengths, prefixes)
        return drawn.generate(duration_s, rng=rng, start_s=float(rng.uniform(0.0, 1200.0)))

    def digest(self) -> str:
        return digest("mixed", self.high_rps)


def _lengths(rng: np.random.Generator) -> tuple[Lengths, float]:
    """Lognormal lengths, and their mean tokens per request."""
    prompt, output = float(PROMPT_TOKENS), float(OUTPUT_TOKENS)
    if rng.random() < 0.5:
        prompt, output = float(np.exp(rng.uniform(4.6, 7.2))), float(np.exp(rng.uniform(4.2, 6.0)))
    drawn = Independent(
        prompt=ClippedLognormal(round(prompt), 0.9, low=4, high=4096),
        output=ClippedLognormal(round(output), 0.9, low=2, high=1024),
    )
    return drawn, prompt + output


def _arrivals(high_rps: float, rng: np.random.Generator) -> Arrivals:
    low_rps = high_rps * float(rng.uniform(0.05, 0.7))
    pattern = rng.integers(3)
    if pattern == 0:
        return Piecewise(((high_rps, 1.0),))
    if pattern == 1:
        return Diurnal(low_rps, high_rps, period_s=1200.0)
    return Mmpp(low_rps, high_rps, dwell_s=float(rng.uniform(15.0, 90.0)))
