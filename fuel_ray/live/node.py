"""A real vLLM server on real GPUs, behind the Node protocol."""

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from fuel_ray.errors import NodeError, TelemetryError
from fuel_ray.live.cpu import CpuMeter, CpuReading
from fuel_ray.live.foreign_load import ForeignLoad, Served, came
from fuel_ray.live.gpu.lease import ClockLease
from fuel_ray.live.gpu.nvml import GpuReading, Gpus
from fuel_ray.live.load.completion import Attempt
from fuel_ray.live.load.loadgen import LoadGenerator, LoadProgress, late_sends, request_records
from fuel_ray.live.sampling import Sample, Sampler, figures, held_mean, window_energy_j
from fuel_ray.live.vllm.in_force import InForce
from fuel_ray.live.vllm.kv_monitor import MetricsClient
from fuel_ray.live.vllm.limiter import BatchLimiter
from fuel_ray.live.vllm.metrics import MetricsDelta, MetricsSnapshot, difference
from fuel_ray.types import Knobs, NodeSpec, RequestRecords, WindowMetrics

GPU_INTERVAL_S = 0.05

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Mark:
    """What is read at the edge between two windows."""

    at_s: float
    server: MetricsSnapshot
    energy_j: float | None
    cpu: CpuReading | None  # None if it could not be read


