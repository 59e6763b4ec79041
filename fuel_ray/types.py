"""The nouns of fuel_ray: knobs, nodes, requests, windows, policies. The unit is in every name."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import neg
from typing import Literal, Protocol, TypeVar

import numpy as np

from fuel_ray.histogram import Histogram

LatencyName = Literal["ttft", "tpot", "e2e"]
Samples = TypeVar("Samples")


@dataclass(frozen=True, slots=True)
class Knobs:
    """What is set on a node once per control window."""

    batch_limit: int  # requests that may run at once; acts on admission only
    gpu_clock_mhz: int  # pinned SM clock


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """How a server schedules and what it runs on, with where each fact is from; None: not known."""

    engine: str  # name and version
    max_num_seqs: int
    max_num_batched_tokens: int
    prefix_caching: bool
    chunked_prefill: bool | None = None
    async_scheduling: bool | None = None
    tensor_parallel_size: int | None = None
    sources: tuple[tuple[str, str], ...] = ()  # (fact, what says it); what nobody says is "assumed: ..."


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """What does not change while a node's server lives."""

    name: str
    gpu_name: str
    gpu_uuids: tuple[str, ...]
    model: str
    kv_block_size: int  # tokens
    num_kv_blocks: int | None  # None before the server is up
    batch_limits: tuple[
        int, ...
    ]  # lowest and highest admissible limit: (1, max_num_seqs), equal if it cannot be set
    gpu_clocks_mhz: tuple[int, ...]  # supported SM clocks, ascending; one entry if observe-only
    server: ServerFacts | None = None  # None where nobody asked

    @property
    def max_performance(self) -> Knobs:
        """The highest clock without a batch limit of our own."""
        return Knobs(batch_limit=self.batch_limits[-1], gpu_clock_mhz=self.gpu_clocks_mhz[-1])

    def nearest_clock_mhz(self, clock_mhz: int) -> int:
        """The supported clock nearest to this one."""
        return min(self.gpu_clocks_mhz, key=lambda supported_mhz: abs(supported_mhz - clock_mhz))


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits on latency that a share of the requests, or their mean, has to meet."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    share: float | None = 0.95  # of the requests that must meet all limits; None: the means must meet them

    @property
    def wait_limit_s(self) -> float | None:
        """The longest that a request may wait for its first token; None: any time."""
        return self.e2e_s if self.ttft_s is None else self.ttft_s

    @property
    def limits_s(self) -> dict[LatencyName, float]:
        """The limits that there are."""
        return {name: limit_s for name, limit_s in self._limits_s.items() if limit_s is not None}

    def limited(
        self, latencies: Mapping[LatencyName, Samples]
    ) -> Iterator[tuple[LatencyName, Samples, float]]:
        """Name, samples and limit in s of each latency that has a limit."""
        limits_s = self._limits_s
        for name, samples in latencies.items():
            if (limit_s := limits_s[name]) is not None:
                yield name, samples, limit_s

    @property
    def _limits_s(self) -> dict[LatencyName, float | None]:
        return {"ttft": self.ttft_s, "tpot": self.tpot_s, "e2e": self.e2e_s}


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it is sent."""

    arrival_s: float  # since the workload began
    prompt_tokens: int
    output_tokens: int
    prefix_id: int | None = None  # requests with the same id share their first prefix_tokens tokens
    prefix_tokens: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Requests:
    """A workload's requests as columns of equal length n, sorted by arrival.

    ``prefix_id`` is -1 where a request shares no prefix; ids are otherwise 0 .. number of prefixes - 1.
    """

    arrival_s: np.ndarray  # (n,) float64, ascending, since the workload began
    prompt_tokens: np.ndarray  # (n,) int64, >= 1
    output_tokens: np.ndarray  # (n,) int64, >= 1
    prefix_id: np.ndarray  # (n,) int64
    prefix_tokens: np.ndarray  # (n,) int64, <= prompt_tokens

    def __len__(self) -> int:
        return len(self.arrival_s)

    def part(self, which: np.ndarray | slice) -> "Requests":
        """Those at these places."""
        return Requests(*(getattr(self, field.name)[which] for field in fields(self)))

    def __getitem__(self, index: int) -> Request:
        prefix_id = int(self.prefix_id[index])
        return Request(
            arrival_s=float(self.arrival_s[index]),
            prompt_tokens=int(self.prompt_tokens[index]),
            output_tokens=int(self.output_tokens[index]),
            prefix_id=None if prefix_id < 0 else prefix_id,
            prefix_tokens=int(self.prefix_tokens[index]),
        )


@dataclass(frozen=True, slots=True, eq=False)
class RequestRecords:
    """What happened to n requests, as columns; times in s since the workload began, nan where not reached."""

    arrival_s: np.ndarray  # (n,) float64
    admitted_s: np.ndarray  # (n,) float64
    first_token_s: np.ndarray  # (n,) float64
    finished_s: np.ndarray  # (n,) float64
    prompt_tokens: np.ndarray  # (n,) int64
    output_tokens: np.ndarray  # (n,) int64, asked for
    preemptions: np.ndarray  # (n,) int64

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def ttft_s(self) -> np.ndarray:
        """Time to first token."""
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> np.ndarray:
        """Mean time per output token after the first; nan for one-token outputs."""
        gaps = np.where(self.output_tokens > 1, self.output_tokens - 1, np.nan)
        return (self.finished_s - self.first_token_s) / gaps

    @property
    def e2e_s(self) -> np.ndarray:
        """Time from arrival to the last token."""
        return self.finished_s - self.arrival_s

    @property
    def latencies_s(self) -> dict[LatencyName, np.ndarray]:
        """All three by name."""
        return {"ttft": self.ttft_s, "tpot": self.tpot_s, "e2e": self.e2e_s}

    def meets(self, slo: Slo) -> np.ndarray:
        """Whether each request finished within every limit: (n,) bool."""
        met = np.isfinite(self.finished_s)
        for _, values_s, limit_s in slo.limited(self.latencies_s):
            met &= ~(values_s > limit_s)  # a one-token output has no TPOT and meets its limit
        return met


@dataclass(frozen=True, slots=True)
class WindowMetrics:
    """One control window, measured. Carries samples rather than percentiles, because samples pool.

    ``ttfts_s`` belong to the requests whose first token came in this window; ``tpots_s`` and ``e2es_s`` to
    those that finished in it (one-token outputs have no TPOT). Counts and gauges without a comment are per
    window and at its end. Where a server's ``histograms`` are all that is known of latencies, the samples are
    estimates, and one without a histogram is unknown.
    """

    duration_s: float
    energy_j: float  # of all GPUs of the node
    cpu_energy_j: float | None
    gpu_util: float | None  # share of the window in which a kernel ran, 0..1
    gpu_mem_util: float | None  # memory controller's busy share, 0..1
    cpu_util: float | None  # 0..1
    arrivals: int
    completed: int
    prompt_tokens: int  # computed, without prefix cache hits
    output_tokens: int
    running: int
    waiting: int
    preemptions: int
    kv_usage: float  # share of the KV blocks in use, 0..1
    prefix_hit_rate: float | None  # share of queried prompt tokens found in the cache; None without queries
    oldest_wait_s: float  # age of the oldest request without a first token, 0.0 if there is none
    ttfts_s: tuple[float, ...]
    tpots_s: tuple[float, ...]
    e2es_s: tuple[float, ...]
    knobs: Knobs  # in force at its end, whatever was asked for
    gpu_clock_mhz: float | None = None  # mean SM clock while busy; below the knob when the power cap binds
    histograms: Mapping[LatencyName, Histogram] | None = None  # None: the samples are exact
    # whether a step of the scheduler has put the limit in force that was asked for; False: steps were made,
    # and none did; None: none was made, or the limit is not ours
    limit_acknowledged: bool | None = None
    late_sends: int = 0  # requests that our own load sent more than 10 ms after their time
    # by the server's counters, of requests that our load did not send; a window's edges move some to the next
    foreign_requests: int | None = None
    # ages of the requests without a first token at its end and at its beginning, oldest first; None: not
    # known. Those at its beginning are left out that ended in it without one
    waits_s: Sequence[float] | None = None
    waits_before_s: Sequence[float] | None = None

    @property
    def latencies_s(self) -> dict[LatencyName, tuple[float, ...]]:
        """All samples by name."""
        return {"ttft": self.ttfts_s, "tpot": self.tpots_s, "e2e": self.e2es_s}

    def measured(self, name: LatencyName) -> bool:
        """Whether this latency is known, be it of no request."""
        return self.histograms is None or name in self.histograms

    def judged_by(self, slo: Slo) -> bool:
        """Whether every latency that the SLO limits is known."""
        return self.histograms is None or all(map(self.measured, slo.limits_s))

    def count(self, name: LatencyName) -> int:
        """How many requests have this latency."""
        if self.histograms is not None:
            return self.histograms[name].count if name in self.histograms else 0
        return len(self.latencies_s[name])

    def misses(self, name: LatencyName, limit_s: float) -> tuple[int, int]:
        """Fewest and most requests that can have been above a limit: equal where latencies are exact."""
        if self.histograms is not None:
            return self.histograms[name].misses(limit_s) if name in self.histograms else (0, 0)
        missed = sum(value_s > limit_s for value_s in self.latencies_s[name])
        return missed, missed

    def newly_overdue(self, limit_s: float) -> int | None:
        """How many more than at its beginning wait for a first token for longer; None: not known.

        Together with the TTFTs above the limit it counts each miss once, in the window in which the limit
        passed.
        """
        if self.waits_s is None or self.waits_before_s is None:
            return None
        return _longer(self.waits_s, limit_s) - _longer(self.waits_before_s, limit_s)

    def least_sum_s(self, name: LatencyName) -> float:
        """What a latency comes to over all requests at least: exactly where it is known so."""
        if self.histograms is None or name not in self.histograms:
            return sum(self.latencies_s[name])
        histogram = self.histograms[name]
        return histogram.mean_bounds_s()[0] * histogram.count

    def mean_s(self, name: LatencyName) -> float | None:
        """Mean of a latency; None without requests, or where it is not known exactly."""
        if self.histograms is not None:
            return self.histograms[name].mean_s if name in self.histograms else None
        values_s = self.latencies_s[name]
        return sum(values_s) / len(values_s) if values_s else None


def _longer(waits_s: Sequence[float], limit_s: float) -> int:
    """How many of these, oldest first, are longer."""
    return bisect_left(waits_s, -limit_s, key=neg)


class Node(Protocol):
    """One GPU server, real or simulated, that is set and measured once per control window."""

    @property
    def spec(self) -> NodeSpec: ...

    def reset(self, *, seed: int) -> None:
        """Start afresh; a simulated node draws its workload from ``seed``, a live one drops old samples."""

    def apply(self, knobs: Knobs) -> Knobs:
        """Ask for the knobs and return what is in force at this moment.

        What needs the server's next step is in force later: ``WindowMetrics.knobs`` has it.

        Raises:
            NodeError: the node refused or is gone.
        """

    def measure(self, duration_s: float) -> WindowMetrics:
        """Let ``duration_s`` seconds pass (real or virtual) and return what was measured in them.

        Raises:
            NodeError: the window could not be measured.
        """

    def take_records(self) -> RequestRecords:
        """Records of what has finished or was given up since the last call, in order of finish."""

    def close(self) -> None:
        """Release what the node holds; safe to call twice."""


class Policy(Protocol):
    """Chooses the knobs of the next window from the window just measured."""

    def reset(self) -> None:
        """Forget the past, at the start of an episode."""

    def decide(self, window: WindowMetrics) -> Knobs:
        """Knobs for the next window."""
