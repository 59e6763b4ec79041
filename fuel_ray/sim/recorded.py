"""Recorded runs of a real server, as trace files: JSON objects with ``info`` and ``requests``.

Each request has ``n_in`` and ``n_out`` in tokens, ``start`` on any clock, ``ttft`` and ``e2e``, in s.
``info`` has ``secs`` and the ``energy_j`` in them (null: not measured), from ``begin`` on the requests' clock
(by default the first start), the schedules ``[[second, value], ...]`` of batch limit and, where it was not
the highest, clock in MHz, and what the server is: ``block_size``, ``num_kv_blocks``, ``max_num_seqs``,
``max_num_batched_tokens`` and, where it is off, ``prefix_caching``. ``sim.doubts`` reads ``failed``,
``unfinished``, ``late_sends``, ``foreign_requests``, ``prefix_hit_rate``, ``unmeasured_s``, ``assumed``,
``gpu_name``, ``model`` and ``highest_sm_clock_mhz``. What else it says is for people.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fuel_ray.errors import ConfigError
from fuel_ray.sim.rows import Row
from fuel_ray.types import Requests

_MOST = 10**7  # requests, tokens or blocks of a server, and MHz
_LONGEST_S = 1e6


@dataclass(frozen=True, slots=True, eq=False)
class RecordedRun:
    """One run of a real server: what was sent and what was measured."""

    requests: Requests  # arrival_s counts from the beginning, in ascending order
    duration_s: float
    energy_j: float | None  # in duration_s; None: not measured
    ttft_s: np.ndarray  # in the order of requests, like the next
    e2e_s: np.ndarray
    kv_block_size: int  # tokens
    num_kv_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    limit_schedule: tuple[tuple[float, int], ...]  # (second, batch limit), ascending from 0
    clock_schedule: tuple[tuple[float, int], ...] = ()  # (second, MHz), ascending from 0; none: the highest
    prefix_caching: bool = True
    info: Mapping[str, Any] = field(default_factory=dict)  # what else the file says of it


def read_trace(path: str) -> RecordedRun:
    """A recorded run from a trace file.

    Raises:
        ConfigError: there is no such file, or it is malformed.
    """
    if not Path(path).is_file():
        raise ConfigError(f"trace {path}: there is no such file")
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        info = Row(raw["info"], f"trace {path}: info")
        rows = [Row(row, f"trace {path}: request {k}") for k, row in enumerate(raw["requests"])]
        return _run(info, sorted(rows, key=lambda row: row.number("start", above=-math.inf)))
    except KeyError as error:
        raise ConfigError(f"{path} is not a trace: it has no {error}") from error
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is not a trace: {error}") from error


def trace_text(run: RecordedRun, **facts: Any) -> str:
    """The trace file of a run, which ``read_trace`` reads; ``facts`` are what else its ``info`` says.

    Raises:
        ConfigError: nobody could replay it: no request of several tokens ended, or its server's KV cache is
            not known.
    """
    several = run.requests.output_tokens > 1
    if not (run.e2e_s > run.ttft_s)[several].any():
        raise ConfigError("a trace needs at least one finished request with several tokens")
    if not run.num_kv_blocks:
        raise ConfigError("a trace needs the number of KV blocks, which the server does not report")
    requests, latencies_s = run.requests, zip(run.ttft_s.tolist(), run.e2e_s.tolist(), strict=True)
    info = {
        "begin": 0.0,
        "secs": run.duration_s,
        "energy_j": run.energy_j,
        "block_size": run.kv_block_size,
        "num_kv_blocks": run.num_kv_blocks,
        "max_num_seqs": run.max_num_seqs,
        "max_num_batched_tokens": run.max_num_batched_tokens,
        "prefix_caching": run.prefix_caching,
        "limit_schedule": run.limit_schedule,
        "clock_schedule": run.clock_schedule,
        "n": len(requests),
    } | dict(run.info)
    rows = [
        {"n_in": n_in, "n_out": n_out, "start": start_s, "ttft": ttft_s, "e2e": e2e_s}
        for n_in, n_out, start_s, (ttft_s, e2e_s) in zip(
            requests.prompt_tokens.tolist(),
            requests.output_tokens.tolist(),
            requests.arrival_s.tolist(),
            latencies_s,
            strict=True,
        )
    ]
    return json.dumps({"info": info | facts, "requests": rows})


def _run(info: Row, rows: Sequence[Row]) -> RecordedRun:
    if not rows:
        raise ValueError("requests must be a list with at least one request")
    start_s = np.array([row.number("start", above=-math.inf) for row in rows])
    n_in, n_out = (np.array([row.whole(key) for row in rows]) for key in ("n_in", "n_out"))
    ttft_s, e2e_s = (np.array([row.number(key) for row in rows]) for key in ("ttft", "e2e"))
    if (e2e_s < ttft_s).any() or not (e2e_s > ttft_s)[n_out > 1].any():
        raise ValueError("a request must have ttft <= e2e, and one of several tokens ttft < e2e")
    block_size, num_kv_blocks = (info.whole(key, most=_MOST) for key in ("block_size", "num_kv_blocks"))
    pool, longest = (num_kv_blocks - 1) * block_size, (n_in + n_out).max()
    if longest > pool:
        raise ValueError(f"a request of {longest} tokens does not fit into the KV cache of {pool} tokens")
    begin_s = info.number("begin", above=-math.inf) if "begin" in info.values else start_s[0]
    if begin_s > start_s[0]:
        raise ValueError(f"info: begin is {begin_s}, after the first request's start {start_s[0]}")
    if start_s[-1] - begin_s > _LONGEST_S:
        raise ValueError(f"a request starts {start_s[-1] - begin_s:g} s after the beginning")
    return RecordedRun(
        requests=Requests(start_s - begin_s, n_in, n_out, np.full(len(rows), -1), np.zeros_like(n_in)),
        duration_s=info.number("secs", most=_LONGEST_S),
        energy_j=None if info.values.get("energy_j", 0) is None else info.number("energy_j"),
        ttft_s=ttft_s,
        e2e_s=e2e_s,
        kv_block_size=block_size,
        num_kv_blocks=num_kv_blocks,
        max_num_seqs=info.whole("max_num_seqs", most=_MOST),
        max_num_batched_tokens=info.whole("max_num_batched_tokens", most=_MOST),
        limit_schedule=_schedule("limit_schedule", info.values["limit_schedule"]),
        clock_schedule=_schedule("clock_schedule", info.values.get("clock_schedule", [])),
        prefix_caching=bool(info.values.get("prefix_caching", True)),
        info={key: value for key, value in info.values.items() if key not in _OF_THE_RUN},
    )


_OF_THE_RUN = frozenset(
    {
        *("begin", "secs", "energy_j", "block_size", "num_kv_blocks", "max_num_seqs"),
        *("max_num_batched_tokens", "prefix_caching", "limit_schedule", "clock_schedule", "n"),
    }
)


def _schedule(name: str, raw: Any) -> tuple[tuple[float, int], ...]:
    """Every (second, value), as it is written; what nobody set is at its highest."""
    entries = [(float(second), value) for second, value in raw] if isinstance(raw, list) else []
    valid = all(type(value) is int and 0 < value <= _MOST for _, value in entries)
    seconds = [second for second, _ in entries]
    if (
        not isinstance(raw, list)
        or not valid
        or seconds != sorted(seconds)
        or not all(0 <= s < math.inf for s in seconds)
    ):
        raise ValueError(f"{name} must be a list of [second, whole number] with ascending seconds from 0")
    return tuple(entries)
