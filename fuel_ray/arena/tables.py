"""What came of an arena as tables, for Markdown and for a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fuel_ray.policies.catalogue import REFERENCES, label

Summaries = Sequence[Mapping[str, Any]]

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


def markdown(summaries: Summaries) -> str:
    """One table per SLO and scenario."""
    lines: list[str] = []
    for (slo, scenario), rows in _cells(summaries):
        lines += ["", f"**{scenario}, {slo} SLO** (n = {rows[0]['n']}, energy in %)", ""]
        lines += [
            "| policy | " + " | ".join(title for title, _, _ in SHOWN) + " |",
            "|---|" + "--:|" * len(SHOWN),
        ]
        lines += [
            f"| {label(row['policy'])} | " + " | ".join(_shown(row, *s[1:]) for s in SHOWN) + " |"
            for row in rows
        ]
    return "\n".join(lines[1:])


def _cells(summaries: Summaries) -> Iterator[tuple[tuple[str, str], list[Mapping[str, Any]]]]:
    """The rows of each (SLO, scenario)."""
    for key in dict.fromkeys((row["slo"], row["scenario"]) for row in summaries):
        yield key, [row for row in summaries if (row["slo"], row["scenario"]) == key]


def _shown(row: Mapping[str, Any], name: str, form: str) -> str:
    value = row[f"{name}_pct"] if name.startswith("vs_") else row[name]
    if value is None:
        return "-"
    if form != "interval":
        return form.format(value) + ("" if name != "slo_attainment" or row["kept"] else " !")
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{value:+.1f}" if low is None else f"{value:+.1f} ({low:+.1f}..{high:+.1f})"


def headline(summaries: Summaries, policy: str) -> str:
    """One row per workload for one policy, beside the references."""
    lines = [
        f"| {label(policy)} | max J | static J (SLO) | table % (SLO) | **{label(policy)} %** (95 %) | SLO | "
        "equal SLO | vs table | vs oracle | vs max |",
        "|---|" + "--:|" * 9,
    ]
    for (slo, scenario), of_cell in _cells(summaries):
        rows = {row["policy"]: row for row in of_cell}
        if policy not in rows:
            continue
        fastest, static, table = (rows[name] for name in REFERENCES)
        own = [_shown(rows[policy], *SHOWN[k][1:]) for k in (3, 1, 4, 5, 6, 2)]
        lines.append(
            f"| {scenario}, {slo} | {fastest['energy_j_per_request']:.1f} | "
            f"{static['energy_j_per_request']:.1f} ({static['slo_attainment']:.3f}) | "
            f"{table['vs_tuned_static_pct']:+.1f} ({table['slo_attainment']:.3f}) | " + " | ".join(own) + " |"
        )
    return "\n".join(lines)


def text(summaries: Summaries) -> str:
    """The same for a terminal."""
    lines: list[str] = []
    for (slo, scenario), rows in _cells(summaries):
        head = "".join(f"{title:>{_WIDTH[title]}}" for title, _, _ in SHOWN)
        title = f"{scenario}, {slo} SLO, n = {rows[0]['n']}"
        lines += ["", f"{title:<34}{head}"]
        for row in rows:
            lines.append(
                f"  {label(row['policy']):<32}"
                + "".join(f"{_shown(row, *s[1:]):>{_WIDTH[s[0]]}}" for s in SHOWN)
            )
    return "\n".join(lines[1:])


_WIDTH = {title: 26 if form == "interval" else max(len(title), 7) + 2 for title, _, form in SHOWN}
