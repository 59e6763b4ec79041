"""What a deployment leaves on disk and says: steps.jsonl, run.json, complaints and a summary."""

import json
import logging
import math
import time
from collections import Counter, deque
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fuel_ray.control import StepRecord
from fuel_ray.deploy.canary import Canary
from fuel_ray.deploy.deployment import Attached
from fuel_ray.errors import ConfigError, DiskError, FuelRayError
from fuel_ray.histogram import Histogram
from fuel_ray.metrics import EpisodeTotals, attainment_bounds, latency, window_attainment
from fuel_ray.record import StepLog, step_line, write_json
from fuel_ray.types import Knobs, LatencyName, Slo, WindowMetrics

SAY_S = 60.0
LATENCY_SAMPLES = 10_000  # of each latency, the last ones, for the percentiles of the summary

_LATENCIES: tuple[LatencyName, ...] = ("ttft", "tpot", "e2e")

logger = logging.getLogger(__name__)


class Recorder:
    """Writes steps.jsonl and keeps the totals of the run; memory does not grow with it."""

    def __init__(self, run_dir: Path, facts: dict[str, Any], slo: Slo, trial: Canary | None = None) -> None:
        self._run_dir, self._facts, self._trial = run_dir, facts, trial
        self._log = StepLog(run_dir / "steps.jsonl")
        self._slo = slo
        self._began_s = time.monotonic()
        self._totals = EpisodeTotals()
        self._completed = self._windows = self._lost = 0
        self._saved_j: float | None = None
        self._overruled: Counter[str] = Counter()
        self._histograms: dict[LatencyName, Histogram] = {}
        self._said_s: dict[str, float] = {}  # when the last complaint was made
        self._samples: dict[str, deque[float]] = {
            name: deque(maxlen=LATENCY_SAMPLES) for name in (*_LATENCIES, "decision")
        }
        write_json(run_dir / "run.json", facts)

    def attached(self, attached: Attached) -> None:
        """Say what is controlled."""
        spec = attached.loop.node.spec
        self._facts["spec"] = asdict(spec)
        self._write("run.json lacks what is controlled", self._facts)
        clocks, limits = spec.gpu_clocks_mhz, spec.batch_limits
        what = f"{spec.name}: {spec.model} on {spec.gpu_name}, KV blocks of {spec.kv_block_size}"
        may = f"clock {clocks[0]}..{clocks[-1]} MHz, batch limit {limits[0]}..{limits[-1]}"
        for line in (f"{what}; {may}", *attached.judged):
            print(f"deploy  {line}", flush=True)

    def measured(self, record: StepRecord, *, decision_s: float, saved_j: float | None) -> None:
        """Record a window."""
        window = record.metrics
        self._windows += 1
        self._totals.add(window)
        self._completed += window.completed
        if saved_j is not None:
            self._saved_j = (self._saved_j or 0.0) + saved_j
        self._count(window)
        self._samples["decision"].append(decision_s)
        self._overruled.update(record.verdict.reasons)
        bounds = attainment_bounds(window, self._slo)
        labels = {
            "permitted": asdict(record.verdict.knobs),
            "overruled": record.verdict.reasons,
            "energy_j": round(window.energy_j, 3),
            "saved_j_modelled": None if saved_j is None else round(saved_j, 3),
            "duration_s": round(window.duration_s, 4),
            "output_tokens": window.output_tokens,
            "preemptions": window.preemptions,
            "slo_attainment": _rounded(window_attainment(window, self._slo)),
            "slo_attainment_bounds": bounds and tuple(map(_rounded, bounds)),
        }
        self._log.write(step_line(record, time_s=self._now_s(), labels=labels))

    def _count(self, window: WindowMetrics) -> None:
        """Latencies as they are known: one by one, or as the server counted them."""
        for name, values_s in window.latencies_s.items():
            if window.histograms is None:
                self._samples[name].extend(values_s)
            elif (histogram := window.histograms.get(name)) is not None:
                there = self._histograms.get(name)
                self._histograms[name] = histogram if there is None else there + histogram

    def lost(self, step: int, chosen: Knobs, error: FuelRayError) -> None:
        """Record that there is no window."""
        self._lost += 1
        self._say(f"window {step} could not be measured", str(error))
        now_s = round(self._now_s(), 3)
        line = {"step": step, "time_s": now_s, "chosen": asdict(chosen), "error": str(error)}
        self._log.write(json.dumps(line))

    def detached(self, error: FuelRayError) -> None:
        """Say that nothing is controlled at the moment."""
        cause = error.__context__ if isinstance(error.__context__, FuelRayError) else None
        why = f"{cause}; {error}" if cause is not None and error.__cause__ is None else str(error)
        self._say("clocks and batch limit are reset until control is possible again", why)

    def _say(self, what: str, why: str) -> None:
        """Once a minute while it stays the same: an outage of a night should not fill a log."""
        now_s = self._now_s()
        if now_s - self._said_s.get(why, -math.inf) >= SAY_S:
            self._said_s = {why: now_s}
            logger.warning("%s: %s", what, why)

    def close(self) -> None:
        """Close steps.jsonl, write the summary into run.json and print it."""
        self._log.close()
        self._write("run.json lacks the summary", {**self._facts, "summary": self.summary()})
        print(f"{self.summary_text()}\nwrote {self._run_dir}", flush=True)

    def _write(self, otherwise: str, facts: dict[str, Any]) -> None:
        """Write run.json; a disk without room neither ends a deployment nor hides why it ended."""
        try:
            write_json(self._run_dir / "run.json", facts)
        except (DiskError, ConfigError) as error:
            logger.warning("%s: %s", otherwise, error)

    def summary(self) -> dict[str, Any]:
        """What the run measured."""
        totals = self._totals
        return {
            "windows": self._windows,
            "lost_windows": self._lost,
            "lost_lines": self._log.lost_lines,
            "seconds": totals.seconds,
            "energy_j": totals.energy_j,
            "saved_j_modelled": self._saved_j,
            "overruled": dict(self._overruled),
            "canary": None if self._trial is None else asdict(self._trial.difference()),
            "completed": self._completed,
            "output_tokens": totals.output_tokens,
            "energy_j_per_request": totals.energy_j / self._completed if self._completed else None,
            "clock_switches": totals.clock_switches,
            **{name: self._latency(name) for name in _LATENCIES},
            "decision": asdict(latency(np.array(self._samples["decision"]))),
        }

    def summary_text(self) -> str:
        """The same for people."""
        s = self.summary()
        per_request = s["energy_j_per_request"]
        return (
            f"{s['windows']} windows, {s['lost_windows']} lost; {s['completed']} requests, "
            f"{s['energy_j']:.0f} J, {'-' if per_request is None else f'{per_request:.2f}'} J/request; "
            f"TTFT {_latency_text(s['ttft'])}; TPOT {_latency_text(s['tpot'])}; "
            f"decision p99 {_ms(s['decision']['p99_s'])}"
            + ("" if s["saved_j_modelled"] is None else f"\n{self._saving(s)}")
            + ("" if s["canary"] is None else f"\n{_trial_text(s['canary'])}")
            + "".join(
                f"\nthe guard overruled the policy {n} times: {why}" for why, n in s["overruled"].items()
            )
        )

    def _latency(self, name: LatencyName) -> dict[str, Any]:
        """Mean and percentiles; those of a histogram are interpolated and have their bucket beside them."""
        histogram = self._histograms.get(name)
        if histogram is None:
            return asdict(latency(np.array(self._samples[name])))
        found: dict[str, Any] = {"mean_s": histogram.mean_s}
        for key, share in (("p50", 0.5), ("p99", 0.99)):
            value_s, low_s, high_s = histogram.quantile_s(share) or (None, None, None)
            known = None if low_s is None else (low_s, high_s if high_s != math.inf else None)
            found |= {f"{key}_s": value_s, f"{key}_bounds_s": known}
        return found

    def _saving(self, s: dict[str, Any]) -> str:
        saved_j, shadow = s["saved_j_modelled"], self._facts["config"]["shadow"]
        reference_j = s["energy_j"] if shadow else s["energy_j"] + saved_j
        share = f" ({saved_j / reference_j:+z.1%})" if reference_j else ""
        would = "would have saved" if shadow else "saved"
        return f"the policy {would} {saved_j:.0f} J{share} compared with maximum performance (modelled)"

    def _now_s(self) -> float:
        return time.monotonic() - self._began_s


