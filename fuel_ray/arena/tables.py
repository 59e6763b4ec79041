"""What came of an arena as tables, for Markdown and for a terminal."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fuel_ray.arena.comparison import Rows
from fuel_ray.policies.catalogue import JUDGED_BY, MAX_PERFORMANCE, label

SHOWN = (
    ("J/req", "energy_j_per_request", "{:.1f}"),
    ("of SLO", "slo_attainment", "{:.3f}"),
    ("vs tuned static", "vs_tuned_static", "{:+.1f}"),
    ("vs table", "vs_load_table", "{:+.1f}"),
    ("vs max", "vs_max_performance", "{:+.1f}"),
    ("equal SLO", "equal_pct", "{:+.1f}"),
    ("vs oracle", "vs_oracle", "{:+.1f}"),
    ("switches", "clock_switches", "{:.0f}"),
)
_READING = "energy in %, (95 % interval) [lowest..highest over the clock axes]"


def markdown(summaries: Rows) -> str:
    """One table per SLO and scenario."""
    head = ["policy", *(title for title, _, _ in SHOWN)]
    return "\n\n".join(
        f"**{scenario}, {slo} SLO** (n = {rows[0]['n']}, {_READING})\n\n"
        + _piped(head, ([label(row["policy"]), *_shown(row)] for row in rows))
        + "".join(f"\n\n{note}" for note in _notes(rows))
        for (slo, scenario), rows in _cells(summaries)
    )


def headline(summaries: Rows, policy: str) -> str:
    """One row per workload for one policy, beside the references."""
    head = [label(policy), "static J (SLO)", "table % (SLO)", "max J", f"**{label(policy)} %**", "SLO"]
    lines = []
    for (slo, scenario), of_cell in _cells(summaries):
        rows = {row["policy"]: row for row in of_cell}
        if policy in rows:
            static, table, fastest = (rows[name] for name in JUDGED_BY)
            own, change = _shown(rows[policy]), table["vs_tuned_static_pct"]
            lines.append(
                [
                    f"{scenario}, {slo}",
                    f"{static['energy_j_per_request']:.1f} ({static['slo_attainment']:.3f})",
                    f"{change:+.1f}{_span(table, 'vs_tuned_static_axis', '{:+.1f}', '[]')} "
                    f"({table['slo_attainment']:.3f})",
                    f"{fastest['energy_j_per_request']:.1f}",
                    *(own[k] for k in (2, 1, 3, 4, 5, 6)),
                ]
            )
    return _piped([*head, "vs table", "vs max", "equal SLO", "vs oracle"], lines)


def text(summaries: Rows) -> str:
    """The same for a terminal."""
    titles = [title for title, _, _ in SHOWN]
    columns = zip(titles, *(_shown(row) for row in summaries), strict=True)
    widths = [max(map(len, column)) + 2 for column in columns]

    def line(first: str, figures: Iterable[str]) -> str:
        return f"{first:<34}" + "".join(f"{x:>{width}}" for x, width in zip(figures, widths, strict=True))

    blocks = []
    for (slo, scenario), rows in _cells(summaries):
        head = line(f"{scenario}, {slo} SLO, n = {rows[0]['n']}", titles)
        lines = [line(f"  {label(row['policy'])}", _shown(row)) for row in rows]
        blocks.append("\n".join([head, *lines, *(f"  {note}" for note in _notes(rows))]))
    return "\n\n".join([*blocks, _READING])


def _notes(rows: Rows) -> Iterator[str]:
    """What a change of 0.0 means where tuned static is at the lowest clock."""
    at_floor = [row for row in rows if row.get("floor_mhz") is not None]
    if len(at_floor) > 1:
        others = {row["policy"] for row in rows} - {row["policy"] for row in at_floor} - {MAX_PERFORMANCE}
        names = ", ".join(label(row["policy"]) for row in at_floor)
        where = f"at the lowest clock, {at_floor[0]['floor_mhz']} MHz"
        if others:
            yield f"{where}, are {names}: nothing to compare between them"
        else:
            yield f"every policy is {where}: nothing to compare"


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
    missed = " !" if name == "slo_attainment" and not row["kept"] else ""
    return form.format(value) + missed + _span(row, name, form, "()") + _span(row, f"{name}_axis", form, "[]")


def _span(row: Mapping[str, Any], name: str, form: str, brackets: str) -> str:
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    if low is None or high is None:
        return ""
    return f" {brackets[0]}{form.format(low)}..{form.format(high)}{brackets[1]}"
