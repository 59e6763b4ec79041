"""How policies are compared."""

from dataclasses import dataclass
from pathlib import Path

from fuel_ray.arena.scenarios import SloName
from fuel_ray.config import ServingConfig
from fuel_ray.tuning.episodes import EPISODE_S


@dataclass(frozen=True)
class ArenaConfig(ServingConfig):
    """Compare policies on simulated nodes under many workloads, with baselines tuned for each."""

    block_sizes: tuple[int, ...] = (16,)
    """KV block size in tokens; one."""
    policies: tuple[Path, ...] = ()
    """Policy folders that take part besides the published rules."""
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
