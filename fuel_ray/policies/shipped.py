"""Policy folders that come with the package, by name.

``example`` is a DQN of the default preset: `fuel-ray train --block-sizes 16` at commit 8a5fed4, 2026-11-27,
for the default load, SLO and pack.
"""

from pathlib import Path

SHIPPED = {"example": Path(__file__).parent / "example"}


def folder_of(entry: str) -> Path:
    """The shipped folder of this name, or else the path that the entry is."""
    return SHIPPED.get(entry, Path(entry))
