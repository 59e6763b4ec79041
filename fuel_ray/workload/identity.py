"""What makes two workloads the same, and two requests share a prefix."""

import hashlib
from dataclasses import fields, is_dataclass
from typing import Protocol

import numpy as np


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


def digest(*definition: object) -> str:
    """12 hex characters that depend on the whole content of numbers, strings, arrays and dataclasses."""
    sha = hashlib.sha256()
    for value in definition:
        _feed(sha, value)
    return sha.hexdigest()[:12]


def renumbered(prefix_id: np.ndarray) -> np.ndarray:
    """The same groups under the ids 0 .. k-1, with -1 kept for requests that share no prefix."""
    shares = prefix_id >= 0
    ids = np.full(len(prefix_id), -1, dtype=np.int64)
    ids[shares] = np.unique(prefix_id[shares], return_inverse=True)[1]
    return ids


def _feed(sha: _Hash, value: object) -> None:
    if isinstance(value, np.ndarray):
        sha.update(value.astype(value.dtype.newbyteorder("<")).tobytes())
    elif is_dataclass(value):
        sha.update(type(value).__name__.encode())
        for field in fields(value):
            sha.update(field.name.encode())
            _feed(sha, getattr(value, field.name))
    else:
        sha.update(repr(value).encode() + b";")
