"""How policies are compared."""

from dataclasses import dataclass
from pathlib import Path

from fuel_ray.arena.scenarios import SloName
from fuel_ray.config import ServingConfig
from fuel_ray.errors import ConfigError
from fuel_ray.flags import validate_tune_share
from fuel_ray.tuning.episodes import EPISODE_S, TUNING_SEEDS


@dataclass(frozen=True)
class _JudgeConfig(ServingConfig):
    policies: tuple[str, ...] = ()
    """Policy folders, names such as clipper or voltana, and package.module:Class."""
    seeds: int = 10
    """Held-out episodes per policy, each with its own arrivals."""
    seconds: int = EPISODE_S
    """Seconds of arrivals per episode."""
    tune_share: float = 0.97
    """Share of requests asked for on the tuning seeds; some slips on held-out ones."""


@dataclass(frozen=True)
class EvaluateConfig(_JudgeConfig):
    """Let policies serve the same arrivals, one after the other, on a simulated or a live node.

    A policy folder plays at the block sizes that it was trained for; what a rule needs is tuned on the twin.
    """

    static: tuple[str, ...] = ("max",)
    """Static policies: max, LIMIT, or LIMIT@MHZ such as 48@1350. Savings are against the first."""
    save_traces: bool = False
    """Write a trace per episode, which `fuel-ray validate` reads; a live node's is written in any case."""


@dataclass(frozen=True)
class _TunedConfig(_JudgeConfig):
    tuning_seeds: int = 6
    """Episodes that everything is tuned on."""
    axis_seeds: int = 2
    """Held-out episodes per policy under each other clock axis of the pack; 0: none."""
    workers: int = 2
    """Processes."""


@dataclass(frozen=True)
class ArenaConfig(_TunedConfig):
    """Compare policies on simulated nodes under many workloads, with baselines tuned for each."""

    block_sizes: tuple[int, ...] = (16,)
    """KV block size in tokens; one."""
    scenarios: tuple[str, ...] = ()
    """Workloads by name; empty: all."""
    slos: tuple[SloName, ...] = ("interactive",)
    """interactive: TTFT 1 s, TPOT 50 ms. tight: TPOT 1.1 x p95 at maximum. seed: mean e2e 10 s."""
    peers: bool = True
    """Whether the published rules take part."""
    oracle: bool = True
    """Whether schedules that know the arrivals are searched, as a bound: most of an arena's time."""
    resume: Path | None = None
    """Folder of an interrupted arena to go on with; its settings are taken."""


@dataclass(frozen=True)
class RecommendConfig(_TunedConfig):
    """Evaluate policies for a load and an SLO on simulated nodes, and name the pair to deploy.

    A folder of policy folders, such as a sweep's policies/, stands for those in it.
    """

    save: Path | None = None
    """Where to write the recommended policy, tuned for this load and SLO, for `fuel-ray deploy`."""


def check_tuning(config: _TunedConfig, slo_share: float | None) -> None:
    """Check on what is tuned, and what is asked of it.

    Raises:
        ConfigError: there are not so many tuning seeds, an episode is too short to judge anything by, the
            other clock axes have a negative number of them, or less is asked for than the SLO.
    """
    if config.tuning_seeds > len(TUNING_SEEDS):
        raise ConfigError(f"--tuning-seeds {config.tuning_seeds}: there are {len(TUNING_SEEDS)}")
    if config.axis_seeds < 0:
        raise ConfigError(f"--axis-seeds {config.axis_seeds}: must be at least 0")
    if config.seconds < 60:
        raise ConfigError(f"--seconds {config.seconds}: must be at least 60")
    validate_tune_share(config.tune_share, slo_share)
