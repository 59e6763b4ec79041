"""Episodes as recorded runs, which the simulator can replay."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np

from fuel_ray.control import ControlLoop
from fuel_ray.errors import NodeError
from fuel_ray.live.vllm.facts import assumed
from fuel_ray.sim.recorded import RecordedRun
from fuel_ray.types import Knobs, NodeSpec, RequestRecords, Requests, WindowMetrics

_DRAIN_WINDOWS = 120  # after the last arrival


def record(loop: ControlLoop, knobs: Knobs, *, seed: int, windows: int) -> RecordedRun:
    """Serve the node's load under the knobs for so many windows, and on until nothing runs or waits.

    Raises:
        NodeError: a window could not be measured, or the last request has not ended in time.
    """
    measured = [loop.reset(seed=seed)]
    while len(measured) < windows or measured[-1].running or measured[-1].waiting:
        if len(measured) == windows + _DRAIN_WINDOWS:
            raise NodeError(
                f"{loop.node.spec.name}: requests are still running {_DRAIN_WINDOWS} windows after the last "
                "arrival"
            )
        measured.append(loop.step(knobs).metrics)
    return recorded_run(loop, measured, loop.node.take_records())


def recorded_run(loop: ControlLoop, windows: Sequence[WindowMetrics], records: RequestRecords) -> RecordedRun:
    """What was measured from a reset on; requests without an end are left out and counted."""
    spec = loop.node.spec
    ends_s = np.cumsum([window.duration_s for window in windows])
    limits = (
        [window.knobs.batch_limit for window in windows]
        if spec.batch_limits[0] < spec.batch_limits[-1]
        else []
    )
    clocks = [window.knobs.gpu_clock_mhz for window in windows] if len(spec.gpu_clocks_mhz) > 1 else []
    requests, ttft_s, e2e_s = ended_requests(records)
    energy_j = sum(window.energy_j for window in windows)
    return RecordedRun(
        requests=requests,
        duration_s=float(ends_s[-1]),
        energy_j=energy_j or None,
        ttft_s=ttft_s,
        e2e_s=e2e_s,
        kv_block_size=spec.kv_block_size,
        num_kv_blocks=spec.num_kv_blocks or 0,
        max_num_seqs=spec.server.max_num_seqs if spec.server else spec.batch_limits[-1],
        max_num_batched_tokens=spec.server.max_num_batched_tokens if spec.server else 0,
        limit_schedule=_changes(ends_s, limits),
        clock_schedule=_changes(ends_s, clocks),
        prefix_caching=spec.server is None or spec.server.prefix_caching,
        info=server_info(spec) | _load_info(windows, records, float(ends_s[-1])),
    )


def ended_requests(records: RequestRecords) -> tuple[Requests, np.ndarray, np.ndarray]:
    """Those that ended, in order of their arrival, with their TTFT and e2e in s."""
    ended = np.flatnonzero(np.isfinite(records.finished_s) & np.isfinite(records.first_token_s))
    order = ended[np.argsort(records.arrival_s[ended], kind="stable")]
    none = np.full(len(order), -1)
    requests = Requests(
        records.arrival_s[order],
        records.prompt_tokens[order],
        records.output_tokens[order],
        none,
        np.zeros_like(none),
    )
    return requests, records.ttft_s[order], records.e2e_s[order]


def server_info(spec: NodeSpec) -> dict[str, Any]:
    """What a trace says of the server."""
    info: dict[str, Any] = {
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "gpu_name": spec.gpu_name,
        "gpus": len(spec.gpu_uuids),
        "model": spec.model,
    }
    if (server := spec.server) is not None:
        info |= {
            "engine": server.engine,
            "chunked_prefill": server.chunked_prefill,
            "async_scheduling": server.async_scheduling,
            "tensor_parallel_size": server.tensor_parallel_size,
            "said_by": dict(server.sources),
            "assumed": assumed(server),
        }
    return info


def _load_info(windows: Sequence[WindowMetrics], records: RequestRecords, end_s: float) -> dict[str, Any]:
    """What speaks for or against the measurement; see ``sim.doubts``."""
    foreign = [window.foreign_requests for window in windows if window.foreign_requests is not None]
    clocks_mhz = [window.gpu_clock_mhz for window in windows if window.gpu_clock_mhz is not None]
    last_s = float(np.nanmax(records.finished_s, initial=0.0))
    return {
        "failed": int((~np.isfinite(records.finished_s)).sum()),
        "unfinished": max(0, sum(window.arrivals for window in windows) - len(records)),
        "late_sends": sum(window.late_sends for window in windows),
        "foreign_requests": max(0, sum(foreign)) if foreign else None,
        "prefix_hit_rate": _cached_share(windows),
        "highest_sm_clock_mhz": max(clocks_mhz, default=None),
        "unmeasured_s": round(max(0.0, last_s - end_s), 3),
    }


def _cached_share(windows: Sequence[WindowMetrics]) -> float | None:
    """Share of the prompt tokens that were found in the prefix cache."""
    rates = [(window.prefix_hit_rate, window.prompt_tokens) for window in windows]
    cached = [computed * rate / (1 - rate) for rate, computed in rates if rate is not None and rate < 1]
    total = sum(cached) + sum(computed for _, computed in rates)
    return round(sum(cached) / total, 4) if cached and total else None


def _changes(ends_s: np.ndarray, values: list[int]) -> tuple[tuple[float, int], ...]:
    """(second, value) from which on it was another; none of a knob that cannot be set."""
    starts_s = [0.0, *ends_s[:-1].tolist()]
    new = [k for k, value in enumerate(values) if not k or value != values[k - 1]]
    return tuple((starts_s[k], values[k]) for k in new)
