"""fuel-ray deploy: a policy in front of a running vLLM server; clocks and limit are given back at its end."""

import contextlib
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tyro.conf import arg

from fuel_ray.build_deploy import Target, attach
from fuel_ray.config import GuardConfig, to_dict
from fuel_ray.control import StepRecord
from fuel_ray.deployment import Attached, Deployment, Observer, Observers
from fuel_ray.errors import ConfigError, FuelRayError, PolicyError
from fuel_ray.flags import check_ranges, parse_flags
from fuel_ray.live.exporter import Exporter
from fuel_ray.metrics import EpisodeTotals, latency, window_attainment
from fuel_ray.policies.canary import Canary
from fuel_ray.policies.checkpoint import is_checkpoint
from fuel_ray.policies.learned import PolicyFolder, read_policy
from fuel_ray.record import StepLog, new_folder, origin, step_line, write_json
from fuel_ray.types import Knobs, Slo

EXPORT_S = 120.0  # imports on a busy machine
LATENCY_SAMPLES = 10_000  # of each latency, the last ones, for the percentiles of the summary

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeployConfig:
    """Let a trained policy control a running vLLM server, once per interval, until it is stopped.

    Clocks and limit return to what they were on exit, error, SIGTERM, SIGINT and SIGHUP, and by a watchdog
    when this process is killed.
    """

    policy: Annotated[Path, arg(aliases=["--model"])]
    """Policy folder of a sweep, results/sweep-.../policies/block_16, or an RLlib checkpoint in its run."""
    server: str = "http://127.0.0.1:8000"
    """URL of the running server; it is attached to and never stopped."""
    gpu_ids: tuple[str, ...] = ("0",)
    """NVML indices or UUIDs of the GPUs that the server runs on."""
    limit_file: Path | None = None
    """FUEL_RAY_LIMIT_FILE of the running server; None: its batch limit is left alone."""
    max_num_seqs: int | None = None
    """Capacity of the server, its highest batch limit; None: what its scheduler says."""
    clock_control: Literal["on", "off"] = "on"
    """off: clocks are left alone and the policy chooses among the batch limits."""
    shadow: bool = False
    """Change nothing; record what the policy would have done."""
    canary: float | None = None
    """Share of the time, such as 0.1, in which the policy rules, in blocks drawn by chance; in the others
    maximum performance does, and the difference is reported with its interval. None: it always rules."""
    canary_block_s: float = 30.0
    """Seconds per block."""
    seed: int = 0
    """Seed of the blocks that are drawn."""
    interval_s: Annotated[float, arg(aliases=["--interval"])] = 1.0
    """Seconds between two decisions."""
    max_steps: int | None = None
    """Windows after which to stop; None: when a signal says so."""
    metrics_port: int | None = None
    """Port of the controller's own /metrics, such as 9464; None: there is none."""
    metrics_host: str = "127.0.0.1"
    """Address that /metrics listens on."""
    allow_mismatch: bool = False
    """Take a policy made for another model, GPU, vLLM, clocks or limits; never for another block size."""
    guard: GuardConfig = field(
        default_factory=lambda: GuardConfig(latency=True, drift=True, switches_per_minute=30)
    )
    out: Path = Path("results")
    """Folder in which the run's own folder is made."""


def parse(argv: list[str], *, prog: str) -> DeployConfig:
    """Settings from flags.

    Raises:
        ConfigError: a flag is wrong.
        PolicyError: there is no such policy.
    """
    config = parse_flags(DeployConfig, argv, prog=prog)
    check_ranges(config)
    if config.shadow and config.canary is not None:
        raise ConfigError("--canary needs the policy to rule at times; --shadow never lets it")
    return config


def run(config: DeployConfig) -> int:
    """Control the server until stopped, print what was done and write it."""
    folder = _policy(config.policy)
    target = Target(
        server=config.server,
        gpu_ids=config.gpu_ids,
        limit_file=config.limit_file,
        max_num_seqs=config.max_num_seqs,
        clock_control=config.clock_control,
        shadow=config.shadow,
        allow_mismatch=config.allow_mismatch,
        guard=config.guard,
    )

    trial = None
    if config.canary is not None:
        rng = np.random.default_rng(config.seed)
        slo = folder.codec.slo
        trial = Canary(share=config.canary, block_s=config.canary_block_s, slo=slo, rng=rng)

    def attach_again() -> Attached:
        return attach(target, folder, interval_s=config.interval_s, trial=trial)

    with contextlib.ExitStack() as opened:
        observers: list[Observer] = []
        if config.metrics_port is not None:
            info = {"policy": str(folder.path), "mode": "shadow" if config.shadow else "control"}
            exporter = Exporter(config.metrics_port, folder.codec.slo, host=config.metrics_host, info=info)
            opened.callback(exporter.close)
            observers.append(exporter)
        first = attach_again()  # what is wrong at first is the user's to know
        opened.callback(first.loop.node.close)
        recorder = Recorder(new_folder(config.out, "deploy"), _facts(config, folder), folder.codec.slo, trial)
        opened.callback(recorder.close)
        deployment = Deployment(attach_again, Observers(recorder, *observers), interval_s=config.interval_s)
        deployment.run(first, max_steps=config.max_steps)
    return 0


def _policy(path: Path) -> PolicyFolder:
    """The policy in a folder; a checkpoint is converted in another process, which loads the simulator."""
    if not is_checkpoint(path):
        return read_policy(path)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fuel_ray", "export", "--checkpoint", str(path), "--to", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=EXPORT_S)
        if done.returncode:
            raise PolicyError(done.stderr.strip().removeprefix("fuel-ray: ") or f"{command} failed")
        return replace(read_policy(Path(folder)), path=path)


