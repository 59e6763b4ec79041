"""Function calls side by side, as tasks of Ray."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray

from fuel_ray.cluster.hosts import answer_of, driver_resource
from fuel_ray.progress import UNSEEN, Bar

ANSWER_S = 60.0  # to fetch what a finished job has left

Result = TypeVar("Result")


def in_parallel(
    what: str,
    function: Callable[..., Result],
    jobs: Sequence[tuple[Any, ...]],
    *,
    at_once: int | None = None,
    here: bool = False,
    bar: Bar = UNSEEN,
) -> list[Result]:
    """Call a function once per job, one core each; results in the order of the jobs.

    ``what`` names them where one fails, and ``bar`` shows how far they are. At most ``at_once`` run at a
    time, or else as many as there are cores; ``here`` says that they need this machine's disk.
    """
    remote = ray.remote(function).options(resources=driver_resource() if here else None)
    references: list[Any] = []
    pending: list[Any] = []
    while pending or len(references) < len(jobs):
        if len(references) < len(jobs) and (at_once is None or len(pending) < at_once):
            references.append(remote.remote(*jobs[len(references)]))
            pending.append(references[-1])
            continue
        _, pending = ray.wait(pending)
        done = len(references) - len(pending)
        if done == len(jobs) or done % max(1, len(jobs) // 8) == 0:
            bar.at(done / len(jobs), f"{done}/{len(jobs)}")
    return [answer_of(reference, what, ANSWER_S) for reference in references]
