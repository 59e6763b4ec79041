"""Processes: a family by a variable that they inherit or by its port, one by pid and start time; signals."""

import contextlib
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType

import psutil

POLL_S = 0.05
KILL_S = 5.0  # a killed process frees GBs of memory first

_PROC = Path("/proc")
_FIRST_PID_NAMESPACE = 0xEFFFFFFC  # linux/proc_ns.h, PROC_PID_INIT_INO
_PROXIES = (  # what listens for a server that runs elsewhere
    *("docker-proxy", "rootlessport", "slirp4netns", "conmon", "containerd-shim", "kubectl", "kube-proxy"),
    *("ssh", "sshd", "socat", "nginx", "haproxy", "envoy", "traefik", "caddy"),
)
_VLLM = re.compile(r"vllm(\.entrypoints|::|\S*\s+serve\b)", re.IGNORECASE)
_CAP_SYS_ADMIN = 21  # linux/capability.h; the kernel driver asks for it in the first user namespace

logger = logging.getLogger(__name__)


class MarkedProcesses:
    """The processes whose environment has ``mark``, orphans and those in other sessions included.

    Those once seen are followed until they are gone: the kernel drops a process's environment before it has
    closed its files, a GPU's among them.
    """

    def __init__(self, mark: str):
        self._mark = mark.encode()  # NAME=value
        self._started: dict[int, str] = {}  # kernel's start time by pid, against reused pids

    def pids(self) -> tuple[int, ...]:
        """Those that are not gone yet."""
        for folder in _PROC.glob("[0-9]*"):
            with contextlib.suppress(OSError):  # gone meanwhile, or another user's
                if self._mark in (folder / "environ").read_bytes().split(b"\0"):
                    self._started[int(folder.name)] = start_time(int(folder.name))
        self._started = {pid: start for pid, start in self._started.items() if lives(pid, start)}
        return tuple(sorted(self._started))

    def end(self, *, grace_s: float) -> None:
        """Return when all are gone; what is left after ``grace_s`` is killed."""
        kill_s = time.monotonic() + grace_s
        while pids := self.pids():
            if time.monotonic() >= kill_s + KILL_S:
                logger.error("processes %s do not exit", pids)
                return
            if time.monotonic() >= kill_s:
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_S)


@contextlib.contextmanager
def orderly_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise SystemExit(128 + number), so that what was opened is closed.

    The first one makes the others ignored until the block ends. A signal that is ignored, as by nohup, stays
    so. Outside the main thread, where Python has no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    handled = {n: handler for n, handler in found.items() if handler not in (signal.SIG_IGN, None)}

    codes: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        for other in handled:
            signal.signal(other, signal.SIG_IGN)
        codes.append(128 + number)
        raise SystemExit(*codes)

    try:
        for number in handled:
            signal.signal(number, leave)
        yield
    except SystemExit as error:  # out of a call of Ray's it comes with another code
        error.code = codes[0] if codes else error.code
        raise
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)


def start_time(pid: int) -> str:
    """The kernel's, in clock ticks since boot; with the pid it names a process once and for all."""
    return _state(pid)[1]


def lives(pid: int, start: str) -> bool:
    """Whether it is still the process with that start time, with a thread that is more than a zombie."""
    try:
        state, started = _state(pid)
        threads = len(os.listdir(_PROC / str(pid) / "task"))
    except OSError:
        return False
    return started == start and (state not in "ZX" or threads > 1)


def are_ours_to_see(pids: Iterable[int]) -> bool:
    """Whether the driver counts processes as this one does, and not as they are outside a container."""
    with contextlib.suppress(OSError):
        if (_PROC / "self/ns/pid").stat().st_ino == _FIRST_PID_NAMESPACE:
            return True
    return all(map(psutil.pid_exists, pids))


def is_local(host: str) -> bool:
    """Whether a host name is this machine's."""
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return False
    own = {a.address.partition("%")[0] for found in psutil.net_if_addrs().values() for a in found}
    return any(address in own or address.startswith("127.") for address in addresses)


def server_flags(port: int) -> tuple[str, ...]:
    """The words after `vllm serve` of the server that listens on a TCP port here; none if it is not seen."""
    for pid in sorted(server_pids(port)[0]):
        with contextlib.suppress(psutil.Error):
            words = psutil.Process(pid).cmdline()
            if "serve" in words[1:] and _VLLM.search(" ".join(words)):
                return tuple(words[words.index("serve") + 1 :])
            if len(words) > 2 and words[2].startswith("vllm.entrypoints"):
                return tuple(words[3:])
    return ()


def server_pids(port: int) -> tuple[frozenset[int], str]:
    """The processes of the server that listens on a TCP port here; of none, why."""
    try:
        found = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    except (psutil.Error, OSError) as error:
        return frozenset(), f"the process on port {port} cannot be seen ({error})"
    listeners = {c.pid for c in found if c.laddr.port == port} - {None}
    if not listeners:
        return frozenset(), f"no process that this user can see listens on port {port}"
    family: set[int] = set()
    for pid in listeners:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if process.name() in _PROXIES:
                return (
                    frozenset(),
                    f"{process.name()} on port {port} forwards to a container or another host",
                )
            root = _root(process)
            family |= {root.pid, *(child.pid for child in root.children(recursive=True))}
    return frozenset(family), f"the server on port {port} has just ended"


def _root(process: psutil.Process) -> psutil.Process:
    """With several API servers the one that listens is a child of `vllm serve`, as the engines are."""
    while (parent := process.parent()) is not None and _VLLM.search(" ".join(parent.cmdline())):
        process = parent
    return process


def holds_sys_admin(proc: Path) -> bool:
    """Whether a process (a folder of /proc) has CAP_SYS_ADMIN in the first user namespace."""
    try:
        status, uid_map = (proc / "status").read_text(), (proc / "uid_map").read_text()
    except OSError:
        return False
    capabilities = next((line.split()[1] for line in status.splitlines() if line.startswith("CapEff")), "0")
    return bool(int(capabilities, 16) >> _CAP_SYS_ADMIN & 1) and uid_map.split() == ["0", "0", "4294967295"]


def _state(pid: int) -> tuple[str, str]:
    """State letter and start time, fields 3 and 22 of proc(5)'s stat."""
    fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]
