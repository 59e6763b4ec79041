"""Our side of the run-time batch limit: the limit file that ``vllm_plugin`` reads at every step."""

import contextlib
import errno
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fuel_ray import vllm_plugin
from fuel_ray.errors import NodeError
from fuel_ray.live.vllm.in_force import Acknowledgement, InForce
from fuel_ray.vllm_plugin import Report, clamped

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LimiterStatus:
    """What the scheduler said at its last step; an idle server makes no steps."""

    wanted_limit: int | None  # None: the server's own limit
    step: int
    running: int
    waiting: int
    batch_limit: int  # in force at that step
    capacity: int  # the highest limit


class BatchLimiter(contextlib.AbstractContextManager["BatchLimiter"]):
    """Sets the batch limit of a running vLLM server through a limit file that it creates and removes.

    Start the server with FUEL_RAY_LIMIT_FILE naming the file. With data parallelism each engine applies the
    limit, and the status is that of the engine that stepped last.

    Args:
        path: of the limit file.
        leased: for this process alone; the limit ends when it does, even if it is killed.
        capacity: the server's highest limit, where it is known.

    Raises:
        NodeError: the file cannot be made, another process has leased it, or, from its methods, it is gone.
    """

    def __init__(self, path: Path, *, leased: bool = False, capacity: int | None = None):
        self.path = Path(path)
        self._lease: int | None = None
        self._said: set[int] = set()  # limits that were clamped
        try:
            if leased:
                self._lease = vllm_plugin.lease_file(str(self.path))
            else:
                vllm_plugin.create_file(str(self.path))
        except BlockingIOError:
            raise NodeError(
                f"--limit-file {self.path}: in use by {_holder(self.path)}; stop that process first"
            ) from None
        except OSError as error:
            raise _uncreated(self.path, error) from error
        try:
            self._acknowledgement = Acknowledgement(self.path, self._read()[1], capacity=capacity)
        except NodeError:
            self._let_go()  # or this process could never lease it again
            raise

    def __exit__(self, *exc: object) -> None:
        self.close()

    def set(self, limit: int) -> int:
        """Ask for a limit and return it clamped to 1..capacity, or to 1.. without a scheduler.

        It acts at the scheduler's next step; whether it is in force, ``in_force`` and ``window`` say.
        """
        report = self._read()[1]
        used = clamped(limit, report.capacity) if report.monotonic_ns else max(1, limit)
        if used != limit and limit not in self._said:
            self._said.add(limit)
            logger.warning(
                "batch limit %d is outside 1 to %d; using %d", limit, report.capacity or limit, used
            )
        self._acknowledgement.ask(limit, report)
        self._write(limit)
        return used

    @property
    def in_force(self) -> int | None:
        """The limit that the server admits by at this moment; None: its own, which no scheduler has said."""
        return self._acknowledgement.now(self._read()[1])

    @property
    def capacity(self) -> int | None:
        """The server's own highest limit; None: no scheduler has said it."""
        return self._read()[1].capacity or None

    def window(self, *, worked: bool, duration_s: float) -> InForce:
        """What was in force in the window that just ended, in which the server ``worked`` or was idle.

        Raises:
            ConfigError: there was traffic for some time, and no step has acknowledged the limit; the message
                says what to do.
        """
        return self._acknowledgement.window(self._read()[1], worked=worked, duration_s=duration_s)

    def forget(self) -> None:
        """The server was started anew: what the scheduler said before no longer counts."""
        self._acknowledgement.forget()

    def clear(self) -> None:
        """Give the server its own limit back."""
        self._write(None)
        self._acknowledgement.ask(None, self._read()[1])

    def status(self) -> LimiterStatus:
        """What the scheduler published at its last step; raises NodeError where none has attached."""
        wanted, report = self._read()
        if not report.monotonic_ns:
            raise NodeError(
                f"no vLLM scheduler has attached to {self.path}: start vLLM with "
                f"{vllm_plugin.LIMIT_FILE_VARIABLE}={self.path}, with fuel_ray installed in its environment "
                "and not excluded by VLLM_PLUGINS; a running server attaches at its next step"
            )
        return LimiterStatus(wanted, *report[:-1])

    def close(self) -> None:
        """Give the server its own limit back and remove the file; safe to call twice."""
        with contextlib.suppress(NodeError):
            self.clear()
        self.path.unlink(missing_ok=True)
        self._let_go()

    def _let_go(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            os.close(lease)

    def _read(self) -> tuple[int | None, Report]:
        try:
            content = vllm_plugin.read_file(str(self.path))
        except OSError as error:
            raise NodeError(f"limit file {self.path} cannot be read: {error.strerror or error}") from error
        if content is None:
            raise NodeError(f"limit file {self.path} is corrupt")
        return content

    def _write(self, wanted: int | None) -> None:
        try:
            vllm_plugin.write_limit(str(self.path), wanted)
        except OSError as error:
            raise NodeError(f"limit file {self.path} cannot be written: {error.strerror or error}") from error


def check_creatable(path: Path) -> None:
    """Return if a limit file could be put there, without doing so.

    Raises:
        NodeError: it could not; ``BatchLimiter`` would say the same.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _uncreated(path, error) from error


def _uncreated(path: Path, error: OSError) -> NodeError:
    return NodeError(f"limit file {path} cannot be created: {error.strerror or error}")


def _holder(path: Path) -> str:
    """The process that has locked a file, as /proc/locks knows it."""
    with contextlib.suppress(OSError):
        inode = path.stat().st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()  # 1: FLOCK ADVISORY WRITE pid major:minor:inode 0 EOF
            if len(fields) > 5 and fields[5].endswith(f":{inode}"):
                return f"pid {fields[4]}"
    return "another process"
