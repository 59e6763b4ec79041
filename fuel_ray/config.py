"""One frozen tree of settings; presets are values of it, JSON files change it. Flags are in flags.py."""

import dataclasses
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from fuel_ray.codec import PLAIN_FEATURES, PRICED_FEATURES, SEED_FEATURES, GridName
from fuel_ray.errors import ConfigError
from fuel_ray.json_settings import changed_by
from fuel_ray.node_config import GuardConfig, LiveConfig
from fuel_ray.outside import Reference
from fuel_ray.types import Slo

Reward = Literal["energy", "greendls", "greendls_kv", "greendls_kv_normalized"]
Preset = Literal["default", "quick", "plain", "generalist", "seed"]
Mode = Literal["specialist", "generalist", "fixed_price"]
Backend = Literal["sim", "live"]
NodeKind = Literal[Backend, "ray"]
Tracker = Literal["wandb", "mlflow"]


@dataclass(frozen=True)
class TrainConfig:
    """How a policy is trained. A setting that the algorithm does not use is an error."""

    algorithm: str = "dqn"
    """Learning algorithm. dqn: a double, duelling DQN that stays near the best simple rule. rllib-dqn:
    RLlib's DQN, which ignores that rule. ppo: RLlib's PPO. Or an algorithm of your own,
    package.module:NAME."""
    episode_steps: int = 200
    """Control windows per training episode."""
    num_envs: int = 32
    """Simulated nodes that are stepped in parallel."""
    fragment_steps: int = 16
    """Windows that each node runs between two rounds of updates; for a DQN at least --train.n-step."""
    updates_per_round: int = 64
    """Gradient updates per round."""
    batch_size: int = 256
    """Samples per gradient update."""
    buffer_size: int = 100_000
    """Capacity of the replay buffer, in transitions."""
    learning_starts: int = 4_000
    """Windows to collect before the first update, but at most a tenth of the training."""
    lr: float = 5e-4
    """Learning rate of Adam."""
    gamma: float = 0.93
    """Discount factor per window."""
    n_step: int = 5
    """Rewards that are summed before bootstrapping (n-step returns)."""
    hidden: tuple[int, ...] = (128, 128)
    """Units of each hidden layer."""
    head: Literal["joint", "additive", "smooth", "priced"] = "priced"
    """What the network outputs. joint: one advantage per pair of batch limit and clock. additive: one per
    batch limit plus one per clock. smooth: additive, and smooth in the clock. priced: smooth, with separate
    values for energy and misses, which are added at the price of a miss."""
    epsilon_initial: float = 0.6
    """Share of random actions at the start of the training."""
    epsilon_final: float = 0.15
    """Share of random actions at the end of the training."""
    epsilon_share: float = 0.5
    """Part of the training, as a share, in which random actions fall from --train.epsilon-initial to
    --train.epsilon-final."""
    priority: float = 0.6
    """Prioritised replay: exponent of the temporal-difference error by which transitions are drawn; 0 draws
    uniformly."""
    lr_final_share: float = 0.05
    """Learning rate at the end of the training, as a share of --train.lr; it falls linearly."""
    hold_steps: int = 6
    """Mean number of windows for which a random action is held."""
    target_update_updates: int = 200
    """How slowly the target network follows: after each update it moves 1/N of the way to the network (Polyak
    averaging; N = 200 means tau = 0.005). It is not an interval between copies."""
    branch_tries: int = 3
    """Branches: other actions to try at each branching point when a specialist is trained on the twin. 0: no
    branches; learn by temporal differences from the actions taken, as on live nodes."""
    branch_every: int = 4
    """Branches: windows between two branching points."""
    branch_hold: int = 3
    """Branches: windows for which a tried action is held."""
    branch_horizon: int = 20
    """Branches: windows after which the outcomes are compared."""
    branch_other_limit: float = 0.1
    """Branches: share of the tried actions that change the batch limit."""
    lower_limits: bool = False
    """Whether training may try, and the policy may choose, a lower batch limit than that of the best simple
    rule."""
    iterations: int = 5
    """Training results to report; each has a checkpoint."""
    average_results: int = 2
    """A policy's weights are the average over this many results, up to the chosen one."""


