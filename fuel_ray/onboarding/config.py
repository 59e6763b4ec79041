"""What may be said of an onboarding: the settings of its verbs, and a few of its own."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from tyro.conf import arg

from fuel_ray.commands.profile import ProfileConfig
from fuel_ray.config import LearnConfig, NodeKind
from fuel_ray.errors import ConfigError
from fuel_ray.flags import parse_serving, resumed, value_of
from fuel_ray.node_config import LiveConfig
from fuel_ray.onboarding.journal import JOURNAL, OF_STAGE, is_done
from fuel_ray.sim.calibrate import FEWEST
from fuel_ray.workload.spec import parse_workload

SERVED = "what the server serves"  # in place of a model that was not named

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class OnboardLive(LiveConfig):
    """The server and the GPUs that it runs on."""

    model: Annotated[str, arg(aliases=["--model"])] = ""
    """Model folder or name, of which a server is started; of a running one, what it serves."""
    server: Annotated[str | None, arg(aliases=["--server"])] = None
    """URL of a running server, which is attached to and never stopped; None: start one of --model."""
    limit_file: Annotated[Path | None, arg(aliases=["--limit-file"])] = None
    """FUEL_RAY_LIMIT_FILE of the running server; None: its batch limit is left alone."""
    gpu_ids: Annotated[tuple[str, ...], arg(aliases=["--gpu-ids"])] = ()
    """GPUs that the server runs on, by nvidia-smi's index or by UUID; none given: the first visible one."""


@dataclass(frozen=True)
class OnboardConfig(LearnConfig, ProfileConfig):
    """Measure your own server, fit its twin, train a policy on it and say how to deploy that, step by step.

    --server URL is a running vLLM, --model MODEL starts one, --node sim tries all of it on the simulator.
    """

    node: NodeKind = "live"
    """live: your server. sim: the calibrated twin of --pack stands for it."""
    live: OnboardLive = field(default_factory=OnboardLive)
    block_sizes: tuple[int, ...] = (16,)
    """KV block size in tokens of a server that is started; a running one says its own."""
    kv_tokens: int | None = None
    """Size of the KV pool in tokens; None: the server's own, or with --node sim the pack's."""
    steps: int = 120_000
    """Control windows (1 s each) to train the policy on."""
    seeds: int = 6
    """Held-out workload seeds that policies are compared on."""
    observe_minutes: float | None = None
    """Read the load from the counters of --observe-server for so long, in place of --workload."""
    observe_server: str | None = None
    """URL of a server with the load to read; None: the one that is onboarded."""
    validate_seconds: int = 60
    """Seconds of the fresh load that the twin is compared on."""
    validate_rate_rps: float | None = None
    """Its requests per second; None: as many as keep about eight running, by the fitted pack."""
    accept_fidelity: bool = False
    """Go on with a twin whose errors on the fresh load are too large."""


def parse(argv: list[str], *, prog: str) -> OnboardConfig:
    """Settings from flags; with --resume, those of the folder, which flags may repeat but not change.

    What was not reached yet may still change: load and SLO until there was a training, --accept-fidelity.

    Raises:
        ConfigError: a flag is wrong, or differs from the folder's.
    """
    config = _parsed(argv, prog=prog)
    if config.node == "ray":
        raise ConfigError("--node ray: run onboard on the server's own machine")
    if len(config.block_sizes) != 1:
        raise ConfigError("--block-sizes: a server has one block size")
    if (pairs := len({*config.batches}) * len({*config.contexts})) < FEWEST:
        raise ConfigError(f"--batches, --contexts: a twin needs {FEWEST} pairs of them, these are {pairs}")
    if config.observe_minutes is None:
        parse_workload(config.workload)
    elif value_of(argv, "--workload") is not None:
        raise ConfigError("--workload and --observe-minutes: the load is either named or read")
    elif config.node == "sim" and config.observe_server is None:
        raise ConfigError("--observe-minutes: the twin has no traffic to read; name its load by --workload")
    return config


def settings(kind: type[Settings], config: Any, **changes: Any) -> Settings:
    """The settings of one verb, out of those of the onboarding."""
    names = {f.name for f in fields(kind)} & {f.name for f in fields(config)} - {"config", "resume"}  # type: ignore[arg-type]
    return kind(**({name: getattr(config, name) for name in names} | changes))


def _parsed(argv: list[str], *, prog: str) -> OnboardConfig:
    folder = value_of(argv, "--resume")
    if folder is None:
        return parse_serving(OnboardConfig, argv, prog=prog, default=_default(argv))
    done = is_done(Path(folder), "train")
    may_change = ("accept_fidelity", *(() if done else OF_STAGE["slo"]))
    base = OnboardConfig()
    return resumed(Path(folder), argv, prog=prog, base=base, may_change=may_change, file=JOURNAL)


def _default(argv: list[str]) -> OnboardConfig:
    named = [value_of(argv, flag) for flag in ("--server", "--live.server", "--model", "--live.model")]
    others = ("--node", "--config")
    if not any(named) and not any(value_of(argv, flag) for flag in others) and not {"--help", "-h"} & {*argv}:
        raise ConfigError("give --server URL of a running vLLM, --model MODEL to start one, or --node sim")
    return replace(OnboardConfig(), live=OnboardLive(model=SERVED if any(named[:2]) else ""))
