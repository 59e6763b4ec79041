"""What is printed, where the file behind stdout or stderr takes no more."""

import contextlib
import errno
import io
import select
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from fuel_ray.disk import FAULTS


class Outlet(io.RawIOBase):
    """What takes printed bytes; those that find no room are lost, and who prints goes on."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._left = False  # the reader of a pipe has; that is raised once
        self.fault: str | None = None  # why bytes are lost

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return int(self._raw.fileno())

    def isatty(self) -> bool:
        return not self._raw.closed and bool(self._raw.isatty())

    def write(self, data: Any) -> int | None:
        if self._left:
            return len(data)
        try:
            written: int | None = self._raw.write(data)
        except OSError as error:
            self._left = error.errno == errno.EPIPE
            if error.errno not in FAULTS:
                raise
            self.fault = error.strerror
            return len(data)
        return written


def print_unless_blocked(line: str) -> None:
    """Print a line, or lose it where that would wait for a reader or nobody reads any more."""
    with contextlib.suppress(BrokenPipeError):
        if _takes_more(sys.stdout):
            print(line, flush=True)


@contextlib.contextmanager
def lasting_output() -> Iterator[Callable[[], str | None]]:
    """Let no print end the work of the block for want of room; the call says why some of it is lost."""
    found = sys.stdout, sys.stderr
    outlets: list[Outlet] = []
    sys.stdout, sys.stderr = (_lasting(stream, outlets) for stream in found)

    def lost() -> str | None:
        sys.stdout.flush()
        return next((outlet.fault for outlet in outlets if outlet.fault), None)

    try:
        yield lost
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BrokenPipeError, ValueError):  # ValueError: it is closed
                stream.flush()
        sys.stdout, sys.stderr = found


def _takes_more(stream: TextIO) -> bool:
    """Whether a short line can be written at once; not on a stopped terminal or into a full pipe."""
    try:
        return bool(select.select([], [stream], [], 0)[1])
    except (OSError, ValueError):  # it is no file's, such as a notebook's
        return True


def _lasting(stream: TextIO, outlets: list[Outlet]) -> TextIO:
    """The same stream through an outlet; one that is no file's, such as a notebook's, is left alone."""
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    if not isinstance(stream, io.TextIOWrapper) or not isinstance(raw, io.FileIO):
        return stream
    stream.flush()
    outlets.append(outlet := Outlet(raw))
    unbuffered = raw is buffer
    return io.TextIOWrapper(  # type: ignore[type-var]
        outlet if unbuffered else io.BufferedWriter(outlet),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=unbuffered,
    )
