"""Files that appear whole or not at all, and what a disk that takes no more says."""

import contextlib
import errno
import os
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from fuel_ray.errors import ConfigError, DiskError

# Of the machine, not of what was asked for
_NAMES = "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM ENAMETOOLONG EIO ESTALE ENODEV ENOTCONN EMFILE ENFILE EBUSY"
FAULTS = frozenset(getattr(errno, name) for name in _NAMES.split())
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})  # of a disk alone
_STEM = 60  # letters of a name, so that a temporary one is never too long
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextlib.contextmanager
def whole(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file that takes the place of ``path`` when the block ends: nobody ever sees half of it.

    Raises:
        DiskError, ConfigError: as ``writing``; what was at ``path`` stays.
    """
    partial = path.with_name(f"{path.name[:_STEM]}.partial")
    text = {} if "b" in mode else {"newline": "", "encoding": "utf-8"}
    with writing(path):
        try:
            with partial.open(mode, **text) as file:  # type: ignore[call-overload]
                yield file
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Let an OSError of writing ``path`` leave as an error that names it.

    Raises:
        DiskError: the disk takes no more, or not from us.
        ConfigError: ``path`` is not one that can be written, such as one below a file.
    """
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        kind = DiskError if error.errno in FAULTS else ConfigError
        raise kind(f"cannot write {path}: {reason(error)}") from error


@contextlib.contextmanager
def disk_faults() -> Iterator[None]:
    """Let a disk's fault that nobody has named leave as a DiskError; other OSErrors leave as they are."""
    try:
        yield
    except OSError as error:
        if isinstance(error, DiskError) or error.errno not in FAULTS:
            raise
        raise DiskError(f"{error.filename or _writer(error)}: {reason(error)}") from error


def _writer(error: OSError) -> str:
    """Whose file it was: the module that the error comes from."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return f"a file of {frames[-1].f_globals.get('__name__', 'Python')}" if frames else "a file"


def reason(error: OSError) -> str:
    """What the system says and, where there is something, what helps."""
    said = error.strerror or str(error)
    if error.errno in _FULL:
        return f"{said}; free some space"
    return said


def fault_in(text: str) -> str | None:
    """The disk's fault that other people's code tells of in a message or a traceback; None if it is none.

    Only a disk that takes no more is looked for: other people's code says "permission denied" of much else.
    """
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        if os.strerror(number) in text:
            return reason(OSError(number, os.strerror(number)))
    return None


def write_or_keep(folder: Path, files: Mapping[str, str]) -> None:
    """Write what took long to measure, by file name: into ``folder``, or else wherever there is room.

    Raises:
        DiskError: it is not in ``folder``; the message says where it is, or that it was only printed.
    """
    try:
        _write(folder, files)
    except (DiskError, ConfigError) as error:
        place = next((place for place in _others(folder.name) if _written(place, files)), None)
        if place is None:
            print("\n".join(files.values()), flush=True)
        where = "it was printed instead" if place is None else f"it was written to {place} instead"
        raise DiskError(f"{error}; {where}") from error


def _write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        with writing(folder / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with whole(folder / name) as file:
            file.write(text)


def _written(folder: Path, files: Mapping[str, str]) -> bool:
    try:
        _write(folder, files)
    except (DiskError, ConfigError):
        return False
    return True


def _others(name: str) -> Iterator[Path]:
    """Where most machines have room; the last one is memory."""
    with contextlib.suppress(OSError):
        yield Path(tempfile.gettempdir(), name)
    with contextlib.suppress(OSError):
        yield Path.cwd() / name
    with contextlib.suppress(RuntimeError):
        yield Path.home() / name
    yield Path("/var/tmp", name)
    yield Path("/dev/shm", name)
