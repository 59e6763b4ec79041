"""The least energy that is known for exactly these arrivals: schedules of policies, improved in hindsight."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from fuel_ray.errors import ConfigError
from fuel_ray.sim.hindsight import Moves, episode_of, improve, outcome
from fuel_ray.sim.node import SimulatedNode
from fuel_ray.sim.snapshot import limits_of, new_copy
from fuel_ray.tuning.episodes import DRAIN_S
from fuel_ray.tuning.runs import Runs
from fuel_ray.tuning.search import LIMITS_SCARCE
from fuel_ray.types import Slo

PRICES = 4
# Of the Lagrangian: a pass that gains less is the last. With one more such pass the bound was at most 0.24 %
# lower in two cells (diurnal-scarce and mmpp, tight, 10 seeds, 2026-11-27), for 40 to 50 % more time.
ENOUGH = 5e-4
_PASSES = 12
_SEGMENT_S = 5
_SHIFT_S = 2  # from pass to pass
_HORIZON_S = 6  # after a segment; 12 and 20 found no more, and take longer
_PLACES = (-20, -8, -4, -2, -1, 1, 2, 4, 8, 20)  # among the GPU's clocks
_FIRST_PRICE = 1.0  # by the energy of a request
_STEEP = 2.0  # misses fall about as the square root of the price rises
_WIDEST = 8.0  # step between prices


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A schedule for one seed and what comes of it."""

    knobs: np.ndarray  # (windows, 2) batch limit, index of the clock
    energy_j: float
    requests: int
    met: int

    def lagrangian(self, price_j: float) -> float:
        """Energy with a price on every miss, in J."""
        return self.energy_j + price_j * (self.requests - self.met)


class Hindsight:
    """One seed's arrivals, to be searched at several prices of a miss."""

    def __init__(self, runs: Runs, slo: Slo) -> None:
        """Draw the arrivals of the only seed of ``runs``.

        Raises:
            ConfigError: the node is not a simulated one.
        """
        node, (seed,) = runs.loop.node, runs.seeds
        if not isinstance(node, SimulatedNode):
            raise ConfigError(f"{node.spec.name}: only a simulated node can be searched in hindsight")
        node.reset(seed=seed)
        self._windows, self._clocks_mhz = int(runs.seconds) + DRAIN_S, node.spec.gpu_clocks_mhz
        self._episode = episode_of(node.inside, limits_of(slo), at_least=int(runs.seconds))
        self._state, self._branch = new_copy(node.inside.state), new_copy(node.inside.state)
        lowest, highest = node.spec.batch_limits
        limits = {limit for limit in LIMITS_SCARCE if lowest <= limit < highest} | {highest}
        self._batch_limits = np.array(sorted(limits) if lowest < highest else [], np.int64)

    def chosen(self, schedule: np.ndarray) -> Found:
        """What comes of a batch limit and a clock (MHz) per window, the last ones to the end."""
        rows = schedule[np.minimum(np.arange(self._windows), len(schedule) - 1)]
        clocks = np.searchsorted(self._clocks_mhz, rows[:, 1])
        return self._served(np.stack([rows[:, 0], clocks], axis=1).astype(np.int64))

    def cheapest(self, price_j: float, starts: Sequence[Found]) -> Found:
        """The least Lagrangian found, from the best of ``starts`` and never above it."""
        best = min(starts, key=lambda start: start.lagrangian(price_j))
        for number in range(_PASSES):
            found = self._improved(best, price_j, shift_s=number * _SHIFT_S % _SEGMENT_S)
            gain = 1.0 - found.lagrangian(price_j) / best.lagrangian(price_j)
            best = found if gain > 0 else best
            if gain < ENOUGH:
                break
        return best

    def _improved(self, found: Found, price_j: float, *, shift_s: int) -> Found:
        """What a pass makes of a schedule."""
        knobs = found.knobs.copy()
        moves = Moves(np.array(_PLACES), self._batch_limits, _SEGMENT_S, _HORIZON_S)
        improve(self._episode, self._state, self._branch, knobs, moves, price_j, shift_s)
        return self._served(knobs)

    def _served(self, knobs: np.ndarray) -> Found:
        return Found(knobs, *outcome(self._episode, self._state, knobs))


