"""The controller's side of the clock helper: pins and resets through a Unix socket instead of NVML."""

import os
import socket
from pathlib import Path

from fuel_ray.errors import GpuError, PrivilegeError

SOCKET_VARIABLE = "FUEL_RAY_CLOCK_SOCKET"
TIMEOUT_S = 2.0  # a clock takes 23 to 200 ms to be set
MAX_LINE = 4096


def clock_client() -> "ClockClient | None":
    """The helper that FUEL_RAY_CLOCK_SOCKET names; None if clocks are set through NVML."""
    path = os.environ.get(SOCKET_VARIABLE)
    return ClockClient(Path(path)) if path else None


class ClockClient:
    """One connection to a clock helper, made when it is needed; what it pinned ends with it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket: socket.socket | None = None

    def pin(self, uuid: str, clock_mhz: int) -> None:
        """Pin a GPU's clock; PrivilegeError where the helper refuses, GpuError where it does not answer."""
        self._ask(f"pin {uuid} {clock_mhz}")

    def reset(self, uuid: str) -> None:
        """Give a GPU's clock back; raises as ``pin`` does."""
        self._ask(f"reset {uuid}")

    def serves(self, uuid: str) -> bool:
        """Whether the helper is there and may set this GPU's clock."""
        try:
            return uuid in self._ask("gpus").split()
        except GpuError:
            return False

    def close(self) -> None:
        """End the connection and what was pinned through it; safe to call twice."""
        connection, self._socket = self._socket, None
        if connection is not None:
            connection.close()

    def _ask(self, line: str) -> str:
        fresh = self._socket is None
        try:
            answer = self._exchange(line)
        except OSError as error:
            self.close()
            if not fresh:  # the helper was restarted, and gave back what was pinned
                return self._ask(line)
            raise GpuError(f"the clock helper at {self._path} does not answer: {error}") from error
        word, _, rest = answer.partition(" ")
        if word != "ok":
            raise PrivilegeError(f"the clock helper at {self._path} refused `{line}`: {rest}")
        return rest

    def _exchange(self, line: str) -> str:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(TIMEOUT_S)
            self._socket.connect(str(self._path))
        self._socket.sendall(f"{line}\n".encode())
        answer = b""
        while not answer.endswith(b"\n") and len(answer) < MAX_LINE:
            part = self._socket.recv(MAX_LINE)
            if not part:
                raise ConnectionResetError("it closed the connection")
            answer += part
        return answer.decode(errors="replace").strip()
