"""One frozen tree of settings; presets are values of it, flags and JSON change it."""

import contextlib
import dataclasses
import io
import json
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from fuel_ray.codec import DEFAULT_FEATURES, FEATURES, SEED_FEATURES, GridName
from fuel_ray.errors import ConfigError
from fuel_ray.types import Slo

Reward = Literal["energy", "greendls", "greendls_kv", "greendls_kv_normalized"]
Preset = Literal["default", "seed"]
NodeKind = Literal["sim", "live"]


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
class LiveConfig:
    """The server and the GPUs of a live node."""

    model: str = ""
    """Model folder or name, as vllm serve takes it."""
    server: str | None = None
    """URL of a running server to attach to, which is not stopped; None: start one per block size."""
    limit_file: Path | None = None
    """FUEL_RAY_LIMIT_FILE of the running server; None: its batch limit is left alone."""
    vllm: str = "vllm"
    """Command that runs vLLM; several words as in a shell."""
    flags: str = ""
    """More flags of vllm serve, as in a shell: --live.flags="--dtype half"."""
    gpu_ids: tuple[str, ...] = ("0",)
    """NVML indices or UUIDs of the GPUs that the server runs on."""
    clock_control: Literal["on", "off"] = "on"
    """off: observe-only; clocks are left alone and policies have one clock to choose."""
    vocab_size: int = 1000
    """Prompts are random token ids below this."""
    request_timeout_s: float = 120.0
    """Seconds after which a request is given up."""
    start_timeout_s: float = 600.0
    """Seconds in which the server has to answer."""


@dataclass(frozen=True)
class ServingConfig:
    """A node, the load that it serves and what is promised."""

    preset: Preset = "default"
    """default: what we recommend. seed: 187 actions, 10 features, GreenDLS reward, mean e2e within 10 s."""
    block_sizes: tuple[int, ...] = (8, 16, 32, 64)
    """KV block sizes in tokens; powers of two up to 256."""
    node: NodeKind = "sim"
    """sim: the calibrated twin. live: a real vLLM server on this machine's GPUs, in real time."""
    live: LiveConfig = field(default_factory=LiveConfig)
    pack: str = "h100-qwen3-8b"
    """Calibration pack of the simulated node: a shipped name or a .json file."""
    kv_tokens: int | None = 26_000
    """Size of the KV pool in tokens, of a server that is started too; None: the pack's or server's own."""
    max_num_seqs: int | None = None
    """Capacity of the server, its highest batch limit; None: the pack's."""
    gpu_clocks_mhz: tuple[int, ...] = ()
    """SM clocks that may be chosen in MHz; empty: all that the GPU supports."""
    prefix_caching: bool = True
    """Whether full KV blocks are found again."""
    workload: str = "diurnal"
    """Workload to serve: NAME[:key=value,...]."""
    slo_ttft_s: float | None = 1.0
    """Limit on the time to first token in s; None: no limit."""
    slo_tpot_s: float | None = 0.05
    """Limit on the time per output token in s; None: no limit."""
    slo_e2e_s: float | None = None
    """Limit on the time from arrival to the last token in s; None: no limit."""
    slo_share: float | None = 0.95
    """Share of requests that must keep all limits, 0..1; None: the means must keep them."""
    reward: Reward = "energy"
    """Reward that windows are scored by."""
    miss_price_j: float = 200.0
    """Joules charged per missed limit by the energy reward."""
    guard_wait_s: float | None = None
    """Maximum performance while a request has waited longer than this, in s; None: never."""
    seed: int = 0
    """Seed of everything random."""
    out: Path = Path("results")
    """Folder in which the run's own folder is made."""
    config: Path | None = None
    """JSON file of settings (a run.json will do) that flags are applied on top of."""

    @property
    def slo(self) -> Slo:
        """The latency promise."""
        return Slo(self.slo_ttft_s, self.slo_tpot_s, self.slo_e2e_s, self.slo_share)


@dataclass(frozen=True)
class SweepConfig(ServingConfig):
    """Train one DQN per KV block size, compare it with the baselines, write policies and a report."""

    steps: int = 120_000
    """Control windows (1 s each) to train each policy on."""
    seeds: int = 10
    """Held-out workload seeds of the evaluation."""
    control_workload: str | None = "steady:rate_rps=5"
    """Negative control, evaluated only; None: leave it out."""
    tune_share: float = 0.97
    """Share that baselines and checkpoints are tuned to on training seeds; some slips on held-out ones."""
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
    conditional: bool = False
    """One policy for all block sizes, which it sees as a feature."""
    live_seconds: int = 120
    """Seconds of arrivals per policy and seed when a live node is evaluated."""
    train: TrainConfig = field(default_factory=TrainConfig)
    resume: Path | None = None
    """Run folder of an interrupted sweep to go on with."""


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
_ONLY_IN_RUN_JSON = ("backend", "slo_attainment_target")  # it says more than settings
# Lowest and highest value of each number, or of each in a tuple
_COUNT, _SHARE = (1, 10**9), (0.0, 1.0)
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        ("steps", "seeds", "kv_tokens", "grid_clock_step_mhz", "grid_batch_limits", "live_seconds"), _COUNT
    ),
    **dict.fromkeys(("seed", "miss_price_j", "guard_wait_s"), (0, 2**31 - 1)),
    **dict.fromkeys(("grid_lowest_clock_share", "train.gamma", "train.epsilon_final"), _SHARE),
    **dict.fromkeys(("max_num_seqs", "gpu_clocks_mhz", "live.vocab_size"), _COUNT),
    **dict.fromkeys(("live.request_timeout_s", "live.start_timeout_s"), (1.0, 86_400.0)),
    **dict.fromkeys(("train.lr", "train.epsilon_share"), (1e-9, 1.0)),
    **dict.fromkeys(
        (f"train.{f.name}" for f in dataclasses.fields(TrainConfig) if f.type in (int, tuple[int, ...])),
        _COUNT,
    ),
}
PRESETS: dict[str, SweepConfig] = {"default": SweepConfig(), "seed": SEED_PRESET}

