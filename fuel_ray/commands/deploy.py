"""fuel-ray deploy: a policy in front of a running vLLM server; clocks and limit are given back at its end."""

import contextlib
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
from fuel_ray.deploy.deployment import Deployment, Observer
from fuel_ray.deploy.exporter import Exporter
from fuel_ray.deploy.recorder import Recorder
from fuel_ray.deploy.rule import Rule
from fuel_ray.errors import ConfigError
from fuel_ray.flags import parse_flags
from fuel_ray.policies.learned import PolicyFolder
from fuel_ray.policies.shipped import folder_of
from fuel_ray.record import new_folder, origin
from fuel_ray.training.checkpoint import policy_folder
from fuel_ray.types import Slo


@dataclass(frozen=True, kw_only=True)
class DeployConfig(Target):
    """Let a trained policy control a running vLLM server, once per interval, until it is stopped.

    Clocks and limit return to what they were on exit, error, SIGTERM, SIGINT and SIGHUP, and by a watchdog
    when this process is killed.
    """

    policy: Annotated[str, arg(aliases=["--model"])]
    """Policy folder of a sweep, results/sweep-.../policies/block_16, or an RLlib checkpoint in its run. With
    --shadow also a name such as clipper, or package.module:Class, for which the SLO is to be said."""
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
    slo_ttft_s: float | None = None
    """The SLO of a rule, whose requests have a first token within this, in s. A folder has its own."""
    slo_tpot_s: float | None = None
    """And a time per output token within this, in s."""
    slo_e2e_s: float | None = None
    """And the last token within this, in s."""
    pack: str | None = None
    """Calibration pack of the server's GPU, for rules that need a model of it."""
    extra_features: tuple[str, ...] = ()
    """package.module:FEATURES that the policy needs."""
    out: Path = Path("results")
    """Folder in which the run's own folder is made."""


_OF_A_RULE = ("slo_ttft_s", "slo_tpot_s", "slo_e2e_s", "pack")


def parse(argv: list[str], *, prog: str) -> DeployConfig:
    """Settings from flags; raises ConfigError where one is wrong."""
    config = parse_flags(DeployConfig, argv, prog=prog)
    if config.shadow and config.canary is not None:
        raise ConfigError("--canary needs the policy to rule at times; --shadow never lets it")
    if (rule := _rule(config)) is not None:
        rule.check()
        if not config.shadow:
            raise ConfigError(f"--policy {config.policy}: only a folder may rule; this only with --shadow")
    elif given := [name for name in _OF_A_RULE if getattr(config, name) is not None]:
        raise ConfigError(f"--{given[0].replace('_', '-')}: a policy folder has its own")
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
        first = attach_again()  # what is wrong at first is the user's to know
        opened.callback(first.loop.node.close)
        recorder = Recorder(new_folder(config.out, "deploy"), facts, folder.slo, trial)
        opened.callback(recorder.close)
        deployment = Deployment(attach_again, [recorder, *observers], interval_s=config.interval_s)
        deployment.run(first, max_steps=config.max_steps)
    return 0


def _rule(config: DeployConfig) -> Rule | None:
    """What is named where --policy is no path."""
    if folder_of(config.policy).exists():
        return None
    return Rule(config.policy, Slo(config.slo_ttft_s, config.slo_tpot_s, config.slo_e2e_s), config.pack)
