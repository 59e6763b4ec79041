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
    """The server and its GPUs."""

    model: Annotated[str, arg(aliases=["--model"])] = ""
    """Model, a name or a folder, to start a server for. With --server: the model that the server has."""
    server: Annotated[str | None, arg(aliases=["--server"])] = None
    """URL of a running server, which is never stopped. None: start one for --model."""
    limit_file: Annotated[Path | None, arg(aliases=["--limit-file"])] = None
    """The server's FUEL_RAY_LIMIT_FILE. None: its batch limit is not changed."""
    gpu_ids: Annotated[tuple[str, ...], arg(aliases=["--gpu-ids"])] = ()
    """GPUs of the server: nvidia-smi's indices, or UUIDs. By default the first of CUDA_VISIBLE_DEVICES."""


@dataclass(frozen=True)
class OnboardConfig(LearnConfig, ProfileConfig):
    """Measure your own server, fit a twin to it, train a policy on the twin, and say how to deploy it.

    Give --server URL for a running vLLM server, --model MODEL to start one, or --node sim to rehearse.
    """

    node: NodeKind = "live"
    """What is measured: live (your server) or sim (a rehearsal). In a rehearsal the twin of --pack takes the
    place of a server."""
    live: OnboardLive = field(default_factory=OnboardLive)
    block_sizes: tuple[int, ...] = (16,)
    """KV block size in tokens of a server that is started. A running one reports its own."""
    kv_tokens: int | None = None
    """Size of the KV cache in tokens. None: the server's own, or with --node sim the pack's."""
    steps: int = 120_000
    """Control windows (1 s each) to train the policy for."""
    seeds: int = 6
    """Held-out seeds on which policies are compared."""
    observe_minutes: float | None = None
    """Minutes to watch the server's traffic. The workload is derived from it, instead of --workload."""
    observe_server: str | None = None
    """URL of a server whose traffic is watched. None: the server that is onboarded."""
    validate_seconds: int = 60
    """Seconds of the workload on which twin and server are compared."""
    validate_rate_rps: float | None = None
    """Requests per second of that workload. None: a rate at which about eight requests run at once."""
    accept_fidelity: bool = False
    """Continue although the twin differs too much from the server."""


def parse(argv: list[str], *, prog: str) -> OnboardConfig:
    """Settings from flags; with --resume, those of the folder, which flags may repeat but not change.

    What was not reached yet may still change: load and SLO until there was a training, --accept-fidelity.

    Raises:
        ConfigError: a flag is wrong, or differs from the folder's.
    """
    config = _parsed(argv, prog=prog)
    if config.node == "ray":
        raise ConfigError(
            "--node ray: onboard measures a server on this machine; run it on the server's host"
        )
    if config.node == "sim" and config.live.server is not None:
        raise ConfigError("--server: --node sim is a rehearsal without a server; leave one of the two out")
    if len(config.block_sizes) != 1:
        raise ConfigError("--block-sizes: a server has exactly one block size, such as --block-sizes 16")
    if (pairs := len({*config.batches}) * len({*config.contexts})) < FEWEST:
        raise ConfigError(
            f"--batches, --contexts: {pairs} pairs of a batch and a context are too few for a twin; give at "
            f"least {FEWEST}"
        )
    if config.observe_minutes is None:
        parse_workload(config.workload)
    elif value_of(argv, "--workload") is not None:
        raise ConfigError("--workload and --observe-minutes exclude each other: give one of them")
    elif config.node == "sim" and config.observe_server is None:
        raise ConfigError(
            "--observe-minutes: with --node sim there is no traffic to watch; give --workload instead"
        )
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
        raise ConfigError(
            "nothing to onboard: give --server URL of a running vLLM server, --model MODEL to start one, or "
            "--node sim to rehearse"
        )
    return replace(OnboardConfig(), live=OnboardLive(model=SERVED if any(named[:2]) else ""))
