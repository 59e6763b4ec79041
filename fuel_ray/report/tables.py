"""The report's tables: what each policy cost and attained, and how the run was made."""

from collections.abc import Callable, Mapping
from typing import Any

from fuel_ray.policies.catalogue import REFERENCES, color, label
from fuel_ray.policies.static import LoadTable
from fuel_ray.report.data import ENERGY, Run, digests, energy_against, mean_over_seeds, missed
from fuel_ray.report.page import Cell, table
from fuel_ray.report.text import percent
from fuel_ray.stats import Interval

_HEAD = (
    Cell("block"),
    Cell("policy", style="text"),
    Cell("J/request"),
    *(Cell(f"vs {name}") for name in ("max", "static", "table")),
    Cell("SLO met"),
    Cell("TTFT p99 s"),
    Cell("TPOT p99 ms"),
    Cell("MHz"),
    Cell("limit"),
    Cell("switches"),
)
_MEANS: dict[str, Callable[[float], str]] = {
    "ttft_p99_s": "{:.2f}".format,
    "tpot_p99_s": lambda seconds: f"{1000 * seconds:.1f}",  # shown in ms
    "mean_gpu_clock_mhz": "{:.0f}".format,
    "mean_batch_limit": "{:.0f}".format,
    "clock_switches": "{:.0f}".format,
}


def results(run: Run, *, workload: str) -> str:
    """Block size x policy: energy, what it is relative to each reference, SLO attainment and latency."""
    groups = []
    for size in run.block_sizes:
        first, *rest = _rows(run, workload=workload, size=size) or [[Cell("not run", style="text")]]
        groups.append([[Cell(str(size), rows=1 + len(rest)), *first], *rest])
    return table(_HEAD, groups)


def plain_results(run: Run, *, workload: str) -> list[str]:
    """The same as lines of text."""
    rows = [[cell.text for cell in _HEAD]]
    for size in run.block_sizes:
        rows += [
            [str(size), *(cell.text for cell in row)] for row in _rows(run, workload=workload, size=size)
        ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [line.replace("−", "-").replace("–", "-") for line in lines]


def span(interval: Interval, form: Callable[[float], str]) -> str:
    """An interval's ends, or nothing where it is unknown."""
    if interval.low is None or interval.high is None:
        return ""
    return f"{form(interval.low)} to {form(interval.high)}".replace(" %", "")


def change(ratio: float) -> str:
    """A ratio as a relative change: 0.9 -> "−10.0 %"."""
    return f"{100 * (ratio - 1):+.1f} %".replace("-", "−")


def chosen_pairs(run: Run) -> str:
    """What the baselines were tuned to."""
    rows = [
        [
            Cell(size),
            Cell(_pair(tuned.get("tuned_static")), style="text"),
            Cell(_rates(tuned), style="text wrap"),
            Cell(_held(tuned.get("anchor_weight")), style="text"),
        ]
        for size, tuned in (run.info.get("tuned") or {}).items()
    ]
    head = (
        Cell("block size"),
        Cell("tuned static", style="text"),
        Cell("load table, by arrival rate", style="text"),
        Cell("DQN's weight on it", style="text"),
    )
    return table(head, [[row] for row in rows]) if rows else ""


def _held(weight: float | None) -> str:
    return "free" if not weight else f"{weight:g}"


def key_values(tree: Mapping[str, Any]) -> str:
    """Settings and their values."""
    rows = [[Cell(key, style="text"), Cell(str(value), style="text wrap")] for key, value in tree.items()]
    return table((Cell("name", style="text"), Cell("value", style="text")), [rows]) if rows else ""


def requests(run: Run) -> str:
    """What was sent, by digest, per workload and seed."""
    rows = [
        [Cell(workload, style="text"), Cell(str(seed)), Cell(", ".join(found), style="text wrap")]
        for (workload, seed), found in digests(run).items()
    ]
    return table((Cell("workload", style="text"), Cell("seed"), Cell("digest", style="text")), [rows])


def _rows(run: Run, *, workload: str, size: int) -> list[list[Cell]]:
    """One row per policy that ran at this block size, without the block size."""
    return [row for policy in run.policies if (row := _row(run, policy, workload=workload, size=size))]


def _row(run: Run, policy: str, *, workload: str, size: int) -> list[Cell]:
    def mean(column: str) -> Interval | None:
        return mean_over_seeds(run, column, policy=policy, workload=workload, block_size=size)

    if (energy := mean(ENERGY)) is None:
        return []
    ratios = (
        None if name == policy else energy_against(run, policy, name, workload=workload, block_size=size)
        for name in REFERENCES
    )
    share = mean("slo_attainment")
    return [
        Cell(
            label(policy),
            style="text mine" if policy == run.learned else "text",
            dot=color(policy, run.policies),
        ),
        _cell(energy, "{:.1f}".format),
        *(_cell(ratio, change) for ratio in ratios),
        _cell(share, percent, style="bad" if missed(run, share) else ""),
        *(Cell(_cell(mean(column), form).text) for column, form in _MEANS.items()),
    ]


def _cell(interval: Interval | None, form: Callable[[float], str], *, style: str = "") -> Cell:
    return (
        Cell("–", style=style) if interval is None else Cell(form(interval.mean), span(interval, form), style)
    )


def _pair(knobs: Mapping[str, Any] | None) -> str:
    return f"{knobs.get('gpu_clock_mhz')} MHz, limit {knobs.get('batch_limit')}" if knobs else "–"


def _rates(tuned: Mapping[str, Any]) -> str:
    if not tuned.get("load_table"):
        return "–"
    load_table = LoadTable.from_dict(tuned["load_table"])
    upto = (*(f"to {rate_rps:g} req/s" for rate_rps in load_table.rates_rps), "above")
    rows = zip(upto, load_table.knobs, strict=True)
    return "; ".join(f"{rate}: {k.gpu_clock_mhz} MHz, limit {k.batch_limit}" for rate, k in rows)
