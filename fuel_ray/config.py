"""One frozen tree of settings; presets are values of it, flags and JSON change it."""

import contextlib
import dataclasses
import io
import json
import re
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from fuel_ray.codec import DEFAULT_FEATURES, FEATURES, SEED_FEATURES, GridName
from fuel_ray.errors import ConfigError
from fuel_ray.types import Slo

Reward = Literal["energy", "greendls", "greendls_kv", "greendls_kv_normalized"]
Preset = Literal["default", "seed"]


@dataclass(frozen=True)
class TrainConfig:
    """How a DQN is trained."""

    episode_steps: int = 200
    """Control windows per training episode."""
    num_envs: int = 32
    """Simulated nodes that are stepped together."""
    fragment_steps: int = 16
    """Windows per node between two rounds of updates; at least n_step."""
    updates_per_round: int = 64
    """Gradient updates after each round."""
    batch_size: int = 256
    """Transitions per update."""
    buffer_size: int = 100_000
    """Transitions in the replay buffer."""
    learning_starts: int = 4_000
    """Windows before the first update."""
    lr: float = 5e-4
    """Adam's step size."""
    gamma: float = 0.9
    """Discount per window."""
    n_step: int = 3
    """Rewards summed before bootstrapping."""
    hidden: tuple[int, ...] = (128, 128)
    """Units per hidden layer."""
    head: Literal["joint", "additive"] = "additive"
    """Advantages: free per (limit, clock), or the sum of one per limit and one per clock."""
    epsilon_final: float = 0.05
    """Share of random actions at the end."""
    epsilon_share: float = 0.5
    """Share of the training over which random actions fall from all to epsilon_final."""
    target_update_updates: int = 200
    """Updates between copies of the network into the target network."""
    iterations: int = 16
    """Training results, each with a checkpoint."""


@dataclass(frozen=True)
class SweepConfig:
    """Train one DQN per KV block size, compare it with the baselines, write policies and a report."""

    preset: Preset = "default"
    """default: what we recommend. seed: 187 actions, 10 features, GreenDLS reward, mean e2e within 10 s."""
    block_sizes: tuple[int, ...] = (8, 16, 32, 64)
    """KV block sizes in tokens; powers of two up to 256."""
    steps: int = 120_000
    """Control windows (1 s each) to train each policy on."""
    seeds: int = 10
    """Held-out workload seeds of the evaluation."""
    pack: str = "h100-qwen3-8b"
    """Calibration pack of the simulated node: a shipped name or a .json file."""
    kv_tokens: int | None = 26_000
    """Size of the KV pool in tokens; None: the pack's own."""
    prefix_caching: bool = True
    """Whether full KV blocks are found again."""
    workload: str = "diurnal"
    """Workload to train and evaluate on: NAME[:key=value,...]."""
    control_workload: str | None = "steady:rate_rps=5"
    """Negative control, evaluated only; None: leave it out."""
    slo_ttft_s: float | None = 1.0
    """Limit on the time to first token in s; None: no limit."""
    slo_tpot_s: float | None = 0.05
    """Limit on the time per output token in s; None: no limit."""
    slo_e2e_s: float | None = None
    """Limit on the time from arrival to the last token in s; None: no limit."""
    slo_share: float | None = 0.95
    """Share of requests that must keep all limits, 0..1; None: the means must keep them."""
    tune_share: float = 0.97
    """Share that baselines and checkpoints are tuned to on training seeds; some slips on held-out ones."""
    reward: Reward = "energy"
    """Reward that the DQN learns from."""
    miss_price_j: float = 200.0
    """Joules charged per missed limit by the energy reward."""
    features: tuple[str, ...] = DEFAULT_FEATURES
    """Entries of the observation, by name."""
    normalisation: Literal["fixed", "running"] = "fixed"
    """Scales of the feature table, or mean and spread under random actions, stored with the policy."""
    grid: GridName = "node"
    """Action grid: derived from the node, the seed preset's 187 or GreenDLS's 198 actions."""
    grid_clock_step_mhz: int = 75
    """Distance of the clocks of the node grid in MHz."""
    grid_lowest_clock_share: float = 0.5
    """Lowest clock of the node grid as a share of the highest."""
    grid_batch_limits: tuple[int, ...] = (32, 40, 128)
    """Batch limits of the node grid; the server's capacity is always added."""
    guard_wait_s: float | None = None
    """Maximum performance while a request has waited longer than this, in s; None: never."""
    conditional: bool = False
    """One policy for all block sizes, which it sees as a feature."""
    seed: int = 0
    """Seed of everything random."""
    train: TrainConfig = field(default_factory=TrainConfig)
    out: Path = Path("results")
    """Folder in which the run's own folder is made."""
    resume: Path | None = None
    """Run folder of an interrupted sweep to go on with."""
    config: Path | None = None
    """JSON file of settings (a run.json will do) that flags are applied on top of."""

    @property
    def slo(self) -> Slo:
        """The latency promise."""
        return Slo(self.slo_ttft_s, self.slo_tpot_s, self.slo_e2e_s, self.slo_share)


