"""Text files that users bring: packed or not, in UTF-8 or UTF-16, with lines of any system."""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from fuel_ray.errors import ConfigError

_PACKED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_REFUSED = {  # first bytes of what is no text
    b"PK\x03\x04": "a zip archive or a workbook: unpack it, or save it as CSV",
    b"PAR1": "a Parquet file: write it as CSV",
    b"\x28\xb5\x2f\xfd": "packed with zstd: unpack it, or pack it with gzip",
}
_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_DECODER = json.JSONDecoder()


@contextmanager
def opened(path: Path, *, newline: str | None = None) -> Iterator[TextIO]:
    """The text of a file; a byte order mark and gzip, bzip2 or xz packing are seen from its first bytes.

    Raises:
        ConfigError: it cannot be opened or unpacked, or is no text; also for what is read in the block.
    """
    try:
        if path.is_dir():
            names = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
            raise ConfigError(f"{path}: a folder: give a file; in it are {names}")
        with path.open("rb") as file, _unpacked(path, file) as raw:
            yield io.TextIOWrapper(raw, encoding=_encoding(_head(raw)), newline=newline)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text, nor UTF-16 with a byte order mark") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def json_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Line and value of each object of JSON Lines, or of the items of one JSON array.

    Raises:
        ConfigError: it cannot be opened; the message names the line that is not JSON.
    """
    with opened(path) as text:
        number = 0
        for number, line in enumerate(text, 1):
            if line.lstrip().startswith("[") and not line.strip().endswith("],"):
                yield from _items(line + text.read(), path=path, line=number)
                return
            if row := line.strip().rstrip(","):
                yield number, _decoded(row, path=path, line=number)


def read_text_json(path: Path) -> object:
    """The value of one JSON file.

    Raises:
        ConfigError: it cannot be opened or is not JSON.
    """
    with opened(path) as text:
        try:
            return json.load(text)
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not JSON: {error}") from error


def _unpacked(path: Path, file: io.BufferedReader) -> BinaryIO:
    head = _head(file)
    for first, why in _REFUSED.items():
        if head.startswith(first):
            raise ConfigError(f"{path}: {why}")
    for first, unpack in _PACKED.items():
        if head.startswith(first):
            return cast(BinaryIO, unpack(file, "rb"))
    return file


def _head(raw: BinaryIO) -> bytes:
    peeked: bytes = cast(io.BufferedReader, raw).peek(8)[:8]
    return peeked


def _encoding(head: bytes) -> str:
    marked = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    if marked is not None:
        return marked
    unmarked = {(False, True): "utf-16-le", (True, False): "utf-16-be"}  # text of ASCII characters
    return unmarked.get((head[:1] == b"\0", head[1:2] == b"\0"), "utf-8")


def _items(text: str, *, path: Path, line: int) -> Iterator[tuple[int, object]]:
    """The items of a JSON array, with the lines that they begin in."""
    place, counted = text.index("[") + 1, 0
    while True:
        while text[place : place + 1] in (" ", "\n", "\t", "\r", ","):
            place += 1
        line += text.count("\n", counted, place)
        counted = place
        if text[place : place + 1] == "]":
            _check_end(text, place + 1, path=path, line=line)
            return
        try:
            value, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}:{line}: {text[place : place + 60]!r} is not JSON") from error
        yield line, value


def _check_end(text: str, place: int, *, path: Path, line: int) -> None:
    if rest := text[place:].strip():
        line += text.count("\n", place, text.index(rest, place))
        raise ConfigError(f"{path}:{line}: {rest[:60]!r} follows the end of the array")


def _decoded(text: str, *, path: Path, line: int) -> object:
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}:{line}: {text[:60]!r} is not JSON: {error}") from error
