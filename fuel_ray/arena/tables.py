"""What came of an arena as tables, for Markdown and for a terminal."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fuel_ray.arena.equal import Rows
from fuel_ray.policies.catalogue import MAX_PERFORMANCE, TUNED_STATIC, label

SHOWN = (
    ("J/req", "energy_j_per_request", "{:.1f}"),
    ("of SLO", "slo_attainment", "{:.3f}"),
    ("iso best rule", "iso_best_rule", "{:+.1f}"),
    ("raw", "vs_best_rule", "{:+.1f}"),
    ("iso static", "iso_tuned_static", "{:+.1f}"),
    ("iso table", "iso_load_table", "{:+.1f}"),
    ("vs max", "vs_max_performance", "{:+.1f}"),
    ("captured", "captured", "{:.0f}"),
    ("switches", "clock_switches", "{:.0f}"),
)
_HEADLINE = ("vs_best_rule", "iso_tuned_static", "vs_max_performance")
_WITH_INTERVAL = ("iso_best_rule", "iso_tuned_static")
_CHANGES = ("vs_", "iso_", "captured", "bound")
_MARKS = {"": "", "short": " <", "not reached": "n.r."}
_READING = (
    "energy in %, (95 % interval) [lowest..highest over the clock axes]; iso: at the attainment that the "
    "other reached, < short of it by 0.1 point at most, n.r. not reached; s: one training, interval of seeds "
    "only; captured: of what the search in hindsight leaves below the best simple rule"
)


def markdown(summaries: Rows) -> str:
    """One table per SLO and scenario."""
    head = ["policy", *(title for title, _, _ in SHOWN)]
    return "\n\n".join(
        f"**{scenario}, {slo} SLO** ({_facts(rows)}, {_READING})\n\n"
        + _piped(head, ([label(row["policy"]), *_shown(row)] for row in rows))
        + "".join(f"\n\n{note}" for note in _notes(rows))
        for (slo, scenario), rows in _cells(summaries)
    )


def headline(summaries: Rows, policy: str) -> str:
    """One row per workload for one policy, beside tuned static and the best simple rule."""
    head = ["static J (SLO)", "best rule", "J (SLO)", f"{label(policy)} J (SLO)", "**iso best rule**", "raw"]
    lines = []
    for (slo, scenario), of_cell in _cells(summaries):
        rows = {row["policy"]: row for row in of_cell}
        if policy in rows:
            own, best = rows[policy], rows.get(rows[policy]["best_rule"])
            named = ["-", "-"] if best is None else [label(best["policy"]), _level(best)]
            changes = [_figure(own, "iso_best_rule", "{:+.1f}")]
            changes += [_figure(own, name, "{:+.1f}") for name in _HEADLINE]
            bound = [_figure(own, "bound", "{:+.1f}"), _figure(own, "captured", "{:.0f}")]
            where = f"{scenario}, {slo}"
            lines.append([where, _level(rows[TUNED_STATIC]), *named, _level(own), *changes, *bound])
    return _piped(["", *head, "iso static", "vs max", "bound", "captured %"], lines)


def _level(row: Mapping[str, Any]) -> str:
    """Energy per request and attainment."""
    return f"{row['energy_j_per_request']:.1f} ({_figure(row, 'slo_attainment', '{:.3f}', band=False)})"


def text(summaries: Rows) -> str:
    """The same for a terminal."""
    titles = [title for title, _, _ in SHOWN]
    columns = zip(titles, *(_shown(row) for row in summaries), strict=True)
    widths = [max(map(len, column)) + 2 for column in columns]

    def line(first: str, figures: Iterable[str]) -> str:
        return f"{first:<34}" + "".join(f"{x:>{width}}" for x, width in zip(figures, widths, strict=True))

    blocks = []
    for (slo, scenario), rows in _cells(summaries):
        head = line(f"{scenario}, {slo} SLO, {_facts(rows)}", titles)
        lines = [line(f"  {label(row['policy'])}", _shown(row)) for row in rows]
        blocks.append("\n".join([head, *lines, *(f"  {note}" for note in _notes(rows))]))
    return "\n\n".join([*blocks, _READING])


def _facts(rows: Rows) -> str:
    """How many seeds there are and whom policies are compared with."""
    best = rows[0]["best_rule"]
    return f"n = {rows[0]['n']}" + ("" if best is None else f", best rule: {label(best)}")


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


def _figure(row: Mapping[str, Any], name: str, form: str, *, band: bool = True) -> str:
    """A figure with its mark, its interval if it is at equal attainment, and its band over the clock axes."""
    value = row[f"{name}_pct"] if name.startswith(_CHANGES) else row[name]
    mark = _MARKS[row.get(f"{name}_mark", "")]
    if value is None:
        return mark or "-"
    shown = form.format(value) + mark
    if name == "slo_attainment" and not row["kept"]:
        shown += " !"
    if name in _WITH_INTERVAL:
        shown += _span(row, name, form, "()", after="s" if row["seeds_only"] else "")
    return shown + (_span(row, f"{name}_axis", form, "[]") if band else "")


def _span(row: Mapping[str, Any], name: str, form: str, brackets: str, *, after: str = "") -> str:
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    if low is None or high is None:
        return ""
    return f" {brackets[0]}{form.format(low)}..{form.format(high)}{after and ' ' + after}{brackets[1]}"
