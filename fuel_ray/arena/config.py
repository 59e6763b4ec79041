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
    """Policies to compare. Names such as clipper or example, policy folders, or package.module:Class."""
    seeds: int = 10
    """Held-out seeds to evaluate on. Each is an episode with the same arrivals for every policy."""
    seconds: int = EPISODE_S
    """Seconds of arrivals per episode."""
    tune_share: float = 0.97
    """Attainment that policies are tuned to on the tuning seeds. It is a little above --slo-share, because
    attainment on held-out seeds is usually lower."""


@dataclass(frozen=True)
class EvaluateConfig(_JudgeConfig):
    """Compare policies on the same arrivals, one after the other, on a simulated or a live node.

    A policy folder is evaluated at the block sizes that it was trained for. Rules are tuned on the twin.
    """

    static: tuple[str, ...] = ("max",)
    """Static policies: max, LIMIT, or LIMIT@MHZ such as 48@1350. Savings are relative to the first one."""
    save_traces: bool = False
    """Write a trace of each episode for `fuel-ray validate`. Live nodes always write one."""


@dataclass(frozen=True)
class _TunedConfig(_JudgeConfig):
    tuning_seeds: int = 6
    """Episodes on which policies are tuned, at most 8."""
    axis_seeds: int = 2
    """Held-out seeds on which every policy is evaluated again under each other clock axis of the pack. 0:
    none."""
    workers: int = 2
    """Processes to run in parallel."""


@dataclass(frozen=True)
class ArenaConfig(_TunedConfig):
    """Compare policies on simulated nodes under many workloads, with baselines tuned for each workload."""

    block_sizes: tuple[int, ...] = (16,)
    """KV block size in tokens; exactly one."""
    scenarios: tuple[str, ...] = ()
    """Scenarios (a workload and a KV cache size) by name; by default all."""
    slos: tuple[SloName, ...] = ("interactive",)
    """interactive: TTFT 1 s, TPOT 50 ms. tight: TPOT 1.1 times its 95th percentile at maximum performance.
    seed: mean end-to-end latency 10 s."""
    peers: bool = True
    """Whether published rules are compared too."""
    oracle: bool = True
    """Whether to search for a lower bound on energy, by schedules that know all arrivals. It takes most of
    the time."""
    resume: Path | None = None
    """Folder of an interrupted arena to continue, with its settings."""


@dataclass(frozen=True)
class RecommendConfig(_TunedConfig):
    """Compare policies for a workload and an SLO on simulated nodes, and name the one to deploy.

    --policies also takes a folder that contains policy folders, such as the policies/ of a sweep.
    """

    save: Path | None = None
    """Folder to write the recommended policy to, tuned for this workload and SLO; `fuel-ray deploy` takes
    it."""


def check_tuning(config: _TunedConfig, slo_share: float | None) -> None:
    """Check on what is tuned, and what is asked of it.

    Raises:
        ConfigError: there are not so many tuning seeds, an episode is too short to judge anything by, the
            other clock axes have a negative number of them, or less is asked for than the SLO.
    """
    if config.tuning_seeds > len(TUNING_SEEDS):
        raise ConfigError(f"--tuning-seeds {config.tuning_seeds}: must be from 1 to {len(TUNING_SEEDS)}")
    if config.axis_seeds < 0:
        raise ConfigError(f"--axis-seeds {config.axis_seeds}: must be at least 0")
    if config.seconds < 60:
        raise ConfigError(f"--seconds {config.seconds}: must be at least 60")
    validate_tune_share(config.tune_share, slo_share)
