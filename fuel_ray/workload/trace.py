"""Replays of recorded traffic, and the readers of the published formats."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from itertools import chain, pairwise, takewhile
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from fuel_ray.errors import ConfigError
from fuel_ray.types import Requests
from fuel_ray.workload.arrivals import repeated
from fuel_ray.workload.identity import digest, renumbered

T = TypeVar("T")

_MOONCAKE_BLOCK_TOKENS = 512  # of the published Mooncake traces
_MOST = 10_000_000  # tokens or requests per second; beyond it the file is damaged


class TraceRow(NamedTuple):
    """One recorded request."""

    time_s: float  # from any origin
    prompt_tokens: int
    output_tokens: int  # 0 if the request failed
    hash_ids: tuple[int, ...] = ()  # one per block of the prompt; equal ids mean equal prompts so far


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """A recorded trace, repeated for ever; the same for every random generator."""

    name: str
    requests: Requests  # of one period
    period_s: float

    @property
    def mean_rate_rps(self) -> float:
        return len(self.requests) / self.period_s

    @property
    def halves(self) -> tuple["Replay", "Replay"]:
        middle_s = self.period_s / 2
        first = int(np.searchsorted(self.requests.arrival_s, middle_s))
        return self._part(slice(first), 0.0), self._part(slice(first, None), middle_s)

    def _part(self, which: slice, begin_s: float) -> "Replay":
        part = self.requests.part(which)
        return Replay(self.name, replace(part, arrival_s=part.arrival_s - begin_s), self.period_s / 2)

    def generate(self, duration_s: float, *, rng: np.random.Generator, start_s: float = 0.0) -> Requests:
        times_s = self.requests.arrival_s
        arrival_s, index = repeated(times_s, self.period_s, duration_s=duration_s, start_s=start_s)
        part = self.requests.part(index)
        return replace(part, arrival_s=arrival_s, prefix_id=renumbered(part.prefix_id))

    def digest(self) -> str:
        return digest(self.requests, self.period_s)


def replay(
    name: str, rows: Sequence[TraceRow], *, source: Path, rate_scale: float, max_prompt_tokens: int
) -> Replay:
    """Replay the requests that did not fail, ``rate_scale`` times as fast; the last gap is a mean gap.

    Raises:
        ConfigError: fewer than two requests that did not fail, or all at one time.
    """
    rows = sorted((row for row in rows if row.output_tokens > 0), key=lambda row: row.time_s)
    span_s = rows[-1].time_s - rows[0].time_s if rows else 0.0
    if span_s == 0.0:
        raise ConfigError(f"{source}: no two requests with output tokens at different times")
    prompt_tokens = np.clip([row.prompt_tokens for row in rows], 1, max_prompt_tokens)
    prefixes = np.array(_shared_prefixes([row.hash_ids for row in rows]), np.int64)
    requests = Requests(
        arrival_s=np.array([row.time_s - rows[0].time_s for row in rows]) / rate_scale,
        prompt_tokens=prompt_tokens,
        output_tokens=np.array([row.output_tokens for row in rows], np.int64),
        prefix_id=prefixes[:, 0],
        prefix_tokens=np.minimum(prefixes[:, 1], prompt_tokens),
    )
    return Replay(name, requests, period_s=span_s * len(rows) / (len(rows) - 1) / rate_scale)


def read_azure(path: Path) -> list[TraceRow]:
    """Azure LLM inference traces of 2023 and 2024 (github.com/Azure/AzurePublicDataset)."""
    return _read_csv(path, ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), seconds=_seconds_of_date)


def read_burstgpt(path: Path) -> list[TraceRow]:
    """BurstGPT (arXiv:2401.17644); its failed requests have no response tokens."""
    return _read_csv(path, ("Timestamp", "Request tokens", "Response tokens"), seconds=float)


@cache
def read_shipped(path: Path) -> list[TraceRow]:
    """Those in ``data/``, read once: a training makes dozens of nodes."""
    return _read_csv(path, ("arrival_s", "prompt_tokens", "output_tokens"), seconds=float)


def read_mooncake(path: Path) -> list[TraceRow]:
    """Mooncake traces (arXiv:2407.00079), one JSON object a line."""

    def parse(line: str) -> TraceRow:
        item = json.loads(line)
        hash_ids = tuple(_whole(block, most=2**62) for block in item.get("hash_ids", ()))
        return _row(item["timestamp"] / 1000, item["input_length"], item["output_length"], hash_ids)

    expected = "JSON with timestamp (ms), input_length, output_length and hash_ids"
    return _parse(path, _lines(path), parse, expected)


def read_speeds(path: Path) -> tuple[int, ...]:
    """Requests in each second: whole numbers, as a JSON list or separated by commas, blanks or newlines."""

    def parse(line: str) -> tuple[int, ...]:
        return tuple(_whole(item) for item in line.translate(str.maketrans("[],;", "    ")).split())

    speeds = tuple(chain.from_iterable(_parse(path, _lines(path), parse, "a list of whole numbers")))
    if not any(speeds):
        raise ConfigError(f"{path}: no second with a request")
    return speeds


def _read_csv(
    path: Path, columns: tuple[str, str, str], *, seconds: Callable[[str], float]
) -> list[TraceRow]:
    lines = _lines(path)
    header = [name.strip() for name in lines[0].split(",")] if lines else []
    if missing := [column for column in columns if column not in header]:
        raise ConfigError(f"{path}:1: no column {missing[0]!r}; needs {', '.join(columns)}")
    time, prompt, output = (header.index(column) for column in columns)

    def parse(line: str) -> TraceRow:
        cells = line.split(",")
        return _row(seconds(cells[time].strip()), cells[prompt], cells[output])

    return _parse(path, lines[1:], parse, f"a row with {', '.join(columns)}", first_line=2)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text") from error


def _parse(
    path: Path, lines: Sequence[str], parse: Callable[[str], T], expected: str, *, first_line: int = 1
) -> list[T]:
    parsed = []
    for number, line in enumerate(lines, first_line):
        if not line.strip():
            continue
        try:
            parsed.append(parse(line))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
            raise ConfigError(f"{path}:{number}: {line[:60]!r} is not {expected}") from error
    return parsed


def _row(
    time_s: float, prompt_tokens: str | int, output_tokens: str | int, hash_ids: tuple[int, ...] = ()
) -> TraceRow:
    if not math.isfinite(time_s):
        raise ValueError(time_s)
    return TraceRow(time_s, _whole(prompt_tokens), _whole(output_tokens), hash_ids)


def _whole(value: str | int, *, most: int = _MOST) -> int:
    number = int(value)
    if not 0 <= number <= most:
        raise ValueError(value)
    return number


def _seconds_of_date(text: str) -> float:
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _shared_prefixes(prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
    """A (prefix id, prefix tokens) per prompt; (-1, 0) where no other prompt shares its first block.

    Prompts form a tree of blocks, of which those in at least two prompts matter. ``Requests`` knows one chain
    per prefix id, so the tree is cut into chains that follow the most shared child, and each prompt belongs
    to the chain of its deepest shared block. Prompts of one chain share exactly what they share in the trace;
    what prompts of different chains share above the branch is lost, so sharing is under-estimated.
    """
    uses = Counter(chain.from_iterable(set(prompt) for prompt in prompts))
    shared = [tuple(takewhile(lambda block: uses[block] > 1, prompt)) for prompt in prompts]
    follower: dict[int, int] = {}
    for blocks in shared:
        for block, child in pairwise(blocks):
            if uses[child] > uses[follower.get(block, -1)]:
                follower[block] = child
    return [(_head(blocks, follower), len(blocks) * _MOONCAKE_BLOCK_TOKENS) for blocks in shared]


def _head(blocks: tuple[int, ...], follower: dict[int, int]) -> int:
    """First block of the cut-out chain in which this one ends; -1 for an empty one."""
    head = blocks[0] if blocks else -1
    for block, child in pairwise(blocks):
        head = head if follower[block] == child else child
    return head
