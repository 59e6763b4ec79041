"""Recorded runs of a real server, as trace files: JSON objects with ``info`` and ``requests``."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fuel_ray.errors import ConfigError
from fuel_ray.sim.replay import RecordedRun
from fuel_ray.sim.rows import Row
from fuel_ray.types import Requests


def read_trace(path: str) -> RecordedRun:
    """A recorded run from a trace file; second 0 is its first arrival.

    Raises:
        ConfigError: there is no such file, or it is malformed.
    """
    if not Path(path).is_file():
        raise ConfigError(f"trace {path}: no such file")
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        info, schedule = Row(raw["info"], f"trace {path}: info"), raw["info"]["limit_schedule"]
        rows = [Row(row, f"trace {path}: request {k}") for k, row in enumerate(raw["requests"])]
        return _run(info, schedule, sorted(rows, key=lambda row: row.number("start", above=-math.inf)))
    except KeyError as error:
        raise ConfigError(f"trace {path}: malformed: there is no {error}") from error
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"trace {path}: malformed: {error}") from error


def _run(info: Row, schedule: Any, rows: Sequence[Row]) -> RecordedRun:
    if not rows:
        raise ValueError("requests must be a list with at least one request")
    start_s = np.array([row.number("start", above=-math.inf) for row in rows])
    n_in, n_out = (np.array([row.whole(key) for row in rows]) for key in ("n_in", "n_out"))
    ttft_s, e2e_s = (np.array([row.number(key) for row in rows]) for key in ("ttft", "e2e"))
    if (e2e_s < ttft_s).any() or not (e2e_s > ttft_s)[n_out > 1].any():
        raise ValueError("a request must have ttft <= e2e, and one of several tokens ttft < e2e")
    block_size, num_kv_blocks = info.whole("block_size"), info.whole("num_kv_blocks")
    pool, longest = (num_kv_blocks - 1) * block_size, (n_in + n_out).max()
    if longest > pool:
        raise ValueError(f"a request of {longest} tokens does not fit into the KV pool of {pool} tokens")
    return RecordedRun(
        requests=Requests(start_s - start_s[0], n_in, n_out, np.full(len(rows), -1), np.zeros_like(n_in)),
        duration_s=info.number("secs"),
        energy_j=info.number("energy_j"),
        ttft_s=ttft_s,
        e2e_s=e2e_s,
        kv_block_size=block_size,
        num_kv_blocks=num_kv_blocks,
        max_num_seqs=info.whole("max_num_seqs"),
        max_num_batched_tokens=info.whole("max_num_batched_tokens"),
        limit_schedule=_schedule(schedule, info.whole("max_num_seqs")),
    )


def _schedule(raw: Any, max_num_seqs: int) -> tuple[tuple[float, int], ...]:
    """Every (second, limit) from second 0 on; without a limit until the first of them."""
    entries = [(float(second), limit) for second, limit in raw] if isinstance(raw, list) else []
    limits = all(type(limit) is int and limit > 0 for _, limit in entries)
    seconds = [second for second, _ in entries]
    if not isinstance(raw, list) or not limits or seconds != sorted(seconds) or min(seconds, default=0) < 0:
        raise ValueError("limit_schedule must be a list of [second, limit] with ascending seconds from 0")
    unlimited = [] if 0.0 in seconds else [(0.0, max_num_seqs)]
    return (*unlimited, *entries)
