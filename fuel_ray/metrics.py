"""From windows and request records to the figures of the summary: one definition of each."""

from dataclasses import dataclass, field

import numpy as np

from fuel_ray.types import RequestRecords, Slo, WindowMetrics


@dataclass(frozen=True, slots=True)
class Latency:
    """Mean and percentiles of one latency, in seconds; None without samples."""

    mean_s: float | None
    p50_s: float | None
    p99_s: float | None


@dataclass(frozen=True, slots=True)
class EpisodeSummary:
    """What one policy did with one workload."""

    energy_j: float
    energy_j_per_request: float | None
    energy_j_per_output_token: float | None
    slo_attainment: float
    slo_met: bool
    ttft: Latency
    tpot: Latency
    e2e: Latency
    requests: int  # arrived
    preemptions: int
    mean_gpu_clock_mhz: float
    mean_batch_limit: float
    clock_switches: int


@dataclass(slots=True)
class EpisodeTotals:
    """Adds windows up as they come."""

    energy_j: float = 0.0
    seconds: float = 0.0
    arrivals: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    clock_mhz_s: float = 0.0
    limit_s: float = 0.0
    clock_switches: int = 0
    _clock_mhz: int | None = field(default=None, repr=False)

    def add(self, window: WindowMetrics) -> None:
        """Take one more window into account."""
        self.energy_j += window.energy_j
        self.seconds += window.duration_s
        self.arrivals += window.arrivals
        self.output_tokens += window.output_tokens
        self.preemptions += window.preemptions
        self.clock_mhz_s += window.knobs.gpu_clock_mhz * window.duration_s
        self.limit_s += window.knobs.batch_limit * window.duration_s
        if self._clock_mhz is not None and self._clock_mhz != window.knobs.gpu_clock_mhz:
            self.clock_switches += 1
        self._clock_mhz = window.knobs.gpu_clock_mhz

    def summary(self, records: RequestRecords, slo: Slo) -> EpisodeSummary:
        """Figures of the episode; requests that arrived and are not in ``records`` missed the SLO."""
        figures = {name: latency(values_s) for name, values_s in records.latencies_s.items()}
        attainment, met = attained(records, slo, arrivals=self.arrivals)
        return EpisodeSummary(
            energy_j=self.energy_j,
            energy_j_per_request=self.energy_j / self.arrivals if self.arrivals else None,
            energy_j_per_output_token=self.energy_j / self.output_tokens if self.output_tokens else None,
            slo_attainment=attainment,
            slo_met=met,
            **figures,
            requests=self.arrivals,
            preemptions=self.preemptions,
            mean_gpu_clock_mhz=self.clock_mhz_s / self.seconds,
            mean_batch_limit=self.limit_s / self.seconds,
            clock_switches=self.clock_switches,
        )


def attained(records: RequestRecords, slo: Slo, *, arrivals: int) -> tuple[float, bool]:
    """Share of the requests that met the SLO, and whether that or the means meet it.

    Requests that arrived and are not in ``records`` missed it.
    """
    attainment = int(records.meets(slo).sum()) / arrivals if arrivals else 1.0
    if slo.share is not None:
        return attainment, attainment >= slo.share
    means = ((latency(values_s).mean_s, limit_s) for _, values_s, limit_s in slo.limited(records.latencies_s))
    within = all(mean_s is None or mean_s <= limit_s for mean_s, limit_s in means)
    return attainment, len(records) >= arrivals and within


def latency(values_s: np.ndarray) -> Latency:
    """Mean, median and 99th percentile (linear interpolation) of the values that are known."""
    known = values_s[np.isfinite(values_s)]
    if not len(known):
        return Latency(None, None, None)
    p50_s, p99_s = np.percentile(known, (50, 99)).tolist()
    return Latency(float(known.mean()), p50_s, p99_s)


def window_attainment(window: WindowMetrics, slo: Slo) -> float | None:
    """Smallest share of a window's TTFT, TPOT and e2e samples within its limit; 1.0 without samples.

    A stalled window, in which nothing finished and somebody waits beyond the TTFT or e2e limit, has
    attainment 0. None where a limit cannot be judged. An estimate where samples are: see
    ``attainment_bounds``.
    """
    if not window.judged_by(slo):
        return None
    if _stalled(window, slo):
        return 0.0
    pairs = slo.limited(window.latencies_s)
    shares = (sum(value <= limit for value in values) / len(values) for _, values, limit in pairs if values)
    return min(shares, default=1.0)


def attainment_bounds(window: WindowMetrics, slo: Slo) -> tuple[float, float] | None:
    """Lowest and highest attainment that is possible: equal where limits are judged exactly."""
    attainment = window_attainment(window, slo)
    if attainment is None or window.histograms is None or _stalled(window, slo):
        return None if attainment is None else (attainment, attainment)
    lowest = highest = 1.0
    for name, values_s, limit_s in slo.limited(window.latencies_s):
        if values_s:
            fewest, most = window.misses(name, limit_s)
            lowest = min(lowest, 1.0 - most / len(values_s))
            highest = min(highest, 1.0 - fewest / len(values_s))
    return lowest, highest


def _stalled(window: WindowMetrics, slo: Slo) -> bool:
    limit_s = slo.wait_limit_s
    return limit_s is not None and not window.completed and window.oldest_wait_s > limit_s
