"""The readers of the published formats; docs/workloads.md has their columns and units."""

from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fuel_ray.errors import ConfigError
from fuel_ray.workload.cells import Unit, column, count, is_date, missing
from fuel_ray.workload.files import json_rows, opened, read_text_json
from fuel_ray.workload.prefixes import Hashed
from fuel_ray.workload.table import Clock, Columns, Request, as_arrays, read_table, recorded
from fuel_ray.workload.units import block_tokens, in_seconds, time_order

_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURSTGPT = ("Timestamp", "Request tokens", "Response tokens")
_SHIPPED = ("arrival_s", "prompt_tokens", "output_tokens")
_JSON = ("timestamp", "input_length", "output_length", "hash_ids")
_VLLM = ("start_times", "input_lens", "output_lens")
_MOST_RPS, _MOST_REQUESTS = 10_000, 100_000_000  # of speeds, which are drawn all at once


@dataclass(frozen=True, slots=True)
class Format:
    """What a published format's numbers mean where nothing else says it."""

    unit: Unit  # of times that are no dates
    block_tokens: int = 0  # per hash id; 0 if it has none
    slowest_rps: float = 1 / 20  # mean rate below which another unit is suspected


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """The requests of a trace that did not fail, in the order of their times."""

    time_s: np.ndarray  # (n,) float64, from any origin
    prompt_tokens: np.ndarray  # (n,) int32
    output_tokens: np.ndarray  # (n,) int32
    prefix_id: np.ndarray | None = None  # (n,) int64; None: no prompt begins as another
    prefix_tokens: np.ndarray | None = None  # (n,) int64


FORMATS = {
    "azure": Format("s"),
    "mooncake": Format("ms", 512),
    "bailian": Format("s", 16),
    "burstgpt": Format("s", slowest_rps=1 / 120),  # begins with a request a minute
    "vllm": Format("s"),
}


def read_recorded(name: str, path: Path, *, unit: Unit | None, block: int | None) -> Recorded:
    """A trace of the format of that name, its times in ``unit`` and its hashed blocks of ``block`` tokens.

    Either is told from the file if it is None, and said where it is not the format's.

    Raises:
        ConfigError: the file is malformed, or its numbers make no sense in any unit.
    """
    columns, hashed = _READERS[name](path)
    if unit is not None and columns.dated:
        raise ConfigError(f"{path}: timestamps are dates: leave unit={unit} out")
    which = None  # of the file's requests, where that is not all of them in its order
    if not (answered := columns.output_tokens > 0).all():
        columns, which = _chosen(columns, np.flatnonzero(answered)), np.flatnonzero(answered)
    _check_span(path, columns.time)
    if (order := time_order(columns.time, source=path, absolute=columns.dated)) is not None:
        columns, which = _chosen(columns, order), order if which is None else which[order]
    form, known = FORMATS[name], "s" if columns.dated else unit or columns.unit
    usual, slowest_rps = form.unit, form.slowest_rps
    time_s = in_seconds(columns.time, source=path, usual=usual, slowest_rps=slowest_rps, known=known)
    if hashed is None:
        return Recorded(time_s, columns.prompt_tokens, columns.output_tokens)
    which = np.arange(len(time_s)) if which is None else which
    blocks, tokens = hashed.blocks[which], columns.prompt_tokens
    size = block_tokens(tokens, blocks, source=path, usual=form.block_tokens, given=block)
    prefix_id, depth = hashed.shared(which)
    return Recorded(time_s, tokens, columns.output_tokens, prefix_id, depth * size)


@cache
def read_shipped(path: Path) -> Recorded:
    """A trace of ``data/``, read once: a training makes dozens of nodes."""
    columns = read_table(path, _SHIPPED)
    return Recorded(columns.time, columns.prompt_tokens, columns.output_tokens)


def read_speeds(path: Path) -> tuple[int, ...]:
    """Requests in each second: whole numbers, as a JSON list or separated by commas, blanks or newlines.

    Raises:
        ConfigError: something else is in it, or no request.
    """
    with opened(path) as text:
        speeds = tuple(
            chain.from_iterable(_speeds(path, number, line) for number, line in enumerate(text, 1))
        )
    if not any(speeds):
        raise ConfigError(f"{path}: no second with a request")
    if sum(speeds) > _MOST_REQUESTS:
        raise ConfigError(f"{path}: more than {_MOST_REQUESTS:,} requests")
    return speeds


