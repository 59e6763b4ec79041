"""Tune's files on a disk that may fill up: each is whole or not there, and a run that it ended can go on."""

import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from pyarrow import PythonFile
from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

from fuel_ray.disk import fault_in, whole
from fuel_ray.errors import DiskError
from fuel_ray.training.ray_private import DECISIONS

_LITTLE_BYTES = 2**23  # free on a disk that is as good as full
_LOGGER = "ray.tune"


def whole_files() -> FileSystem:
    """The local disk for Tune, which writes states and checkpoints in place and believes what it finds."""
    return PyFileSystem(_Whole(fsspec.filesystem("file")))


class _Whole(FSSpecHandler):  # type: ignore[misc]
    def open_output_stream(self, path: str, metadata: Any) -> PythonFile:
        return PythonFile(_WholeFile(Path(path)), mode="w")


class _WholeFile:
    """A file that takes its place when it is closed, unless a write failed; arrow asks for these methods."""

    def __init__(self, path: Path) -> None:
        self._opened = contextlib.ExitStack()
        self._file = self._opened.enter_context(whole(path, "wb"))

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def write(self, data: Any) -> int:
        try:
            return int(self._file.write(data))
        except OSError as error:  # it is given up, and its room with it: arrow may never close it
            self._opened.pop_all().__exit__(type(error), error, error.__traceback__)
            raise

    def tell(self) -> int:
        return int(self._file.tell())

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._opened.pop_all().close()


def forget_stop(experiment: Path) -> None:
    """Let a trial whose checkpoint found no room go on: Tune remembers that it wanted to stop it.

    Without this the resumed trial ends after its first result (Ray 2.60, _schedule_trial_stop).
    """
    for path in experiment.glob("experiment_state-*.json"):
        try:
            state = json.loads(path.read_text())
        except (OSError, ValueError):  # Tune says what it makes of it
            continue
        if state.get("runner_data", {}).get(DECISIONS):
            state["runner_data"][DECISIONS] = {}
            with whole(path) as file:
                json.dump(state, file)


class _Watch(logging.Filter):
    """Keeps what Tune logs of a full disk, traceback after traceback, to one reason."""

    def __init__(self) -> None:
        super().__init__()
        self.fault: str | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        fault = fault_in(f"{record.getMessage()} {error}")
        self.fault = self.fault or fault
        follows = self.fault is not None and record.getMessage().startswith("Trials did not complete")
        return fault is None and not follows


@contextlib.contextmanager
def disk_faults_told(experiment: str) -> Iterator[None]:
    """Let a trial that ended for want of room leave as one DiskError, whatever Tune makes of it.

    Raises:
        DiskError: a disk took no more; what was written before can be resumed.
    """
    watch = _Watch()
    handlers = [handler for name in ("ray", _LOGGER) for handler in logging.getLogger(name).handlers]
    for handler in (*handlers, *logging.getLogger().handlers):
        handler.addFilter(watch)
    try:
        yield
    except DiskError:
        raise
    except (Exception, KeyboardInterrupt) as error:  # of any kind: Tune stumbles over its own cut files
        if (fault := watch.fault or fault_in(str(error))) is None:
            raise
        raise DiskError(f"cannot write {_full(experiment)}: {fault}") from error
    finally:
        for handler in (*handlers, *logging.getLogger().handlers):
            handler.removeFilter(watch)


def _full(experiment: str) -> str:
    """Whichever of the disks that a training writes to is full."""
    places = (experiment, tempfile.gettempdir(), os.environ.get("RAY_TMPDIR", "/tmp"))
    free = {place: _free_bytes(place) for place in places}
    fullest = min(free, key=lambda place: free[place])
    return fullest if free[fullest] < _LITTLE_BYTES else experiment


def _free_bytes(place: str) -> float:
    try:
        return float(shutil.disk_usage(place).free)
    except OSError:  # a URL
        return float("inf")
