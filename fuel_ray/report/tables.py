"""The report's tables: what each policy cost and attained, and how the run was made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from textwrap import wrap
from typing import Any

from fuel_ray.policies.catalogue import JUDGED_BY, LOAD_TABLE, color, label
from fuel_ray.policies.static import LoadTable
from fuel_ray.report.data import (
    ENERGY,
    Run,
    digests,
    energy_against,
    energy_over_axes,
    mean_over_axes,
    mean_over_seeds,
    missed,
)
from fuel_ray.report.page import Cell, table
from fuel_ray.report.wording import ascii_only, bare, change, ends, percent, setting, span
from fuel_ray.stats import Interval
from fuel_ray.types import Knobs

_POLICY = Cell("policy", style="text")
_AGAINST = (*(f"vs {label(name)}" for name in JUDGED_BY), "SLO attainment")
_CLOCK = "GPU clock (MHz)"
_MEAN = ("TTFT p99 (s)", "TPOT p99 (ms)", _CLOCK, "batch limit", "clock switches")
_AXIS_HEAD = (_POLICY, *map(Cell, (*_AGAINST, _CLOCK)))
_HEAD = (_POLICY, *map(Cell, ("J/request", *_AGAINST, *_MEAN)))
_MEANS: dict[str, Callable[[float], str]] = {
    "ttft_p99_s": "{:.2f}".format,
    "tpot_p99_s": lambda seconds: f"{1000 * seconds:.1f}",  # shown in ms
    "mean_gpu_clock_mhz": "{:.0f}".format,
    "mean_batch_limit": "{:.0f}".format,
    "clock_switches": "{:.0f}".format,
}


def results(run: Run, *, workload: str) -> str:
    """Block size x policy: energy, what it is relative to each baseline, SLO attainment and latency."""
    groups = [
        _rows(run, workload, size) or [[Cell("not evaluated", style="text")]] for size in run.block_sizes
    ]
    return table(_HEAD, groups, titles=[f"block size {size}" for size in run.block_sizes])


def plain_results(run: Run, *, workload: str) -> list[str]:
    """The same as lines of text."""
    rows = [
        [str(size), *(cell.text for cell in row)]
        for size in run.block_sizes
        for row in _rows(run, workload, size)
    ]
    return _plain(["block size", *(cell.text for cell in _HEAD)], rows)


def clock_axes(run: Run) -> str:
    """What each policy saves, attains and chooses under every clock axis that the pack's data allow."""
    rows = [_axis_row(run, policy) for policy in run.policies]
    return table(_AXIS_HEAD, [rows]) if len(run.axes) else ""


def plain_clock_axes(run: Run) -> list[str]:
    """The same as lines of text."""
    rows = [_axis_row(run, policy) for policy in run.policies]
    noted = [[f"{cell.text} ({cell.note})" if cell.note else cell.text for cell in row] for row in rows]
    return _plain([cell.text for cell in _AXIS_HEAD], noted) if len(run.axes) else []


def _axis_row(run: Run, policy: str) -> list[Cell]:
    style = "text mine" if policy == run.learned else "text"
    against = [[] if name == policy else energy_over_axes(run, policy, name) for name in JUDGED_BY]
    return [
        Cell(label(policy), style=style, dot=color(policy, run.policies)),
        *(_band(ratios, change) for ratios in against),
        _band(mean_over_axes(run, "slo_attainment", policy), percent),
        _band(mean_over_axes(run, "mean_gpu_clock_mhz", policy), "{:.0f}".format),
    ]


def _band(by_axis: Sequence[float], form: Callable[[float], str]) -> Cell:
    """The nominal axis's figure and, as its note where they differ, the lowest and the highest."""
    if not by_axis:
        return Cell("–")
    low, high = min(by_axis), max(by_axis)
    return Cell(form(by_axis[0]), "" if form(low) == form(high) else bare(ends(low, high, form)))


def chosen_pairs(run: Run) -> str:
    """What the baselines were tuned to."""
    head = ("block size", "tuned static", "load table, by arrival rate", "best simple rule", "anchor weight")
    groups = []
    for size, tuned in (run.info.get("tuned") or {}).items():
        weight, best = tuned.get("anchor_weight"), label(tuned.get("best_rule", LOAD_TABLE))
        groups.append([[size, _static(tuned), _rates(tuned), best, f"{weight:g}" if weight else "none"]])
    return _listing(head, groups, ("", "text", "text wrap", "text", ""))