def _speeds(path: Path, number: int, line: str) -> list[int]:
    try:
        return [_whole(item) for item in line.translate(str.maketrans("[],;", "    ")).split()]
    except ValueError as error:
        wrong = f"{path}:{number}: {line.strip()[:60]!r} is not a list of whole numbers"
        raise ConfigError(f"{wrong}, of requests in each second: {error}") from error


def _whole(text: str) -> int:
    if (number := count(text)) is None:
        raise ValueError(f"{text!r} is not a number")
    if number > _MOST_RPS:
        raise ValueError(f"{text} is more than {_MOST_RPS:,}")
    return number


def _read_azure(path: Path) -> tuple[Columns, None]:
    """Azure LLM inference traces of 2023 and 2024 (github.com/Azure/AzurePublicDataset)."""
    return read_table(path, _AZURE), None


def _read_burstgpt(path: Path) -> tuple[Columns, None]:
    """BurstGPT (arXiv:2401.17644); its failed requests have no response tokens."""
    return read_table(path, _BURSTGPT), None


def _read_blocks(path: Path) -> tuple[Columns, Hashed]:
    """Mooncake (arXiv:2407.00079) and Bailian (arXiv:2506.02634) traces, one JSON object a line."""
    clock, hashed, requests = Clock(), Hashed(), []
    names: dict[str, tuple[str, Unit | None]] = {}
    item: Any
    for line, item in json_rows(path):
        try:
            names = names or _names(item)
            request = _request(item, names, clock)
            if request is not None:
                hashed.append(item.get(names["hash_ids"][0]))
                requests.append(request)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            wrong = f"{path}:{line}: {str(item)[:60]!r} is not JSON with {', '.join(_JSON)}"
            reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
            raise ConfigError(f"{wrong}: {reason}") from error
    unit = names["timestamp"][1] if names else None
    return Columns(*as_arrays(requests), dated=bool(clock.dated), unit=unit), hashed


def _read_vllm(path: Path) -> tuple[Columns, None]:
    """What `vllm bench serve --save-result --save-detailed` writes: one JSON object with lists."""
    result: Any = read_text_json(path)
    if not isinstance(result, dict):
        raise ConfigError(f"{path}: no JSON object, as `vllm bench serve` writes")
    if absent := [name for name in _VLLM if not isinstance(result.get(name), list)]:
        raise ConfigError(f"{path}: no list {absent[0]!r}; `vllm bench serve` writes it with --save-detailed")
    lists = [result[name] for name in _VLLM]
    if len({len(values) for values in lists}) != 1:
        raise ConfigError(f"{path}: {', '.join(_VLLM)} are not equally long")
    clock, requests = Clock(), []
    for place, (time, prompt_tokens, output_tokens) in enumerate(zip(*lists, strict=True)):
        try:
            requests.append(recorded(clock.read(time), count(prompt_tokens), count(output_tokens)))
        except ValueError as error:
            raise ConfigError(f"{path}: request {place}: {error}") from error
    arrays = as_arrays([request for request in requests if request is not None])
    return Columns(*arrays, dated=bool(clock.dated), unit=None), None


def _names(item: object) -> dict[str, tuple[str, Unit | None]]:
    if not isinstance(item, dict):
        raise ValueError("no JSON object")
    found = {name: column(item, name) for name in _JSON}
    return {name: there or (name, None) for name, there in found.items()}


def _request(item: Any, names: dict[str, tuple[str, Unit | None]], clock: Clock) -> Request | None:
    time, prompt_tokens, output_tokens = (item[names[name][0]] for name in _JSON[:3])
    if isinstance(time, str) and not (is_date(time) or missing(time)):
        raise ValueError(f"timestamp is the text {time!r}, neither a number nor a date")
    return recorded(clock.read(time), count(prompt_tokens), count(output_tokens))


def _chosen(columns: Columns, which: np.ndarray) -> Columns:
    time, prompt_tokens, output_tokens = (part[which] for part in columns[:3])
    return columns._replace(time=time, prompt_tokens=prompt_tokens, output_tokens=output_tokens)


def _check_span(path: Path, time: np.ndarray) -> None:
    if not len(time) or time.min() == time.max():
        raise ConfigError(f"{path}: no two requests with output tokens at different times")


_READERS = {
    "azure": _read_azure,
    "burstgpt": _read_burstgpt,
    "mooncake": _read_blocks,
    "bailian": _read_blocks,
    "vllm": _read_vllm,
}
