"""How the simulator is compiled: once, and again when any of its sources changes.

numba looks at the file of a function alone: what another file has of it, and was compiled into it, would stay
as it was after an update.
"""

from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from numba import config, njit

from fuel_ray.home import compile_cache

_SOURCES = Path(__file__).parent


def kept(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``njit`` with these options, whose code is kept on disk for the sources as they are."""

    def compiled(function: Callable[..., Any]) -> Any:
        given = config.CACHE_DIR
        config.CACHE_DIR = str(folder(Path(given) if given else compile_cache(), _SOURCES))
        try:
            return njit(cache=True, **options)(function)
        finally:
            config.CACHE_DIR = given

    return compiled


@cache
def folder(parent: Path, sources: Path) -> Path:
    """Where the code that is compiled from these sources is kept."""
    found = sha256()
    for source in sorted(sources.glob("*.py")):
        found.update(source.read_bytes())
    return parent / f"fuel-ray-{found.hexdigest()[:12]}"
