"""What a policy did in a cell, against each reference: as they were tuned, and at equal attainment."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fuel_ray.arena.equal import Iso, Rows, Sweep, captured, enough, iso, raw, setting_of, sweep_of
from fuel_ray.errors import ConfigError
from fuel_ray.policies.catalogue import BEST_RULE, LOAD_TABLE, REFERENCES, TUNED_STATIC
from fuel_ray.stats import Interval

ORACLE = "oracle"
_TRAINING = re.compile(r"#\d+")


@dataclass(frozen=True, slots=True)
class _Side:
    """What everybody did under one clock axis, by name: as tuned, and at all settings."""

    rows: Mapping[str, Rows]
    sweeps: Mapping[str, Sweep]

    def rows_of(self, names: Sequence[str]) -> Rows:
        """Of several trainings."""
        return [row for name in names for row in self.rows[name]]

    def first(self, n: int) -> "_Side":
        """On the first seeds alone."""
        rows = {name: own[:n] for name, own in self.rows.items()}
        return _Side(rows, {name: own.first(n) for name, own in self.sweeps.items()})


_Measure = Callable[[_Side], float | None]


def summarise(cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per policy, in the order in which they ran; changes of energy are in percent.

    ``vs_...`` is energy over the reference's less 1, both as tuned for the share that was asked. ``iso_...``
    is that at the attainment that the reference reached, between the settings of each; with a mark where
    the policy falls short of it. Intervals are 95 % over seeds, and over trainings where there are several:
    entries NAME#0, NAME#1 are trainings of NAME and make one row. ``seeds_only`` says that one training
    stands for all. ``captured_pct`` is the share of what the search in hindsight leaves below the best simple
    rule. ``..._axis_low`` and ``..._axis_high`` are the least and the most under any clock axis of the pack:
    the figure of all seeds and what each axis changes of it on its own, fewer ones. None where only one axis
    was evaluated.

    Raises:
        ConfigError: the cell is of a version that did not sweep.
    """
    if "swept" not in cell:
        where = f"cell {cell['scenario']}, {cell['slo']}"
        raise ConfigError(f"{where}: written by an older version; run the arena again")
    trainings = trainings_of(row["policy"] for row in cell["rows"])
    most = enough(cell["share"], of_means=cell["limits"]["share"] is None)
    side = _side(cell["rows"], cell["swept"], most)
    axes = [_side(cell["axes"][axis], cell["swept_axes"][axis], most) for axis in cell.get("axes", {})]
    best = cell.get(BEST_RULE, LOAD_TABLE)
    floor = _at_lowest_clock(cell, {name: side.rows_of(names) for name, names in trainings.items()})
    bound = sweep_of(cell["hindsight"]) if cell.get("hindsight") else side.sweeps.get(ORACLE)
    return [
        {
            **_summary(cell, name, side.rows_of(names), side),
            **_training_facts(cell, names),
            **_changes(names, best, side, bound),
            **_bands(names, best, side, [axis for axis in axes if set(names) <= set(axis.sweeps)]),
            "floor_mhz": floor.get(name),
        }
        for name, names in trainings.items()
    ]


def trainings_of(names: Iterable[str]) -> dict[str, list[str]]:
    """The entries of each policy: several trainings of it, or itself."""
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        found.setdefault(_TRAINING.sub("", name), []).append(name)
    return found


def _side(rows: Rows, swept: Mapping[str, Rows], most: float) -> _Side:
    names = dict.fromkeys(row["policy"] for row in rows)
    by_policy = {name: [row for row in rows if row["policy"] == name] for name in names}
    settings = {name: swept.get(name) or [setting_of(own)] for name, own in by_policy.items()}
    return _Side(by_policy, {name: sweep_of(own, enough=most) for name, own in settings.items()})


def _at_lowest_clock(cell: Mapping[str, Any], by_policy: Mapping[str, Rows]) -> dict[str, int]:
    """The node's lowest clock by policies that never left it, if tuned static is one of them."""
    lowest_mhz = cell.get("lowest_clock_mhz")
    if lowest_mhz is None or cell["static"]["gpu_clock_mhz"] != lowest_mhz or TUNED_STATIC not in by_policy:
        return {}
    means = {
        name: float(np.mean([row["mean_gpu_clock_mhz"] for row in rows])) for name, rows in by_policy.items()
    }  # of whole episodes, the first window at the highest clock included
    return {name: lowest_mhz for name, mean in means.items() if abs(mean - means[TUNED_STATIC]) < 1.0}


