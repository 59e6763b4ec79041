"""fuel-ray deploy: a policy in front of a running vLLM server; clocks and limit are given back at its end."""

import contextlib
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tyro.conf import arg

from fuel_ray.config import GuardConfig, to_dict
from fuel_ray.deploy.attach import Target, attach
from fuel_ray.deploy.canary import Canary
from fuel_ray.deploy.deployment import Attached, Deployment, Observer, Observers
from fuel_ray.deploy.exporter import Exporter
from fuel_ray.deploy.recorder import Recorder
from fuel_ray.errors import ConfigError, PolicyError
from fuel_ray.flags import check_ranges, parse_flags
from fuel_ray.policies.learned import PolicyFolder, read_policy
from fuel_ray.record import new_folder, origin
from fuel_ray.training.checkpoint import is_checkpoint

EXPORT_S = 120.0  # imports on a busy machine


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
    extra_features: tuple[str, ...] = ()
    """package.module:FEATURES that the policy needs."""
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
    folder = _policy(config.policy, config.extra_features)
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
        slo = folder.slo
        trial = Canary(share=config.canary, block_s=config.canary_block_s, slo=slo, rng=rng)

    def attach_again() -> Attached:
        return attach(target, folder, interval_s=config.interval_s, trial=trial)

    with contextlib.ExitStack() as opened:
        observers: list[Observer] = []
        if config.metrics_port is not None:
            info = {"policy": str(folder.path), "mode": "shadow" if config.shadow else "control"}
            exporter = Exporter(config.metrics_port, folder.slo, host=config.metrics_host, info=info)
            opened.callback(exporter.close)
            observers.append(exporter)
        first = attach_again()  # what is wrong at first is the user's to know
        opened.callback(first.loop.node.close)
        recorder = Recorder(new_folder(config.out, "deploy"), _facts(config, folder), folder.slo, trial)
        opened.callback(recorder.close)
        deployment = Deployment(attach_again, Observers(recorder, *observers), interval_s=config.interval_s)
        deployment.run(first, max_steps=config.max_steps)
    return 0


def _policy(path: Path, extra_features: tuple[str, ...]) -> PolicyFolder:
    """The policy in a folder; a checkpoint is converted in another process, which loads the simulator."""
    if not is_checkpoint(path):
        return read_policy(path, extra_features=extra_features)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fuel_ray", "export", "--checkpoint", str(path), "--to", folder]
        command += ["--extra-features", *extra_features] if extra_features else []
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=EXPORT_S)
        if done.returncode:
            raise PolicyError(done.stderr.strip().removeprefix("fuel-ray: ") or f"{command} failed")
        return replace(read_policy(Path(folder), extra_features=extra_features), path=path)


def _facts(config: DeployConfig, folder: PolicyFolder) -> dict[str, Any]:
    """What run.json says beforehand."""
    return {
        **origin("deploy"),
        "config": to_dict(config),
        "policy": folder.manifest.to_dict(),
        "slo": asdict(folder.slo),
    }
