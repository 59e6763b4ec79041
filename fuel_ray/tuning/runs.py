"""Runs of policies over fixed seeds; what a fixed pair of knobs does is run once and remembered."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fuel_ray.control import ControlLoop
from fuel_ray.metrics import EpisodeTotals
from fuel_ray.policies.compiled import room
from fuel_ray.policies.static import Compilable, Planned, Static
from fuel_ray.sim.closed_loop import play
from fuel_ray.sim.node import SimulatedNode
from fuel_ray.sim.program import Program, Server
from fuel_ray.tuning.clock_search import Trace, trace_of
from fuel_ray.tuning.episodes import DRAIN_S, HELD_OUT_SEED, Episode, run_episode
from fuel_ray.types import Knobs, Policy, RequestRecords, Slo


@dataclass(frozen=True, slots=True, eq=False)
class Played:
    """One episode: arrays per window of 1 s, and its requests."""

    energy_j: np.ndarray
    arrivals: np.ndarray
    limits: np.ndarray  # batch limits in force
    clocks_mhz: np.ndarray
    records: RequestRecords
    output_tokens: int
    preemptions: int
    most_running: float  # requests at once; infinite where it is not known

    @property
    def schedule(self) -> np.ndarray:
        """The batch limit and clock (MHz) in force: (windows, 2)."""
        return np.stack([self.limits, self.clocks_mhz], axis=1)

    @property
    def totals(self) -> EpisodeTotals:
        """Its windows, added up one by one."""
        return EpisodeTotals(
            energy_j=float(self.energy_j.cumsum()[-1]),  # one after the other, as the loop adds them
            seconds=float(len(self.energy_j)),
            arrivals=int(self.arrivals.sum()),
            output_tokens=self.output_tokens,
            preemptions=self.preemptions,
            clock_mhz_s=float(self.clocks_mhz.sum()),
            limit_s=float(self.limits.sum()),
            clock_switches=int((np.diff(self.clocks_mhz) != 0).sum()),
        )


@dataclass(frozen=True, slots=True)
class Score:
    """What a policy did on the tuning seeds."""

    energy_j_per_request: float
    slo_attainment: float

    def rank(self, share: float) -> tuple[bool, float]:
        """Lower is better: least energy of those that meet the SLO for ``share``, or else most attainment."""
        missed = self.slo_attainment < share
        return missed, -self.slo_attainment if missed else self.energy_j_per_request


def least_energy(points: Iterable[tuple[float, float]], attained: float) -> float | None:
    """Least energy of points (attainment, energy), and of mixes of two, at an attainment; None: too high.

    One policy in some of the time and another in the rest attains, and takes, what lies between the two.
    """
    known = sorted(points)
    above = [point for point in known if point[0] >= attained]
    if not above:
        return None
    best = min(energy_j for _, energy_j in above)
    below = [(share, energy_j) for share, energy_j in known if share < attained and energy_j < best]
    mixes = [
        low_j + (high_j - low_j) * (attained - low) / (high - low)
        for low, low_j in below
        for high, high_j in above
    ]
    return min([best, *mixes])


class _Fixed(NamedTuple):
    """What runs showed: traces by SLO, one per seed, and the most requests that ran at once."""

    traces: dict[str, list[Trace]]
    most_running: float


class Runs:
    """Plays policies against the same arrivals and judges them by several SLOs at once."""

    def __init__(
        self, loop: ControlLoop, *, seeds: Sequence[int], seconds: float, slos: Mapping[str, Slo]
    ) -> None:
        self.loop, self.slos = loop, dict(slos)
        self.seeds, self.seconds = tuple(seeds), seconds
        self._static: dict[Knobs, _Fixed] = {}

    def first(self, seeds: int) -> "Runs":
        """The same on the first seeds alone."""
        return Runs(self.loop, seeds=self.seeds[:seeds], seconds=self.seconds, slos=self.slos)

    def episode(self, policy: Policy, seed: int) -> Episode:
        """One episode, not remembered."""
        return run_episode(self.loop, policy, seed=seed, seconds=self.seconds)

    def played(self, policy: Policy, seed: int) -> Played:
        """The same without what else its windows say: fast for what can be planned or compiled."""
        return self.fast(policy, seed) or self._slow(policy, seed)

    def traces(self, policy: Policy, slo: str) -> list[Trace]:
        """One trace per seed."""
        if not isinstance(policy, Static):
            return self._play(policy, (slo,)).traces[slo]
        knobs = policy.knobs
        if knobs not in self._static:
            self._static[knobs] = self._under_higher_limit(knobs) or self._play(policy, tuple(self.slos))
        return self._static[knobs].traces[slo]

    def score(self, policy: Policy, slo: str, *, share: float) -> Score:
        """Energy per request and attainment, pooled over the seeds.

        For an SLO on means, attainment is ``share`` or more if the mean is at ``share`` of its limit.
        """
        return score_of(self.traces(policy, slo), self.slos[slo], share=share)

    def _under_higher_limit(self, knobs: Knobs) -> _Fixed | None:
        """The runs under a higher batch limit, if so few requests ran that they are the same."""
        for known, fixed in self._static.items():
            higher = known.gpu_clock_mhz == knobs.gpu_clock_mhz and known.batch_limit > knobs.batch_limit
            if higher and fixed.most_running <= knobs.batch_limit:
                return fixed
        return None

    def _play(self, policy: Policy, slos: Sequence[str]) -> _Fixed:
        traces: dict[str, list[Trace]] = {name: [] for name in slos}
        most_running = 0.0
        for seed in self.seeds:
            own = self.played(policy, seed)
            most_running = max(most_running, own.most_running)
            for name in slos:
                traces[name].append(trace_of(own.energy_j, own.arrivals, own.records, self.slos[name]))
        return _Fixed(traces, most_running)

    def _slow(self, policy: Policy, seed: int) -> Played:
        episode = self.episode(policy, seed)
        rows = [(w.arrivals, w.knobs.batch_limit, w.knobs.gpu_clock_mhz) for w in episode.windows]
        arrivals, limits, clocks_mhz = np.array(rows).T
        energy_j = np.array([w.energy_j for w in episode.windows])
        totals, records = episode.totals, episode.records
        tokens, preemptions = totals.output_tokens, totals.preemptions
        return Played(energy_j, arrivals, limits, clocks_mhz, records, tokens, preemptions, math.inf)

    def fast(self, policy: Policy, seed: int) -> Played | None:
        """One episode without looking at windows, of a policy that need not; None for any other."""
        node = self.loop.node
        if not isinstance(node, SimulatedNode) or self.loop.guarded:
            return None
        if isinstance(policy, Planned):
            return self._planned(policy, node, seed)
        found = policy.compiled(node.spec) if isinstance(policy, Compilable) else None
        if found is None:
            return None
        node.reset(seed=seed)
        arrivals = node.arrivals_to_come(int(self.seconds) + DRAIN_S)
        served = run_program(node, *found, windows=len(arrivals), at_least=int(self.seconds))
        return _played(node, arrivals, *served)

    def _planned(self, policy: Planned, node: SimulatedNode, seed: int) -> Played:
        node.reset(seed=seed)
        arrivals = node.arrivals_to_come(int(self.seconds) + DRAIN_S)
        limits, clocks_mhz = policy.plan(arrivals[:-1])
        first = node.spec.max_performance  # as ``ControlLoop.reset`` has it
        limits = np.array([first.batch_limit, *limits])
        clocks_mhz = np.array([first.gpu_clock_mhz, *clocks_mhz])
        energy_j = node.play(limits, clocks_mhz, at_least=int(self.seconds))
        return _played(node, arrivals, energy_j, limits, clocks_mhz)


def run_program(
    node: SimulatedNode, p: Program, server: Server, *, windows: int, at_least: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Let a program control a node that was reset: energy (J), batch limits and clocks (MHz) per window."""
    energy_j, limits, rows = np.zeros(windows), np.zeros(windows, np.int64), np.zeros(windows, np.int64)
    s, e, m, clocks = node.inside
    ran = play(s, e, m, clocks, p, server, *room(p), at_least, energy_j, limits, rows)
    return energy_j[:ran], limits[:ran], np.array(node.spec.gpu_clocks_mhz)[rows[:ran]]


