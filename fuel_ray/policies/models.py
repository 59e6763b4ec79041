"""Latency and energy as the peers fit them, here from a pack's performance model instead of a profile.

VoltanaLLM and EAIS fit straight lines to profiled runs; here the same lines are fitted by least squares to
steps of the calibrated performance model, which has no outliers for a robust fit to leave out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fuel_ray.sim.pack import PerfModel
from fuel_ray.types import Slo
from fuel_ray.workload.lengths import OUTPUT_TOKENS, PROMPT_TOKENS

_PROMPTS = (32, 64, 128, 256, 512, 1024, 2048)  # tokens
_CONTEXTS = (128, 384, 768, 1536)  # tokens per request


@dataclass(frozen=True, slots=True)
class StepModel:
    """A clock's inter-token latency and prefill time, each linear in its load (VoltanaLLM)."""

    gpu_clock_mhz: int
    itl_request_s: float  # per running request
    itl_token_s: float  # per token in the KV cache
    itl_fixed_s: float
    prefill_token_s: float  # per prompt token
    prefill_fixed_s: float

    def itl_s(self, requests: float, tokens: float) -> float:
        """Time of a decode step."""
        return self.itl_request_s * requests + self.itl_token_s * tokens + self.itl_fixed_s

    def prefill_s(self, tokens: float) -> float:
        """Time of a step that computes this many prompt tokens."""
        return self.prefill_token_s * tokens + self.prefill_fixed_s


@dataclass(frozen=True, slots=True)
class BatchModel:
    """A clock's time and energy for a whole batch of b requests, each linear in b (EAIS)."""

    gpu_clock_mhz: int
    request_s: float
    fixed_s: float
    request_j: float
    fixed_j: float

    def latency_s(self, batch: int) -> float:
        """From the start of the batch to its last token."""
        return self.request_s * batch + self.fixed_s

    def energy_j_per_request(self, batch: int) -> float:
        """Energy of the batch by requests in it."""
        return self.request_j + self.fixed_j / batch


def fit_steps(perf: PerfModel, clocks_mhz: Sequence[int], *, max_num_seqs: int) -> tuple[StepModel, ...]:
    """Step models at these clocks, in their order, for up to ``max_num_seqs`` running requests."""
    requests = np.unique(np.geomspace(1, max_num_seqs, 10).round())
    loads = np.array([(n, n * context) for n in requests for context in _CONTEXTS])
    prompts, models = np.array(_PROMPTS)[:, None], []
    for clock_mhz in clocks_mhz:
        steps_s = (perf.step_cost(n, tokens, 0, clock_mhz)[0] for n, tokens in loads)
        itls_s = np.array([max(step_s, perf.constants.launch_graph_s) for step_s in steps_s])
        prefills_s = np.array([_prefill_cost(perf, p, clock_mhz)[0] for p in _PROMPTS])
        itl, prefill = _least_squares(loads, itls_s).tolist(), _least_squares(prompts, prefills_s).tolist()
        models.append(StepModel(clock_mhz, *itl, *prefill))
    return tuple(models)


def fit_batches(perf: PerfModel, clocks_mhz: Sequence[int], *, max_batch: int) -> tuple[BatchModel, ...]:
    """Batch models at these clocks for requests as long as the default workload's are on average."""
    batches = np.unique(np.geomspace(1, max_batch, 12).round())
    models = []
    for clock_mhz in clocks_mhz:
        costs = [_batch_cost(perf, b, clock_mhz) for b in batches.tolist()]
        slopes, fixed = _least_squares(batches[:, None], np.array(costs)).tolist()
        models.append(BatchModel(clock_mhz, slopes[0], fixed[0], slopes[1], fixed[1]))
    return tuple(models)


def every(clocks_mhz: Sequence[int], stride: int) -> tuple[int, ...]:
    """Every ``stride``-th clock down from the highest, ascending."""
    return tuple(clocks_mhz[::-1][::stride][::-1])


def token_limits(slo: Slo, *, output_tokens: float = OUTPUT_TOKENS) -> tuple[float, float]:
    """TTFT and TPOT limits in s; an e2e limit gives a tenth to the first token, the rest to the others.

    A limit that the SLO does not set, and an e2e limit does not imply, is infinite.
    """
    ttft_s, tpot_s = float("inf"), float("inf")
    if slo.e2e_s is not None:
        ttft_s, tpot_s = 0.1 * slo.e2e_s, 0.9 * slo.e2e_s / output_tokens
    return slo.ttft_s or ttft_s, slo.tpot_s or tpot_s


def _prefill_cost(perf: PerfModel, tokens: float, clock_mhz: int) -> tuple[float, float]:
    """Time in s and energy in J of a prefill by itself, launch included."""
    m = perf.constants
    work_s, power_w, _ = perf.step_cost(1, tokens, tokens, clock_mhz, tokens**2 / 2)
    launch_s = m.launch_pieces_s if tokens < m.graph_max_tokens else m.launch_eager_s
    stall_j = max(launch_s - work_s, 0.0) * perf.at(clock_mhz).stall_w
    return max(work_s, launch_s), work_s * power_w + stall_j


def _batch_cost(perf: PerfModel, batch: float, clock_mhz: int) -> tuple[float, float]:
    """Time in s and energy in J of a static batch: its prefills, then its decode steps."""
    prefill_s, prefill_j = _prefill_cost(perf, PROMPT_TOKENS, clock_mhz)
    context = batch * (PROMPT_TOKENS + OUTPUT_TOKENS / 2)
    step_s, power_w, _ = perf.step_cost(batch, context, 0, clock_mhz)
    decode_s = OUTPUT_TOKENS * step_s
    return batch * prefill_s + decode_s, batch * prefill_j + decode_s * power_w


def _least_squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Slopes and, last, the intercept of y = slopes x + intercept: (columns of x + 1,) or (.., targets)."""
    return np.asarray(np.linalg.lstsq(np.column_stack((x, np.ones(len(x)))), y, rcond=None)[0])
