"""fuel-ray clock-helper: sets clocks for a controller that may not, as a small service of root's."""

import contextlib
import grp
import pwd
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fuel_ray.errors import ConfigError
from fuel_ray.live.gpu.clock_client import SOCKET_VARIABLE
from fuel_ray.live.gpu.clock_helper import ClockHelper, listening_socket
from fuel_ray.live.gpu.nvml import Gpus


@dataclass(frozen=True)
class ClockHelperConfig:
    """Pin and reset the clocks of the given GPUs for other users, over a Unix socket, and do nothing else.

    Run it as root: by hand, with sudo or as a systemd unit. Controllers find it through
    FUEL_RAY_CLOCK_SOCKET. When a controller exits or is killed, the clocks that it pinned are reset.
    """

    gpu_ids: tuple[str, ...]
    """GPUs whose clocks may be set: nvidia-smi's indices, or UUIDs."""
    users: tuple[str, ...] = ()
    """Users, by name or number, that may set clocks, besides root."""
    group: str | None = None
    """Group that may open the socket. None: only its owner. A socket that systemd passes has its own
    group."""
    socket: Path = Path("/run/fuel-ray/clocks.sock")
    """Socket to listen on, unless systemd passes one."""


def run(config: ClockHelperConfig) -> int:
    """Serve until a signal ends it."""
    if not config.gpu_ids:
        raise ConfigError("--gpu-ids is empty: give the GPUs whose clocks may be set, such as --gpu-ids 0 1")
    uids = frozenset(_number(user, lambda name: pwd.getpwnam(name).pw_uid) for user in config.users)
    gid = None if config.group is None else _number(config.group, lambda name: grp.getgrnam(name).gr_gid)
    with contextlib.ExitStack() as opened:
        with Gpus(config.gpu_ids, hidden=True) as named:
            uuids = named.uuids
        gpus = {uuid: opened.enter_context(Gpus([uuid], hidden=True, direct=True)) for uuid in uuids}
        listener = opened.enter_context(listening_socket(config.socket, gid=gid))
        print(f"clock helper for {', '.join(uuids)}; {SOCKET_VARIABLE}={config.socket}", flush=True)
        ClockHelper(gpus, listener, uids=uids).serve(threading.Event())
    return 0


def _number(name: str, find: Callable[[str], int]) -> int:
    try:
        return int(name) if name.isdecimal() else find(name)
    except KeyError:
        raise ConfigError(f"{name!r} is not a user or group of this host") from None