def _summary(cell: Mapping[str, Any], name: str, rows: Rows, side: _Side) -> dict[str, Any]:
    static = side.rows.get(TUNED_STATIC, rows)
    attained = attainment(rows)
    enough = min(cell["share"], attainment(static)) - 0.005
    return {
        "scenario": cell["scenario"],
        "slo": cell["slo"],
        "policy": name,
        BEST_RULE: cell.get(BEST_RULE),
        "n": len({row["seed"] for row in rows}),
        "energy_j_per_request": sum(row["energy_j"] for row in rows) / sum(row["requests"] for row in rows),
        "slo_attainment": attained,
        "kept": attained >= enough or bool(all(row["slo_met"] for row in rows)),
        "clock_switches": float(np.mean([row["clock_switches"] for row in rows])),
        "mean_gpu_clock_mhz": float(np.mean([row["mean_gpu_clock_mhz"] for row in rows])),
    }


def _training_facts(cell: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """How many trainings the figures are of; None of what is not trained."""
    learned = set(names) <= set(cell.get("learned", ()))
    return {"trainings": len(names) if learned else None, "seeds_only": learned and len(names) == 1}


def _changes(names: Sequence[str], best: str, side: _Side, bound: Sweep | None) -> dict[str, Any]:
    own = [side.sweeps[name] for name in names]
    changes: dict[str, Any] = {}
    for column, reference in _raw_columns(best).items():
        other = _other(names, reference, side)
        changes |= _percent(column, None if other is None else raw(own, other))
    for column, reference in _iso_columns(best).items():
        other = _other(names, reference, side)
        found = Iso(None) if other is None else iso(own, other)
        changes |= {**_percent(column, found.ratio), f"{column}_mark": found.mark}
    bound_pct = share = None
    if bound is not None and best in side.sweeps:
        bound_pct = _percent("bound", iso([bound], side.sweeps[best]).ratio)["bound_pct"]
        share = None if names == [ORACLE] else captured(own, side.sweeps[best], bound)
    return changes | {"bound_pct": bound_pct, "captured_pct": None if share is None else 100 * share}


def _raw_columns(best: str) -> dict[str, str]:
    """Columns of changes as tuned, and whom each is against."""
    return {f"vs_{BEST_RULE}": best} | {f"vs_{name}": name for name in REFERENCES}


def _iso_columns(best: str) -> dict[str, str]:
    """The same of changes at equal attainment."""
    return {f"iso_{BEST_RULE}": best, f"iso_{TUNED_STATIC}": TUNED_STATIC, f"iso_{LOAD_TABLE}": LOAD_TABLE}


def _other(names: Sequence[str], reference: str, side: _Side) -> Sweep | None:
    """The reference, if it has played and is not the policy itself."""
    return None if reference in names else side.sweeps.get(reference)


def _bands(names: Sequence[str], best: str, own: _Side, axes: Sequence[_Side]) -> dict[str, float | None]:
    """Lowest and highest change against each reference, and attainment, over the clock axes."""
    measures: dict[str, _Measure] = {
        column: partial(_raw_pct, names, other) for column, other in _raw_columns(best).items()
    }
    measures |= {column: partial(_iso_pct, names, other) for column, other in _iso_columns(best).items()}
    measures["slo_attainment"] = lambda side: attainment(side.rows_of(names))
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


def _raw_pct(names: Sequence[str], reference: str, side: _Side) -> float | None:
    other = _other(names, reference, side)
    if other is None:
        return None
    return 100 * (sum(_nominal_j(side.sweeps[name]) for name in names) / len(names) / _nominal_j(other) - 1)


def _nominal_j(sweep: Sweep) -> float:
    return float(sweep.energy_j[0].sum())


def _iso_pct(names: Sequence[str], reference: str, side: _Side) -> float | None:
    other = _other(names, reference, side)
    if other is None:
        return None
    found = iso([side.sweeps[name] for name in names], other, interval=False).ratio
    return None if found is None else 100 * (found.mean - 1)


def _shifted(measure: _Measure, own: _Side, axis: _Side) -> float | None:
    """The figure of all seeds, moved by what the axis makes of it on the first ones, which it has."""
    (n,) = {len(sweep.seeds) for sweep in axis.sweeps.values()}
    figures = [measure(side) for side in (own, axis, own.first(n))]
    if None in figures:
        return None
    on_all, under, on_same = (figure for figure in figures if figure is not None)
    return on_all + under - on_same


def attainment(rows: Rows) -> float:
    """Share of all requests that met the SLO.

    Raises:
        ConfigError: there was no request, so there is nothing to compare.
    """
    shares, requests = ([row[name] for row in rows] for name in ("slo_attainment", "requests"))
    if not sum(requests):
        raise ConfigError(
            "no request finished in these episodes: raise --seconds, or give a --workload with more requests"
        )
    return float(np.average(shares, weights=requests))


def _percent(name: str, ratio: Interval | None) -> dict[str, float | None]:
    parts = (f"{name}_pct", f"{name}_low", f"{name}_high")
    values = (None, None, None) if ratio is None else (ratio.mean, ratio.low, ratio.high)
    return {part: None if v is None else 100 * (v - 1) for part, v in zip(parts, values, strict=True)}
