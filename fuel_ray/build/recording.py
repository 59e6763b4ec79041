"""An episode at fixed knobs as a recorded run, which the simulator can replay."""

import numpy as np

from fuel_ray.control import ControlLoop
from fuel_ray.errors import NodeError
from fuel_ray.sim.replay import RecordedRun
from fuel_ray.types import Knobs, RequestRecords, Requests, WindowMetrics

_DRAIN_WINDOWS = 120  # after the last arrival


def record(
    loop: ControlLoop, knobs: Knobs, *, seed: int, windows: int, max_num_batched_tokens: int
) -> RecordedRun:
    """Serve the node's load under the knobs for so many windows, and on until nothing runs or waits.

    Raises:
        NodeError: a window could not be measured, or the last request has not ended in time.
    """
    measured = [loop.reset(seed=seed)]
    while len(measured) < windows or measured[-1].running or measured[-1].waiting:
        if len(measured) == windows + _DRAIN_WINDOWS:
            raise NodeError(f"{loop.node.spec.name}: requests run on {_DRAIN_WINDOWS} windows after the last")
        measured.append(loop.step(knobs).metrics)
    return recorded_run(loop, measured, loop.node.take_records(), max_num_batched_tokens)


def recorded_run(
    loop: ControlLoop,
    windows: list[WindowMetrics],
    records: RequestRecords,
    max_num_batched_tokens: int,
) -> RecordedRun:
    """What was measured from a reset on; requests without an end are left out."""
    spec = loop.node.spec
    ended = np.flatnonzero(np.isfinite(records.finished_s) & np.isfinite(records.first_token_s))
    order = ended[np.argsort(records.arrival_s[ended], kind="stable")]
    none = np.full(len(order), -1)
    ends_s = np.cumsum([window.duration_s for window in windows])
    knobs = [window.knobs for window in windows]
    return RecordedRun(
        requests=Requests(
            records.arrival_s[order],
            records.prompt_tokens[order],
            records.output_tokens[order],
            none,
            np.zeros_like(none),
        ),
        duration_s=float(ends_s[-1]),
        energy_j=sum(window.energy_j for window in windows),
        ttft_s=records.ttft_s[order],
        e2e_s=records.e2e_s[order],
        kv_block_size=spec.kv_block_size,
        num_kv_blocks=spec.num_kv_blocks or 0,
        max_num_seqs=spec.batch_limits[-1],
        max_num_batched_tokens=max_num_batched_tokens,
        limit_schedule=_changes(ends_s, [k.batch_limit for k in knobs]),
        clock_schedule=_changes(ends_s, [k.gpu_clock_mhz for k in knobs]),
    )


def _changes(ends_s: np.ndarray, values: list[int]) -> tuple[tuple[float, int], ...]:
    """(second, value) from which on it was another."""
    starts_s = [0.0, *ends_s[:-1].tolist()]
    pairs = zip(starts_s, values, [None, *values[:-1]], strict=True)
    return tuple((start_s, value) for start_s, value, before in pairs if value != before)