T = TypeVar("T")
Serving = TypeVar("Serving", bound=ServingConfig)


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


def parse_serving(
    config_class: type[Serving], argv: list[str], *, prog: str, default: Serving | None = None
) -> Serving:
    """Settings of a verb: ``default`` or else the preset, then the --config file, then flags.

    Raises:
        ConfigError: a flag, a file or a value is wrong.
    """
    preset, path = _value_of(argv, "--preset"), _value_of(argv, "--config")
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"--preset {preset} is unknown; allowed are {', '.join(PRESETS)}")
    base = default or _of_class(config_class, PRESETS[preset or "default"])
    if path is not None:
        base = load_config(Path(path), base=base)
    config = parse_flags(config_class, argv, prog=prog, default=base)
    validate(config)
    return config


def _of_class(config_class: type[Serving], preset: "SweepConfig") -> Serving:
    """The preset's values of those settings that ``config_class`` has too."""
    names = {f.name for f in dataclasses.fields(config_class)} & {f.name for f in dataclasses.fields(preset)}
    return config_class(**{name: getattr(preset, name) for name in names})


def validate(config: ServingConfig) -> None:
    """Check what types cannot.

    Raises:
        ConfigError: names the first value that is out of range, and the range.
    """
    for size in config.block_sizes:
        if not (1 <= size <= 256 and size & (size - 1) == 0):
            raise ConfigError(f"--block-sizes {size}: not a power of two from 1 to 256")
    if not config.block_sizes or len(set(config.block_sizes)) < len(config.block_sizes):
        raise ConfigError("--block-sizes: give at least one, each once")
    for name, value in _numbers(config):
        low, high = _RANGES[name]
        if not low <= value <= high:
            raise ConfigError(f"{_flag(name)} {value}: must be from {low:g} to {high:g}")
    _validate_slo(config)
    _validate_live(config)
    if isinstance(config, SweepConfig):
        _validate_training(config)


def _numbers(config: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number that has a range, with its dotted name."""
    for f in dataclasses.fields(config):
        value, name = getattr(config, f.name), prefix + f.name
        if dataclasses.is_dataclass(value):
            yield from _numbers(value, name + ".")
        elif name in _RANGES:
            yield from (
                (name, item) for item in (value if isinstance(value, tuple) else (value,)) if item is not None
            )


def _validate_training(config: "SweepConfig") -> None:
    unknown = [name for name in config.features if name not in FEATURES]
    if unknown or not config.features or len(set(config.features)) < len(config.features):
        raise ConfigError(f"--features {' '.join(unknown)}: each once, out of {', '.join(FEATURES)}")
    if config.train.fragment_steps < config.train.n_step:
        raise ConfigError("--train.fragment-steps must be at least --train.n-step")
    if not 0 < config.tune_share <= 1:
        raise ConfigError(f"--tune-share {config.tune_share}: must be above 0 and at most 1")
    if config.node == "live" and config.conditional:
        raise ConfigError("--conditional needs all block sizes at once; a live server has one")


def _validate_live(config: ServingConfig) -> None:
    if config.node != "live":
        return
    if not config.live.model:
        raise ConfigError("--node live needs --live.model, the model as vllm serve takes it")
    if config.live.server is not None and len(config.block_sizes) > 1:
        raise ConfigError("--live.server is one server with one block size: give that as --block-sizes")


def _validate_slo(config: ServingConfig) -> None:
    limits = ("slo_ttft_s", "slo_tpot_s", "slo_e2e_s")
    for name in limits:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{_flag(name)} {value}: must be above 0 s, or None for no limit")
    if all(getattr(config, name) is None for name in limits):
        raise ConfigError(f"{', '.join(map(_flag, limits))}: at least one limit is needed")
    if config.slo_share is not None and not 0 < config.slo_share <= 1:
        raise ConfigError(f"--slo-share {config.slo_share}: must be above 0 and at most 1")
    if config.reward.startswith("greendls") and config.slo_e2e_s is None:
        raise ConfigError(f"--reward {config.reward} needs --slo-e2e-s (GreenDLS: 10)")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def to_dict(config: Any) -> dict[str, Any]:
    """Settings as plain data, for JSON."""
    return dataclasses.asdict(config, dict_factory=_plain)


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in items}


def load_config(path: Path, *, base: Serving) -> Serving:
    """Settings from a JSON file, or from the ``config`` of a run.json, on top of ``base``.

    Raises:
        ConfigError: the file is not there, is not JSON or has an unknown key.
    """
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path}: {error}") from error
    return from_dict(raw.get("config", raw) if isinstance(raw, dict) else raw, base=base, source=str(path))


def from_dict(raw: Any, *, base: Serving, source: str) -> Serving:
    """The inverse of ``to_dict``; keys that are left out keep the value of ``base``.

    Raises:
        ConfigError: a key is unknown or a value has the wrong type.
    """
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: not a JSON object")
    raw = {key: value for key, value in raw.items() if key not in _ONLY_IN_RUN_JSON}
    nested = {f.name: getattr(base, f.name) for f in dataclasses.fields(base) if f.name in ("train", "live")}
    changes = _changes(type(base), {k: v for k, v in raw.items() if k not in nested}, source)
    for name, part in nested.items():
        part_raw = raw.get(name, {})
        if not isinstance(part_raw, dict):
            raise ConfigError(f"{source}: {name} is not a JSON object")
        changes[name] = replace(part, **_changes(type(part), part_raw, source))
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
