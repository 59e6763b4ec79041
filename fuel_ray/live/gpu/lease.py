"""Clocks that are given back whatever happens: one controller per GPU, and a watchdog that outlives it."""

import contextlib
import functools
import logging
import os
import select
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fuel_ray.errors import GpuError
from fuel_ray.live.gpu.lease_state import lock, owners, record_owner, state_folder, state_path
from fuel_ray.live.gpu.nvml import Gpus

START_S = 30.0  # imports on a busy machine
END_S = 5.0

# Forked once more it is an orphan, for Ray kills the children of a worker that it ends; forked before it
# imports, while it has one thread.
_WATCHDOG = "import os; os.fork() and os._exit(0); from fuel_ray.live.gpu.lease import watch; watch()"

logger = logging.getLogger(__name__)


class ClockLease:
    """The right of this process alone to set the clocks of some GPUs, until ``release``.

    If the process dies, however it does, a watchdog gives the clocks back within 2 s. Clocks that a dead
    owner left behind are given back first. A forked child of this process has no part in the lease.

    Args:
        uuids: of the GPUs.
        folder: of the state files; by default ``state_folder()``.

    Raises:
        GpuError: another controller has a GPU (the message names its pid and command), the watchdog does not
            start, or clocks that were left behind cannot be given back.
        ConfigError, DiskError: as ``state_folder``.
    """

    def __init__(self, uuids: Sequence[str], *, folder: Path | None = None):
        self._uuids, self._folder = tuple(uuids), folder or state_folder()
        with contextlib.ExitStack() as taken:
            self._locks = [taken.enter_context(lock(self._folder, uuid)) for uuid in self._uuids]
            for uuid in self._uuids:
                self._take(uuid)
                taken.callback(state_path(self._folder, uuid).unlink, missing_ok=True)
            self._watchdog = self._watched()
            taken.pop_all()
        self._held = True
        _LEASES.add(self)
        _let_go_in_children()

    def renew(self) -> None:
        """Make sure that the clocks are watched over: a watchdog that died is started again, or GpuError."""
        if not self._held:
            raise GpuError(f"the lease on the clocks of {', '.join(self._uuids)} has ended")
        if not self._watchdog.lives():
            logger.warning("the clock watchdog of %s died; starting it again", self._uuids)
            dead, self._watchdog = self._watchdog, self._watched()
            dead.close()

    def release(self, give_back: Callable[[], None]) -> None:
        """End the lease after ``give_back``; where that fails, the watchdog tries. Safe to call twice."""
        given_back = False
        try:
            give_back()
            given_back = True
        finally:
            if self._held:
                self._end(given_back=given_back)

    def _take(self, uuid: str) -> None:
        if state_path(self._folder, uuid).exists():
            logger.warning("GPU %s: its last controller died; resetting its clocks", uuid)
            _reset(uuid)
        record_owner(self._folder, uuid)

    def _watched(self) -> "_Watchdog":
        return _Watchdog(self._folder, self._uuids, [file.fileno() for file in self._locks])

    def _end(self, *, given_back: bool) -> None:
        if given_back:
            for uuid in self._uuids:
                state_path(self._folder, uuid).unlink(missing_ok=True)
        self._watchdog.end(given_back=given_back)
        self.let_go()

    def let_go(self) -> None:
        """Have no part in it any more, without a word to the watchdog; what a forked child does."""
        if self._held:
            self._held = False
            self._watchdog.close()
            for file in self._locks:
                file.close()


