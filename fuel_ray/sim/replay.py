"""What the simulated server predicts for a recorded run, beside what was measured."""

from collections.abc import Iterator, Mapping
from itertools import count, pairwise

import numpy as np

from fuel_ray.sim import scheduler as rules
from fuel_ray.sim.pack import Pack, PerfModel
from fuel_ray.sim.recorded import RecordedRun
from fuel_ray.sim.scheduler import Engine, advance, new_state

_LATENCIES = [f"{name}_{figure}" for name in ("ttft", "tpot", "e2e") for figure in ("mean", "p50", "p99")]
FIGURES = ("energy", "mean_power", *_LATENCIES)
BOUNDS = {"energy": 0.03, "tpot_mean": 0.05, "e2e_mean": 0.05, "ttft_p50": 0.15}  # of a twin to be trusted

_DRAIN_STEP_S = 10.0  # how often the replay looks whether all requests have finished


def measured_figures(run: RecordedRun) -> dict[str, float | None]:
    """Energy (J), mean power (W), None if it was not measured, and latencies (s), named as in ``FIGURES``."""
    return figures(run, run.energy_j, run.ttft_s, run.e2e_s)


def predicted_figures(run: RecordedRun, pack: Pack) -> dict[str, float | None]:
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


def figures(
    run: RecordedRun, energy_j: float | None, ttft_s: np.ndarray, e2e_s: np.ndarray
) -> dict[str, float | None]:
    """Figures of the run's requests with another energy and other latencies, named as in ``FIGURES``."""
    outputs = run.requests.output_tokens
    several = outputs > 1
    tpot_s = (e2e_s - ttft_s)[several] / (outputs[several] - 1)
    power_w = None if energy_j is None else energy_j / run.duration_s
    values: dict[str, float | None] = {"energy": energy_j, "mean_power": power_w}
    for name, values_s in (("ttft", ttft_s), ("tpot", tpot_s), ("e2e", e2e_s)):
        p50_s, p99_s = np.percentile(values_s, (50, 99)).tolist()
        values |= {f"{name}_mean": float(values_s.mean()), f"{name}_p50": p50_s, f"{name}_p99": p99_s}
    return values


def relative_errors(
    predicted: Mapping[str, float | None], measured: Mapping[str, float | None]
) -> dict[str, float | None]:
    """Fractions by which the prediction is too high; None where nothing was measured."""
    return {name: _relative_error(predicted[name], measured[name]) for name in FIGURES}


def beyond_bounds(errors: Mapping[str, float | None]) -> dict[str, float]:
    """The errors that are larger than ``BOUNDS`` allow."""
    found = {name: errors[name] for name in BOUNDS}
    return {name: error for name, error in found.items() if error is not None and abs(error) > BOUNDS[name]}


def _relative_error(predicted: float | None, measured: float | None) -> float | None:
    return predicted / measured - 1.0 if predicted is not None and measured else None


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
