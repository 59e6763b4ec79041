"""What makes two workloads the same, and two requests share a prefix."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from hashlib import sha256
from itertools import chain

import numpy as np

_PIECE = 1 << 20  # numbers of a long trace that are hashed at once


def digest(*definition: object) -> str:
    """12 hex characters that depend on the whole content of numbers, strings, arrays and dataclasses."""
    found = sha256()
    for part in chain.from_iterable(map(_content, definition)):
        found.update(part)
    return found.hexdigest()[:12]


def renumbered(prefix_id: np.ndarray) -> np.ndarray:
    """The same groups under the ids 0 .. k-1, with -1 kept for requests that share no prefix."""
    shares = prefix_id >= 0
    ids = np.full(len(prefix_id), -1, dtype=np.int64)
    ids[shares] = np.unique(prefix_id[shares], return_inverse=True)[1]
    return ids


def _content(value: object) -> Iterator[bytes]:
    if isinstance(value, np.ndarray):
        for begin in range(0, len(value), _PIECE):
            yield value[begin : begin + _PIECE].astype(value.dtype.newbyteorder("<")).tobytes()
    elif is_dataclass(value):
        yield type(value).__name__.encode()
        for field in fields(value):
            yield field.name.encode()
            yield from _content(getattr(value, field.name))
    else:
        yield repr(value).encode() + b";"
