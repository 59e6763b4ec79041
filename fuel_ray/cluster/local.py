"""A Ray of this process's own: what it needs of the machine, and what is done where that is not there."""

import logging
import os
import resource
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from fuel_ray.errors import ConfigError

_LONGEST = 43  # characters of Ray's folder: its sockets have 64 more, and at most 107 (unix(7))
_LEAST_OPEN = 512  # files; with 64 Ray starts, and its raylet dies at the sixth worker
_LEAST_FREE = 64 * 2**20  # bytes, for sockets and logs
_OTHERS = ("/tmp", "/var/tmp", "/dev/shm")

logger = logging.getLogger(__name__)


def start_local(resources: Mapping[str, float], **quiet: Any) -> None:
    """Start Ray on this machine, with its sockets and logs where there is room for them.

    Raises:
        ConfigError: it cannot start; the message says what it lacks.
    """
    _check_loopback()
    _check_open_files()
    folder = _ray_folder()
    try:
        ray.init(
            "local",
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            resources=dict(resources),
            _temp_dir=str(folder),
            **quiet,
        )
    except Exception as error:  # that of a start that takes too long is no other
        ray.shutdown()
        why = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        if isinstance(error, PermissionError):
            raise ConfigError(
                f"Ray cannot start on this machine: {why}; set HOME or RAY_TMPDIR to another folder"
            ) from error
        raise ConfigError(
            f"Ray cannot start on this machine: {why}. It needs memory, processes (ulimit -u) and open files "
            f"(ulimit -n); {folder}/session_latest/logs may say more"
        ) from error


def temp_folder() -> Path:
    """Where Ray makes its own folder, called ray."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp").absolute()


def _ray_folder() -> Path:
    """The folder that Ray takes by itself, or else the first that it can have."""
    first = temp_folder()
    why = _unfit(first / "ray")
    if why is None:
        return first / "ray"
    folders = list(dict.fromkeys((first, *map(Path, _OTHERS))))
    for own in (folder / name for folder in folders for name in ("ray", f"ray-{os.geteuid()}")):
        if _unfit(own) is None:
            logger.warning("%s, so Ray's sockets and logs are in %s", why, own)
            return own
    raise ConfigError(
        f"Ray has no folder for its sockets and logs: {why}, and {', '.join(_OTHERS)} cannot be used either. "
        f"Set RAY_TMPDIR to a writable folder with a short path and {_LEAST_FREE >> 20} MiB free"
    )


def _unfit(own: Path) -> str | None:
    """Why Ray cannot have its files in a folder, which need not be there yet; None if it can."""
    if len(str(own)) > _LONGEST:
        return f"the path {own} is too long for a socket"
    there = next(path for path in (own, *own.parents) if os.path.exists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return f"{there} is not writable"
    if shutil.disk_usage(there).free < _LEAST_FREE:
        return f"{there} is full"
    return None


def _check_loopback() -> None:
    """Ray's processes talk over it, and wait for minutes where it is down."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        raise ConfigError(
            f"Ray cannot start on this machine: 127.0.0.1 does not answer ({error.strerror or error}); "
            "run `ip link set lo up` as root, or start the container with a network"
        ) from error


def _check_open_files() -> None:
    """Ray raises its own limit as far as it may."""
    _, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= highest < _LEAST_OPEN:
        raise ConfigError(
            f"Ray cannot start on this machine: it needs {_LEAST_OPEN} open files and {highest} are allowed "
            "(ulimit -Hn); raise the limit in limits.conf, or start the container with --ulimit nofile=65536"
        )
