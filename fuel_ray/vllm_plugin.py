"""The run-time batch limit inside vLLM (0.20 to 0.33), and the 64 bytes it shares with ``live.limiter``.

vLLM loads ``register`` in its API server, engine core and workers; it does nothing unless the environment
variable FUEL_RAY_LIMIT_FILE names a control file. Imports only the standard library until vLLM is there.
"""

import contextlib
import fcntl
import logging
import os
import struct
import time
from collections.abc import Callable, Sized
from functools import wraps
from typing import Any, NamedTuple, Protocol

LIMIT_FILE_VARIABLE = "FUEL_RAY_LIMIT_FILE"

# Read and written with pread and pwrite rather than mapped: when someone truncates a mapped file, the next
# access ends the process with SIGBUS. Opened at each step, so that a file that comes late or anew is found.
_COMMAND = struct.Struct("<qq")  # magic, wanted limit; written by live.limiter
_REPORT = struct.Struct("<6q")  # Report; written by the scheduler
_MAGIC = int.from_bytes(b"fuelray1", "little")
_LEASED = int.from_bytes(b"fuelray2", "little")  # the limit ends with the controller, which holds flock(2)
_NO_LIMIT = 2**63 - 1

logger = logging.getLogger(__name__)


class Report(NamedTuple):
    """What the scheduler published at its last step; the order is that of the bytes."""

    step: int  # schedule() calls so far; 0 says what the engine began with, and nothing of what was asked
    running: int  # after that step's admissions
    waiting: int
    batch_limit: int  # in force: the capacity where schedule() has admitted above what was set
    capacity: int  # --max-num-seqs: the highest limit
    monotonic_ns: int  # when; 0 if nothing was published yet


class Scheduler(Protocol):
    """What is used of vLLM's scheduler; since 0.31 it has ``max_num_active_reqs`` as well."""

    running: Sized
    max_num_running_reqs: int

    def get_request_counts(self) -> tuple[int, int]: ...


def create_file(path: str) -> None:
    """Put a control file without a limit and without a report at ``path``, replacing what is there."""
    os.close(_put(path, _MAGIC))


def lease_file(path: str) -> int:
    """As ``create_file``, but its limit counts only while the descriptor that is returned stays open.

    The kernel closes it however the process ends, so that no limit outlives its controller.

    Raises:
        BlockingIOError: another process has leased the file.
    """
    with contextlib.suppress(FileNotFoundError):
        old = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _put(path, _LEASED)
        finally:
            os.close(old)
    return _put(path, _LEASED)


def _put(path: str, magic: int) -> int:
    """The new file's descriptor, locked where it is leased."""
    temporary = f"{path}.{os.getpid()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(fd, _COMMAND.pack(magic, _NO_LIMIT) + bytes(_REPORT.size))
        if magic == _LEASED:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.replace(temporary, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def write_limit(path: str, wanted: int | None) -> None:
    """Ask the scheduler for a limit, None for its own; it acts at its next step."""
    number = _NO_LIMIT if wanted is None else min(max(wanted, -_NO_LIMIT), _NO_LIMIT - 1)
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, number.to_bytes(8, "little", signed=True), 8)
    finally:
        os.close(fd)


