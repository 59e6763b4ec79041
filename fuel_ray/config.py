"""One frozen tree of settings; presets are values of it, JSON files change it. Flags are in flags.py."""

import contextlib
import dataclasses
import json
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar

from fuel_ray.codec import PLAIN_FEATURES, PRICED_FEATURES, SEED_FEATURES, GridName
from fuel_ray.errors import ConfigError
from fuel_ray.node_config import GuardConfig, LiveConfig
from fuel_ray.outside import Reference, reference
from fuel_ray.types import Slo

Reward = Literal["energy", "greendls", "greendls_kv", "greendls_kv_normalized"]
Preset = Literal["default", "quick", "plain", "generalist", "seed"]
Mode = Literal["specialist", "generalist", "fixed_price"]
Backend = Literal["sim", "live"]
NodeKind = Literal[Backend, "ray"]
Tracker = Literal["wandb", "mlflow"]


@dataclass(frozen=True)
class TrainConfig:
    """How a policy is trained; what an algorithm has no use for is refused (algorithms.py)."""

    algorithm: str = "dqn"
    """dqn: double and duelling, near the best simple rule. rllib-dqn: RLlib's own, which knows no
    rule. ppo: RLlib's. Or your own, package.module:NAME."""
    episode_steps: int = 200
    """Control windows per training episode."""
    num_envs: int = 32
    """Simulated nodes that are stepped together."""
    fragment_steps: int = 16
    """Windows per node between two rounds of updates; of a DQN at least n_step."""
    updates_per_round: int = 64
    """Gradient updates after each round."""
    batch_size: int = 256
    """Windows per gradient update."""
    buffer_size: int = 100_000
    """Transitions in the replay buffer."""
    learning_starts: int = 4_000
    """Windows before the first update; at most a tenth of the training."""
    lr: float = 5e-4
    """Adam's step size."""
    gamma: float = 0.93
    """Discount per window."""
    n_step: int = 5
    """Rewards summed before bootstrapping."""
    hidden: tuple[int, ...] = (128, 128)
    """Units per hidden layer."""
    head: Literal["joint", "additive", "smooth", "priced"] = "priced"
    """Advantages: free per (limit, clock); one per limit plus one per clock; so, and smooth in the clock; so,
    of energy and of misses each, which add up at the price of a miss."""
    epsilon_initial: float = 0.6
    """Share of random actions at the start."""
    epsilon_final: float = 0.15
    """Share of random actions at the end."""
    epsilon_share: float = 0.5
    """Share of the training over which random actions fall from epsilon_initial to epsilon_final."""
    priority: float = 0.6
    """Exponent of the temporal-difference error in drawing from the replay buffer; 0 draws uniformly."""
    lr_final_share: float = 0.05
    """Step size at the end, as a share of lr; it falls linearly."""
    hold_steps: int = 6
    """Mean number of windows for which a random action is held."""
    target_update_updates: int = 200
    """After every update the target network goes 1 / this of the way to the network (Polyak averaging; 200 is
    tau = 0.005). It is no number of updates between copies."""
    branch_tries: int = 3
    """Of a specialist on the twin: other actions that are tried where an episode branches; 0: it learns by
    temporal differences from what it does, as on live nodes."""
    branch_every: int = 4
    """Windows from one such place to the next."""
    branch_hold: int = 3
    """Windows for which an action is held there."""
    branch_horizon: int = 20
    """Windows after which the branches are compared."""
    branch_other_limit: float = 0.1
    """Share of these actions that have another batch limit."""
    lower_limits: bool = False
    """Whether a policy may have a lower batch limit than the rule that it is kept near, and tries some."""
    iterations: int = 5
    """Training results, each with a checkpoint."""
    average_results: int = 2
    """A policy is the average of the weights at this many results up to the chosen one."""


