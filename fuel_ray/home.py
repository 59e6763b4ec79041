"""Folders that libraries write to, for a user who has no home or may not write to it."""

import os
import stat
import tempfile
from pathlib import Path

_SHARED_MEMORY = "/dev/shm"  # a container whose root is read-only has it


def stand_ins() -> dict[str, str]:
    """Environment variables that give libraries a folder to write to; none where they find one themselves."""
    found = {}
    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError:
        found["TMPDIR"] = temporary = _SHARED_MEMORY
    home = Path(os.path.expanduser("~"))  # where a user has no home, ~ stays as it is
    there = {
        "HOME": home.is_absolute() and os.path.isdir(home),
        "NUMBA_CACHE_DIR": _may_write(compile_cache()),
        "MPLCONFIGDIR": _may_write(_of_user("XDG_CONFIG_HOME", home / ".config")),
    }
    lacking = [name for name, is_there in there.items() if not is_there]
    if lacking and (own := _own(temporary)) is not None:
        found |= {name: own for name in lacking if name == "HOME" or name not in os.environ}
    return found if _may_write(Path(temporary)) else {}


def compile_cache() -> Path:
    """Where compiled code is kept: beside the simulator, or with the user's caches if it cannot be there."""
    beside = Path(__file__).parent / "sim" / "__pycache__"
    return (
        beside if _may_write(beside) else _of_user("XDG_CACHE_HOME", Path(os.path.expanduser("~")) / ".cache")
    )


def is_own_folder(path: Path) -> bool:
    """Whether it is a folder of this user's and no link; in a shared one anybody can have made it before."""
    found = path.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def nowhere_to_write(error: RuntimeError) -> str | None:
    """What to do if numba has no folder for what it compiles; None if the error is another."""
    if "no locator available" not in str(error):
        return None
    return "has no folder to write to: set TMPDIR or NUMBA_CACHE_DIR to one that can be written to"


def _own(temporary: str) -> str | None:
    """A folder that is nobody else's, since what is compiled there is run; None if none can be made."""
    own = Path(temporary, f"fuel-ray-{os.geteuid()}")
    try:
        own.mkdir(mode=0o700, exist_ok=True)
        safe = is_own_folder(own) and not own.lstat().st_mode & 0o022
        return str(own) if safe else tempfile.mkdtemp(prefix="fuel-ray-")
    except OSError:
        return None


def _of_user(variable: str, otherwise: Path) -> Path:
    return Path(os.environ.get(variable) or otherwise)


def _may_write(folder: Path) -> bool:
    if not folder.is_absolute():
        return False
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    return os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)