def _facts(config: DeployConfig, folder: PolicyFolder) -> dict[str, Any]:
    """What run.json says beforehand."""
    return {
        **origin("deploy"),
        "config": to_dict(config),
        "policy": asdict(folder.manifest),
        "slo": asdict(folder.codec.slo),
    }


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
        self._samples: dict[str, deque[float]] = {
            name: deque(maxlen=LATENCY_SAMPLES) for name in ("ttft", "tpot", "e2e", "decision")
        }

    def attached(self, attached: Attached) -> None:
        """Say what is controlled."""
        spec = attached.loop.node.spec
        self._facts["spec"] = asdict(spec)
        clocks, limits = spec.gpu_clocks_mhz, spec.batch_limits
        print(
            f"deploy  {spec.name}: {spec.model} on {spec.gpu_name}, KV blocks of {spec.kv_block_size}; "
            f"clock {clocks[0]}..{clocks[-1]} MHz, batch limit {limits[0]}..{limits[-1]}",
            flush=True,
        )

    def measured(self, record: StepRecord, *, decision_s: float, saved_j: float | None) -> None:
        """Record a window."""
        window = record.metrics
        self._windows += 1
        self._totals.add(window)
        self._completed += window.completed
        if saved_j is not None:
            self._saved_j = (self._saved_j or 0.0) + saved_j
        for name, values in (("ttft", window.ttfts_s), ("tpot", window.tpots_s), ("e2e", window.e2es_s)):
            self._samples[name].extend(values)
        self._samples["decision"].append(decision_s)
        self._overruled.update(record.verdict.reasons)
        labels = {
            "permitted": asdict(record.verdict.knobs),
            "overruled": record.verdict.reasons,
            "energy_j": round(window.energy_j, 3),
            "saved_j_modelled": None if saved_j is None else round(saved_j, 3),
            "duration_s": round(window.duration_s, 4),
            "output_tokens": window.output_tokens,
            "preemptions": window.preemptions,
            "slo_attainment": round(window_attainment(window, self._slo), 4),
        }
        self._log.write(step_line(record, time_s=self._now_s(), labels=labels))

    def lost(self, step: int, chosen: Knobs, error: FuelRayError) -> None:
        """Record that there is no window."""
        self._lost += 1
        logger.warning("window %d is lost: %s", step, error)
        line = {
            "step": step,
            "time_s": round(self._now_s(), 3),
            "chosen": asdict(chosen),
            "error": str(error),
        }
        self._log.write(json.dumps(line))

    def detached(self, error: FuelRayError) -> None:
        """Say that nothing is controlled at the moment."""
        cause = error.__context__ if isinstance(error.__context__, FuelRayError) else None
        why = f"{cause}; {error}" if cause is not None and error.__cause__ is None else str(error)
        logger.warning("clocks and batch limit are given back until it works again: %s", why)

    def close(self) -> None:
        """Close steps.jsonl, write run.json and print the summary."""
        self._log.close()
        with contextlib.suppress(OSError):  # a full disk must not hide why it ended
            write_json(self._run_dir / "run.json", {**self._facts, "summary": self.summary()})
        print(f"{self.summary_text()}\nwrote {self._run_dir}", flush=True)

    def summary(self) -> dict[str, Any]:
        """What the run measured."""
        totals = self._totals
        figures = {name: latency(np.array(values)) for name, values in self._samples.items()}
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
            **{name: asdict(figure) for name, figure in figures.items()},
        }

    def summary_text(self) -> str:
        """The same for people."""
        s = self.summary()
        per_request = s["energy_j_per_request"]
        return (
            f"{s['windows']} windows, {s['lost_windows']} lost; {s['completed']} requests, "
            f"{s['energy_j']:.0f} J, {'-' if per_request is None else f'{per_request:.2f}'} J/request; "
            f"TTFT p50 {_ms(s['ttft']['p50_s'])}, p99 {_ms(s['ttft']['p99_s'])}; "
            f"TPOT p50 {_ms(s['tpot']['p50_s'])}, p99 {_ms(s['tpot']['p99_s'])}; "
            f"decision p99 {_ms(s['decision']['p99_s'])}"
            + ("" if s["saved_j_modelled"] is None else f"\n{self._saving(s)}")
            + ("" if s["canary"] is None else f"\n{_trial_text(s['canary'])}")
            + "".join(f"\noverruled {n} times: {reason}" for reason, n in s["overruled"].items())
        )

    def _saving(self, s: dict[str, Any]) -> str:
        saved_j, shadow = s["saved_j_modelled"], self._facts["config"]["shadow"]
        reference_j = s["energy_j"] if shadow else s["energy_j"] + saved_j
        share = f" ({saved_j / reference_j:+.1%})" if reference_j else ""
        would = "would have saved" if shadow else "saved"
        return f"the policy {would} {saved_j:.0f} J{share} over maximum performance, by the model"

    def _now_s(self) -> float:
        return time.monotonic() - self._began_s


def _trial_text(found: dict[str, Any]) -> str:
    """What a trial has measured, for people."""
    with_policy, without = found["blocks"]
    parts = [f"canary  {with_policy} blocks with the policy, {without} at maximum performance"]
    for name, what in (("energy", "energy per output token"), ("attainment", "SLO attainment")):
        change = found[name]
        if change is None:
            parts.append(f"{what}: too few blocks")
        elif change["low"] is None:
            parts.append(f"{what} {change['mean']:+.1%}")
        else:
            parts.append(f"{what} {change['mean']:+.1%} (95 %: {change['low']:+.1%}..{change['high']:+.1%})")
    return "; ".join(parts)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.3g} ms"
