"""CSV traces, read in pieces: a week of them has tens of millions of rows."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fuel_ray.errors import ConfigError
from fuel_ray.workload.cells import (
    MOST,
    NO_TIME,
    Unit,
    column,
    count,
    is_date,
    missing,
    seconds_of_date,
    time_of,
)
from fuel_ray.workload.files import opened

Request = tuple[float, int, int]  # time, prompt tokens, output tokens: 0 if it failed

_PIECE = 1000  # rows; more of them fall out of the processor's caches
_DELIMITERS = ",;\t|"


class Columns(NamedTuple):
    """What a trace says about its requests, in the order of the file."""

    time: np.ndarray  # (n,) float64: seconds since 1970 if ``dated``, else numbers in the file's unit
    prompt_tokens: np.ndarray  # (n,) int32
    output_tokens: np.ndarray  # (n,) int32, 0 if the request failed
    dated: bool
    unit: Unit | None  # as the name of the column says


class Layout(NamedTuple):
    """Where in a row of a table the wanted cells are."""

    names: Sequence[str]
    places: Sequence[int]
    width: int  # cells of the header


class Clock:
    """Reads times as the first of them is written: as numbers, or as dates."""

    def __init__(self) -> None:
        self.dated: bool | None = None

    def read(self, value: object) -> float | None:
        """The time; None if it is missing.

        Raises:
            ValueError: it is not written as the first one.
        """
        if self.dated is None and not missing(value):
            self.dated = is_date(value)
        return seconds_of_date(value) if self.dated else time_of(value)


def read_table(path: Path, names: tuple[str, str, str]) -> Columns:
    """The columns of time, prompt tokens and output tokens of a CSV file; other columns are ignored.

    Rows without any value, and those of failed requests without a time, are left out.

    Raises:
        ConfigError: no such columns, or a row without them; the message names file and line.
    """
    clock = Clock()
    with opened(path, newline="") as text:
        reader, header = _reader(path, text)
        found = [column(header, name) for name in names]
        if absent := [name for name, place in zip(names, found, strict=True) if place is None]:
            there = ", ".join(header) or "nothing"
            raise ConfigError(f"{path}:1: no column {absent[0]!r}; needs {', '.join(names)}; has {there}")
        layout = Layout(names, [header.index(place[0]) for place in found if place is not None], len(header))
        rows = _rows(path, reader)
        pieces = [_piece([], path=path, layout=layout, clock=clock)]
        while piece := list(islice(rows, _PIECE)):
            pieces.append(_piece(piece, path=path, layout=layout, clock=clock))
    unit = found[0][1] if found[0] is not None else None
    time, prompt_tokens, output_tokens = (np.concatenate(part) for part in zip(*pieces, strict=True))
    return Columns(time, prompt_tokens, output_tokens, bool(clock.dated), unit)


def recorded(time: float | None, prompt_tokens: int | None, output_tokens: int | None) -> Request | None:
    """A request as the file has it; None if it failed and says no more.

    Raises:
        ValueError: it did not fail and has no time or no prompt tokens.
    """
    if not output_tokens and (time is None or prompt_tokens is None or output_tokens is None):
        return None
    if time is None or prompt_tokens is None or output_tokens is None:
        raise ValueError(f"output tokens without {'a time' if time is None else 'prompt tokens'}")
    return time, prompt_tokens, output_tokens


def as_arrays(requests: Sequence[Request]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times, prompt tokens and output tokens (n,), in the few bytes that they need."""
    time, prompt_tokens, output_tokens = zip(*requests, strict=True) if requests else ((), (), ())
    return np.array(time, np.float64), np.array(prompt_tokens, np.int32), np.array(output_tokens, np.int32)


def _reader(path: Path, text: Iterable[str]) -> tuple[Iterator[tuple[int, list[str]]], list[str]]:
    """Lines and cells of the rows that are not empty, and the header, which tells what parts the cells."""
    lines, skipped, first = iter(text), 0, ""
    for first in lines:
        if first.strip() and not first.lower().startswith("sep="):  # a line that Excel writes
            break
        skipped += 1
    delimiter = max(_DELIMITERS, key=first.count)
    reader = csv.reader(chain([first], lines), delimiter=delimiter, skipinitialspace=True)
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise ConfigError(f"{path}:{skipped + 1}: {error}: a quote that is not closed?") from error
    return ((skipped + reader.line_num, cells) for cells in reader if any(cells)), header


def _rows(path: Path, reader: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, list[str]]]:
    line = 1
    try:
        for line, cells in reader:
            yield line, cells
    except csv.Error as error:
        raise ConfigError(f"{path}: after line {line}: {error}: a quote that is not closed?") from error


def _piece(
    rows: Sequence[tuple[int, list[str]]],
    *,
    path: Path,
    layout: Layout,
    clock: Clock,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    try:
        arrays = _at_once(rows, layout=layout, dated=clock.dated)
    except (ValueError, IndexError, OverflowError):
        return as_arrays(list(_one_by_one(rows, path=path, layout=layout, clock=clock)))
    if rows:
        clock.dated = bool(clock.dated)  # numbers, if it was not told
    return arrays


def _at_once(
    rows: Sequence[tuple[int, list[str]]], *, layout: Layout, dated: bool | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows' columns; ValueError if a cell is not in the usual form."""
    times, prompt_tokens, output_tokens = ([cells[place] for _, cells in rows] for place in layout.places)
    if max((len(cells) for _, cells in rows), default=0) > layout.width:
        raise ValueError
    time = np.array([*map(_moment, times)] if dated else [*map(float, times)])
    tokens = np.array([[*map(float, prompt_tokens)], [*map(float, output_tokens)]])
    if not ((np.abs(time) < NO_TIME).all() and ((tokens >= 0) & (tokens <= MOST) & (tokens % 1 == 0)).all()):
        raise ValueError
    return time, *tokens.astype(np.int32)


def _one_by_one(
    rows: Iterable[tuple[int, list[str]]],
    *,
    path: Path,
    layout: Layout,
    clock: Clock,
) -> Iterator[Request]:
    for line, cells in rows:
        if not any(cell.strip() for cell in cells):
            continue
        try:
            if len(cells) <= max(layout.places) or "".join(cells[layout.width :]).strip():
                raise ValueError(f"{len(cells)} cells under a header of {layout.width}")
            time, prompt_tokens, output_tokens = (cells[place] for place in layout.places)
            request = recorded(clock.read(time), count(prompt_tokens), count(output_tokens))
        except (ValueError, OverflowError) as error:
            text = ",".join(cells)[:60]
            raise ConfigError(
                f"{path}:{line}: {text!r} is not a row with {', '.join(layout.names)}: {error}"
            ) from error
        if request is not None:
            yield request


def _moment(text: str) -> float:
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
