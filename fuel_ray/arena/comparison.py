"""What a policy did in a cell, against each reference and at equal attainment."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fuel_ray.errors import ConfigError
from fuel_ray.policies.catalogue import REFERENCES, TUNED_STATIC
from fuel_ray.stats import Interval, relative_energy

Rows = Sequence[Mapping[str, Any]]
ORACLE = "oracle"


def summarise(cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per policy, in the order in which they ran: means over seeds, changes of energy in percent.

    A change is energy over the reference's energy less 1, paired by seed, with its 95 % bootstrap interval.
    ``equal_pct`` compares with fixed clocks at the attainment that the policy reached: with the cheapest mix
    of two clocks on the frontier of what they did on the same arrivals; None where no clock got there.
    """
    names = dict.fromkeys(row["policy"] for row in cell["rows"])
    by_policy = {name: [row for row in cell["rows"] if row["policy"] == name] for name in names}
    return [_summary(cell, name, rows, by_policy) for name, rows in by_policy.items()]


def _summary(cell: Mapping[str, Any], name: str, rows: Rows, by_policy: Mapping[str, Rows]) -> dict[str, Any]:
    energy_j = float(sum(row["energy_j"] for row in rows)) / sum(row["requests"] for row in rows)
    attained, static = attainment(rows), by_policy.get(TUNED_STATIC, rows)
    enough = min(cell["share"], attainment(static)) - 0.005
    changes: dict[str, float | None] = {}
    for reference in (*REFERENCES, ORACLE):
        others = () if reference == name else by_policy.get(reference, ())
        own_j, others_j = ({row["seed"]: row["energy_j"] for row in by_seed} for by_seed in (rows, others))
        changes |= _percent(f"vs_{reference}", relative_energy(own_j, others_j))
    equal_j = None
    if cell["limits"]["share"] is not None:
        equal_j = _frontier_energy([*cell["frontier"], _as_fixed_pair(static)], attained)
    return {
        "scenario": cell["scenario"],
        "slo": cell["slo"],
        "policy": name,
        "n": len(rows),
        "energy_j_per_request": energy_j,
        "slo_attainment": attained,
        "kept": attained >= enough or bool(all(row["slo_met"] for row in rows)),
        "equal_pct": None if equal_j is None else 100 * (energy_j / equal_j - 1),
        "clock_switches": float(np.mean([row["clock_switches"] for row in rows])),
        "mean_gpu_clock_mhz": float(np.mean([row["mean_gpu_clock_mhz"] for row in rows])),
        **changes,
    }


def attainment(rows: Rows) -> float:
    """Share of all requests that met the SLO.

    Raises:
        ConfigError: there was no request, so there is nothing to compare.
    """
    shares, requests = ([row[name] for row in rows] for name in ("slo_attainment", "requests"))
    if not sum(requests):
        raise ConfigError("no request was finished in these episodes: longer ones, or a load that has some")
    return float(np.average(shares, weights=requests))


def _percent(name: str, ratio: Interval | None) -> dict[str, float | None]:
    parts = (f"{name}_pct", f"{name}_low", f"{name}_high")
    values = (None, None, None) if ratio is None else (ratio.mean, ratio.low, ratio.high)
    return {part: None if v is None else 100 * (v - 1) for part, v in zip(parts, values, strict=True)}


def _as_fixed_pair(rows: Rows) -> dict[str, list[float]]:
    """Rows of a fixed pair in the form of the frontier."""
    return {
        "energy_j": [row["energy_j"] for row in rows],
        "requests": [row["requests"] for row in rows],
        "badness": [(1 - row["slo_attainment"]) * row["requests"] for row in rows],
    }


def _frontier_energy(frontier: Sequence[Mapping[str, Any]], attained: float) -> float | None:
    """Least J per request of fixed pairs, mixed in time, that reach this attainment; None if none does."""
    totals = [(sum(f["requests"]), sum(f["badness"]), sum(f["energy_j"])) for f in frontier]
    points = sorted((1 - missed / requests, energy_j / requests) for requests, missed, energy_j in totals)
    above = [(share, energy_j) for share, energy_j in points if share >= attained]
    if not above:
        return None
    best = min(energy_j for _, energy_j in above)
    below = [(share, energy_j) for share, energy_j in points if share < attained and energy_j < best]
    mixes = [
        low_j + (high_j - low_j) * (attained - low) / (high - low)
        for low, low_j in below
        for high, high_j in above
    ]
    return min([best, *mixes])