SEED_PRESET = SweepConfig(
    preset="seed",
    steps=50_000,  # 500 episodes of 100 steps
    slo_ttft_s=None,
    slo_tpot_s=None,
    slo_e2e_s=10.0,
    slo_share=None,
    reward="greendls_kv_normalized",
    features=SEED_FEATURES,
    grid="seed",
    train=TrainConfig(
        episode_steps=100,
        batch_size=64,  # GreenDLS
        lr=1e-4,
        gamma=0.99,
        n_step=1,
        hidden=(256, 256),
        head="joint",
        epsilon_final=0.1,
    ),
)
# Lowest and highest value of each number, or of each in a tuple
_COUNT, _SHARE = (1, 10**9), (0.0, 1.0)
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("steps", "seeds", "kv_tokens", "grid_clock_step_mhz", "grid_batch_limits"), _COUNT),
    **dict.fromkeys(("seed", "miss_price_j", "guard_wait_s"), (0, 2**31 - 1)),
    **dict.fromkeys(("grid_lowest_clock_share", "train.gamma", "train.epsilon_final"), _SHARE),
    **dict.fromkeys(("train.lr", "train.epsilon_share"), (1e-9, 1.0)),
    **dict.fromkeys(
        (f"train.{f.name}" for f in dataclasses.fields(TrainConfig) if f.type in (int, tuple[int, ...])),
        _COUNT,
    ),
}
PRESETS: dict[str, SweepConfig] = {"default": SweepConfig(), "seed": SEED_PRESET}

T = TypeVar("T")


