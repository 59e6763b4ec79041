"""Figures of the clocks that policies chose: how often, and where on the clock axis of the pack."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fuel_ray.policies.catalogue import color, label
from fuel_ray.report.data import Run, where
from fuel_ray.report.figures import draw
from fuel_ray.sim.pack import Pack, PerfModel
from fuel_ray.workload.lengths import OUTPUT_TOKENS, PROMPT_TOKENS

_LIMIT, _CLOCK = "chosen.batch_limit", "chosen.gpu_clock_mhz"
_MOST_CELLS = 16  # along an axis, so that a number fits into each
_ROUND_MHZ = 25  # widths of wider cells are a multiple of it
_WRITTEN_SHARE = 3  # %
_CONTEXT = PROMPT_TOKENS + OUTPUT_TOKENS // 2  # tokens of a request in the middle of its output
_DOT_ROOM = 0.02  # of the axis, beside its ends
_LARGEST_DOT = 380  # square points, of a clock that was always chosen
_BAND = (
    "Top: energy of a decode step of {batch} requests of {context} tokens, relative to the highest clock. "
    "Line: nominal clock axis. Band: lowest to highest of {axes} axes. The wider the band at the clocks "
    "that a policy chose, the less certain its saving. Bottom: the clocks that each policy chose on "
    "workload {workload}, one held-out seed, all block sizes; the area of a dot is the share of control "
    "windows."
)


class Drawn(NamedTuple):
    """A figure and the sentences below it."""

    uri: str
    caption: str


class _Cells(NamedTuple):
    """Cells along an axis: a value each, or from one value to below the next."""

    lows: np.ndarray
    single: bool

    def of(self, values: pd.Series) -> np.ndarray:
        """The cell of each value."""
        return np.searchsorted(self.lows, values, side="right") - 1


def decision_heat_maps(run: Run, *, workload: str) -> str | None:
    """Share of windows in which the learned policy chose each (batch limit, clock), per block size."""
    steps = where(run.steps, workload=workload, policy=run.learned)
    if steps.empty:
        return None
    sizes = sorted(steps["block_size"].unique())
    clocks, limits = _clock_cells(steps[_CLOCK]), _limit_cells(steps[_LIMIT])
    rows = -(-len(sizes) // 2)

    def paint(figure: Figure) -> None:
        grid = figure.subplots(rows, min(2, len(sizes)), squeeze=False)
        shares = [_shares(steps[steps["block_size"] == size], limits=limits, clocks=clocks) for size in sizes]
        top = max(float(share.max()) for share in shares)
        for axes, size, share in zip(grid.flat, sizes, shares, strict=False):
            image = _heat_map(axes, share, limits=limits, clocks=clocks, top=top)
            axes.set(title=f"block size {size}", xlabel="GPU clock (MHz)", ylabel="batch limit")
        for axes in grid.flat[len(sizes) :]:
            axes.set_visible(False)
        figure.colorbar(image, ax=grid, label="share of control windows (%)", shrink=0.7)

    return draw(paint, height_in=min(0.9 + rows * (1.1 + 0.22 * len(limits.lows)), 9.0))


def band(run: Run, pack: Pack, *, workload: str) -> Drawn | None:
    """Energy over the clock under every axis of the pack, above the clocks that each policy chose.

    None where the pack has one axis or no windows were recorded.
    """
    steps = where(run.steps, workload=workload)
    if steps.empty or len(pack.clock_axes) == 1:
        return None
    batch = max(1, round(float(steps["in_system"].mean())))
    nominal, *others = (pack.with_axis(name).perf for name in pack.clock_axes)

    def paint(figure: Figure) -> None:
        ratios = (2.6, 0.34 * len(run.policies))
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=ratios)
        curves = [_step_energy(perf, pack.gpu_clocks_mhz, batch) for perf in (nominal, *others)]
        top.fill_between(pack.gpu_clocks_mhz, np.min(curves, 0), np.max(curves, 0), color="#b9cbd8", lw=0)
        top.plot(pack.gpu_clocks_mhz, curves[0], color="#30343b", linewidth=1.5)
        top.set_ylabel("energy of a decode step,\nhighest clock = 1")
        for row, policy in enumerate(run.policies):
            _dots(bottom, where(steps, policy=policy)[_CLOCK], row, color(policy, run.policies))
        bottom.set_yticks(range(len(run.policies)), list(map(label, run.policies)))
        bottom.set(xlabel="GPU clock (MHz)", ylim=(len(run.policies) - 0.4, -0.6))
        room_mhz = _DOT_ROOM * (pack.gpu_clocks_mhz[-1] - pack.gpu_clocks_mhz[0])
        bottom.set_xlim(pack.gpu_clocks_mhz[0] - room_mhz, pack.gpu_clocks_mhz[-1] + room_mhz)

    told = {"batch": batch, "context": _CONTEXT, "axes": len(pack.clock_axes), "workload": workload}
    return Drawn(draw(paint, height_in=3.4 + 0.34 * len(run.policies)), _BAND.format(**told))


def _step_energy(perf: PerfModel, clocks_mhz: tuple[int, ...], batch: int) -> np.ndarray:
    """Of a decode step at each clock, relative to the highest."""
    steps = [perf.step_cost(batch, batch * _CONTEXT, 0, clock) for clock in clocks_mhz]
    energies_j = np.array([step_s * power_w for step_s, power_w, _ in steps])
    return energies_j / energies_j[-1]


def _dots(axes: Any, chosen_mhz: pd.Series, row: int, ink: str) -> None:
    """A dot at the mean clock of each cell, as large as it was chosen often."""
    cells = _clock_cells(chosen_mhz)
    by_cell = chosen_mhz.groupby(cells.of(chosen_mhz))
    sizes = _LARGEST_DOT * by_cell.size() / max(1, len(chosen_mhz))
    axes.scatter(by_cell.mean(), [row] * len(sizes), s=sizes, color=ink, linewidths=0, clip_on=False)


def _clock_cells(clocks_mhz: pd.Series) -> _Cells:
    found = np.sort(clocks_mhz.unique())
    if len(found) <= _MOST_CELLS:
        return _Cells(found, single=True)
    width = _ROUND_MHZ * -(-(found[-1] - found[0] + 1) // (_ROUND_MHZ * (_MOST_CELLS - 1)))
    return _Cells(np.arange(found[0] // width * width, found[-1] + 1, width), single=False)


def _limit_cells(limits: pd.Series) -> _Cells:
    found = np.sort(limits.unique())
    every = -(-len(found) // _MOST_CELLS)
    return _Cells(found[::every], single=every == 1)


def _shares(steps: pd.DataFrame, *, limits: _Cells, clocks: _Cells) -> np.ndarray:
    """Percent of windows, shape (limits, clocks)."""
    counts = np.zeros((len(limits.lows), len(clocks.lows)))
    np.add.at(counts, (limits.of(steps[_LIMIT]), clocks.of(steps[_CLOCK])), 1)
    return np.asarray(100 * counts / counts.sum())


def _heat_map(axes: Any, share: np.ndarray, *, limits: _Cells, clocks: _Cells, top: float) -> Any:
    image = axes.pcolormesh(np.where(share > 0, share, np.nan), cmap="Blues", vmin=0, vmax=top)
    axes.set_facecolor("#f6f7f9")
    axes.grid(visible=False)
    for axis, cells, rotation in ((axes.xaxis, clocks, 90), (axes.yaxis, limits, 0)):
        at = np.arange(len(cells.lows)) + (0.5 if cells.single else 0.0)
        axis.set_ticks(at, cells.lows, rotation=rotation, fontsize=7.5)
    for row, column in np.argwhere(share >= _WRITTEN_SHARE):
        value = share[row, column]
        ink = "white" if value > 0.42 * top else "#30343b"
        axes.text(column + 0.5, row + 0.5, f"{value:.0f}", ha="center", va="center", fontsize=7, color=ink)
    return image
