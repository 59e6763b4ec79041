"""From cells to figures: paired differences with intervals, energy at equal attainment, regret."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fuel_ray.stats import Interval, paired_ratio

Cell = Mapping[str, Any]
REFERENCES = ("max performance", "tuned static", "load table", "oracle")


def summarise(cell: Cell) -> list[dict[str, Any]]:
    """One row per policy, in the order in which they ran: means over seeds, changes of energy in percent.

    A change is energy over the reference's energy less 1, paired by seed, with its 95 % bootstrap interval.
    ``equal_pct`` compares with fixed clocks at the attainment that the policy reached: with the cheapest mix
    of two clocks on the frontier of what they did on the same arrivals; None where no clock got there.
    """
    by_policy: dict[str, list[Mapping[str, Any]]] = {}
    for row in cell["rows"]:
        by_policy.setdefault(row["policy"], []).append(row)
    return [_summary(cell, name, rows, by_policy) for name, rows in by_policy.items()]


def _summary(
    cell: Cell,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    by_policy: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    energy_j = float(sum(row["energy_j"] for row in rows)) / sum(row["requests"] for row in rows)
    attained = float(np.average([r["slo_attainment"] for r in rows], weights=[r["requests"] for r in rows]))
    changes = {
        f"vs_{reference.replace(' ', '_')}": None
        if reference == name
        else _change(rows, by_policy.get(reference, ()))
        for reference in REFERENCES
    }
    static = by_policy.get("tuned static", rows)
    static_attained = float(
        np.average([r["slo_attainment"] for r in static], weights=[r["requests"] for r in static])
    )
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
        "kept": attained >= min(cell["share"], static_attained) - 0.005
        or bool(all(r["slo_met"] for r in rows)),
        "equal_pct": None if equal_j is None else 100 * (energy_j / equal_j - 1),
        "clock_switches": float(np.mean([row["clock_switches"] for row in rows])),
        "mean_gpu_clock_mhz": float(np.mean([row["mean_gpu_clock_mhz"] for row in rows])),
        **{f"{key}_{part}": value for key, c in changes.items() for part, value in _percent(c).items()},
    }


def _as_fixed_pair(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Rows of a fixed pair in the form of the frontier."""
    return {
        "energy_j": [row["energy_j"] for row in rows],
        "requests": [row["requests"] for row in rows],
        "badness": [(1 - row["slo_attainment"]) * row["requests"] for row in rows],
    }


def _change(rows: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]) -> Interval | None:
    own = {row["seed"]: row["energy_j"] for row in rows}
    other = {row["seed"]: row["energy_j"] for row in reference}
    seeds = sorted(own.keys() & other.keys())
    if not seeds:
        return None
    return paired_ratio(
        [own[seed] for seed in seeds], [other[seed] for seed in seeds], rng=np.random.default_rng(0)
    )


def _percent(ratio: Interval | None) -> dict[str, float | None]:
    parts = ("pct", "low", "high")
    values = (None, None, None) if ratio is None else (ratio.mean, ratio.low, ratio.high)
    return {part: None if v is None else 100 * (v - 1) for part, v in zip(parts, values, strict=True)}


def _frontier_energy(frontier: Sequence[Mapping[str, Any]], attained: float) -> float | None:
    """Least J per request of fixed pairs, mixed in time, that reach this attainment; None if none does."""
    points = sorted(
        (1 - sum(f["badness"]) / sum(f["requests"]), sum(f["energy_j"]) / sum(f["requests"]))
        for f in frontier
    )
    enough = [energy_j for share, energy_j in points if share >= attained]
    if not enough:
        return None
    best = min(enough)
    below = [(share, energy_j) for share, energy_j in points if share < attained and energy_j < best]
    above = [(share, energy_j) for share, energy_j in points if share >= attained]
    mixes = [
        low_j + (high_j - low_j) * (attained - low) / (high - low)
        for low, low_j in below
        for high, high_j in above
    ]
    return min([best, *mixes])