def parse_flags(config_class: type[T], argv: list[str], *, prog: str, default: T | None = None) -> T:
    """Parse command-line flags into a frozen dataclass.

    Raises:
        ConfigError: a flag or a value is wrong, in one line.
        SystemExit: with code 0, after --help.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                config_class,
                args=argv,
                prog=prog,
                default=default if default is not None else tyro.MISSING_NONPROP,
                description=config_class.__doc__,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(_one_line(complaint.getvalue())) from None


def parse_sweep(argv: list[str], *, prog: str, default: SweepConfig | None = None) -> SweepConfig:
    """Settings of a sweep: ``default`` or else the preset, then the --config file, then flags.

    Raises:
        ConfigError: a flag, a file or a value is wrong.
    """
    preset, path = _value_of(argv, "--preset"), _value_of(argv, "--config")
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"--preset {preset} is unknown; allowed are {', '.join(PRESETS)}")
    base = default or PRESETS[preset or "default"]
    if path is not None:
        base = load_config(Path(path), base=base)
    config = parse_flags(SweepConfig, argv, prog=prog, default=base)
    validate(config)
    return config


def validate(config: SweepConfig) -> None:
    """Check what types cannot.

    Raises:
        ConfigError: names the first value that is out of range, and the range.
    """
    for size in config.block_sizes:
        if not (1 <= size <= 256 and size & (size - 1) == 0):
            raise ConfigError(f"--block-sizes {size}: not a power of two from 1 to 256")
    if not config.block_sizes or len(set(config.block_sizes)) < len(config.block_sizes):
        raise ConfigError("--block-sizes: give at least one, each once")
    for name, (low, high) in _RANGES.items():
        of_train = name.startswith("train.")
        values = getattr(config.train if of_train else config, name.removeprefix("train."))
        for value in values if isinstance(values, tuple) else (values,):
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{_flag(name)} {value}: must be from {low:g} to {high:g}")
    unknown = [name for name in config.features if name not in FEATURES]
    if unknown or not config.features or len(set(config.features)) < len(config.features):
        raise ConfigError(f"--features {' '.join(unknown)}: each once, out of {', '.join(FEATURES)}")
    if config.train.fragment_steps < config.train.n_step:
        raise ConfigError("--train.fragment-steps must be at least --train.n-step")
    _validate_slo(config)


def _validate_slo(config: SweepConfig) -> None:
    limits = ("slo_ttft_s", "slo_tpot_s", "slo_e2e_s")
    for name in limits:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{_flag(name)} {value}: must be above 0 s, or None for no limit")
    if all(getattr(config, name) is None for name in limits):
        raise ConfigError(f"{', '.join(map(_flag, limits))}: at least one limit is needed")
    for name in ("slo_share", "tune_share"):
        value = getattr(config, name)
        if value is not None and not 0 < value <= 1:
            raise ConfigError(f"{_flag(name)} {value}: must be above 0 and at most 1")
    if config.reward.startswith("greendls") and config.slo_e2e_s is None:
        raise ConfigError(f"--reward {config.reward} needs --slo-e2e-s (GreenDLS: 10)")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def to_dict(config: Any) -> dict[str, Any]:
    """Settings as plain data, for JSON."""
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in dataclasses.asdict(config).items()
    }


def load_config(path: Path, *, base: SweepConfig) -> SweepConfig:
    """Settings from a JSON file, or from the ``config`` of a run.json, on top of ``base``.

    Raises:
        ConfigError: the file is not there, is not JSON or has an unknown key.
    """
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path}: {error}") from error
    return from_dict(raw.get("config", raw) if isinstance(raw, dict) else raw, base=base, source=str(path))


def from_dict(raw: Any, *, base: SweepConfig, source: str) -> SweepConfig:
    """The inverse of ``to_dict``; keys that are left out keep the value of ``base``.

    Raises:
        ConfigError: a key is unknown or a value has the wrong type.
    """
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: not a JSON object")
    extra = ("train", "backend", "slo_attainment_target")  # run.json says more than settings
    changes = _changes(SweepConfig, {k: v for k, v in raw.items() if k not in extra}, source)
    train = raw.get("train", {})
    if not isinstance(train, dict):
        raise ConfigError(f"{source}: train is not a JSON object")
    changes["train"] = replace(base.train, **_changes(TrainConfig, train, source))
    for name in ("out", "resume", "config"):
        changes.pop(name, None)
    return replace(base, **changes)


def _changes(config_class: type, raw: dict[str, Any], source: str) -> dict[str, Any]:
    kinds = typing.get_type_hints(config_class)
    changes = {}
    for key, value in raw.items():
        if key not in kinds:
            raise ConfigError(f"{source}: unknown key {key!r}; allowed are {', '.join(kinds)}")
        kind = kinds[key]
        if isinstance(value, list):
            value = tuple(value)  # noqa: PLW2901  (JSON has no tuples)
        if not _fits(value, kind):
            raise ConfigError(f"{source}: {key} is {value!r}; allowed is {kind}")
        changes[key] = value
    return changes


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value from JSON has the annotated type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, args[0]) for item in value)
    if args:
        return any(_fits(value, option) for option in args)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, str) if kind is Path else isinstance(value, kind)


def _value_of(argv: list[str], flag: str) -> str | None:
    for i, arg in enumerate(argv):
        if arg == flag and i + 1 < len(argv):
            return argv[i + 1]
        if arg.startswith(flag + "="):
            return arg.split("=", 1)[1]
    return None


def _one_line(text: str) -> str:
    """Tyro's boxed complaint as one line, without its pointer to --help."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    words = " ".join(line.strip(" │╭╮╰╯─┆┄") for line in plain.splitlines())
    words = re.sub(r"\s+", " ", words).strip()
    words = re.sub(r" (For full helptext|Argument helptext:).*", "", words)
    return re.sub(r"^(Parsing error|Unrecognized options|[A-Z][a-z]+ (error|options?))\s+", "", words)