class _Watchdog:
    """The controller's ends of two pipes to the watchdog; by one each side sees that the other is gone."""

    def __init__(self, folder: Path, uuids: Sequence[str], lock_fds: Sequence[int]):
        (stdin, control), (alive, stdout) = os.pipe(), os.pipe()
        self._control, self._alive = (
            os.fdopen(control, "wb", buffering=0),
            os.fdopen(alive, "rb", buffering=0),
        )
        try:
            try:
                _spawn((str(folder.absolute()), *uuids), stdin=stdin, stdout=stdout, lock_fds=lock_fds)
            finally:
                os.close(stdin)
                os.close(stdout)
            if not self._ended(within_s=START_S) or not self._alive.read(1):
                raise GpuError("the clock watchdog did not start; stderr says why")
        except BaseException:
            self.close()
            raise

    def lives(self) -> bool:
        """Whether it does; costs microseconds."""
        return not self._ended(within_s=0.0)

    def end(self, *, given_back: bool) -> None:
        """Tell it that this process is done, and wait until it has reset what was not given back."""
        if given_back:
            with contextlib.suppress(BrokenPipeError):  # it died
                self._control.write(b"1")
        self._control.close()
        if not self._ended(within_s=END_S):
            logger.error("the clock watchdog does not exit")

    def close(self) -> None:
        """Forget about it; safe to call twice."""
        self._control.close()
        self._alive.close()

    def _ended(self, *, within_s: float) -> bool:
        """Whether there is its one byte, that it has started, or the end of the pipe."""
        poll = select.poll()
        poll.register(self._alive, select.POLLIN)
        return bool(poll.poll(within_s * 1000))


_LEASES: "weakref.WeakSet[ClockLease]" = weakref.WeakSet()


@functools.cache
def _let_go_in_children() -> None:
    """What os.register_at_fork is given stays for good, so that it is given one function for all leases."""

    def let_all_go() -> None:
        for lease in tuple(_LEASES):
            lease.let_go()

    os.register_at_fork(after_in_child=let_all_go)


def watch() -> None:
    """Run the watchdog (arguments: state folder, UUIDs): reset the clocks if stdin ends without a word."""
    folder, *uuids = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.write(sys.stdout.fileno(), b"1")
    if sys.stdin.buffer.read():
        return
    for uuid in uuids:
        try:
            _reset(uuid)
            state_path(Path(folder), uuid).unlink(missing_ok=True)
            logger.warning("fuel-ray: the controller died; the clocks of GPU %s were given back", uuid)
        except GpuError as error:
            logger.error("fuel-ray: the controller died: %s; `fuel-ray unlock` tries again", error)


def unlock(uuid: str, *, folder: Path, force: bool = False) -> None:
    """Give a GPU's clocks back to the driver, whoever locked them, and remove a stale state file.

    Raises:
        GpuError: the driver refused, or a controller has the GPU and ``force`` is not given; with it that one
            keeps its lease and may set them again.
    """
    try:
        held = lock(folder, uuid)
    except GpuError:
        if not force:
            raise
        _reset(uuid)
        return
    with held:
        _reset(uuid)
        state_path(folder, uuid).unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a GPU, or of all that could be asked for."""

    text: str
    failed: bool = False


def unlock_gpus(gpu_ids: Sequence[str] = (), *, force: bool = False) -> list[Outcome]:
    """Give the clocks of these GPUs of this host back; of none, those that dead controllers left."""
    folder = state_folder()
    if gpu_ids:
        with Gpus(gpu_ids, hidden=True) as gpus:
            return [_unlocked(uuid, folder, force=force) for uuid in gpus.uuids]
    found = owners(folder)
    if not found:
        return [Outcome(f"nothing to reset: no clocks are recorded as locked in {folder}")]
    return [
        Outcome(f"GPU {uuid}: not reset, it is in use by {owner}")
        if owner is not None and owner.lives()
        else _unlocked(uuid, folder, force=False)
        for uuid, owner in found.items()
    ]


def _unlocked(uuid: str, folder: Path, *, force: bool) -> Outcome:
    try:
        unlock(uuid, folder=folder, force=force)
    except GpuError as error:
        return Outcome(str(error), failed=True)
    return Outcome(f"GPU {uuid}: clocks given back")


def _reset(uuid: str) -> None:
    with Gpus([uuid], hidden=True) as gpus:
        gpus.reset()


def _spawn(arguments: Sequence[str], *, stdin: int, stdout: int, lock_fds: Sequence[int]) -> None:
    """Start the watchdog, with the modules that this process would import and in a session of its own."""
    try:
        subprocess.run(
            [sys.executable, "-P", "-c", _WATCHDOG, *arguments],
            stdin=stdin,
            stdout=stdout,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            pass_fds=lock_fds,
            start_new_session=True,
            check=True,
            timeout=START_S,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise GpuError(f"cannot start the clock watchdog: {error}") from error
