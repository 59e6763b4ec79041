"""What a run leaves on disk: run.json, summary.csv, learning.csv, steps.jsonl. Files appear whole or not."""

import csv
import io
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from importlib import metadata
from itertools import chain, count
from pathlib import Path
from typing import Any

from fuel_ray.address import concealed
from fuel_ray.control import StepRecord
from fuel_ray.disk import FAULTS, reason, whole, writing
from fuel_ray.errors import ConfigError, DiskError, FuelRayError
from fuel_ray.metrics import EpisodeSummary
from fuel_ray.stages import timed

logger = logging.getLogger(__name__)

_TUNE = "tune"  # how Tune's folders in that of a run begin
_PACKAGES = ("fuel_ray", "ray", "torch", "numpy", "numba", "pandas", "gymnasium")


def write_json(path: Path, data: Any) -> None:
    """Write JSON at once."""
    with whole(path) as file:
        file.write(json.dumps(data, indent=2))


def publish(run_dir: Path, storage: str) -> None:
    """Copy a run's files to its folder at ``storage``, but not tune/, which Tune puts there itself."""
    with _stored(storage, run_dir) as (files, there):
        for path in run_dir.rglob("*"):
            name = path.relative_to(run_dir)
            if path.is_file() and not name.parts[0].startswith(_TUNE):
                files.makedirs(f"{there}/{name.parent.as_posix()}", exist_ok=True)
                _put(files, path, f"{there}/{name.as_posix()}")


@contextmanager
def stage(run_dir: Path, name: str) -> Iterator[None]:
    """Add the seconds that a stage takes to those in run.json."""
    spent: dict[str, float] = {}
    with timed(spent, name):
        yield
    facts = read_json(run_dir / "run.json")
    before = facts.get("seconds", {})
    facts["seconds"] = {**before, name: round(before.get(name, 0.0) + spent[name], 1)}
    write_json(run_dir / "run.json", facts)


def fetch(run_dir: Path, storage: str) -> None:
    """The inverse of ``publish``, for a machine that has not the run's folder."""
    with _stored(storage, run_dir) as (files, there):
        names = [name for name in files.find(there) if f"/{run_dir.name}/{_TUNE}" not in name]
        partial = run_dir.with_name(f"{run_dir.name}.partial")
        with writing(run_dir):
            for name in names:
                path = partial / name.rpartition(f"/{run_dir.name}/")[2]
                path.parent.mkdir(parents=True, exist_ok=True)
                files.get_file(name, str(path))
            if names:
                os.replace(partial, run_dir)


def _put(files: Any, source: Path, target: str) -> None:
    """Copy a file into storage, where nobody ever sees half of it; object stores see to that themselves."""
    if "file" in files.protocol:
        with whole(Path(target), "wb") as file:
            file.write(source.read_bytes())
    else:
        files.put_file(str(source), target)


@contextmanager
def _stored(storage: str, run_dir: Path) -> Iterator[tuple[Any, str]]:
    """The file system of ``storage`` and the run's folder there; what fails is a DiskError or ConfigError."""
    import fsspec  # noqa: PLC0415  (a deployment, which has no such storage, goes without)

    try:
        files, root = fsspec.core.url_to_fs(storage)
        yield files, f"{root.rstrip('/')}/{run_dir.name}"
    except DiskError:
        raise
    except OSError as error:
        kind = DiskError if error.errno in FAULTS else ConfigError
        raise kind(f"--storage {storage}: {reason(error)}") from error
    except (ValueError, ImportError) as error:
        raise ConfigError(f"--storage {storage}: {error}") from error


def read_json(path: Path) -> Any:
    """Read JSON that fuel_ray wrote.

    Raises:
        ConfigError: the file is not there or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: {reason(error)}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error


def make_folder(path: Path) -> None:
    """Make a folder that can be written to.

    Raises:
        ConfigError: there is a file in its place.
        DiskError: it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        kind = DiskError if error.errno in FAULTS else ConfigError
        raise kind(f"cannot make folder {path}: {reason(error)}") from error
    if not os.access(path, os.W_OK):
        raise DiskError(f"folder {path} is not writable: choose another, or change its permissions")


