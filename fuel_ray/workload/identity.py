"""What makes two workloads the same, and two requests share a prefix."""

from dataclasses import fields, is_dataclass
from hashlib import sha256

import numpy as np


def digest(*definition: object) -> str:
    """12 hex characters that depend on the whole content of numbers, strings, arrays and dataclasses."""
    return sha256(b"".join(map(_content, definition))).hexdigest()[:12]


def renumbered(prefix_id: np.ndarray) -> np.ndarray:
    """The same groups under the ids 0 .. k-1, with -1 kept for requests that share no prefix."""
    shares = prefix_id >= 0
    ids = np.full(len(prefix_id), -1, dtype=np.int64)
    ids[shares] = np.unique(prefix_id[shares], return_inverse=True)[1]
    return ids


def _content(value: object) -> bytes:
    if isinstance(value, np.ndarray):
        return value.astype(value.dtype.newbyteorder("<")).tobytes()
    if not is_dataclass(value):
        return repr(value).encode() + b";"
    parts = [field.name.encode() + _content(getattr(value, field.name)) for field in fields(value)]
    return type(value).__name__.encode() + b"".join(parts)