@dataclass(frozen=True)
class ServingConfig:
    """A node, the load that it serves and its SLO."""

    preset: Preset = "default"
    """Set of defaults: default, quick, plain, generalist, seed. default: one policy per workload and SLO,
    trained to stay near its best simple rule. quick: the same for one block size, with less training and
    fewer seeds. plain: trained at one fixed price of a miss. generalist: one policy for many workloads and
    SLOs. seed: GreenDLS's reward with a KV term, 11 x 17 actions, 10 features."""
    block_sizes: tuple[int, ...] = (8, 16, 32, 64)
    """KV block sizes in tokens: powers of two up to 256."""
    node: NodeKind = "sim"
    """What serves the requests: sim, live or ray. sim: the twin, a simulated vLLM server. live: a real vLLM
    server on this machine's GPUs, in real time. ray: the nodes of a Ray cluster, of the kind that --backend
    names."""
    backend: Backend = "sim"
    """With --node ray, the kind of the cluster's nodes. With --node sim or live it is not needed."""
    node_wait_s: float = 60.0
    """With --node ray, seconds to wait until the cluster has the nodes that the run needs."""
    node_failures: int = 3
    """Consecutive failures of a node after which an episode or a trial ends; live nodes and --node ray
    only."""
    live: LiveConfig = field(default_factory=LiveConfig)
    pack: str = "h100-qwen3-8b"
    """Calibration pack of the twin: a shipped one by name (`fuel-ray packs` lists them), or a .json file."""
    clock_axis: str = "nominal"
    """Clock axis of the pack, which says how step time and power depend on the GPU clock: nominal, or another
    one that the pack has, such as low or high."""
    kv_tokens: int | None = 26_000
    """Size of the KV cache in tokens, for the twin and for a server that is started. None: the pack's or the
    server's own."""
    max_num_seqs: int | None = None
    """Requests that the server can run at once. This is its highest batch limit. None: the pack's."""
    limit_control: Literal["on", "off"] = "on"
    """on: policies set the batch limit of the twin. off: it stays at the server's capacity, as on a vLLM
    server without a limit file."""
    gpu_clocks_mhz: tuple[int, ...] = ()
    """GPU clocks (SM clocks) that policies may choose, in MHz; by default all that the GPU supports."""
    prefix_caching: bool = True
    """Whether the server reuses full KV blocks of prompts with the same beginning."""
    workload: str = "diurnal"
    """Workload to serve: NAME or NAME:KEY=VALUE,KEY=VALUE. Examples are mmpp, azure-conv and
    diurnal:high_rps=20; docs/workloads.md has all. package.module:function is one of your own."""
    slo_ttft_s: float | None = 1.0
    """SLO: limit on the time to first token in s. None: no limit."""
    slo_tpot_s: float | None = 0.05
    """SLO: limit on the time per output token in s. None: no limit."""
    slo_e2e_s: float | None = None
    """SLO: limit on the time from arrival to the last token in s. None: no limit."""
    slo_share: float | None = 0.95
    """SLO: share of requests that must meet every limit. None: the mean latencies must meet the limits
    instead."""
    reward: Reward | Reference = "energy"
    """Reward of a control window: one of these, or package.module:Class of your own."""
    miss_price_j: float = 200.0
    """Price in J that the energy reward charges for every latency limit that a request misses."""
    extra_features: tuple[str, ...] = ()
    """Features of your own, package.module:FEATURES, to use beside the built-in ones."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    allow_mismatch: bool = False
    """Accept policies that were trained on another version of their calibration pack."""
    seed: int = 0
    """Seed of all random numbers."""
    out: Path = Path("results")
    """Folder in which the run creates its own folder."""
    config: Path | None = None
    """JSON file with settings, such as a run.json. Flags override it."""

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
    """Control windows (1 s each) to train each policy for. Training without branches needs about 200,000."""
    tune_share: float = 0.97
    """Attainment that baselines and policies are tuned to on the tuning seeds. It is a little above
    --slo-share, because attainment on held-out seeds is usually lower."""
    tuning_seeds: int = 8
    """Episodes of 20 minutes on which baselines and policies are tuned, at most 8."""
    features: tuple[str, ...] = PRICED_FEATURES
    """Names of the features that the policy observes."""
    normalisation: Literal["fixed", "running"] = "fixed"
    """How features are scaled. fixed: by constants. running: by their mean and spread under random actions,
    which are stored with the policy."""
    grid: GridName = "node"
    """Actions that the policy can choose. node: clocks and batch limits of the node. seed: 187 actions.
    greendls: GreenDLS's 198 actions."""
    grid_clock_step_mhz: int = 15
    """Smallest distance between the clocks of --grid node, in MHz."""
    grid_lowest_clock_share: float = 0.45
    """Lowest clock of --grid node, as a share of the highest."""
    grid_batch_limits: tuple[int, ...] = (32, 40, 128)
    """Batch limits of --grid node; the server's capacity is always added."""
    mode: Mode = "specialist"
    """What a policy is trained for. specialist: the workload at many prices of a miss, of which the best is
    then chosen. generalist: random workloads, KV cache sizes, TPOT limits and prices. fixed_price: the
    workload at --miss-price-j."""
    conditional: bool = False
    """Train one policy for all block sizes, which observes the block size as a feature."""
    start_from: Path | None = None
    """Policy folder whose weights training starts from, such as one that was trained on the twin."""
    anchor: bool = True
    """Tie each policy to the best simple rule of its workload. How closely is tuned too."""
    train: TrainConfig = field(default_factory=TrainConfig)
    nodes_per_trial: int = 1
    """With --node ray, nodes on which each trial collects experience in parallel."""
    baselines: Path | None = None
    """baselines.json of another run with the same workload, node and SLO, to use instead of tuning the
    baselines again."""
    callbacks: tuple[Tracker, ...] = ()
    """Experiment trackers that receive the training results; docs/files.md says how to set them up."""
    storage: str | None = None
    """Folder or fsspec URL, such as s3://bucket/folder, for checkpoints and results. None: the run's own
    folder."""
    resume: Path | None = None
    """Folder of an interrupted run to continue, with its settings."""


