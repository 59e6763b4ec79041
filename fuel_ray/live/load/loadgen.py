"""Open-loop load: requests are sent at their times, whatever the server does with the earlier ones."""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import aiohttp
import numpy as np

from fuel_ray.errors import TelemetryError
from fuel_ray.live.load.completion import Attempt, Completions
from fuel_ray.live.load.prompts import TokenPrompts
from fuel_ray.live.vllm.endpoint import Endpoint
from fuel_ray.types import RequestRecords, Requests

Prompts = Sequence[str] | TokenPrompts

LATE_S = 0.010  # a send this long after its time is counted as late
_STOP_S = 10.0
_KEEPALIVE_S = 4.0  # vLLM drops idle connections after 5 s


@dataclass(frozen=True, slots=True, eq=False)
class LoadResult:
    """What came of the requests that were sent, in order of their end; all fields but two have length n.

    A failed request has no ``finished_s`` and an error. A client sees neither admissions (nan) nor
    preemptions (0); take the latter from the server's counters.
    """

    records: RequestRecords
    received_tokens: tuple[int | None, ...]  # as the server counted them
    itls_s: tuple[tuple[float, ...], ...]  # gaps between chunks, per request
    errors: tuple[str | None, ...]
    late_sends: int  # more than 10 ms after their time
    duration_s: float
    held_s: tuple[float, ...]  # for which each was kept back before it arrived, by ``max_concurrency``


def late_sends(ended: Iterable[Attempt]) -> int:
    """How many were sent more than 10 ms after their time."""
    return sum(a.sent_s is not None and a.sent_s - a.arrival_s > LATE_S for a in ended)