def key_values(tree: Mapping[str, Any]) -> str:
    """Settings and their values."""
    rows = [[key, setting(value)] for key, value in tree.items()]
    return _listing(("name", "value"), [rows] if rows else [], ("text", "text wrap"))


def requests(run: Run) -> str:
    """What was sent, by digest, per workload and seed."""
    rows = [[workload, str(seed), ", ".join(found)] for (workload, seed), found in digests(run).items()]
    return _listing(("workload", "seed", "digest"), [rows], ("text", "", "text wrap"))


def _listing(head: Sequence[str], groups: Sequence[Sequence[Sequence[str]]], styles: Sequence[str]) -> str:
    """A table of plain text, a style per column; nothing where there are no rows."""

    def cells(row: Sequence[str]) -> list[Cell]:
        return [Cell(text, style=style) for text, style in zip(row, styles, strict=True)]

    titles = [replace(cell, style=cell.style.removesuffix(" wrap")) for cell in cells(head)]
    return table(titles, [[cells(row) for row in rows] for rows in groups]) if groups else ""


def _plain(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text under each other, in ASCII; what stands above a column is broken into its width."""
    widths = [
        max(map(len, (*column, *name.split())))
        for name, column in zip(head, zip(*rows, strict=True), strict=True)
    ]
    broken = [wrap(name, width) for name, width in zip(head, widths, strict=True)]
    tall = max(map(len, broken))
    heads = zip(*([""] * (tall - len(lines)) + lines for lines in broken), strict=True)
    lines = (
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in (*heads, *rows)
    )
    return [ascii_only(line).rstrip() for line in lines]


def _rows(run: Run, workload: str, size: int) -> list[list[Cell]]:
    """One row per policy that ran at this block size, without the block size."""
    return [row for policy in run.policies if (row := _row(run, policy, workload, size))]


def _row(run: Run, policy: str, workload: str, size: int) -> list[Cell]:
    mean = partial(mean_over_seeds, run, policy=policy, workload=workload, block_size=size)
    against = partial(energy_against, run, policy, workload=workload, block_size=size)
    if (energy := mean(ENERGY)) is None:
        return []
    ratios = (None if name == policy else against(name) for name in JUDGED_BY)
    share = mean("slo_attainment")
    style = "text mine" if policy == run.learned else "text"
    return [
        Cell(label(policy), style=style, dot=color(policy, run.policies)),
        _cell(energy, "{:.1f}".format),
        *(_cell(ratio, change) for ratio in ratios),
        _cell(share, percent, style="bad" if missed(run, share) else ""),
        *(Cell(_cell(mean(column), form).text) for column, form in _MEANS.items()),
    ]


def _cell(interval: Interval | None, form: Callable[[float], str], *, style: str = "") -> Cell:
    if interval is None:
        return Cell("–", style=style)
    return Cell(form(interval.mean), bare(span(interval, form)), style)


def _static(tuned: Mapping[str, Any]) -> str:
    return _pair(Knobs(**tuned["tuned_static"])) if tuned.get("tuned_static") else "–"


def _rates(tuned: Mapping[str, Any]) -> str:
    if not tuned.get("load_table"):
        return "–"
    load_table = LoadTable.from_dict(tuned["load_table"])
    bounds = [f"up to {rate_rps:.1f} requests/s" for rate_rps in load_table.rates_rps]
    bounds.append("above" if bounds else "any rate")
    steps = zip(bounds, load_table.knobs, (*load_table.knobs[1:], None), strict=True)
    last_of_each = [(bound, knobs) for bound, knobs, after in steps if knobs != after]
    (limit, *others) = {knobs.batch_limit for knobs in load_table.knobs}
    if others:
        return "; ".join(f"{bound}: {_pair(knobs)}" for bound, knobs in last_of_each)
    clocks = "; ".join(f"{bound}: {knobs.gpu_clock_mhz} MHz" for bound, knobs in last_of_each)
    return f"{clocks}; batch limit {limit}"


def _pair(knobs: Knobs) -> str:
    return f"{knobs.gpu_clock_mhz} MHz, batch limit {knobs.batch_limit}"
