"""The privileged side: pins and resets the clocks of named GPUs for those who may ask, and nothing else.

A line is "pin UUID MHZ", "reset UUID" or "gpus"; the answer begins with "ok" or "no". What a connection has
pinned is reset when it ends, so that no clock outlives its controller.
"""

import contextlib
import logging
import os
import selectors
import socket
import stat
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fuel_ray.errors import ConfigError, GpuError
from fuel_ray.live.gpu.nvml import Gpus

MAX_LINE = 128  # bytes
MAX_PEERS = 16
SEND_S = 1.0
POLL_S = 0.2

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid; unix(7), SO_PEERCRED

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Peer:
    connection: socket.socket
    pid: int
    uid: int
    data: bytes = b""
    pinned: set[str] = field(default_factory=set)


class ClockHelper:
    """Serves one listening socket until stopped.

    Args:
        gpus: one object per UUID that may be set.
        listener: a listening Unix socket.
        uids: users that may ask, besides root.
    """

    def __init__(self, gpus: Mapping[str, Gpus], listener: socket.socket, *, uids: frozenset[int]) -> None:
        self._gpus, self._listener, self._uids = gpus, listener, uids | {0}
        self._selector = selectors.DefaultSelector()
        self._peers: list[_Peer] = []

    def serve(self, stop: threading.Event) -> None:
        """Answer until ``stop``; clocks that are pinned then are given back."""
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        try:
            while not stop.is_set():
                for key, _ in self._selector.select(POLL_S):
                    if key.data is None:
                        self._accept()
                    else:
                        self._read(key.data)
        finally:
            for peer in tuple(self._peers):
                self._drop(peer)
            self._selector.close()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            connection, _ = self._listener.accept()
            raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            pid, uid, _ = _CREDENTIALS.unpack(raw)
            connection.settimeout(SEND_S)
            if len(self._peers) >= MAX_PEERS:
                logger.warning("too many connections: user %d (pid %d) was turned away", uid, pid)
                connection.close()
                return
            peer = _Peer(connection, pid, uid)
            self._peers.append(peer)
            self._selector.register(connection, selectors.EVENT_READ, peer)

    def _read(self, peer: _Peer) -> None:
        try:
            part = peer.connection.recv(MAX_LINE)
            peer.data += part
            while b"\n" in peer.data:
                line, _, peer.data = peer.data.partition(b"\n")
                answer = self._answer(peer, line.decode(errors="replace").split())
                peer.connection.sendall(f"{answer}\n".encode())
        except OSError:
            part = b""
        if not part or len(peer.data) > MAX_LINE:
            self._drop(peer)

    def _answer(self, peer: _Peer, words: list[str]) -> str:
        if peer.uid not in self._uids:
            logger.warning("user %d (pid %d) may not set clocks here", peer.uid, peer.pid)
            return f"no user {peer.uid} may not set clocks here"
        match words:
            case ["gpus"]:
                return f"ok {' '.join(self._gpus)}"
            case ["pin", uuid, clock] if uuid in self._gpus and clock.isdecimal():
                return self._pin(peer, uuid, int(clock))
            case ["reset", uuid] if uuid in self._gpus:
                return self._reset(uuid)
        return "no it is `pin UUID MHZ`, `reset UUID` or `gpus`, for " + ", ".join(self._gpus)

    def _pin(self, peer: _Peer, uuid: str, clock_mhz: int) -> str:
        gpus = self._gpus[uuid]
        others = [other.pid for other in self._peers if other is not peer and uuid in other.pinned]
        if others:
            return f"no pid {others[0]} has its clock"
        if clock_mhz not in gpus.supported_clocks_mhz:
            return f"no {clock_mhz} MHz is not one of its clocks"
        peer.pinned.add(uuid)  # before the call: should it fail half way, the end of the connection resets
        return _tried(partial(gpus.pin, clock_mhz))

    def _reset(self, uuid: str) -> str:
        for peer in self._peers:
            peer.pinned.discard(uuid)
        return _tried(self._gpus[uuid].reset)

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        self._peers.remove(peer)
        peer.connection.close()
        for uuid in peer.pinned:
            answer = self._reset(uuid)
            logger.log(
                logging.INFO if answer == "ok" else logging.ERROR,
                "GPU %s of pid %d, which is gone, reset: %s",
                *(uuid, peer.pid, answer),
            )


def _tried(call: Callable[[], object]) -> str:
    try:
        call()
    except GpuError as error:
        return f"no {' '.join(str(error).split())}"
    return "ok"


def listening_socket(path: Path, *, gid: int | None) -> socket.socket:
    """Systemd's socket if it gave one, else a new one at ``path`` for its owner and group alone.

    Raises:
        ConfigError: it cannot be made, or another helper listens there.
    """
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS") == "1":
        return socket.socket(fileno=3)  # sd_listen_fds(3)
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX)
    umask = os.umask(0o117)
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        listener.bind(str(path))
        if gid is not None:
            os.chown(path, -1, gid)
    except OSError as error:
        listener.close()
        raise ConfigError(f"--socket {path}: cannot listen there: {error.strerror or error}") from error
    finally:
        os.umask(umask)
    listener.listen(MAX_PEERS)
    return listener


def _remove_stale(path: Path) -> None:
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise ConfigError(f"--socket {path}: this file exists and is not a socket; choose another path")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise ConfigError(f"--socket {path}: another clock helper listens there; stop it, or choose another path")
