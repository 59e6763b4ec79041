"""What the simulated server predicts for a recorded run, beside what was measured."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count, pairwise

import numpy as np

from fuel_ray.sim import scheduler as rules
from fuel_ray.sim.pack import Pack, PerfModel
from fuel_ray.sim.scheduler import Engine, advance, new_state
from fuel_ray.types import Requests

_LATENCIES = [f"{name}_{figure}" for name in ("ttft", "tpot", "e2e") for figure in ("mean", "p50", "p99")]
FIGURES = ("energy", "mean_power", *_LATENCIES)

_DRAIN_STEP_S = 10.0  # how often the replay looks whether all requests have finished


@dataclass(frozen=True, slots=True, eq=False)
class RecordedRun:
    """One run of a real server: what was sent and what was measured."""

    requests: Requests  # arrival_s counts from the beginning, in ascending order
    duration_s: float
    energy_j: float  # in duration_s
    ttft_s: np.ndarray  # in the order of requests, like the next
    e2e_s: np.ndarray
    kv_block_size: int  # tokens
    num_kv_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    limit_schedule: tuple[tuple[float, int], ...]  # (second, batch limit), ascending from 0
    clock_schedule: tuple[tuple[float, int], ...] = ()  # (second, MHz), ascending from 0; none: the highest
    prefix_caching: bool = True


def measured_figures(run: RecordedRun) -> dict[str, float]:
    """Energy (J), mean power (W) and latencies (s) as measured, named as in ``FIGURES``."""
    return figures(run, run.energy_j, run.ttft_s, run.e2e_s)


def predicted_figures(run: RecordedRun, pack: Pack) -> dict[str, float]:
    """The same figures when the run's requests arrive at a simulated server under the run's knobs."""
    return figures(run, *predicted_latencies(run, pack.perf))


def predicted_latencies(
    run: RecordedRun, perf: PerfModel, *, first_step: int = 0
) -> tuple[float, np.ndarray, np.ndarray]:
    """Energy (J) in the run's duration, and TTFT and e2e (s) of each request, which may finish later.

    Another number of the first engine step is another draw of the host's delays.
    """
    engine = Engine(
        block_size=run.kv_block_size,
        num_blocks=run.num_kv_blocks - 1,
        max_num_seqs=run.max_num_seqs,
        max_num_batched_tokens=run.max_num_batched_tokens,
        prefix_caching=run.prefix_caching,
    )
    state = new_state(run.requests, engine)
    state.count[rules.STEP] = first_step
    highest_mhz, energy_j = perf.constants.max_clock_mhz, 0.0
    for until_s, limit, clock_mhz in _periods(run):
        at = perf.at(highest_mhz if clock_mhz is None else min(clock_mhz, highest_mhz))
        advance(state, engine, perf.constants, at, until_s, limit)
        if until_s <= run.duration_s:
            energy_j += float(state.clock[rules.ENERGY])
        elif state.count[rules.FINISHED] == len(run.requests):
            break
    latency_s = state.time_s - state.time_s[:, [rules.ARRIVAL]]
    return energy_j, latency_s[:, rules.FIRST_TOKEN], latency_s[:, rules.FINISH]


def figures(run: RecordedRun, energy_j: float, ttft_s: np.ndarray, e2e_s: np.ndarray) -> dict[str, float]:
    """Figures of the run's requests with another energy and other latencies, named as in ``FIGURES``."""
    outputs = run.requests.output_tokens
    several = outputs > 1
    tpot_s = (e2e_s - ttft_s)[several] / (outputs[several] - 1)
    values = {"energy": energy_j, "mean_power": energy_j / run.duration_s}
    for name, values_s in (("ttft", ttft_s), ("tpot", tpot_s), ("e2e", e2e_s)):
        p50_s, p99_s = np.percentile(values_s, (50, 99)).tolist()
        values |= {f"{name}_mean": float(values_s.mean()), f"{name}_p50": p50_s, f"{name}_p99": p99_s}
    return values


def relative_errors(predicted: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, float]:
    """Fractions by which the prediction is too high."""
    return {name: predicted[name] / measured[name] - 1.0 for name in FIGURES}


def _periods(run: RecordedRun) -> Iterator[tuple[float, int, int | None]]:
    """End of each period under the same knobs, the limit and the clock; after the duration, without end."""
    changes_s = {at_s for at_s, _ in (*run.limit_schedule, *run.clock_schedule) if 0 < at_s < run.duration_s}
    for begin_s, end_s in pairwise((0.0, *sorted(changes_s), run.duration_s)):
        limit, clock_mhz = _at(run.limit_schedule, begin_s), _at(run.clock_schedule, begin_s)
        yield end_s, limit or run.max_num_seqs, clock_mhz
    for more in count(1):
        yield run.duration_s + more * _DRAIN_STEP_S, limit or run.max_num_seqs, clock_mhz


def _at(schedule: tuple[tuple[float, int], ...], at_s: float) -> int | None:
    return next((value for begin_s, value in reversed(schedule) if begin_s <= at_s), None)