SHOWN = (
    ("J/req", "energy_j_per_request", "{:.1f}"),
    ("of SLO", "slo_attainment", "{:.3f}"),
    ("vs max", "vs_max_performance", "{:+.1f}"),
    ("vs tuned static (95 %)", "vs_tuned_static", "interval"),
    ("equal SLO", "equal_pct", "{:+.1f}"),
    ("vs table", "vs_load_table", "{:+.1f}"),
    ("vs oracle", "vs_oracle", "{:+.1f}"),
    ("switches", "clock_switches", "{:.0f}"),
)


def markdown(summaries: Sequence[Mapping[str, Any]]) -> str:
    """One table per promise and scenario."""
    lines: list[str] = []
    for key in dict.fromkeys((row["slo"], row["scenario"]) for row in summaries):
        rows = [row for row in summaries if (row["slo"], row["scenario"]) == key]
        lines += ["", f"**{key[1]}, {key[0]} SLO** (n = {rows[0]['n']}, energy in %)", ""]
        lines += [
            "| policy | " + " | ".join(title for title, _, _ in SHOWN) + " |",
            "|---|" + "--:|" * len(SHOWN),
        ]
        lines += [
            f"| {row['policy']} | " + " | ".join(_shown(row, *s[1:]) for s in SHOWN) + " |" for row in rows
        ]
    return "\n".join(lines[1:])


def _shown(row: Mapping[str, Any], name: str, form: str) -> str:
    value = row[f"{name}_pct"] if name.startswith("vs_") else row[name]
    if value is None:
        return "-"
    if form != "interval":
        return form.format(value) + ("" if name != "slo_attainment" or row["kept"] else " !")
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{value:+.1f}" if low is None else f"{value:+.1f} ({low:+.1f}..{high:+.1f})"


def headline(summaries: Sequence[Mapping[str, Any]], policy: str) -> str:
    """One row per workload for one policy, beside the references."""
    lines = [
        f"| {policy} | max J | static J (SLO) | table % (SLO) | **{policy} %** (95 %) | SLO | "
        "equal SLO | vs table | vs oracle | vs max |",
        "|---|" + "--:|" * 9,
    ]
    for key in dict.fromkeys((row["slo"], row["scenario"]) for row in summaries):
        rows = {row["policy"]: row for row in summaries if (row["slo"], row["scenario"]) == key}
        if policy not in rows:
            continue
        fastest, static, table = (rows[name] for name in REFERENCES[:3])
        own = [_shown(rows[policy], *SHOWN[k][1:]) for k in (3, 1, 4, 5, 6, 2)]
        lines.append(
            f"| {key[1]}, {key[0]} | {fastest['energy_j_per_request']:.1f} | "
            f"{static['energy_j_per_request']:.1f} ({static['slo_attainment']:.3f}) | "
            f"{table['vs_tuned_static_pct']:+.1f} ({table['slo_attainment']:.3f}) | " + " | ".join(own) + " |"
        )
    return "\n".join(lines)


def text(summaries: Sequence[Mapping[str, Any]]) -> str:
    """The same for a terminal."""
    lines: list[str] = []
    for key in dict.fromkeys((row["slo"], row["scenario"]) for row in summaries):
        rows = [row for row in summaries if (row["slo"], row["scenario"]) == key]
        head = "".join(f"{title:>{_WIDTH[title]}}" for title, _, _ in SHOWN)
        title = f"{key[1]}, {key[0]} SLO, n = {rows[0]['n']}"
        lines += ["", f"{title:<34}{head}"]
        for row in rows:
            lines.append(
                f"  {row['policy']:<32}" + "".join(f"{_shown(row, *s[1:]):>{_WIDTH[s[0]]}}" for s in SHOWN)
            )
    return "\n".join(lines[1:])


_WIDTH = {title: 26 if form == "interval" else max(len(title), 7) + 2 for title, _, form in SHOWN}