def _trial_text(found: dict[str, Any]) -> str:
    """What a trial has measured, for people."""
    with_policy, without = found["blocks"]
    parts = [f"canary  {with_policy} blocks with the policy, {without} at maximum performance"]
    for name, what in (("energy", "energy per output token"), ("attainment", "SLO attainment")):
        change = found[name]
        if change is None:
            parts.append(f"{what}: too few blocks to compare")
        elif change["low"] is None:
            parts.append(f"{what} {change['mean']:+z.1%}")
        else:
            parts.append(
                f"{what} {change['mean']:+z.1%} (95 %: {change['low']:+z.1%}..{change['high']:+z.1%})"
            )
    return "; ".join(parts)


def _latency_text(of: dict[str, Any]) -> str:
    """Mean, and percentiles by the bucket that they are in where that is what is known."""
    shown = (f"{key} {_percentile(of[f'{key}_s'], of.get(f'{key}_bounds_s'))}" for key in ("p50", "p99"))
    return ", ".join((f"mean {_ms(of['mean_s'])}", *shown))


def _percentile(value_s: float | None, bounds_s: tuple[float, float | None] | None) -> str:
    if bounds_s is None:
        return _ms(value_s)
    low_s, high_s = bounds_s
    if high_s is None:
        return f"> {_ms(low_s)}"
    return f"{low_s * 1000:.3g} to {_ms(high_s)}" if low_s else f"<= {_ms(high_s)}"


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 4)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.3g} ms"
