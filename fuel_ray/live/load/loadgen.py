"""Open-loop load: requests are sent at their times, whatever the server does with the earlier ones."""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import aiohttp
import numpy as np

from fuel_ray.errors import TelemetryError
from fuel_ray.live.load.completion import Attempt, Completions
from fuel_ray.live.load.prompts import TokenPrompts
from fuel_ray.types import RequestRecords, Requests

Prompts = Sequence[str] | TokenPrompts
Listener = Callable[[Attempt], None]

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


async def run_load(
    base_url: str,
    requests: Requests,
    *,
    prompts: Prompts,
    model: str,
    timeout_s: float = 600.0,
    start_s: float | None = None,
    stop: asyncio.Event | None = None,
    on_sent: Listener | None = None,
    on_ended: Listener | None = None,
) -> LoadResult:
    """Send each request at its arrival time and follow all answers to their ends.

    Arrivals count from ``start_s`` (monotonic; by default from this call). Errors and time-outs are noted per
    request. Once ``stop`` is set, nothing more is sent, what is in flight is cancelled, and the result is of
    what was sent. If this coroutine itself is cancelled, ``on_ended`` still hears of every request sent.
    """
    start_s = time.monotonic() if start_s is None else start_s
    stop = stop or asyncio.Event()
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
    no_limit = aiohttp.ClientTimeout(total=None, sock_connect=None)  # each request has its own
    async with aiohttp.ClientSession(connector=connector, timeout=no_limit) as session:
        server = Completions(session, base_url, model=model, timeout_s=timeout_s, start_s=start_s)
        load = _Load(server, on_sent, on_ended)
        try:
            await load.send_all(requests, prompts, stop)
            await load.ended_or(stop)
        finally:
            await load.cancel()
    load.raise_fault()
    return load_result(load.ended, server.now_s())


class _Load:
    """The requests of one load, each in a task of its own."""

    def __init__(self, server: Completions, on_sent: Listener | None, on_ended: Listener | None) -> None:
        self.ended: list[Attempt] = []
        self._server = server
        self._on_sent = on_sent
        self._on_ended = on_ended
        self._tasks: set[asyncio.Task[None]] = set()
        self._fault: BaseException | None = None

    async def send_all(self, requests: Requests, prompts: Prompts, stop: asyncio.Event) -> None:
        for index in range(len(requests)):
            request = requests[index]
            body = self._server.body(prompts[index], request.output_tokens)  # before its time: takes a while
            if await _set_within(stop, request.arrival_s - self._server.now_s()):
                return
            self._send(Attempt(index, request.arrival_s, request.prompt_tokens, request.output_tokens), body)

    async def ended_or(self, stop: asyncio.Event) -> None:
        if not self._tasks:
            return
        either = {asyncio.ensure_future(asyncio.wait(self._tasks)), asyncio.ensure_future(stop.wait())}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiter in either:
                waiter.cancel()

    async def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def raise_fault(self) -> None:
        """A fault of our own; the server's are in the records."""
        if self._fault is not None:
            raise self._fault

    def _send(self, attempt: Attempt, body: bytes) -> None:
        if self._on_sent:
            self._on_sent(attempt)
        task = asyncio.ensure_future(self._server.fetch(attempt, body))
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._end(attempt, task))

    def _end(self, attempt: Attempt, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            attempt.error = "cancelled"
        elif (fault := task.exception()) is not None:
            attempt.error, self._fault = repr(fault), fault
        self.ended.append(attempt)
        if self._on_ended:
            self._on_ended(attempt)


async def _set_within(stop: asyncio.Event, delay_s: float) -> bool:
    if delay_s <= 0:
        await asyncio.sleep(0)  # a burst must not keep the answers waiting
        return stop.is_set()
    try:
        async with asyncio.timeout(delay_s):
            return await stop.wait()
    except TimeoutError:
        return False


def load_result(ended: Sequence[Attempt], duration_s: float) -> LoadResult:
    """The result of these requests."""
    late = sum(
        attempt.sent_s is not None and attempt.sent_s - attempt.arrival_s > LATE_S for attempt in ended
    )
    return LoadResult(
        records=request_records(ended),
        received_tokens=tuple(attempt.received_tokens for attempt in ended),
        itls_s=tuple(tuple(attempt.itls_s) for attempt in ended),
        errors=tuple(attempt.error for attempt in ended),
        late_sends=late,
        duration_s=duration_s,
    )


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
    """A load in a background thread, whose ended requests can be taken while it runs; it runs once."""

    def __init__(
        self, base_url: str, requests: Requests, *, prompts: Prompts, model: str, timeout_s: float = 600.0
    ) -> None:
        self._load = partial(run_load, base_url, requests, prompts=prompts, model=model, timeout_s=timeout_s)
        self._lock = threading.Lock()
        self._in_flight: dict[int, Attempt] = {}
        self._ended: list[Attempt] = []
        self._taken = 0
        self._start_s = math.nan
        self._over_s: float | None = None
        self._fault: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop
        self._looping = threading.Event()
        self._stop = asyncio.Event()
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
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_STOP_S)

    def wait(self, timeout_s: float) -> bool:
        """Whether the load is over within ``timeout_s``."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

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
        """Of all that ended so far; complete after ``wait`` or ``stop``.

        Raises:
            TelemetryError: the generator itself failed.
        """
        self._raise_fault()
        now_s = time.monotonic() if self._over_s is None else self._over_s
        with self._lock:
            return load_result(self._ended, now_s - self._start_s)

    def _run(self) -> None:
        load = self._load(
            start_s=self._start_s, stop=self._stop, on_sent=self._note_sent, on_ended=self._note_ended
        )
        try:
            with asyncio.Runner() as runner:
                self._loop = runner.get_loop()
                self._looping.set()
                runner.run(load)
        except Exception as fault:  # of our own; a thread cannot raise, so the next caller does
            self._fault = fault
        self._over_s = time.monotonic()

    def _note_sent(self, attempt: Attempt) -> None:
        with self._lock:
            self._in_flight[attempt.index] = attempt

    def _note_ended(self, attempt: Attempt) -> None:
        with self._lock:
            del self._in_flight[attempt.index]
            self._ended.append(attempt)

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise TelemetryError(f"the load generator failed: {self._fault!r}") from self._fault