def read_file(path: str) -> tuple[int | None, Report] | None:
    """The wanted limit and the last report; None if these are not our 64 bytes.

    There is no wanted limit in a leased file whose controller has ended.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO in its place must not stop the scheduler
    try:
        data = os.pread(fd, _COMMAND.size + _REPORT.size, 0)
        if len(data) < _COMMAND.size + _REPORT.size:
            return None
        magic, wanted = _COMMAND.unpack_from(data)
        if magic not in (_MAGIC, _LEASED):
            return None
        over = wanted == _NO_LIMIT or (magic == _LEASED and not _is_locked(fd))
    finally:
        os.close(fd)
    return None if over else wanted, Report(*_REPORT.unpack_from(data, _COMMAND.size))


def _is_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False  # closing the descriptor, which comes next, lets it go again


def clamped(wanted: int, capacity: int) -> int:
    """The limit that a scheduler of this capacity puts in force for a wanted one."""
    return max(1, min(wanted, capacity))


class SchedulerLimit:
    """The batch limit of one scheduler: ``apply`` before each step, ``publish`` after it."""

    def __init__(self, path: str, scheduler: Scheduler):
        self._path = path
        self._capacity = scheduler.max_num_running_reqs
        self._own = getattr(scheduler, "max_num_active_reqs", self._capacity)
        self._batch_limit, self._step = self._own, 0
        self._before = 0  # requests running before the step
        self._ignored = False  # by a schedule() of a class of its own, which admits as it likes
        self._said: set[int | str] = set()

    def apply(self, scheduler: Scheduler) -> None:
        """Put the wanted limit in force: nothing above it is admitted, nothing running is preempted."""
        wanted = self._wanted()
        self._batch_limit = self._own if wanted is None else clamped(wanted, self._capacity)
        if wanted is not None and wanted != self._batch_limit:
            self._say_once(
                wanted, f"batch limit {wanted} is not in 1..{self._capacity}; {self._batch_limit} is used"
            )
        self._before = len(scheduler.running)
        if hasattr(scheduler, "max_num_active_reqs"):
            scheduler.max_num_active_reqs = self._batch_limit
        else:  # schedule() asserts len(running) <= max_num_running_reqs; less would kill the engine
            scheduler.max_num_running_reqs = max(self._batch_limit, self._before)

    def publish(self, scheduler: Scheduler) -> None:
        """Write the report of the step just made."""
        running, waiting = scheduler.get_request_counts()
        in_force = self._in_force(len(scheduler.running), waiting)
        report = Report(self._step, running, waiting, in_force, self._capacity, time.monotonic_ns())
        self._step += 1
        try:
            self._write(report)
        except OSError as error:
            self._say_failed("no report of the batch limit", error)

    def _in_force(self, running: int, waiting: int) -> int:
        """What was set, or the capacity once a step has admitted above it, until one shows that it binds."""
        if running > max(self._before, self._batch_limit):
            self._ignored = True
            self._say_once("ignored", "no batch limit: this scheduler's schedule() admits more than is set")
        elif waiting and running == self._batch_limit:
            self._ignored = False
        return self._capacity if self._ignored else self._batch_limit

    def _wanted(self) -> int | None:
        try:
            content = read_file(self._path)
        except OSError as error:
            self._say_failed("no batch limit", error)
            return None
        if content is None:
            self._say_once("corrupt", f"no batch limit: {self._path} is not a control file of fuel_ray")
            return None
        return content[0]

    def _write(self, report: Report) -> None:
        fd = os.open(self._path, os.O_RDWR)
        try:
            if int.from_bytes(os.pread(fd, 8, 0), "little") in (_MAGIC, _LEASED):  # never another's file
                os.pwrite(fd, _REPORT.pack(*report), _COMMAND.size)
        finally:
            os.close(fd)

    def _say_failed(self, what: str, error: OSError) -> None:
        if isinstance(error, FileNotFoundError):  # as it should be until the first controller
            creates = f"`fuel-ray deploy --limit-file {self._path}` creates it"
            self._say_once("absent", f"{self._path} does not exist yet; no batch limit until {creates}")
        else:
            self._say_once(str(error), f"{what}: {error}")

    def _say_once(self, key: int | str, text: str) -> None:
        if key not in self._said:
            self._said.add(key)
            logger.warning("fuel_ray: %s", text)


def register() -> None:
    """Wrap vLLM's scheduler, sync or async; does nothing without FUEL_RAY_LIMIT_FILE or the second time."""
    path = os.environ.get(LIMIT_FILE_VARIABLE)
    if not path:
        return
    try:
        from vllm.v1.core.sched.scheduler import (  # type: ignore[import-not-found]  # noqa: PLC0415
            Scheduler as VllmScheduler,
        )
    except ImportError as error:
        logger.warning("fuel_ray: no batch limit in this vLLM: %s", error)
        return
    if not hasattr(VllmScheduler, "fuel_ray_limit"):
        VllmScheduler.fuel_ray_limit = None
        VllmScheduler.__init__ = _limited_init(VllmScheduler.__init__, path)


def _limited_init(init: Callable[..., None], path: str) -> Callable[..., None]:
    @wraps(init)
    def limited(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        missing = {"running", "max_num_running_reqs", "get_request_counts"} - set(dir(self))
        if missing:
            logger.warning("fuel_ray: no batch limit, this vLLM's scheduler lacks %s", sorted(missing))
        else:
            self.fuel_ray_limit = SchedulerLimit(path, self)
            self.fuel_ray_limit.publish(self)
            self.schedule = _limited_schedule(self)  # of its own class, which --scheduler-cls may have named

    return limited


def _limited_schedule(scheduler: Any) -> Callable[..., Any]:
    limit, schedule = scheduler.fuel_ray_limit, scheduler.schedule

    @wraps(schedule)
    def limited(*args: Any, **kwargs: Any) -> Any:
        limit.apply(scheduler)
        output = schedule(*args, **kwargs)
        limit.publish(scheduler)
        return output

    return limited
