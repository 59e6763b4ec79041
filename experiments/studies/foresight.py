"""How much of the search in hindsight is knowledge of who arrives in the next seconds.

    python experiments/studies/foresight.py [--scenario diurnal-scarce] [--slo tight] [--seeds 10]
        [--futures 10] [--horizon 8] [--workers 2] [--no-bound] [--out FILE]

In every window clocks up to 300 MHz around the best simple rule's are tried on copies of the simulated
engine: one is held for a window and the rule goes on, for 8 s together, and the one of least energy + price x
misses is taken. "Knowing" sees the requests that do arrive. The others see the state of the engine as well,
and how many arrive in each second on average, but of who arrives only futures drawn anew from the load: that
much a controller that is no prophet could know. Four prices of a miss bracket what the best simple rule
attains, as in the search in hindsight, and energies are compared at that attainment (``arena.equal``).
Resampled futures know nothing of a hidden state of the load, such as which rate MMPP is at: take loads whose
rate is a function of time.

It asks what a policy could still gain that does not know the future. It takes, estimated, per seed and price
1.5 CPU seconds for knowing and 12 for ten futures (4 prices each), 2 minutes for the rules and 4 for the
bound: about 15 CPU minutes with ten seeds. ``--seconds 60 --seeds 3 --tuning-seeds 1 --futures 2`` shows that
it runs.

What to expect (docs/arena.md, 2026-11-27, default workload, tight, n = 10): against the load table at equal
attainment, knowing -8.7 %, ten resampled futures +2.0 %, the search in hindsight -14.5 %.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from importance import Bench, arguments, at_equal, bench_of, say

from fuel_ray.arena.equal import Sweep, sweep_of
from fuel_ray.arena.pool import in_processes
from fuel_ray.policies.anchor import at_work
from fuel_ray.sim import scheduler as rules
from fuel_ray.sim.branches import soft_missed
from fuel_ray.sim.choice import choose, look
from fuel_ray.sim.closed_loop import run_window
from fuel_ray.sim.compilation import kept
from fuel_ray.sim.node import SimulatedNode
from fuel_ray.sim.pack import Constants
from fuel_ray.sim.program import SIGHT, Program, Server
from fuel_ray.sim.scheduler import Engine, State
from fuel_ray.sim.snapshot import Limits, copy_state, limits_of, met, new_copy
from fuel_ray.tuning.episodes import DRAIN_S
from fuel_ray.tuning.hindsight import hindsight_points, next_price
from fuel_ray.tuning.runs import plays_of
from fuel_ray.tuning.search import SLACK

SOFT = 0.03  # share of a limit around it over which a request counts as missed in part, as in training
PLACES = (0, -4, 4, -8, 8, -12, 12, -16, 16, -20, 20)  # of 15 MHz
FIRST_FUTURE = 3_000_000  # seed of what is drawn anew; neither a tuning nor a held-out one


class Twin(NamedTuple):
    """A server, the rule on it and what is promised."""

    engine: Engine
    constants: Constants
    clocks: np.ndarray
    program: Program
    server: Server
    limits: Limits


class Search(NamedTuple):
    """What is tried in each window."""

    places: np.ndarray  # among the clocks, from the rule's own: 0 first
    hold: int  # windows
    horizon: int  # windows
    price_j: float  # of a miss


class Futures(NamedTuple):
    """Requests that may come, k draws of a whole episode; the last row of each never arrives."""

    request: np.ndarray  # (k, n, columns of State.request)
    time_s: np.ndarray  # (k, n, columns of State.time_s)
    seen_s: np.ndarray  # (k, n) when they reach the engine


@kept()
def search(
    s: State, other: State, t: Twin, how: Search, futures: Futures, at_least: int, served: np.ndarray
) -> int:
    """Play an episode; fills ``served`` with energy (J), batch limits and rows of clocks; how many windows.

    ``other`` is a copy of the state that has room for the longest request of the futures.
    """
    sight, aside, hidden = np.zeros(SIGHT), np.zeros(SIGHT), np.zeros((3, 1))
    limit, row = t.engine.max_num_seqs, len(t.clocks) - 1
    for k in range(served.shape[1]):
        run_window(s, t.engine, t.constants, t.clocks, limit, row)
        served[0, k], served[1, k], served[2, k] = s.clock[rules.ENERGY], limit, row
        look(s, t.engine, sight, limit, t.clocks[row, 0])
        busy = s.count[rules.RUNNING] + s.count[rules.PREEMPTED]
        if k + 1 >= at_least and busy + s.count[rules.ARRIVED] == s.count[rules.ADMITTED]:
            return k + 1
        limit, own = choose(t.program, sight, t.server, t.clocks, hidden)
        row, least_j = own, np.inf
        for place in how.places:
            tried = own + place
            if tried < 0 or tried >= len(t.clocks):
                continue
            cost_j = 0.0
            for future in range(len(futures.seen_s)):
                if cost_j < least_j:  # a cost only grows
                    first = copy_state(other, s)
                    _expect(other, s, futures, future, how.horizon)
                    aside[:] = sight
                    cost_j += _cost(other, first, t, how, aside, hidden, limit, tried)
            if cost_j < least_j:
                row, least_j = tried, cost_j
    return served.shape[1]


@kept()
def _expect(other: State, s: State, futures: Futures, future: int, horizon: int) -> None:
    """Let a future's requests come after those that the engine knows of."""
    for i in range(s.count[rules.ADMITTED], s.count[rules.ARRIVED]):
        other.request[i], other.time_s[i] = s.request[i], s.time_s[i]
    seen_s, now_s = futures.seen_s[future], s.clock[rules.NOW]
    j = np.searchsorted(seen_s, now_s, side="right")
    for i in range(s.count[rules.ARRIVED], len(other.request)):
        other.request[i], other.time_s[i] = futures.request[future, j], futures.time_s[future, j]
        if seen_s[j] > now_s + horizon + 1.0:
            break
        j += 1


