"""What a policy did in a cell, against each reference and at equal attainment."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from fuel_ray.errors import ConfigError
from fuel_ray.policies.catalogue import JUDGED_BY, REFERENCES, TUNED_STATIC
from fuel_ray.stats import Interval, relative_energy

Rows = Sequence[Mapping[str, Any]]
ORACLE = "oracle"
_Measure = Callable[[Mapping[str, Rows]], float | None]  # of one clock axis, by policy


def summarise(cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per policy, in the order in which they ran: means over seeds, changes of energy in percent.

    A change is energy over the reference's energy less 1, paired by seed, with its 95 % bootstrap interval.
    ``equal_pct`` compares with fixed clocks at the attainment that the policy reached: with the cheapest mix
    of two clocks on the frontier of what they did on the same arrivals; None where no clock got there.
    ``..._axis_low`` and ``..._axis_high`` are the least and the most under any clock axis of the pack: the
    figure of all seeds and what each axis changes of it on its own, fewer ones. None where only one axis was
    evaluated.
    """
    by_policy = _by_policy(cell["rows"])
    axes = [_by_policy(rows) for rows in cell.get("axes", {}).values()]
    floor = _at_lowest_clock(cell, by_policy)
    return [
        {
            **_summary(cell, name, rows, by_policy),
            **_bands(name, by_policy, [axis for axis in axes if name in axis]),
            "floor_mhz": floor.get(name),
        }
        for name, rows in by_policy.items()
    ]


def _by_policy(rows: Rows) -> dict[str, Rows]:
    names = dict.fromkeys(row["policy"] for row in rows)
    return {name: [row for row in rows if row["policy"] == name] for name in names}


def _at_lowest_clock(cell: Mapping[str, Any], by_policy: Mapping[str, Rows]) -> dict[str, int]:
    """The node's lowest clock by policies that never left it, if tuned static is one of them."""
    lowest_mhz = cell.get("lowest_clock_mhz")
    if lowest_mhz is None or cell["static"]["gpu_clock_mhz"] != lowest_mhz or TUNED_STATIC not in by_policy:
        return {}
    means = {
        name: float(np.mean([row["mean_gpu_clock_mhz"] for row in rows])) for name, rows in by_policy.items()
    }  # of whole episodes, the first window at the highest clock included
    return {name: lowest_mhz for name, mean in means.items() if abs(mean - means[TUNED_STATIC]) < 1.0}


def _bands(name: str, own: Mapping[str, Rows], axes: Sequence[Mapping[str, Rows]]) -> dict[str, float | None]:
    """Lowest and highest change against each reference, and attainment, over the clock axes."""
    measures: dict[str, _Measure] = {
        f"vs_{reference}": partial(_change, name, reference) for reference in JUDGED_BY
    }
    measures["slo_attainment"] = lambda by_policy: attainment(by_policy[name])
    bands: dict[str, float | None] = {}
    for key, measure in measures.items():
        figures = [figure for axis in axes if (figure := _shifted(measure, own, axis)) is not None]
        figures += [figure for figure in [measure(own)] if figure is not None and figures]
        if key == "slo_attainment":
            figures = [min(max(figure, 0.0), 1.0) for figure in figures]
        bands |= {
            f"{key}_axis_low": min(figures, default=None),
            f"{key}_axis_high": max(figures, default=None),
        }
    return bands


def _change(name: str, reference: str, by_policy: Mapping[str, Rows]) -> float | None:
    """Of energy, in percent; None against itself or where either has not played."""
    ratio = _ratio(by_policy[name], by_policy.get(reference, ())) if name != reference else None
    return None if ratio is None else 100 * (ratio.mean - 1)


def _shifted(measure: _Measure, own: Mapping[str, Rows], axis: Mapping[str, Rows]) -> float | None:
    """The figure of all seeds, moved by what the axis makes of it on those seeds that it was played on."""
    seeds = {row["seed"] for rows in axis.values() for row in rows}
    same = {name: [row for row in rows if row["seed"] in seeds] for name, rows in own.items()}
    figures = [measure(by_policy) for by_policy in (own, axis, same)]
    if None in figures:
        return None
    on_all, under, on_same = (figure for figure in figures if figure is not None)
    return on_all + under - on_same


def _summary(cell: Mapping[str, Any], name: str, rows: Rows, by_policy: Mapping[str, Rows]) -> dict[str, Any]:
    energy_j = float(sum(row["energy_j"] for row in rows)) / sum(row["requests"] for row in rows)
    attained, static = attainment(rows), by_policy.get(TUNED_STATIC, rows)
    enough = min(cell["share"], attainment(static)) - 0.005
    changes: dict[str, float | None] = {}
    for reference in (*REFERENCES, ORACLE):
        others = () if reference == name else by_policy.get(reference, ())
        changes |= _percent(f"vs_{reference}", _ratio(rows, others))
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


def _ratio(rows: Rows, others: Rows) -> Interval | None:
    """Energy by the others', paired by seed."""
    own_j, others_j = ({row["seed"]: row["energy_j"] for row in by_seed} for by_seed in (rows, others))
    return relative_energy(own_j, others_j)


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
