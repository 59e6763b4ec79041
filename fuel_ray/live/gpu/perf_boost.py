"""CUDA_DISABLE_PERF_BOOST: idle power that a server gives up by a variable in its environment."""

from collections.abc import Iterable
from pathlib import Path

VARIABLE = "CUDA_DISABLE_PERF_BOOST"
MEASURED = (
    "two H200s whose server was idle drew 79 to 80 W with it and 122 to 124 W without (vLLM 0.20.2, 8B, "
    "driver 580, n = 3 each); at 4 requests/s and more no difference was seen"
)


def is_set(environ: dict[str, str]) -> bool:
    """Whether this environment lets the GPU leave its boost clock while no kernel runs."""
    return environ.get(VARIABLE, "0") not in ("", "0")


def environments(pids: Iterable[int], *, proc: Path = Path("/proc")) -> dict[int, dict[str, str]]:
    """What processes were started with, by pid; without those that may not be read."""
    found = {}
    for pid in pids:
        try:
            words = (proc / str(pid) / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        pairs = (word.decode(errors="replace").partition("=") for word in words if word)
        found[pid] = {name: value for name, _, value in pairs}
    return {pid: environ for pid, environ in found.items() if environ}
