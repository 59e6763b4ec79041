"""The report's figures, each drawn to a data URI. The home of matplotlib."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import cycle, product
from operator import attrgetter
from typing import Any, Literal

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import ScalarFormatter

from fuel_ray.policies.catalogue import color, label
from fuel_ray.report.data import ENERGY, Run, mean_over_seeds, where
from fuel_ray.stats import Interval

_BLOCK_COLORS = ("#9ecae1", "#4a98c9", "#1764ab", "#08306b", "#6a51a3", "#3f007d")  # light to dark: an order
_CLOCK_COLORS = ("#b3261e", "#e08214", "#4a98c9", "#08306b")  # fast to slow
_MARKERS = ("o", "s", "^", "D", "v", "P")
_TRACED = ("in_system", "applied.gpu_clock_mhz", "applied.batch_limit")
_MOST_TICKS = 5  # of batch limits; more run together
SMOOTH_S = 15  # bold lines in the time plot are means over this long

_batch = attrgetter("batch")
_key = partial(Line2D, [], [])
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#30343b",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.xmargin": 0.01,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8eaee",
    "legend.frameon": False,
    "svg.hashsalt": "fuel_ray",
    "text.parse_math": False,  # names come from files
}


@dataclass(frozen=True, slots=True)
class ProfilePoint:
    """Decode steps at a clock: of each figure what was measured and what the model says."""

    clock_mhz: float
    context: int  # prompt tokens of the requests
    batch: int
    step_s: tuple[float, float]
    power_w: tuple[float, float]


def learning_curves(run: Run) -> str:
    """Reward and energy per request against environment steps, one line per block size."""
    named = (("reward", "reward per control window"), (ENERGY, "energy per request (J)"))
    panels = [(column, name) for column, name in named if run.learning[column].notna().any()]

    def paint(figure: Figure) -> None:
        for axes, (column, name) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            by_size = run.learning.dropna(subset=[column]).sort_values("env_steps").groupby("block_size")
            for (size, curve), ink in zip(by_size, cycle(_BLOCK_COLORS), strict=False):
                axes.plot(curve["env_steps"], curve[column], color=ink, alpha=0.5, linewidth=0.8)
                smooth = curve[column].rolling(5, min_periods=1).mean()
                axes.plot(curve["env_steps"], smooth, color=ink, linewidth=1.8, label=f"block size {size}")
            axes.set(xlabel="environment steps (control windows)", ylabel=name)
            axes.xaxis.set_major_formatter(lambda steps, _: f"{steps:,.0f}")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")

    return draw(paint, height_in=3.4)


def energy_against_attainment(run: Run, *, workload: str) -> str:
    """Energy per request against SLO attainment: a colour per policy, a marker per block size."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.margins(0.06)
        for policy in run.policies:
            for size, marker in zip(run.block_sizes, cycle(_MARKERS), strict=False):
                mean = partial(mean_over_seeds, run, workload=workload, policy=policy, block_size=size)
                energy, share = mean(ENERGY), mean("slo_attainment")
                if energy is not None and share is not None:
                    _cross(axes, energy, share, color(policy, run.policies), marker)
        if run.attainment_target is not None:
            axes.axhline(100 * run.attainment_target, color="#b3261e", linestyle="--", linewidth=1)
        axes.set(xlabel="energy per request (J)  ← better", ylabel="SLO attainment (%)  better →")
        figure.legend(handles=_scatter_key(run), loc="outside right center")

    return draw(paint, height_in=4.2)


def choices_over_time(run: Run, *, workload: str, block_size: int) -> str | None:
    """Load, queue, clocks and limits on one time axis; None where no windows were recorded."""
    steps = where(run.steps, workload=workload, block_size=block_size)
    if steps.empty:
        return None

    def paint(figure: Figure) -> None:
        panels = figure.subplots(4, 1, sharex=True, height_ratios=(2, 3, 3, 3))
        for policy in run.policies:
            rows = steps[steps["policy"] == policy].sort_values("time_s")
            for axes, column in zip(panels[1:], _TRACED, strict=True):
                _trace(axes, rows, rows[column], color(policy, run.policies))
        load = steps[steps["policy"] == steps["policy"].iloc[0]].sort_values("time_s")
        _trace(panels[0], load, load["arrivals"] / _window_s(load), "#30343b")
        names = ("arrivals\nper second", "requests, running\nand waiting", "GPU clock (MHz)", "batch limit")
        for axes, name in zip(panels, names, strict=True):
            axes.set_ylabel(name)
        panels[3].set_yscale("log", base=2)
        panels[3].yaxis.set_major_formatter(ScalarFormatter())
        if len(limits := sorted(steps["applied.batch_limit"].unique())) <= _MOST_TICKS:
            panels[3].set_yticks(limits)
        panels[3].set_xlabel("time (min)")
        figure.align_ylabels()
        figure.legend(handles=_policy_key(run), loc="outside upper center", ncols=len(run.policies))

    return draw(paint, height_in=7.4, form="webp")


