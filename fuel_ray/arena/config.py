"""How policies are compared."""

from dataclasses import dataclass
from pathlib import Path

from fuel_ray.arena.scenarios import SloName
from fuel_ray.config import ServingConfig
from fuel_ray.errors import ConfigError
from fuel_ray.flags import validate_tune_share
from fuel_ray.tuning.episodes import EPISODE_S, TUNING_SEEDS


@dataclass(frozen=True)
class ArenaConfig(ServingConfig):
    """Compare policies on simulated nodes under many workloads, with baselines tuned for each."""

    block_sizes: tuple[int, ...] = (16,)
    """KV block size in tokens; one."""
    policies: tuple[str, ...] = ()
    """Who takes part besides the published rules: policy folders, package.module:Class."""
    scenarios: tuple[str, ...] = ()
    """Workloads by name; empty: all."""
    slos: tuple[SloName, ...] = ("interactive",)
    """Promises. interactive: TTFT 1 s, TPOT 50 ms. tight: TPOT 1.1 x p95 at maximum. seed: mean e2e 10 s."""
    seeds: int = 10
    """Held-out episodes per policy, each with its own arrivals."""
    tuning_seeds: int = 6
    """Episodes that everything is tuned on."""
    seconds: int = EPISODE_S
    """Seconds of arrivals per episode."""
    tune_share: float = 0.97
    """Share of requests asked for on the tuning seeds; some slips on held-out ones."""
    peers: bool = True
    """Whether the published rules take part."""
    oracle: bool = True
    """Whether schedules that know the arrivals are searched."""
    oracle_segment_s: float = 60.0
    """Seconds of a schedule that the oracle's search moves together."""
    workers: int = 2
    """Processes."""
    resume: Path | None = None
    """Folder of an interrupted arena to go on with; its settings are taken."""


@dataclass(frozen=True)
class EvaluateConfig(ServingConfig):
    """Let policies serve the same arrivals, one after the other, on a simulated or a live node."""

    policies: tuple[str, ...] = ()
    """Policy folders of a sweep, names such as clipper or voltana, and package.module:Class. A folder is
    evaluated on the block sizes that it was trained for; what a rule needs is tuned on the twin first."""
    static: tuple[str, ...] = ("max",)
    """Static policies: max, LIMIT, or LIMIT@MHZ such as 48@1350. Savings are against the first."""
    seeds: int = 10
    """Episodes per policy, each with its own arrivals."""
    seconds: int = EPISODE_S
    """Seconds of arrivals per episode."""
    tune_share: float = 0.97
    """Share of requests asked for on the tuning seeds, where something is tuned."""


@dataclass(frozen=True)
class RecommendConfig(ServingConfig):
    """Evaluate policies for a load and a promise on simulated nodes, and name the pair to deploy."""

    policies: tuple[str, ...] = ()
    """Policy folders, folders of them such as a sweep's policies/, names such as clipper or voltana, and
    package.module:Class."""
    seeds: int = 10
    """Held-out episodes per pair."""
    tuning_seeds: int = 6
    """Episodes on which tuned static and the policies' price of a miss are tuned."""
    seconds: int = EPISODE_S
    """Seconds of arrivals per episode."""
    tune_share: float = 0.97
    """Share of requests asked for on the tuning seeds."""
    workers: int = 2
    """Processes."""
    save: Path | None = None
    """Where to write the recommended policy, tuned for this load and promise, for `fuel-ray deploy`."""


def check_tuning(config: ArenaConfig | RecommendConfig, slo_share: float | None) -> None:
    """Check on what is tuned, and what is asked of it.

    Raises:
        ConfigError: there are not so many tuning seeds, an episode is too short to judge anything by, or less
            is asked for than the SLO.
    """
    if config.tuning_seeds > len(TUNING_SEEDS):
        raise ConfigError(f"--tuning-seeds {config.tuning_seeds}: there are {len(TUNING_SEEDS)}")
    if config.seconds < 60:
        raise ConfigError(f"--seconds {config.seconds}: must be at least 60")
    validate_tune_share(config.tune_share, slo_share)