@dataclass(frozen=True)
class ServingConfig:
    """A node, the load that it serves and its SLO."""

    preset: Preset = "default"
    """default: one policy per load and SLO, trained near its best simple rule. quick: one such policy,
    from less training, on fewer seeds. plain: at one price of a miss. generalist: one for any load and SLO.
    seed: 11 x 17 actions, 10 features, a GreenDLS reward with KV."""
    block_sizes: tuple[int, ...] = (8, 16, 32, 64)
    """KV block sizes in tokens; powers of two up to 256."""
    node: NodeKind = "sim"
    """sim: the calibrated twin. live: a real vLLM server on this machine's GPUs, in real time. ray: on the
    nodes of a Ray cluster, each of them what --backend says."""
    backend: Backend = "sim"
    """What the nodes of --node ray are; --node sim and --node live are that themselves."""
    node_wait_s: float = 60.0
    """With Ray's nodes, how long to wait for the cluster to have those that are needed, in s."""
    node_failures: int = 3
    """With --node ray or a live run, failures of a node in a row that end an episode or a trial."""
    live: LiveConfig = field(default_factory=LiveConfig)
    pack: str = "h100-qwen3-8b"
    """Calibration pack of the simulated node: a shipped name or a .json file."""
    clock_axis: str = "nominal"
    """How the twin's time and power depend on the clock: a clock axis of the pack, such as low or high."""
    kv_tokens: int | None = 26_000
    """Size of the KV pool in tokens, of a server that is started too; None: the pack's or server's own."""
    max_num_seqs: int | None = None
    """Capacity of the server, its highest batch limit; None: the pack's."""
    limit_control: Literal["on", "off"] = "on"
    """off: the twin's batch limit is its capacity alone, as that of a server without a limit file."""
    gpu_clocks_mhz: tuple[int, ...] = ()
    """SM clocks that may be chosen in MHz; empty: all that the GPU supports."""
    prefix_caching: bool = True
    """Whether full KV blocks are found again."""
    workload: str = "diurnal"
    """Workload to serve: NAME[:key=value,...]; NAME may be package.module:function, a Workload's maker."""
    slo_ttft_s: float | None = 1.0
    """Limit on the time to first token in s; None: no limit."""
    slo_tpot_s: float | None = 0.05
    """Limit on the time per output token in s; None: no limit."""
    slo_e2e_s: float | None = None
    """Limit on the time from arrival to the last token in s; None: no limit."""
    slo_share: float | None = 0.95
    """Share of requests that must meet all limits, 0..1; None: the means must meet them."""
    reward: Reward | Reference = "energy"
    """Reward that windows are scored by; or package.module:Class, an Objective."""
    miss_price_j: float = 200.0
    """Joules charged per missed limit by the energy reward."""
    extra_features: tuple[str, ...] = ()
    """package.module:FEATURES, more features by name."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    allow_mismatch: bool = False
    """Take policy folders that were trained on another file of their calibration pack."""
    seed: int = 0
    """Seed of everything random."""
    out: Path = Path("results")
    """Folder in which the run's own folder is made."""
    config: Path | None = None
    """JSON file of settings (a run.json will do) that flags are applied on top of."""

    @property
    def slo(self) -> Slo:
        """The limits on latency, and the share of requests that must meet them."""
        return Slo(self.slo_ttft_s, self.slo_tpot_s, self.slo_e2e_s, self.slo_share)

    @property
    def live_server(self) -> bool:
        """Whether a real server is measured, here or on the nodes of a cluster."""
        return (self.backend if self.node == "ray" else self.node) == "live"


@dataclass(frozen=True)
class LearnConfig(ServingConfig):
    """What a policy sees, may choose and is trained on."""

    steps: int = 60_000
    """Control windows (1 s each) to train each policy on; without branches take 200,000."""
    tune_share: float = 0.97
    """Share that baselines and checkpoints are tuned to on tuning seeds; some slips on held-out ones."""
    tuning_seeds: int = 8
    """Episodes of 20 minutes that baselines, checkpoints and anchors are tuned on, at most 8."""
    features: tuple[str, ...] = PRICED_FEATURES
    """Entries of the observation, by name."""
    normalisation: Literal["fixed", "running"] = "fixed"
    """Scales of the feature table, or mean and spread under random actions, stored with the policy."""
    grid: GridName = "node"
    """Action grid: derived from the node, the seed preset's 187 or GreenDLS's 198 actions."""
    grid_clock_step_mhz: int = 15
    """Distance of the clocks of the node grid in MHz."""
    grid_lowest_clock_share: float = 0.45
    """Lowest clock of the node grid as a share of the highest."""
    grid_batch_limits: tuple[int, ...] = (32, 40, 128)
    """Batch limits of the node grid; the server's capacity is always added."""
    mode: Mode = "specialist"
    """What is trained on. specialist: this load at many prices of a miss, of which the best is then found.
    generalist: random loads, KV pools, TPOT limits and prices. fixed_price: this load at --miss-price-j."""
    conditional: bool = False
    """One policy for all block sizes, which it sees as a feature."""
    start_from: Path | None = None
    """Policy folder whose weights training begins with, such as one that was trained on the twin."""
    anchor: bool = True
    """Keep each policy near the best simple rule of its load; how near is tuned too."""
    train: TrainConfig = field(default_factory=TrainConfig)
    nodes_per_trial: int = 1
    """With --node ray, nodes that make the rollouts of a trial in parallel."""
    baselines: Path | None = None
    """baselines.json of another run on the same load, node and SLO, to be taken as it is."""
    callbacks: tuple[Tracker, ...] = ()
    """Where training results are logged too; docs/files.md says how wandb and mlflow are set up."""
    storage: str | None = None
    """Folder or URL (any of fsspec's: s3://...) for checkpoints and results; None: the run's own folder."""
    resume: Path | None = None
    """Folder of an interrupted run to go on with."""