class GpuNode:
    """One vLLM server, its GPUs and, if there is one, the load that is sent to it.

    Without a load generator latencies come from the server's histograms, exact to their buckets, and the
    oldest wait from its counters. The node takes over what it is given and closes it.
    """

    def __init__(
        self,
        spec: NodeSpec,
        gpus: Gpus,
        client: MetricsClient,
        *,
        limiter: BatchLimiter | None = None,
        shadow: bool = False,
        start_load: Callable[[int], LoadGenerator] | None = None,
        cpu: CpuMeter | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Take over a running server; GpuError if another controller has the clocks that it would set.

        No clock is set where ``spec`` has but one (observe-only), nor in the ``shadow`` of a policy.
        ``start_load`` makes the load of an episode from its seed; None if requests come from elsewhere.
        """
        self._spec, self._gpus, self._client = spec, gpus, client
        self._limiter, self._start_load, self._cpu = limiter, start_load, cpu or CpuMeter()
        self._clock, self._sleep = clock, sleep
        self._knobs = spec.max_performance
        self._readings: Sampler[GpuReading] = Sampler(gpus.read, GPU_INTERVAL_S, name="GPU", clock=clock)
        self._load: LoadGenerator | None = None
        self._foreign = ForeignLoad()
        self._first_tokens: set[int] = set()  # requests whose TTFT was reported
        self._waiting: set[int] = set()  # requests without a first token when the load was looked at last ...
        self._looked_s = 0.0  # ... since it began
        self._ended: list[Attempt] = []  # not yet taken as records
        self._unseen: list[Attempt] = []  # not yet in a window
        self._mark: _Mark | None = None
        self._sent = 0
        self._lease = ClockLease(gpus.uuids) if len(spec.gpu_clocks_mhz) > 1 and not shadow else None

    @property
    def spec(self) -> NodeSpec:
        """The server as it was started."""
        return self._spec

    @property
    def load(self) -> LoadGenerator | None:
        """What sends this episode's requests, if this node does."""
        return self._load

    @property
    def power_limit_w(self) -> float | None:
        """Of all its GPUs, as it is set; None where one does not say."""
        return self._gpus.power_limit_w()

    def reset(self, *, seed: int) -> None:
        """Begin a new load, if this node sends one, and forget old samples."""
        self._stop_load()
        self._first_tokens, self._ended, self._unseen = set(), [], []
        self._sent, self._foreign = 0, ForeignLoad()
        self._waiting, self._looked_s = set(), 0.0
        self._readings.start()
        self._load = None if self._start_load is None else self._start_load(seed)  # drawing it takes a while
        self._mark = self._read_mark()
        if self._load is not None:
            self._load.start()

    def apply(self, knobs: Knobs) -> Knobs:
        """Pin the nearest supported clock, ask for the limit, and return what is in force at this moment.

        A new limit is once the scheduler has acknowledged it; windows say it. What is not controlled stays at
        its highest.
        """
        clock_mhz = self._spec.gpu_clocks_mhz[-1]
        if self._lease is not None:
            self._lease.renew()
            clock_mhz = self._gpus.pin(self._spec.nearest_clock_mhz(knobs.gpu_clock_mhz))
        lowest, limit = self._spec.batch_limits
        if self._limiter is not None:
            self._limiter.set(min(max(knobs.batch_limit, lowest), limit))
            limit = self._limiter.in_force or limit
        self._knobs = Knobs(limit, clock_mhz)
        return self._knobs

    def measure(self, duration_s: float) -> WindowMetrics:
        """Wait ``duration_s`` from the end of the last window and say what happened since then."""
        if self._mark is None:
            raise NodeError(f"{self._spec.name} was not reset")
        begin = self._mark
        if self._clock() - begin.at_s > 2 * duration_s:
            begin = self._read_mark()  # the caller paused: a window does not reach back over the pause
            self._foreign = ForeignLoad()
        self._sleep(max(0.0, begin.at_s + duration_s - self._clock()))
        end = self._read_mark()
        self._mark = end
        try:
            return self._window(begin, end)
        except NodeError:  # the next window begins here, and who got a first token in this one is not known
            self._foreign = ForeignLoad()
            raise

    def take_records(self) -> RequestRecords:
        """Records of the requests that ended since the last call, in order of their end."""
        if self._load is not None:
            self._progress(self._load)
        ended, self._ended = self._ended, []
        return request_records(ended)

    def close(self) -> None:
        """Stop the load and give clocks and limit back; safe to call twice."""
        self._mark = None
        with contextlib.ExitStack() as closing:  # last first, each whether or not another fails
            give_back = self._gpus.close
            closing.callback(give_back if self._lease is None else partial(self._lease.release, give_back))
            closing.callback(self._client.close)
            if self._limiter is not None:
                closing.callback(self._limiter.close)
            closing.callback(self._readings.stop)
            closing.callback(self._stop_load)

    def _stop_load(self) -> None:
        load, self._load = self._load, None
        if load is not None:
            load.stop()

    def _read_mark(self) -> _Mark:
        server = self._client.scrape()
        return _Mark(self._clock(), server, self._gpus.energy_j(), self._read_cpu())

    def _read_cpu(self) -> CpuReading | None:
        """None where RAPL has gone: a window is measured without the CPU's energy."""
        try:
            return self._cpu.read()
        except TelemetryError as error:
            logger.debug("no CPU reading: %s", error)
            return None

    def _progress(self, load: LoadGenerator) -> LoadProgress:
        """Look at the load; what has ended is for the records and for the next window."""
        progress = load.take()
        self._ended += progress.ended
        self._unseen += progress.ended
        return progress

    def _window(self, begin: _Mark, end: _Mark) -> WindowMetrics:
        delta = difference(begin.server, end.server, end.at_s - begin.at_s)
        if delta.restarted:
            if self._limiter is not None:
                self._limiter.forget()
            raise TelemetryError(f"{self._spec.name}: the server restarted within the window")
        in_force = self._in_force(delta)
        readings = self._readings.since(begin.at_s)
        if self._load is not None:
            served = self._served(self._load)
        else:
            served = self._foreign.window(begin.server, end.server, delta, end_s=end.at_s)
        return WindowMetrics(
            duration_s=delta.seconds,
            energy_j=window_energy_j(
                figures(readings, "power_w"),
                begin_s=begin.at_s,
                end_s=end.at_s,
                counter_j=(begin.energy_j, end.energy_j),
            ),
            cpu_energy_j=end.cpu.energy_j - begin.cpu.energy_j if begin.cpu and end.cpu else None,
            gpu_util=_mean(readings, "gpu_util", begin, end),
            gpu_mem_util=_mean(readings, "mem_util", begin, end),
            cpu_util=end.cpu.util if end.cpu else None,
            arrivals=served.arrivals,
            completed=served.completed,
            prompt_tokens=delta.prompt_tokens - (delta.prompt_tokens_cached or 0),
            output_tokens=delta.generation_tokens,
            running=end.server.running,
            waiting=end.server.waiting,
            preemptions=delta.preemptions or 0,
            kv_usage=end.server.kv_usage,
            prefix_hit_rate=delta.prefix_hit_rate,
            oldest_wait_s=served.oldest_wait_s,
            ttfts_s=served.ttfts_s,
            tpots_s=served.tpots_s,
            e2es_s=served.e2es_s,
            knobs=self._knobs,
            gpu_clock_mhz=_mean(readings, "sm_clock_mhz", begin, end),
            histograms=served.histograms,
            limit_acknowledged=None if in_force is None else in_force.acknowledged,
            late_sends=served.late_sends,
            waits_s=served.waits_s,
            waits_before_s=served.waits_before_s,
            foreign_requests=None
            if self._load is None
            else came(begin.server, end.server, delta) - served.arrivals,
        )

    def _in_force(self, delta: MetricsDelta) -> InForce | None:
        """The batch limit of the window, as far as it is ours to ask for."""
        if self._limiter is None:
            return None
        worked = delta.prompt_tokens + delta.generation_tokens > 0
        found = self._limiter.window(worked=worked, duration_s=delta.seconds)
        self._knobs = replace(self._knobs, batch_limit=found.batch_limit or self._spec.batch_limits[-1])
        return found

    def _served(self, load: LoadGenerator) -> Served:
        """Of the own load, request by request."""
        progress = self._progress(load)
        in_flight, now_s = progress.in_flight, progress.now_s
        ended, self._unseen = self._unseen, []
        sent, self._sent = progress.sent - self._sent, progress.sent
        finished = [attempt for attempt in ended if attempt.finished_s is not None]
        records = request_records(finished)
        tpots_s = records.tpot_s
        begun = self._newly_begun((*ended, *in_flight))
        waiting = [a for a in in_flight if a.first_token_s is None]
        waits_s = _ages_s(waiting, now_s)
        waits_before_s = _ages_s([a for a in (*waiting, *begun) if a.index in self._waiting], self._looked_s)
        self._waiting, self._looked_s = {a.index for a in waiting}, now_s
        return Served(
            arrivals=sent,
            completed=len(finished),
            oldest_wait_s=waits_s[0] if waits_s else 0.0,
            ttfts_s=tuple(a.first_token_s - a.arrival_s for a in begun if a.first_token_s is not None),
            tpots_s=tuple(tpots_s[np.isfinite(tpots_s)].tolist()),
            e2es_s=tuple(records.e2e_s.tolist()),
            late_sends=late_sends(ended),
            waits_s=waits_s,
            waits_before_s=waits_before_s,
        )

    def _newly_begun(self, attempts: tuple[Attempt, ...]) -> list[Attempt]:
        """The requests whose first token has come since the last look."""
        found = [a for a in attempts if a.first_token_s is not None and a.index not in self._first_tokens]
        self._first_tokens.update(attempt.index for attempt in found)
        return found


def _ages_s(attempts: list[Attempt], now_s: float) -> tuple[float, ...]:
    """Oldest first."""
    return tuple(sorted((now_s - attempt.arrival_s for attempt in attempts), reverse=True))


def _mean(readings: tuple[Sample[GpuReading], ...], figure: str, begin: _Mark, end: _Mark) -> float | None:
    return held_mean(figures(readings, figure), begin_s=begin.at_s, end_s=end.at_s)