def hindsight_points(
    alone: Sequence[Runs],
    slo: str,
    schedules: Mapping[str, Sequence[np.ndarray]],
    attained: tuple[float, float],
    *,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Points of least energy around a range of attainment, to be mixed: the bound is their lower hull.

    Each has energy, requests and requests that met the SLO per seed. Those with ``price_j``, one price over
    all seeds, were searched, from what every policy chose on the very seed; the policies' own points follow,
    without a price, so that none lies below the hull. None at all where means have to meet the SLO.
    """
    limits = alone[0].slos[slo]
    if limits.share is None:
        return []
    seeds = [Hindsight(runs, limits) for runs in alone]
    starts = {
        name: [s.chosen(own) for s, own in zip(seeds, per, strict=True)] for name, per in schedules.items()
    }
    known = [list(per_seed) for per_seed in zip(*starts.values(), strict=True)]
    prices: dict[float, float] = {}  # and what was attained
    price_j: float | None = _FIRST_PRICE * min(_energy(per_seed) for per_seed in starts.values())
    while price_j is not None:
        found = [seed.cheapest(price_j, own) for seed, own in zip(seeds, known, strict=True)]
        for own, best in zip(known, found, strict=True):
            own.append(best)
        prices[price_j] = _attained(found)
        at = f"{_energy(found):.2f} J/request, SLO attainment {prices[price_j]:.2%}"
        say(f"hindsight at {price_j:.1f} J a miss: {at}")
        price_j = next_price(prices, attained)
    searched = {p: [min(own, key=lambda f: f.lagrangian(p)) for own in known] for p in sorted(prices)}
    return [_point(price_j, found) for price_j, found in searched.items()] + [
        _point(None, found) for found in starts.values()
    ]


def below(points: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Policies, by their held-out rows, whose Lagrangian is below the bound's at a price: there is none.

    ``points`` are ``hindsight_points``. Whoever is named here makes them no bound.
    """
    searched = [(p["price_j"], _priced(p, p["price_j"])) for p in points if p["price_j"] is not None]
    found = []
    for name in dict.fromkeys(row["policy"] for row in rows):
        own = [row for row in rows if row["policy"] == name]
        met = [row["slo_attainment"] * row["requests"] for row in own]
        point = {key: [row[key] for row in own] for key in ("energy_j", "requests")} | {"met": met}
        if any(_priced(point, price_j) < bound_j * (1.0 - 1e-9) for price_j, bound_j in searched):
            found.append(name)
    return found


def next_price(tried: Mapping[float, float], attained: tuple[float, float]) -> float | None:
    """The price to search at next, given what was attained at others; None: enough are known.

    Prices are added below and above until they bracket the range, and then where two are furthest apart in
    attainment.
    """
    if len(tried) >= PRICES:
        return None
    lowest, highest = min(tried), max(tried)
    if tried[lowest] >= attained[0]:
        return lowest / _factor(1.0 - attained[0], 1.0 - tried[lowest])
    if tried[highest] < attained[1]:
        return highest * _factor(1.0 - tried[highest], 1.0 - attained[1])
    lower, upper = max(pairwise(sorted(tried)), key=lambda pair: tried[pair[1]] - tried[pair[0]])
    return float((lower * upper) ** 0.5)


def _priced(point: Mapping[str, Any], price_j: float) -> float:
    return float(sum(point["energy_j"]) + price_j * (sum(point["requests"]) - sum(point["met"])))


def _factor(more: float, fewer: float) -> float:
    """Of the price, beyond that by which misses fall so far."""
    return float(np.clip(1.5 * (more / max(fewer, 1e-9)) ** _STEEP, 1.5, _WIDEST))


def _energy(found: Sequence[Found]) -> float:
    return sum(f.energy_j for f in found) / max(sum(f.requests for f in found), 1)


def _attained(found: Sequence[Found]) -> float:
    return sum(f.met for f in found) / max(sum(f.requests for f in found), 1)


def _point(price_j: float | None, found: Sequence[Found]) -> dict[str, Any]:
    columns = {name: [getattr(f, name) for f in found] for name in ("energy_j", "requests", "met")}
    return {"price_j": price_j, **columns}
