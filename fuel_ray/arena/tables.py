"""What came of an arena as tables, for Markdown and for a terminal."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fuel_ray.arena.comparison import Rows
from fuel_ray.policies.catalogue import REFERENCES, label

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


def markdown(summaries: Rows) -> str:
    """One table per SLO and scenario."""
    head = ["policy", *(title for title, _, _ in SHOWN)]
    return "\n\n".join(
        f"**{scenario}, {slo} SLO** (n = {rows[0]['n']}, energy in %)\n\n"
        + _piped(head, ([label(row["policy"]), *_shown(row)] for row in rows))
        for (slo, scenario), rows in _cells(summaries)
    )


def headline(summaries: Rows, policy: str) -> str:
    """One row per workload for one policy, beside the references."""
    head = [label(policy), "max J", "static J (SLO)", "table % (SLO)", f"**{label(policy)} %** (95 %)", "SLO"]
    lines = []
    for (slo, scenario), of_cell in _cells(summaries):
        rows = {row["policy"]: row for row in of_cell}
        if policy in rows:
            fastest, static, table = (rows[name] for name in REFERENCES)
            own = _shown(rows[policy])
            lines.append(
                [
                    f"{scenario}, {slo}",
                    f"{fastest['energy_j_per_request']:.1f}",
                    f"{static['energy_j_per_request']:.1f} ({static['slo_attainment']:.3f})",
                    f"{table['vs_tuned_static_pct']:+.1f} ({table['slo_attainment']:.3f})",
                    *(own[k] for k in (3, 1, 4, 5, 6, 2)),
                ]
            )
    return _piped([*head, "equal SLO", "vs table", "vs oracle", "vs max"], lines)


def text(summaries: Rows) -> str:
    """The same for a terminal."""
    widths = [26 if form == "interval" else max(len(title), 7) + 2 for title, _, form in SHOWN]

    def line(first: str, figures: Iterable[str]) -> str:
        return f"{first:<34}" + "".join(f"{x:>{width}}" for x, width in zip(figures, widths, strict=True))

    blocks = []
    for (slo, scenario), rows in _cells(summaries):
        head = line(f"{scenario}, {slo} SLO, n = {rows[0]['n']}", (title for title, _, _ in SHOWN))
        blocks.append("\n".join([head, *(line(f"  {label(row['policy'])}", _shown(row)) for row in rows)]))
    return "\n\n".join(blocks)


def _cells(summaries: Rows) -> Iterator[tuple[tuple[str, str], list[Mapping[str, Any]]]]:
    """The rows of each (SLO, scenario)."""
    for key in dict.fromkeys((row["slo"], row["scenario"]) for row in summaries):
        yield key, [row for row in summaries if (row["slo"], row["scenario"]) == key]


def _piped(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of text and then numbers."""
    titles, *lines = (f"| {' | '.join(row)} |" for row in (head, *rows))
    return "\n".join([titles, "|---|" + "--:|" * (len(head) - 1), *lines])


def _shown(row: Mapping[str, Any]) -> list[str]:
    return [_figure(row, name, form) for _, name, form in SHOWN]


def _figure(row: Mapping[str, Any], name: str, form: str) -> str:
    value = row[f"{name}_pct"] if name.startswith("vs_") else row[name]
    if value is None:
        return "-"
    if form != "interval":
        return form.format(value) + ("" if name != "slo_attainment" or row["kept"] else " !")
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{value:+.1f}" if low is None else f"{value:+.1f} ({low:+.1f}..{high:+.1f})"