def profile_and_model(points: Sequence[ProfilePoint]) -> str:
    """Step time and power of decode steps by batch: what was measured as points, the model as lines."""
    clocks = sorted({point.clock_mhz for point in points}, reverse=True)
    shown = [clocks[round(i * (len(clocks) - 1) / 3)] for i in range(4)] if len(clocks) > 4 else clocks
    inks = dict(zip(shown, _CLOCK_COLORS, strict=False))
    contexts = sorted({point.context for point in points})
    ticks = sorted({point.batch for point in points})

    def paint(figure: Figure) -> None:
        panels = figure.subplots(1, 2)
        for clock, context in product(inks, contexts):
            own = sorted((p for p in points if (p.clock_mhz, p.context) == (clock, context)), key=_batch)
            batches, style = [p.batch for p in own], {"color": inks[clock], "linewidth": 1.3}
            marker = _MARKERS[contexts.index(context) % len(_MARKERS)]
            for axes, column, scale in zip(panels, ("step_s", "power_w"), (1000, 1), strict=True):
                values = [[scale * value for value in getattr(p, column)] for p in own]
                axes.plot(batches, [model for _, model in values], **style)
                axes.plot(batches, [measured for measured, _ in values], marker, color=inks[clock], ms=4.5)
        for axes, name in zip(panels, ("decode step (ms)", "power (W)"), strict=True):
            axes.set(xlabel="requests that decode together", ylabel=name, xscale="log", ylim=(0, None))
            axes.set_xticks(ticks, list(map(str, ticks)))
            axes.minorticks_off()  # their labels need TeX's words
        keys = [_key(color=ink, linewidth=3, label=f"{clock:.0f} MHz") for clock, ink in inks.items()]
        marks = zip(contexts, cycle(_MARKERS), strict=False)
        keys += [_key(color="#30343b", marker=m, ls="", label=f"prompts of {c} tokens") for c, m in marks]
        figure.legend(handles=keys, loc="outside right center")

    return draw(paint, height_in=3.6)


def draw(paint: Callable[[Figure], None], *, height_in: float, form: Literal["svg", "webp"] = "svg") -> str:
    """Draw to a data URI: SVG is sharpest, WebP a fifth of its size for lines of thousands of windows."""
    buffer = BytesIO()
    options = {"metadata": {"Date": None}} if form == "svg" else {"dpi": 170, "pil_kwargs": {"quality": 88}}
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.2, height_in), layout="constrained")
        paint(figure)
        figure.savefig(buffer, format=form, **options)
    kind = "svg+xml" if form == "svg" else form
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _cross(axes: Any, energy: Interval, share: Interval, ink: str, marker: str) -> None:
    axes.errorbar(
        energy.mean,
        100 * share.mean,
        xerr=_bars(energy),
        yerr=_bars(share, scale=100),
        fmt=marker,
        color=ink,
        elinewidth=1,
        markeredgecolor="white",
        markeredgewidth=0.6,
        markersize=7.5,
    )


def _bars(interval: Interval, *, scale: float = 1) -> list[list[float]] | None:
    if interval.low is None or interval.high is None:
        return None
    below, above = interval.mean - interval.low, interval.high - interval.mean
    return [[scale * max(below, 0.0)], [scale * max(above, 0.0)]]  # equal seeds may round to below zero


def _trace(axes: Any, rows: pd.DataFrame, values: pd.Series, ink: str) -> None:
    """Each window thin, a centred mean over SMOOTH_S bold."""
    smooth = values.rolling(max(1, round(SMOOTH_S / _window_s(rows))), min_periods=1, center=True).mean()
    axes.plot(rows["time_s"] / 60, values, color=ink, alpha=0.3, linewidth=0.5)
    axes.plot(rows["time_s"] / 60, smooth, color=ink, linewidth=1.5)


def _window_s(rows: pd.DataFrame) -> float:
    return float(rows["time_s"].diff().median()) if len(rows) > 1 else 1.0


def _policy_key(run: Run) -> list[Line2D]:
    return [_key(color=color(name, run.policies), linewidth=3, label=label(name)) for name in run.policies]


def _scatter_key(run: Run) -> list[Line2D]:
    sizes = [
        _key(color="#30343b", marker=marker, ls="", label=f"block size {size}")
        for size, marker in zip(run.block_sizes, cycle(_MARKERS), strict=False)
    ]
    target = _key(color="#b3261e", linestyle="--", linewidth=1, label="attainment target")
    return [*_policy_key(run), *sizes, *([] if run.attainment_target is None else [target])]
