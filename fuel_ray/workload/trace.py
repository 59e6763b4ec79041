"""Replays of recorded traffic."""

from dataclasses import dataclass, replace

import numpy as np

from fuel_ray.types import Requests
from fuel_ray.workload.arrivals import repeated
from fuel_ray.workload.formats import Recorded
from fuel_ray.workload.identity import digest, renumbered


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """A recorded trace, repeated for ever; the same for every random generator."""

    name: str
    requests: Requests  # of one period
    period_s: float

    @property
    def mean_rate_rps(self) -> float:
        return len(self.requests) / self.period_s

    @property
    def halves(self) -> tuple["Replay", "Replay"]:
        middle_s = self.period_s / 2
        first = int(np.searchsorted(self.requests.arrival_s, middle_s))
        return self._part(slice(first), 0.0), self._part(slice(first, None), middle_s)

    def _part(self, which: slice, begin_s: float) -> "Replay":
        part = self.requests.part(which)
        return Replay(self.name, replace(part, arrival_s=part.arrival_s - begin_s), self.period_s / 2)

    def generate(self, duration_s: float, *, rng: np.random.Generator, start_s: float = 0.0) -> Requests:
        times_s = self.requests.arrival_s
        arrival_s, index = repeated(times_s, self.period_s, duration_s=duration_s, start_s=start_s)
        part = self.requests.part(index)
        return replace(part, arrival_s=arrival_s, prefix_id=renumbered(part.prefix_id))

    def digest(self) -> str:
        return digest(self.requests, self.period_s)


def replay(name: str, rows: Recorded, *, rate_scale: float, max_prompt_tokens: int) -> Replay:
    """Replay the requests of a trace, ``rate_scale`` times as fast; the last gap is a mean gap."""
    n, span_s = len(rows.time_s), float(rows.time_s[-1] - rows.time_s[0])
    prompt_tokens = np.clip(rows.prompt_tokens.astype(np.int64), 1, max_prompt_tokens)
    prefix_id, prefix_tokens = (
        np.broadcast_to(np.int64(-1), n),
        np.broadcast_to(np.int64(0), n),
    )  # take no memory
    if rows.prefix_id is not None and rows.prefix_tokens is not None:
        prefix_id, prefix_tokens = rows.prefix_id, np.minimum(rows.prefix_tokens, prompt_tokens)
    requests = Requests(
        arrival_s=(rows.time_s - rows.time_s[0]) / rate_scale,
        prompt_tokens=prompt_tokens,
        output_tokens=rows.output_tokens.astype(np.int64),
        prefix_id=prefix_id,
        prefix_tokens=prefix_tokens,
    )
    return Replay(name, requests, period_s=span_s * n / (n - 1) / rate_scale)
