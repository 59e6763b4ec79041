"""What the simulated server predicts for a recorded run, beside what was measured."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from fuel_ray.sim import scheduler as rules
from fuel_ray.sim.perf_model import Pack
from fuel_ray.sim.scheduler import Engine, advance, new_state
from fuel_ray.types import Requests

FIGURES = ("energy", "mean_power") + tuple(
    f"{latency}_{statistic}" for latency in ("ttft", "tpot", "e2e") for statistic in ("mean", "p50", "p99")
)


@dataclass(frozen=True, slots=True, eq=False)
class RecordedRun:
    """One run of a real server: what was sent and what was measured. Latencies are in the order of ``requests``."""

    requests: Requests  # arrival_s counts from the first arrival
    duration_s: float
    energy_j: float  # in duration_s
    ttft_s: np.ndarray
    e2e_s: np.ndarray
    kv_block_size: int  # tokens
    num_kv_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    limit_schedule: tuple[tuple[float, int], ...]  # (second, batch limit), ascending


def measured_figures(run: RecordedRun) -> dict[str, float]:
    """Energy (J), mean power (W) and latencies (s) as measured, named as in ``FIGURES``."""
    return _figures(run, run.energy_j, run.ttft_s, run.e2e_s)


def predicted_figures(run: RecordedRun, pack: Pack) -> dict[str, float]:
    """The same figures when the run's requests arrive at a simulated server at the pack's highest clock."""
    engine = Engine(
        block_size=run.kv_block_size,
        num_blocks=run.num_kv_blocks - 1,
        max_num_seqs=run.max_num_seqs,
        max_num_batched_tokens=run.max_num_batched_tokens,
        prefix_caching=True,
    )
    state = new_state(run.requests, engine)
    energy_j = 0.0
    for until_s, limit in _limits(run):
        advance(state, engine, pack.perf, until_s, limit, pack.gpu_clocks_mhz[-1])
        energy_j += float(state.clock[rules.ENERGY])
    _drain(state, engine, pack)
    time_s = state.time_s
    arrival_s = time_s[:, rules.ARRIVAL]
    return _figures(
        run, energy_j, time_s[:, rules.FIRST_TOKEN] - arrival_s, time_s[:, rules.FINISH] - arrival_s
    )


def relative_errors(predicted: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, float]:
    """Fractions by which the prediction is too high."""
    return {name: predicted[name] / measured[name] - 1.0 for name in FIGURES}
