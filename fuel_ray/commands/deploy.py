"""fuel-ray deploy: a policy in front of a running vLLM server; clocks and limit are given back at its end."""

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from tyro.conf import arg

from fuel_ray.address import check_variable, page_url, server_url
from fuel_ray.config import to_dict
from fuel_ray.deploy.attach import Target, attach
from fuel_ray.deploy.canary import Canary
from fuel_ray.deploy.deployment import Attached, Deployment, Observer
from fuel_ray.deploy.exporter import Exporter
from fuel_ray.deploy.recorder import Recorder
from fuel_ray.deploy.rule import Rule
from fuel_ray.deploy.status import Status
from fuel_ray.errors import ConfigError, GpuError
from fuel_ray.flags import parse_flags
from fuel_ray.live.checks import has_driver
from fuel_ray.policies.learned import PolicyFolder
from fuel_ray.policies.shipped import folder_of
from fuel_ray.record import new_folder, origin
from fuel_ray.training.checkpoint import policy_folder
from fuel_ray.types import Slo


@dataclass(frozen=True, kw_only=True)
class DeployConfig(Target):
    """Let a trained policy set batch limit and clock of a running vLLM server, once a second, until stopped.

    Clocks and batch limit are reset on exit, on errors, on SIGTERM, SIGINT and SIGHUP, and by a watchdog if
    this process is killed.
    """

    policy: Annotated[str, arg(aliases=["--model"])]
    """Policy to deploy. A policy folder, such as results/sweep-.../policies/block_16, or an RLlib checkpoint
    in its run's folder. With --shadow also the name of a rule, such as clipper, or package.module:Class;
    these need an SLO (--slo-...)."""
    canary: float | None = None
    """Share of the time with the policy in control, such as 0.1. In the rest the server runs at maximum
    performance. Blocks of --canary-block-s are assigned at random, and the difference is reported with a 95 %
    interval. None: the policy is always in control."""
    canary_block_s: float = 30.0
    """Length of a canary block in s."""
    seed: int = 0
    """Seed of the random assignment of canary blocks."""
    interval_s: Annotated[float, arg(aliases=["--interval"])] = 1.0
    """Seconds between two decisions: the length of a control window."""
    max_steps: int | None = None
    """Windows after which to stop. None: run until stopped by a signal."""
    metrics_port: int | None = None
    """Port for the controller's own /metrics, such as 9464. None: no /metrics."""
    metrics_host: str = "127.0.0.1"
    """Address on which /metrics listens."""
    slo_ttft_s: float | None = None
    """SLO of a rule: limit on the time to first token in s. A policy folder contains its own SLO."""
    slo_tpot_s: float | None = None
    """SLO of a rule: limit on the time per output token in s."""
    slo_e2e_s: float | None = None
    """SLO of a rule: limit on the time from arrival to the last token in s."""
    pack: str | None = None
    """Calibration pack of the server's GPU, for rules that need a model of it."""
    extra_features: tuple[str, ...] = ()
    """Features of your own, package.module:FEATURES, that the policy was trained with."""
    out: Path = Path("results")
    """Folder in which the run creates its own folder."""


_OF_A_RULE = ("slo_ttft_s", "slo_tpot_s", "slo_e2e_s", "pack")


def parse(argv: list[str], *, prog: str) -> DeployConfig:
    """Settings from flags; raises ConfigError where one is wrong."""
    config = parse_flags(DeployConfig, argv, prog=prog)
    if config.shadow and config.canary is not None:
        raise ConfigError(
            "--shadow and --canary exclude each other: with --shadow the policy is never in control; give one"
        )
    if (rule := _rule(config)) is not None:
        rule.check()
        if not config.shadow:
            raise ConfigError(
                f"--policy {config.policy}: a rule can only be watched; add --shadow, or give a policy folder"
            )
        rule.check_slo()
    elif given := [name for name in _OF_A_RULE if getattr(config, name) is not None]:
        raise ConfigError(
            f"--{given[0].replace('_', '-')} is for rules; a policy folder contains its own: leave it out"
        )
    server = server_url(config.server, flag="--server")  # its login is not written down with the settings
    check_variable(config.api_key_env, flag="--api-key-env")
    metrics = config.metrics_url and page_url(config.metrics_url, flag="--metrics-url")
    return replace(config, server=server, metrics_url=metrics)


def run(config: DeployConfig) -> int:
    """Control the server until stopped, print what was done and write it."""
    folder = _rule(config) or policy_folder(folder_of(config.policy), extra_features=config.extra_features)
    trial, rng = None, np.random.default_rng(config.seed)
    if config.canary is not None:
        trial = Canary(share=config.canary, block_s=config.canary_block_s, slo=folder.slo, rng=rng)
    what = folder.manifest.to_dict() if isinstance(folder, PolicyFolder) else {"rule": folder.entry}
    facts = {**origin("deploy"), "config": to_dict(config), "policy": what, "slo": asdict(folder.slo)}
    attach_again = partial(attach, config, folder, interval_s=config.interval_s, trial=trial)
    with contextlib.ExitStack() as opened:
        observers: list[Observer] = []
        if config.metrics_port is not None:
            info = {"policy": config.policy, "mode": "shadow" if config.shadow else "control"}
            exporter = Exporter(config.metrics_port, folder.slo, host=config.metrics_host, info=info)
            opened.callback(exporter.close)
            observers.append(exporter)
        first = _first(attach_again)  # what is wrong at first is the user's to know
        opened.callback(first.loop.node.close)
        run_dir = new_folder(config.out, "deploy")
        recorder = Recorder(run_dir, facts, folder.slo, trial)
        opened.callback(recorder.close)
        print(f"deploy  {_beginning(config, run_dir)}", flush=True)
        observers = [recorder, Status(folder.slo), *observers]
        deployment = Deployment(attach_again, observers, interval_s=config.interval_s)
        deployment.run(first, max_steps=config.max_steps)
    return 0


def _first(attach: Callable[[], Attached]) -> Attached:
    try:
        return attach()
    except GpuError as error:
        if has_driver():
            raise
        raise GpuError(
            f"{error}; deploy runs on the machine of the server's GPU, also with --shadow; "
            "`fuel-ray evaluate --policies example` needs no GPU"
        ) from error


def _beginning(config: DeployConfig, run_dir: Path) -> str:
    """What is done from now on, and how to end and watch it."""
    ends = "Ctrl-C ends it and gives clock and batch limit back"
    if config.shadow:
        mode, ends = "shadow", "Ctrl-C ends it"
    else:
        mode = "control" if config.canary is None else f"canary, {100 * config.canary:g} % of the time"
    address = f"http://{config.metrics_host}:{config.metrics_port}"
    watch = "" if config.metrics_port is None else f"; `fuel-ray watch --urls {address}` shows it"
    return f"{mode}: recording to {run_dir}; {ends}{watch}"


def _rule(config: DeployConfig) -> Rule | None:
    """What is named where --policy is no path."""
    if folder_of(config.policy).exists():
        return None
    return Rule(config.policy, Slo(config.slo_ttft_s, config.slo_tpot_s, config.slo_e2e_s), config.pack)
