"""What came of an arena as tables, for Markdown and for a terminal."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from fuel_ray.arena.equal import Rows
from fuel_ray.policies.catalogue import BEST_RULE, MAX_PERFORMANCE, TUNED_STATIC, label
from fuel_ray.report.wording import ascii_only, bare, change, percent

_Form = Callable[[float], str]


def _changed(pct: float) -> str:
    return ascii_only(bare(change(1 + pct / 100)))


def _share(share: float) -> str:
    return bare(percent(share))


def _whole(value: float) -> str:
    return f"{value:z.0f}"


_ATTAINMENT = ("SLO attainment", "slo_attainment", _share)
_BOUND = (("bound", "bound", _changed), ("headroom captured", "captured", _whole))
SHOWN: tuple[tuple[str, str, _Form], ...] = (
    ("J/request", "energy_j_per_request", "{:.1f}".format),
    _ATTAINMENT,
    (f"iso vs {label(BEST_RULE)}", "iso_best_rule", _changed),
    (f"vs {label(BEST_RULE)}", "vs_best_rule", _changed),
    ("iso vs tuned static", "iso_tuned_static", _changed),
    ("iso vs load table", "iso_load_table", _changed),
    ("vs maximum performance", "vs_max_performance", _changed),
    _BOUND[1],
    ("clock switches", "clock_switches", _whole),
)
_HEADLINE = ("iso_best_rule", "vs_best_rule", "iso_tuned_static", "vs_max_performance")
_WITH_INTERVAL = ("iso_best_rule", "iso_tuned_static")
_CHANGES = ("vs_", "iso_", "captured", "bound")
_MARKS = {"": "", "short": " <", "not reached": "n.r."}
_READING = (
    "Changes in J/request in %, SLO attainment in %; (95 % interval), [lowest to highest value over the "
    "clock axes]. vs: both as tuned. iso: at the SLO attainment that the other policy reached; <: up to 0.1 "
    "point below it; n.r.: not reached. s: one training, so the interval is over seeds only. !: SLO missed. "
    "Headroom captured: share, in %, of what the search in hindsight saves compared with the best simple "
    "rule."
)


def markdown(summaries: Rows) -> str:
    """One table per SLO and scenario, after a paragraph on how to read them."""
    head = ["policy", *(title for title, _, _ in SHOWN)]
    tables = (
        f"**{scenario}, {slo} SLO** ({_facts(rows)})\n\n"
        + _piped(head, ([label(row["policy"]), *_shown(row)] for row in rows))
        + "".join(f"\n\n{note}" for note in _notes(rows))
        for (slo, scenario), rows in _cells(summaries)
    )
    return "\n\n".join([_READING, *tables])


def headline(summaries: Rows, policy: str) -> str:
    """One row per workload for one policy, beside tuned static and the best simple rule."""
    energy = "J/request (SLO attainment)"
    head = [f"{label(TUNED_STATIC)}, {energy}", label(BEST_RULE), energy, f"{label(policy)}, {energy}"]
    columns = [*(column for name in _HEADLINE for column in SHOWN if column[1] == name), *_BOUND]
    lines = []
    for (slo, scenario), of_cell in _cells(summaries):
        rows = {row["policy"]: row for row in of_cell}
        if policy in rows:
            own, best = rows[policy], rows.get(rows[policy]["best_rule"])
            named = ["-", "-"] if best is None else [label(best["policy"]), _level(best)]
            changes = [_figure(own, name, form) for _, name, form in columns]
            lines.append([f"{scenario}, {slo}", _level(rows[TUNED_STATIC]), *named, _level(own), *changes])
    return _piped(["", *head, *(title for title, _, _ in columns)], lines)


def _level(row: Mapping[str, Any]) -> str:
    """Energy per request and attainment."""
    _, name, form = _ATTAINMENT
    return f"{row['energy_j_per_request']:.1f} ({_figure(row, name, form, band=False)})"


def text(summaries: Rows) -> str:
    """The same for a terminal."""
    titles = [title for title, _, _ in SHOWN]
    columns = zip(titles, *(_shown(row) for row in summaries), strict=True)
    widths = [max(map(len, column)) + 2 for column in columns]
    first_width = 2 + max(len(label(row["policy"])) for row in summaries)

    def line(first: str, figures: Iterable[str]) -> str:
        return f"  {first:<{first_width}}" + "".join(
            f"{x:>{width}}" for x, width in zip(figures, widths, strict=True)
        )

    blocks = []
    for (slo, scenario), rows in _cells(summaries):
        lines = [line("policy", titles), *(line(label(row["policy"]), _shown(row)) for row in rows)]
        blocks.append(
            "\n".join(
                [f"{scenario}, {slo} SLO ({_facts(rows)})", *lines, *(f"  {note}" for note in _notes(rows))]
            )
        )
    return "\n\n".join([*blocks, _READING])


def _facts(rows: Rows) -> str:
    """How many seeds there are and which simple rule is the best."""
    best = rows[0]["best_rule"]
    return f"n = {rows[0]['n']} seeds" + ("" if best is None else f", {label(BEST_RULE)}: {label(best)}")


def _notes(rows: Rows) -> Iterator[str]:
    """What a change of 0.0 means where tuned static is at the lowest clock."""
    at_floor = [row for row in rows if row.get("floor_mhz") is not None]
    if len(at_floor) > 1:
        others = {row["policy"] for row in rows} - {row["policy"] for row in at_floor} - {MAX_PERFORMANCE}
        where = f"the lowest clock, {at_floor[0]['floor_mhz']} MHz"
        if others:
            names = "; ".join(label(row["policy"]) for row in at_floor)
            yield f"Always at {where}, so that there is nothing to compare between them: {names}."
        else:
            yield f"Every policy is always at {where}, so that there is nothing to compare."


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


def _figure(row: Mapping[str, Any], name: str, form: _Form, *, band: bool = True) -> str:
    """A figure with its mark, its interval if it is at equal attainment, and its band over the clock axes."""
    value = row[f"{name}_pct"] if name.startswith(_CHANGES) else row[name]
    mark = _MARKS[row.get(f"{name}_mark", "")]
    if value is None:
        return mark or "-"
    shown = form(value) + mark
    if name == "slo_attainment" and not row["kept"]:
        shown += " !"
    if name in _WITH_INTERVAL:
        shown += _span(row, name, form, "()", after="s" if row["seeds_only"] else "")
    return shown + (_span(row, f"{name}_axis", form, "[]") if band else "")


def _span(row: Mapping[str, Any], name: str, form: _Form, brackets: str, *, after: str = "") -> str:
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    if low is None or high is None:
        return ""
    return f" {brackets[0]}{form(low)} to {form(high)}{after and ' ' + after}{brackets[1]}"
