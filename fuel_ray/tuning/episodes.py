"""One policy, one seed's arrivals: the episode that everything is tuned and evaluated on."""

from collections.abc import Callable
from dataclasses import dataclass

from fuel_ray.control import ControlLoop, StepRecord
from fuel_ray.metrics import EpisodeTotals
from fuel_ray.types import Policy, RequestRecords, WindowMetrics

EPISODE_S = 1200  # one period of the default workload
DRAIN_S = 120  # windows after the last arrival in which requests may finish
TUNING_SEEDS = tuple(range(1_000, 1_008))
HELD_OUT_SEED = 2_000_000_000  # first of the held-out seeds; no training or tuning seed is one of them


@dataclass(frozen=True, slots=True, eq=False)
class Episode:
    """What was measured: windows in order, their totals and the requests' records."""

    windows: list[WindowMetrics]
    totals: EpisodeTotals
    records: RequestRecords


def run_episode(
    loop: ControlLoop,
    policy: Policy,
    *,
    seed: int,
    seconds: float = EPISODE_S,
    observe: Callable[[StepRecord], None] | None = None,
) -> Episode:
    """Let a policy serve ``seconds`` of arrivals and then drain the queue."""
    totals = EpisodeTotals()
    policy.reset()
    window = loop.reset(seed=seed)
    totals.add(window)
    windows = [window]
    while totals.seconds < seconds + DRAIN_S:
        if totals.seconds >= seconds and not window.running and not window.waiting:
            break
        record = loop.step(policy.decide(window))
        window = record.metrics
        totals.add(window)
        windows.append(window)
        if observe is not None:
            observe(record)
    return Episode(windows, totals, loop.node.take_records())
