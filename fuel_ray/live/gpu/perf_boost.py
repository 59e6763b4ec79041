"""CUDA_DISABLE_PERF_BOOST: idle power that a server gives up by a variable in its environment."""

from collections.abc import Iterable
from pathlib import Path

VARIABLE = "CUDA_DISABLE_PERF_BOOST"
MEASURED = (
    "an H100 whose server was idle drew 73 to 75 W with it and 121 to 130 W without, two H200s 79 to 80 W "
    "and 122 to 124 W (vLLM 0.20.2, 8B, driver 580, n = 3 each); at 1 request/s 4 to 10 % less, p99 TTFT "
    "some 30 ms longer; from 4 requests/s on no difference was seen"
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
