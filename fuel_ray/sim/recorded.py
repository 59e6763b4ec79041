"""Recorded runs of a real server, as trace files: JSON objects with ``info`` and ``requests``."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fuel_ray.errors import ConfigError
from fuel_ray.sim.replay import RecordedRun
from fuel_ray.types import Requests

_SIZES = ("block_size", "num_kv_blocks", "max_num_seqs", "max_num_batched_tokens")  # whole numbers of info
_INFO = (*_SIZES, "limit_schedule", "energy_j", "secs")
_REQUEST = ("n_in", "n_out", "start", "ttft", "e2e")


def read_trace(path: str) -> RecordedRun:
    """A recorded run from a trace file; second 0 is its first arrival.

    Raises:
        ConfigError: there is no such file, or it is malformed.
    """
    if not Path(path).is_file():
        raise ConfigError(f"trace {path}: no such file")
    try:
        raw = json.loads(Path(path).read_text())
    except (ValueError, OSError) as error:
        raise ConfigError(f"trace {path}: not JSON: {error}") from error
    try:
        return _parse(raw)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"trace {path}: malformed: {error}") from error


def _parse(raw: Any) -> RecordedRun:
    _need(raw, ("info", "requests"), "the trace")
    info, rows = raw["info"], raw["requests"]
    _need(info, _INFO, "info")
    if not isinstance(rows, list) or not rows:
        raise ValueError("requests must be a list with at least one request")
    for index, row in enumerate(rows):
        _need(row, _REQUEST, f"request {index}")
    columns = {key: np.array([float(row[key]) for row in rows]) for key in _REQUEST}
    order = np.argsort(columns["start"], kind="stable")
    columns = {key: column[order] for key, column in columns.items()}
    _check_requests(columns)
    sizes = {key: _whole(info[key], key) for key in _SIZES}
    pool = (sizes["num_kv_blocks"] - 1) * sizes["block_size"]
    longest = int((columns["n_in"] + columns["n_out"]).max())
    if longest > pool:
        raise ValueError(f"a request of {longest} tokens does not fit into the KV pool of {pool} tokens")
    return RecordedRun(
        requests=_requests(columns),
        duration_s=_positive(info["secs"], "secs"),
        energy_j=_positive(info["energy_j"], "energy_j"),
        ttft_s=columns["ttft"],
        e2e_s=columns["e2e"],
        kv_block_size=sizes["block_size"],
        num_kv_blocks=sizes["num_kv_blocks"],
        max_num_seqs=sizes["max_num_seqs"],
        max_num_batched_tokens=sizes["max_num_batched_tokens"],
        limit_schedule=_schedule(info["limit_schedule"], sizes["max_num_seqs"]),
    )


def _requests(columns: Mapping[str, np.ndarray]) -> Requests:
    n = len(columns["start"])
    return Requests(
        arrival_s=columns["start"] - columns["start"][0],
        prompt_tokens=columns["n_in"].astype(np.int64),
        output_tokens=columns["n_out"].astype(np.int64),
        prefix_id=np.full(n, -1),
        prefix_tokens=np.zeros(n, np.int64),
    )


def _check_requests(columns: Mapping[str, np.ndarray]) -> None:
    for key, column in columns.items():
        if not np.isfinite(column).all():
            raise ValueError(f"{key} of a request is not a finite number")
    for key in ("n_in", "n_out"):
        if (columns[key] < 1).any() or (columns[key] % 1 != 0).any():
            raise ValueError(f"{key} of a request must be a whole number of at least 1")
    if (columns["ttft"] <= 0).any() or (columns["e2e"] < columns["ttft"]).any():
        raise ValueError("a request must have 0 < ttft <= e2e")
    several = columns["n_out"] > 1
    if not several.any() or (columns["e2e"] == columns["ttft"])[several].all():
        raise ValueError("no request has more than one output token, so there is no TPOT")


def _need(raw: Any, keys: tuple[str, ...], where: str) -> None:
    if not isinstance(raw, dict):
        raise ValueError(f"{where} must be an object with {', '.join(keys)}")
    missing = [key for key in keys if key not in raw]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")


def _positive(value: Any, key: str) -> float:
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{key} is {value}; it must be above 0")
    return number


def _whole(value: Any, key: str) -> int:
    number = _positive(value, key)
    if number % 1:
        raise ValueError(f"{key} is {value}; it must be a whole number")
    return int(number)


def _schedule(raw: Any, max_num_seqs: int) -> tuple[tuple[float, int], ...]:
    pairs = isinstance(raw, list) and all(isinstance(entry, list) and len(entry) == 2 for entry in raw)
    if not pairs:
        raise ValueError("limit_schedule must be a list of [second, limit]")
    entries = [(float(second), _whole(limit, "a limit of limit_schedule")) for second, limit in raw]
    if entries != sorted(entries, key=lambda entry: entry[0]) or any(second < 0 for second, _ in entries):
        raise ValueError("limit_schedule must have ascending seconds from 0")
    unlimited = [(0.0, max_num_seqs)] if not entries or entries[0][0] > 0 else []
    return (*unlimited, *entries)
