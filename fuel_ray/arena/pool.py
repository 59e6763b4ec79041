"""Work in several processes that end with this one."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context
from typing import Any, TypeVar

Result = TypeVar("Result")


def in_processes(
    function: Callable[..., Result], jobs: Sequence[tuple[Any, ...]], *, workers: int
) -> Iterator[Result]:
    """Call a function once per job; results as they come, and what has not begun is dropped on an error."""
    if workers == 1 or len(jobs) < 2:
        yield from (function(*job) for job in jobs)
        return
    pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn"))
    try:
        for future in as_completed([pool.submit(function, *job) for job in jobs]):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in active_children():  # in the middle of a job, if this ends early
            child.terminate()