def new_folder(out: Path, verb: str) -> Path:
    """A new folder below ``out`` named after the verb and the time, and numbered where that is taken."""
    try:
        make_folder(out)
    except FuelRayError as error:
        raise type(error)(f"{error}; --out names another folder for results") from error
    name = f"{verb}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    return next(filter(_is_new, chain([out / name], (out / f"{name}-{number}" for number in count(2)))))


def _is_new(folder: Path) -> bool:
    """Make the folder; whether nobody else has."""
    with writing(folder):
        try:
            folder.mkdir()
        except FileExistsError:
            return False
    return True


def origin(verb: str) -> dict[str, Any]:
    """Where a run's numbers come from: command, time, versions, commit."""
    given = sys.argv[2:] if sys.argv[1:2] == [verb] else sys.argv[1:]  # experiments/ leave the verb out
    return {
        "command": " ".join([f"fuel-ray {verb}", *concealed(given)]),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": versions(),
        "git_commit": git_commit(),
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of equal keys; None becomes an empty field."""
    text = csv_text(rows)
    with whole(path) as file:
        file.write(text)


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """What ``write_csv`` writes."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table that ``write_csv`` wrote, as text; none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def update_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows into a table, in place of its rows of the same block sizes."""
    sizes = {str(row["block_size"]) for row in rows}
    write_csv(path, [*(row for row in read_csv(path) if row["block_size"] not in sizes), *rows])


def update_lines(path: Path, lines: Sequence[str]) -> None:
    """The same for JSON lines."""
    sizes = {json.loads(line)["block_size"] for line in lines}
    there = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    write_lines(path, [*(line for line in there if json.loads(line)["block_size"] not in sizes), *lines])


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that make the numbers."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_commit() -> str | None:
    """Commit of the checkout that fuel_ray runs from, with "+changes" if it differs; None outside one."""
    folder = Path(__file__).parent
    try:
        commit = _git("rev-parse", "HEAD", cwd=folder)
        return commit + ("+changes" if _git("status", "--porcelain", "-uno", cwd=folder) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def summary_fields(summary: EpisodeSummary) -> dict[str, Any]:
    """The columns of summary.csv that say what happened."""
    fields = asdict(summary)
    latencies = [(name, fields.pop(name)) for name in ("ttft", "tpot", "e2e")]
    return fields | {f"{name}_{figure}": value for name, of in latencies for figure, value in of.items()}


def step_line(record: StepRecord, *, time_s: float, labels: Mapping[str, Any]) -> str:
    """One control window as a line of steps.jsonl."""
    window = record.metrics
    return json.dumps(
        {
            **labels,
            "step": record.step,
            "time_s": round(time_s, 3),
            "chosen": asdict(record.chosen),
            "applied": asdict(record.applied),
            "limit_acknowledged": window.limit_acknowledged,
            "reward": None if record.reward is None else round(record.reward, 5),
            "arrivals": window.arrivals,
            "completed": window.completed,
            "running": window.running,
            "waiting": window.waiting,
            "kv_usage": round(window.kv_usage, 4),
            "power_w": round(window.energy_j / window.duration_s, 2),
            "oldest_wait_s": round(window.oldest_wait_s, 3),
        }
    )


class StepLog:
    """Lines added to a file one by one; a full disk costs lines, which are counted, and nothing else.

    Raises:
        DiskError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost_lines = 0
        self._torn = False
        with writing(path):
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, line: str) -> None:
        """Add a line, or count it as lost."""
        data = f"{chr(10) if self._torn else ''}{line}\n".encode()
        try:
            written = os.write(self._fd, data)
        except OSError as error:
            self._lose(error.strerror)
            return
        self._torn = written < len(data)
        if self._torn:
            self._lose("the disk is full")

    def close(self) -> None:
        """Close the file; safe to call twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _lose(self, why: str | None) -> None:
        self.lost_lines += 1
        if self.lost_lines.bit_count() == 1:  # 1, 2, 4, 8 ... so that a full disk's log does not fill another
            logger.warning("%s: %s; %d lines are lost so far", self.path, why, self.lost_lines)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines at once."""
    with whole(path) as file:
        file.writelines(f"{line}\n" for line in lines)


def _git(*words: str, cwd: Path) -> str:
    done = subprocess.run(["git", *words], cwd=cwd, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