@dataclass(frozen=True)
class SweepConfig(LearnConfig):
    """Train one policy per KV block size, compare it with the baselines, write policies and a report."""

    seeds: int = 10
    """Held-out workload seeds of the evaluation."""
    control_workload: str | None = "steady:rate_rps=5"
    """Negative control, evaluated only; None: leave it out."""
    axis_seeds: int = 2
    """Held-out seeds on which every policy is evaluated under each other clock axis of the pack; 0: none."""
    live_seconds: int = 120
    """Seconds of arrivals per policy and seed when a live node is evaluated."""
    policies: tuple[str, ...] = ()
    """Policies that are compared too: names such as clipper or example, folders, package.module:Class."""


@dataclass(frozen=True)
class TrainVerbConfig(LearnConfig):
    """Train one policy per KV block size and write it; `fuel-ray sweep` compares it too."""

    episodes: int | None = None
    """Episodes to train for, in place of --steps."""
    steps_per_episode: int | None = None
    """Windows per episode, in place of --train.episode-steps; with branches --episodes alone goes by it."""


_QUICK = SweepConfig(
    preset="quick",
    block_sizes=(16,),
    steps=18_000,
    tuning_seeds=3,
    train=TrainConfig(iterations=3),
    seeds=3,
    control_workload=None,
    axis_seeds=0,
)
_PLAIN = SweepConfig(
    preset="plain",
    steps=120_000,
    features=PLAIN_FEATURES,
    grid_clock_step_mhz=75,
    mode="fixed_price",
    train=TrainConfig(
        gamma=0.9,
        n_step=3,
        head="additive",
        epsilon_initial=1.0,
        epsilon_final=0.05,
        lr_final_share=0.1,
        hold_steps=1,
        iterations=16,
        average_results=1,
    ),
)
_SEED = replace(
    _PLAIN,
    preset="seed",
    steps=50_000,  # 500 episodes of 100 steps
    slo_ttft_s=None,
    slo_tpot_s=None,
    slo_e2e_s=10.0,
    slo_share=None,
    reward="greendls_kv_normalized",
    features=SEED_FEATURES,
    grid="seed",
    anchor=False,
    train=replace(
        _PLAIN.train,
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
_GENERALIST = SweepConfig(
    preset="generalist",
    steps=700_000,
    mode="generalist",
    train=TrainConfig(
        head="smooth", epsilon_initial=1.0, epsilon_final=0.05, iterations=10, average_results=3
    ),
)
PRESETS: dict[str, SweepConfig] = {
    config.preset: config for config in (SweepConfig(), _QUICK, _PLAIN, _GENERALIST, _SEED)
}

Serving = TypeVar("Serving", bound=ServingConfig)
_RENAMED = {"also": "policies"}  # of files that 0.1 wrote


def to_dict(config: Any) -> dict[str, Any]:
    """Settings as plain data, for JSON: tuples are lists and paths text."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return plain


def load_config(path: Path, *, base: Serving) -> Serving:
    """Settings from a JSON file, or from the ``config`` of a run.json, on top of ``base``.

    Raises:
        ConfigError: the file is not there, is not JSON or has an unknown key.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path}: {error}") from error
    return from_dict(raw.get("config", raw) if isinstance(raw, dict) else raw, base=base, source=str(path))


def from_dict(raw: Any, *, base: Serving, source: str) -> Serving:
    """The inverse of ``to_dict``; keys that are left out keep the value of ``base``, as a run's folders do.

    Raises:
        ConfigError: a key is unknown or a value has the wrong type.
    """
    own = {name: getattr(base, name) for name in ("out", "resume", "config") if hasattr(base, name)}
    changed: Serving = _changed(base, raw, source)
    return replace(changed, **own)


def _changed(base: Any, raw: Any, source: str) -> Any:
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: not a JSON object")
    kinds = typing.get_type_hints(type(base))
    changes: dict[str, Any] = {}
    for key, value in ((_RENAMED.get(key, key), value) for key, value in raw.items()):
        if key not in kinds:
            raise ConfigError(f"{source}: unknown key {key!r}; allowed are {', '.join(kinds)}")
        if dataclasses.is_dataclass(kinds[key]):
            changes[key] = _changed(getattr(base, key), value, f"{source}: {key}")
            continue
        try:
            changes[key] = _typed(value, kinds[key])
        except TypeError:
            raise ConfigError(f"{source}: {key} is {value!r}; allowed is {kinds[key]}") from None
    return replace(base, **changes)


def _typed(value: Any, kind: Any) -> Any:
    """A value from JSON as the annotated type has it, else TypeError."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_typed(item, args[0]) for item in value)
    if origin in (typing.Union, UnionType):
        for option in args:
            with contextlib.suppress(TypeError):
                return _typed(value, option)
    if isinstance(value, str) and (kind is Path or (kind is Reference and reference(value) == value)):
        return kind(value)
    fits = type(value) is kind or (kind is float and type(value) is int)
    if fits or (origin is Literal and value in args):
        return value
    raise TypeError(value)