@kept()
def _cost(
    other: State,
    first: int,
    t: Twin,
    how: Search,
    sight: np.ndarray,
    hidden: np.ndarray,
    limit: int,
    row: int,
) -> float:
    """Energy and priced misses (J) if a clock is held and the rule goes on."""
    energy_j = 0.0
    for k in range(how.horizon):
        if k >= how.hold:
            limit, row = choose(t.program, sight, t.server, t.clocks, hidden)
        run_window(other, t.engine, t.constants, t.clocks, limit, row)
        look(other, t.engine, sight, limit, t.clocks[row, 0])
        energy_j += other.clock[rules.ENERGY]
    return energy_j + how.price_j * soft_missed(other, first, t.limits, SOFT)


def futures_of(node: SimulatedNode, seeds: Sequence[int]) -> tuple[Futures, int]:
    """What these seeds draw, and the blocks of the longest request."""
    states = []
    for seed in seeds:
        node.reset(seed=seed)
        states.append(node.inside.state)
    if any((state.request[:, rules.PREFIX_ID] >= 0).any() for state in states):
        raise SystemExit("requests that share prefixes cannot be drawn anew")
    n = 1 + max(len(state.request) for state in states)
    request = np.zeros((len(states), n, states[0].request.shape[1]), np.int64)
    time_s = np.full((len(states), n, 4), rules.NEVER)
    time_s[:, :, rules.ARRIVAL] = np.inf
    for k, state in enumerate(states):
        request[k, : len(state.request)], time_s[k, : len(state.request)] = state.request, state.time_s
    seen_s = time_s[:, :, rules.ARRIVAL] + node.inside.constants.frontend_in_s
    return Futures(request, time_s, seen_s), max(state.table.shape[1] for state in states)


