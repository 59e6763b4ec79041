"""Who controls which GPU of this machine: a state file and a lock file per GPU.

A GPU's lock file is locked by its controller and that one's watchdog together. The kernel frees it when both
are gone, so a state file beside a free lock is stale. Lock files stay where they are.
"""

import contextlib
import fcntl
import os
import shlex
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from fuel_ray.errors import ConfigError, DiskError, GpuError
from fuel_ray.home import is_own_folder
from fuel_ray.live.processes import lives, start_time
from fuel_ray.record import make_folder, read_json, write_json

STATE_VARIABLE = "FUEL_RAY_STATE_DIR"
LOCK_WAIT_S = 3.0  # a watchdog gives the clocks back within 2 s
POLL_S = 0.05

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that took a GPU's clocks, as its state file says."""

    gpu_uuid: str
    pid: int
    start_time: str  # the kernel's, in clock ticks since boot
    boot_id: str
    taken_at: str  # ISO 8601, UTC
    command: str

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.command}) since {self.taken_at}"

    def lives(self) -> bool:
        """Whether it is still that process, not another one with its pid."""
        return self.boot_id == _boot_id() and lives(self.pid, self.start_time)


def state_folder() -> Path:
    """FUEL_RAY_STATE_DIR, else the first of these that this user may write to.

    /run/fuel-ray, $XDG_RUNTIME_DIR/fuel-ray, /tmp/fuel-ray-UID.

    Raises:
        ConfigError: there is a file in its place, or it is another user's.
        DiskError: it cannot be made or written to.
    """
    asked, runtime = os.environ.get(STATE_VARIABLE), os.environ.get("XDG_RUNTIME_DIR")
    if asked:
        make_folder(Path(asked))
        return Path(asked)
    for parent in ("/run", runtime):
        with contextlib.suppress(ConfigError, DiskError):
            if parent:
                make_folder(Path(parent) / "fuel-ray")
                return Path(parent) / "fuel-ray"
    return _private_folder(Path(f"/tmp/fuel-ray-{os.getuid()}"))


def owners(folder: Path) -> dict[str, Owner | None]:
    """The owners, dead ones too, of GPUs with a state file, by UUID; None where it cannot be read."""
    return {path.stem: _owner(folder, path.stem) for path in sorted(folder.glob("*.json"))}


def state_path(folder: Path, uuid: str) -> Path:
    """The state file of a GPU."""
    return folder / f"{uuid}.json"


def record_owner(folder: Path, uuid: str) -> None:
    """Write that this process controls the GPU."""
    path = state_path(folder, uuid)
    try:
        write_json(path, asdict(_this_process(uuid)))
    except OSError as error:
        raise GpuError(f"cannot write {path}: {error}") from error


def lock(folder: Path, uuid: str) -> IO[str]:
    """The GPU's lock file, locked until it is closed; it waits for the watchdog of an owner that died.

    Raises:
        GpuError: a controller has the GPU (the message names its pid and command), or the folder is missing.
    """
    try:
        file = (folder / f"{uuid}.lock").open("a")
    except OSError as error:
        raise GpuError(f"cannot lock GPU {uuid}: {error}") from error
    try:
        _lock_file(file, folder, uuid)
    except BaseException:
        file.close()
        raise
    return file


def _private_folder(path: Path) -> Path:
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    if not is_own_folder(path):
        raise ConfigError(f"{path} belongs to another user; set {STATE_VARIABLE} to a folder of your own")
    return path


def _owner(folder: Path, uuid: str) -> Owner | None:
    try:
        return Owner(**read_json(state_path(folder, uuid)))
    except (ConfigError, TypeError):
        return None


def _this_process(uuid: str) -> Owner:
    words = Path("/proc/self/cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    return Owner(
        gpu_uuid=uuid,
        pid=os.getpid(),
        start_time=start_time(os.getpid()),
        boot_id=_boot_id(),
        taken_at=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(words),
    )


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip()


def _lock_file(file: IO[str], folder: Path, uuid: str) -> None:
    deadline_s = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            owner = _owner(folder, uuid)
            if owner is not None and owner.lives():
                raise GpuError(f"GPU {uuid} is controlled by {owner}; stop that process first") from None
            if time.monotonic() >= deadline_s:
                whose = f"the watchdog of {owner}, which died," if owner else "an unknown process"
                raise GpuError(f"GPU {uuid}: {whose} still holds its lock") from None
        time.sleep(POLL_S)
