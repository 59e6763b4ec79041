"""A workload from outside: --workload examples.outside.workloads:classes:students=40,every_s=60."""

from dataclasses import dataclass

import numpy as np

from fuel_ray.types import Requests


@dataclass(frozen=True, slots=True)
class Classes:
    """A class of students asks one question each whenever a lesson begins, within some seconds."""

    students: int
    every_s: float
    within_s: float

    @property
    def name(self) -> str:
        return f"classes of {self.students}"

    @property
    def period_s(self) -> float:
        return self.every_s

    @property
    def mean_rate_rps(self) -> float:
        return self.students / self.every_s

    @property
    def halves(self) -> None:
        return None

    def generate(self, duration_s: float, *, rng: np.random.Generator, start_s: float = 0.0) -> Requests:
        lessons = np.arange(start_s // self.every_s, (start_s + duration_s) // self.every_s + 1)
        begins_s = np.repeat(lessons * self.every_s - start_s, self.students)
        arrival_s = np.sort(begins_s + rng.uniform(0.0, self.within_s, len(begins_s)))
        arrival_s = arrival_s[(arrival_s >= 0.0) & (arrival_s < duration_s)]
        n = len(arrival_s)
        return Requests(
            arrival_s=arrival_s,
            prompt_tokens=rng.integers(50, 400, n),
            output_tokens=rng.integers(50, 300, n),
            prefix_id=np.zeros(n, np.int64),  # all have the same lesson in front of their question
            prefix_tokens=np.full(n, 40),
        )

    def digest(self) -> str:
        return f"{self.students:04x}{int(self.every_s):04x}{int(self.within_s):04x}"


def classes(students: int = 40, every_s: float = 60.0, within_s: float = 5.0) -> Classes:
    """What fuel_ray calls with the values behind the name."""
    return Classes(students, every_s, within_s)