def _played(
    node: SimulatedNode,
    arrivals: np.ndarray,
    energy_j: np.ndarray,
    limits: np.ndarray,
    clocks_mhz: np.ndarray,
) -> Played:
    """What a node has just served, which may have ended before the arrivals."""
    ran, (lowest, highest) = len(energy_j), node.spec.batch_limits
    in_force = np.clip(limits[:ran], lowest, highest)
    return Played(
        energy_j,
        arrivals[:ran],
        limits=in_force,
        clocks_mhz=clocks_mhz[:ran],
        records=node.take_records(),
        output_tokens=node.output_tokens,
        preemptions=node.preemptions,
        most_running=node.most_running,
    )


def plays_of(policy: Policy, alone: Sequence[Runs]) -> list[Played]:
    """What a policy does on held-out seeds, each by itself."""
    return [runs.played(policy, seed) for runs in alone for seed in runs.seeds]


def held_out(loop: ControlLoop, seeds: int, *, seconds: float, slos: Mapping[str, Slo]) -> list[Runs]:
    """So many held-out seeds, each by itself."""
    return [Runs(loop, seeds=[HELD_OUT_SEED + k], seconds=seconds, slos=slos) for k in range(seeds)]


def score_of(traces: Sequence[Trace], slo: Slo, *, share: float) -> Score:
    """What these traces amount to."""
    arrivals = max(sum(t.arrivals for t in traces), 1)
    energy_j = float(np.sum([t.energy_j.sum() for t in traces])) / arrivals
    bad = float(np.sum([t.penalty.sum() for t in traces])) / arrivals
    if slo.share is not None:
        return Score(energy_j, 1.0 - bad)
    return Score(energy_j, min(max(1.0, share), share * share / max(bad, 1e-9)))
