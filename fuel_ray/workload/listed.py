"""Requests that are written out in the workload's text."""

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fuel_ray.types import Requests
from fuel_ray.workload.identity import digest

_ENTRY = re.compile(r"(\d+(?:\.\d+)?)@([1-9]\d{0,6})/([1-9]\d{0,6})(?:\*([1-9]\d{0,4}))?")


@dataclass(frozen=True, slots=True, eq=False)
class Listed:
    """The same requests for every random generator, once."""

    name: str
    requests: Requests
    period_s: ClassVar[None] = None
    halves: ClassVar[None] = None

    @property
    def mean_rate_rps(self) -> float:
        return len(self.requests) / max(1.0, float(self.requests.arrival_s[-1]))

    def generate(self, duration_s: float, *, rng: np.random.Generator, start_s: float = 0.0) -> Requests:
        return self.requests.part(slice(int(np.searchsorted(self.requests.arrival_s, duration_s))))

    def digest(self) -> str:
        return digest(self.requests)


def listed(name: str, written: str) -> Listed:
    """From ``SECOND@PROMPT_TOKENS/OUTPUT_TOKENS*COUNT``, joined by +; COUNT is 1 where it is left out.

    Raises:
        ValueError: the message is the entry that is not so.
    """
    rows: list[tuple[float, int, int]] = []
    for entry in written.split("+"):
        if (found := _ENTRY.fullmatch(entry)) is None:
            raise ValueError(entry)
        at, prompt, output, count = found.groups(default="1")
        rows += [(float(at), int(prompt), int(output))] * int(count)
    arrival_s, prompts, outputs = map(np.array, zip(*sorted(rows, key=lambda row: row[0]), strict=True))
    none = np.full(len(rows), -1)
    return Listed(name, Requests(arrival_s, prompts, outputs, none, np.zeros_like(none)))