def request_records(ended: Sequence[Attempt]) -> RequestRecords:
    """As columns; admissions are nan and preemptions 0, because a client sees neither."""
    return RequestRecords(
        arrival_s=np.array([attempt.arrival_s for attempt in ended], np.float64),
        admitted_s=np.full(len(ended), np.nan),
        first_token_s=np.array([attempt.first_token_s for attempt in ended], np.float64),
        finished_s=np.array([attempt.finished_s for attempt in ended], np.float64),
        prompt_tokens=np.array([attempt.prompt_tokens for attempt in ended], np.int64),
        output_tokens=np.array([attempt.output_tokens for attempt in ended], np.int64),
        preemptions=np.zeros(len(ended), np.int64),
    )


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Where a running load stands."""

    now_s: float  # since the load began, as all its times
    sent: int  # requests so far
    ended: tuple[Attempt, ...]  # since the last look, failed ones included, in order of their end
    in_flight: tuple[Attempt, ...]  # copies, in order of sending


class LoadGenerator:
    """A load in a background thread, whose ended requests can be taken while it runs; it runs once.

    Each request is sent at its arrival time, counted from ``start``, and its answer is followed to the end.
    While ``max_concurrency`` are in flight the next one is kept back, and arrives when it is let go, as the
    server sees it. Errors and time-outs are noted per request.
    """

    def __init__(
        self,
        base_url: str | Endpoint,
        requests: Requests,
        *,
        prompts: Prompts,
        model: str,
        timeout_s: float = 600.0,
        max_concurrency: int | None = None,
    ) -> None:
        self._max_concurrency = max_concurrency
        self._requests, self._prompts = requests, prompts
        self._endpoint = Endpoint.of(base_url)
        self._server = partial(Completions, server=self._endpoint, model=model, timeout_s=timeout_s)
        self._lock = threading.Lock()
        self._in_flight: dict[asyncio.Task[None], Attempt] = {}
        self._ended: list[Attempt] = []
        self._taken = 0
        self._start_s = math.nan
        self._over_s: float | None = None
        self._fault: BaseException | None = None
        self._busy_s = 0.0
        self._busy_clock: int | None = None
        self._cancel: Callable[[], object]  # known once it is looping
        self._looping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load-generator", daemon=True)

    def start(self) -> None:
        """Begin to send; arrival times count from here."""
        self._start_s = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """Send no more and cancel what is in flight; safe at any moment and twice."""
        if self._thread.ident is None:
            return
        self._looping.wait(_STOP_S)
        with suppress(RuntimeError):  # the loop is closed: the load is over
            self._cancel()
        self._thread.join(_STOP_S)

    def wait(self, timeout_s: float) -> bool:
        """Whether the load is over within ``timeout_s``."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def start_s(self) -> float:
        """When it was started, on the monotonic clock."""
        return self._start_s

    @property
    def busy_s(self) -> float:
        """CPU time of its thread so far; near the time that has passed, it is the load that is measured."""
        if self._busy_clock is not None:
            with suppress(OSError):  # the thread has ended
                return time.clock_gettime(self._busy_clock)
        return self._busy_s

    def take(self) -> LoadProgress:
        """What ended since the last ``take``, and what is in flight.

        Raises:
            TelemetryError: the generator itself failed.
        """
        self._raise_fault()
        with self._lock:
            ended, self._taken = tuple(self._ended[self._taken :]), len(self._ended)
            in_flight = tuple(map(replace, self._in_flight.values()))
            sent = len(self._ended) + len(in_flight)
        return LoadProgress(time.monotonic() - self._start_s, sent, ended, in_flight)

    def result(self) -> LoadResult:
        """Of all that ended so far; complete after ``wait`` or ``stop``; raises as ``take`` does."""
        self._raise_fault()
        return self.so_far()

    def so_far(self) -> LoadResult:
        """The same of a generator that may have failed."""
        now_s = time.monotonic() if self._over_s is None else self._over_s
        with self._lock:
            ended = tuple(self._ended)
        return LoadResult(
            records=request_records(ended),
            received_tokens=tuple(attempt.received_tokens for attempt in ended),
            itls_s=tuple(tuple(attempt.itls_s) for attempt in ended),
            errors=tuple(attempt.error for attempt in ended),
            late_sends=late_sends(ended),
            duration_s=now_s - self._start_s,
            held_s=tuple(attempt.held_s for attempt in ended),
        )

    def _run(self) -> None:
        self._busy_clock = time.pthread_getcpuclockid(threading.get_ident())
        try:
            with suppress(asyncio.CancelledError):  # by stop()
                asyncio.run(self._send_all())
        except Exception as fault:  # of our own; a thread cannot raise, so the next caller does
            self._fault = fault
        self._busy_s, self._busy_clock = time.thread_time(), None
        self._over_s = time.monotonic()

    async def _send_all(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._cancel = partial(asyncio.get_running_loop().call_soon_threadsafe, task.cancel)
        self._looping.set()
        believed = self._endpoint.context(self._endpoint.url) or True
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S, ssl=believed)
        no_limit = aiohttp.ClientTimeout(total=None, sock_connect=None)  # each request has its own
        async with aiohttp.ClientSession(connector=connector, timeout=no_limit) as session:
            server = self._server(session, start_s=self._start_s)
            free = None if self._max_concurrency is None else asyncio.Semaphore(self._max_concurrency)
            try:
                for index in range(len(self._requests)):
                    request = self._requests[index]
                    body = server.body(self._prompts[index], request.output_tokens)  # takes a while
                    # 0 s too: a burst must not keep the answers waiting
                    await asyncio.sleep(max(0.0, request.arrival_s - server.now_s()))
                    attempt = Attempt(index, request.arrival_s, request.prompt_tokens, request.output_tokens)
                    if free is not None:
                        await _let_go(attempt, server, free)
                    self._send(server, attempt, body, free)
            except BaseException:
                for task in self._in_flight:
                    task.cancel()
                raise
            finally:
                await asyncio.gather(*self._in_flight, return_exceptions=True)

    def _send(
        self, server: Completions, attempt: Attempt, body: bytes, free: asyncio.Semaphore | None
    ) -> None:
        task = asyncio.ensure_future(server.fetch(attempt, body))
        with self._lock:
            self._in_flight[task] = attempt
        task.add_done_callback(self._end)
        if free is not None:
            task.add_done_callback(lambda _: free.release())

    def _end(self, task: asyncio.Task[None]) -> None:
        with self._lock:
            attempt = self._in_flight.pop(task)
            if task.cancelled():
                attempt.error = "cancelled"
            elif (fault := task.exception()) is not None:
                attempt.error, self._fault = repr(fault), fault
            self._ended.append(attempt)

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise TelemetryError(f"the load generator failed: {self._fault!r}") from self._fault


async def _let_go(attempt: Attempt, server: Completions, free: asyncio.Semaphore) -> None:
    """Keep the request back while too many are in flight, or while one before it is kept back."""
    await free.acquire()
    due_s = attempt.arrival_s
    attempt.arrival_s = max(due_s, server.now_s())
    attempt.held_s = attempt.arrival_s - due_s