def searched(place: int, bench: Bench, how: Search, drawn: int) -> tuple[int, dict[str, Any]]:
    """What the search does on a held-out seed, with futures drawn anew or, where there is none, knowing."""
    runs = bench.alone[place]
    node, (seed,), slo = runs.loop.node, runs.seeds, runs.slos[bench.slo]
    assert isinstance(node, SimulatedNode)
    first = FIRST_FUTURE + drawn * place
    futures, blocks = futures_of(node, range(first, first + drawn) if drawn else [seed])
    node.reset(seed=seed)
    s, *engine = node.inside
    rule = at_work(bench.base.rule, node.spec, slo).compiled(node.spec)
    assert rule is not None, "simple rules can be compiled"
    twin, served = Twin(*engine, *rule, limits_of(slo)), np.zeros((3, int(runs.seconds) + DRAIN_S))
    table = np.zeros((len(s.table), max(blocks, s.table.shape[1])), np.int64)
    ran = search(s, new_copy(s)._replace(table=table), twin, how, futures, int(runs.seconds), served)
    energy_j, batch_limits, rows = served[:, :ran]
    clocks_mhz = np.array(node.spec.gpu_clocks_mhz)[rows.astype(int)]
    return place, {
        "energy_j": float(energy_j.sum()),
        "requests": int(s.count[rules.ARRIVED]),
        "met": met(s, twin.limits),
        "schedule": np.stack([batch_limits, clocks_mhz], axis=1).astype(np.int64),
    }


def points(bench: Bench, given: argparse.Namespace, drawn: int) -> list[dict[str, Any]]:
    """What the search does at prices around what the rule attains: a value per held-out seed."""
    price_j: float | None = bench.rule.energy_at(bench.attained, bench.rule.seeds)
    tried: dict[float, float] = {}
    found = []
    while price_j is not None:
        how = Search(np.array(PLACES), given.hold, given.horizon, price_j)
        jobs = [(k, bench, how, drawn) for k in range(len(bench.alone))]
        by_seed = dict(in_processes(searched, jobs, workers=given.workers))
        point = {name: [by_seed[k][name] for k in sorted(by_seed)] for name in by_seed[0]}
        found.append(point)
        tried[price_j] = sum(point["met"]) / sum(point["requests"])
        price_j = next_price(tried, (bench.attained - SLACK, bench.attained + SLACK))
    return found


def row(name: str, own: Sweep, bench: Bench) -> str:
    """Energy where the rule is, the attainments of the settings, and the change with its interval."""
    attained = own.attained(own.seeds)
    at_j = own.energy_at(min(bench.attained, bench.rule.enough), own.seeds)
    return (
        f"| {name} | {at_j:.2f} | {attained.min():.3f}..{attained.max():.3f} | {at_equal(own, bench.rule)} |"
    )


def main() -> None:
    flags = arguments()
    flags.add_argument("--futures", type=int, nargs="+", default=[10], help="drawn anew in each window")
    flags.add_argument("--hold", type=int, default=1, help="windows for which a clock is held")
    flags.add_argument("--horizon", type=int, default=8, help="windows after which clocks are compared")
    flags.add_argument("--bound", action=argparse.BooleanOptionalAction, default=True)
    given = flags.parse_args()
    bench, tell = bench_of(given), partial(say, given.out)
    where = f"{given.scenario}, {given.slo} SLO"
    best = f"best simple rule: {bench.name}, {bench.attained:.3f} of SLO"
    tell(f"**{where}** (n = {len(bench.alone)}, modelled; {best}; 95 % intervals)\n")
    tell("| | J/req where the rule is | settings' of SLO | iso best rule, % |\n|---|--:|--:|--:|")
    tell(row(bench.name, bench.rule, bench))
    spec, slo = bench.tuning.loop.node.spec, bench.tuning.slos[bench.slo]
    by_rule = plays_of(at_work(bench.base.rule, spec, slo), bench.alone)
    schedules = {bench.name: [own.schedule for own in by_rule]}
    for drawn in (*given.futures, 0):
        name = f"one step, {drawn} futures drawn anew" if drawn else "one step, knowing who comes"
        found = points(bench, given, drawn)
        schedules |= {f"{name}, {k}": own["schedule"] for k, own in enumerate(found)}
        tell(row(name, sweep_of(found), bench))
    if given.bound:
        around = (bench.attained - SLACK, bench.attained + SLACK)
        bound = hindsight_points(bench.alone, bench.slo, schedules, around)
        tell(row("search in hindsight", sweep_of(bound), bench))


if __name__ == "__main__":
    main()
