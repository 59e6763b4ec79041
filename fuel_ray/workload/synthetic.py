"""Workloads made of an arrival process, a length distribution and shared prefixes."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fuel_ray.types import Requests
from fuel_ray.workload.arrivals import Arrivals
from fuel_ray.workload.identity import digest, renumbered
from fuel_ray.workload.lengths import Lengths, SharedPrefixes


@dataclass(frozen=True, slots=True, eq=False)
class Synthetic:
    """Requests drawn afresh from each random generator."""

    name: str
    arrivals: Arrivals
    lengths: Lengths
    prefixes: SharedPrefixes | None
    halves: ClassVar[None] = None

    @property
    def period_s(self) -> float | None:
        return self.arrivals.period_s

    @property
    def mean_rate_rps(self) -> float:
        return self.arrivals.mean_rate_rps

    def generate(self, duration_s: float, *, rng: np.random.Generator, start_s: float = 0.0) -> Requests:
        arrival_s = self.arrivals.sample(duration_s, rng=rng, start_s=start_s)
        n = len(arrival_s)
        prompt_tokens, output_tokens = self.lengths.sample(n, rng=rng)
        prefix_id, prefix_tokens = np.full(n, -1), np.zeros(n, np.int64)
        if self.prefixes is not None:
            prefix_id, prefix_tokens = self.prefixes.sample(n, rng=rng)
        return Requests(
            arrival_s=arrival_s,
            prompt_tokens=prompt_tokens + prefix_tokens,
            output_tokens=output_tokens,
            prefix_id=renumbered(prefix_id),
            prefix_tokens=prefix_tokens,
        )

    def digest(self) -> str:
        return digest(self.arrivals, self.lengths, self.prefixes)
