"""The arena's pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fuel_ray.disk import whole
from fuel_ray.policies.catalogue import MAX_PERFORMANCE, TUNED_STATIC, color, label


def draw(summaries: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write ``savings_SLO.png``: energy against tuned static per workload and policy, with intervals."""
    for slo in dict.fromkeys(row["slo"] for row in summaries):
        rows = [row for row in summaries if row["slo"] == slo]
        figure = _forest(rows, f"{slo} SLO: energy per request against tuned static (95 % intervals)")
        with whole(folder / f"savings_{slo}.png", "wb") as file:
            figure.savefig(file, format="png", dpi=110)


def _forest(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    present = dict.fromkeys(row["policy"] for row in rows)
    policies = [name for name in present if name not in (MAX_PERFORMANCE, TUNED_STATIC)]
    figure = Figure(figsize=(11, 1.2 + 0.75 * len(scenarios)), layout="constrained")
    axes = figure.subplots()
    for k, policy in enumerate(policies):
        own = [row for row in rows if row["policy"] == policy]
        height = [scenarios.index(row["scenario"]) + 0.8 * (k + 0.5) / len(policies) - 0.4 for row in own]
        change = [row["vs_tuned_static_pct"] for row in own]
        low = [c - (row["vs_tuned_static_low"] or c) for c, row in zip(change, own, strict=True)]
        high = [(row["vs_tuned_static_high"] or c) - c for c, row in zip(change, own, strict=True)]
        ink = color(policy, policies)
        axes.errorbar(change, height, xerr=[low, high], fmt="none", capsize=2, linewidth=1, ecolor=ink)
        for x, y, row in zip(change, height, own, strict=True):
            axes.plot(x, y, "o", color=ink, markersize=5, markerfacecolor=ink if row["kept"] else "white")
        axes.plot([], [], "o", color=ink, label=label(policy))
    axes.set_yticks(range(len(scenarios)), scenarios)
    axes.set_xlim(-45, 45)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("change of energy per request in % (hollow: misses the SLO that tuned static meets)")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