@dataclass(frozen=True)
class SweepConfig(LearnConfig):
    """Train one policy per KV block size, compare them with the baselines, and write a report."""

    seeds: int = 10
    """Held-out seeds to evaluate on."""
    control_workload: str | None = "steady:rate_rps=5"
    """Workload for a negative control, which is evaluated but not trained for. None: no control."""
    axis_seeds: int = 2
    """Held-out seeds on which every policy is evaluated again under each other clock axis of the pack. 0:
    none."""
    live_seconds: int = 120
    """Seconds of arrivals per policy and seed when live nodes are evaluated."""
    policies: tuple[str, ...] = ()
    """More policies to compare. Names such as clipper or example, policy folders, or package.module:Class."""


@dataclass(frozen=True)
class TrainVerbConfig(LearnConfig):
    """Train one policy per KV block size. `fuel-ray sweep` compares the policies with baselines too."""

    episodes: int | None = None
    """Episodes to train for, instead of --steps."""
    steps_per_episode: int | None = None
    """Windows per episode, instead of --train.episode-steps. A training with branches uses it only to turn
    --episodes into steps."""


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
        why = getattr(error, "strerror", None) or f"not JSON: {error}"
        raise ConfigError(
            f"--config {path}: {why}; give a JSON file of settings, such as a run.json"
        ) from error
    return from_dict(raw.get("config", raw) if isinstance(raw, dict) else raw, base=base, source=str(path))


def from_dict(raw: Any, *, base: Serving, source: str) -> Serving:
    """The inverse of ``to_dict``; keys that are left out keep the value of ``base``, as a run's folders do.

    Raises:
        ConfigError: a key is unknown or a value has the wrong type.
    """
    own = {name: getattr(base, name) for name in ("out", "resume", "config") if hasattr(base, name)}
    changed: Serving = changed_by(raw, base=base, source=source, renamed=_RENAMED)
    return replace(changed, **own)
