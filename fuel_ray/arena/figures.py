"""The arena's pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fuel_ray.arena.comparison import ORACLE
from fuel_ray.disk import whole
from fuel_ray.policies.catalogue import MAX_PERFORMANCE, color, label

_WIDEST = 15.0  # percent; beyond it only the direction is drawn


def draw(summaries: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write ``savings_SLO.png``: energy at equal attainment per workload and policy, with intervals."""
    for slo in dict.fromkeys(row["slo"] for row in summaries):
        rows = [row for row in summaries if row["slo"] == slo]
        title = f"{slo} SLO: energy vs the best simple rule, at equal attainment (95 % intervals)"
        with whole(folder / f"savings_{slo}.png", "wb") as file:
            _forest(rows, title).savefig(file, format="png", dpi=110)


def _forest(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    present = dict.fromkeys(row["policy"] for row in rows)
    policies = [name for name in present if name not in (MAX_PERFORMANCE, ORACLE)]
    height = 1.6 + max(0.1 * len(policies), 0.5) * len(scenarios)
    figure = Figure(figsize=(11, height), layout="constrained")
    axes = figure.subplots()
    for k, policy in enumerate(policies):
        ink = color(policy, policies)
        for row in (row for row in rows if row["policy"] == policy):
            place = scenarios.index(row["scenario"]) + 0.8 * (k + 0.5) / len(policies) - 0.4
            _change(axes, row, place, ink)
        axes.plot([], [], "o", color=ink, label=label(policy))
    bounds = {row["scenario"]: row["bound_pct"] for row in rows if row["bound_pct"] is not None}
    for scenario, bound in bounds.items():
        at = scenarios.index(scenario)
        axes.plot([bound, bound], [at - 0.4, at + 0.4], color="black", linestyle=":", linewidth=1.5)
    if bounds:
        axes.plot([], [], color="black", linestyle=":", label="search in hindsight")
    named = {row["scenario"]: row["best_rule"] for row in rows}
    axes.set_yticks(
        range(len(scenarios)),
        [f"{name}\n({label(rule)})" if (rule := named[name]) else name for name in scenarios],
    )
    axes.set_ylim(len(scenarios) - 0.5, -0.5)
    axes.set_xlim(-_WIDEST, _WIDEST)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(
        "change in energy per request (%); in brackets: best simple rule; triangles: outside; hollow: SLO "
        "missed"
    )
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _change(axes: Axes, row: Mapping[str, Any], place: float, ink: str) -> None:
    """One policy in one cell; nothing where it does not reach the rule's attainment, or is that rule."""
    change, low, high = (row[f"iso_best_rule_{part}"] for part in ("pct", "low", "high"))
    if change is None:
        return
    fill = ink if row["kept"] else "white"
    if abs(change) > _WIDEST:
        edge = _WIDEST - 0.3 if change > 0 else 0.3 - _WIDEST
        axes.plot(edge, place, ">" if change > 0 else "<", color=ink, markersize=5, markerfacecolor=fill)
        return
    if low is not None and high is not None:
        axes.plot([low, high], [place, place], "-", color=ink, linewidth=1)
    axes.plot(change, place, "o", color=ink, markersize=5, markerfacecolor=fill)
