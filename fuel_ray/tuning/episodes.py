"""One policy, one seed's arrivals: the episode that everything is tuned and evaluated on."""

from collections.abc import Callable
from dataclasses import dataclass

from fuel_ray.control import ControlLoop, StepRecord
from fuel_ray.metrics import EpisodeTotals
from fuel_ray.types import Policy, RequestRecords, WindowMetrics
from fuel_ray.workload.spec import parse_workload
from fuel_ray.workload.stretches import different

EPISODE_S = 1200  # one period of the default workload
DRAIN_S = 120  # windows after the last arrival in which requests may finish
TUNING_SEEDS = tuple(range(1_000, 1_008))
HELD_OUT_SEED = 2_100_000_000  # first of the held-out seeds; no training or tuning seed is one of them


def held_out_episodes(workload: str, seeds: int, seconds: int) -> tuple[int, int]:
    """How many held-out episodes there are, and of how many seconds: as asked, if a load is generated.

    Those of a recorded trace have to be different requests, of which there are so many.
    """
    halves = parse_workload(workload).halves
    return (seeds, seconds) if halves is None else different(halves[1], seeds=seeds, seconds=seconds)


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
