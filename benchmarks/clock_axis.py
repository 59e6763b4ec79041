"""The clock axis's form: fitted on one folder of published rows, its errors printed on another's.

    python benchmarks/clock_axis.py FIT_FOLDER TEST_FOLDER [--weights-gb 141.1] [--bandwidth-tb-s 3.35]

Each folder holds decode_grid.csv with the columns tp, batch, clock_mhz, latency_s and power_w_per_gpu; the
first also h100_idle_power_by_clock.csv. Fitted are, per GPU, at batch b and x = clock / highest clock:

    T = fixed + clocked / x + (fixed_seq + clocked_seq / x) b + streaming(clock) weights / (TP bandwidth)
    P = idle(clock) + (hbm / TP + ((weight + seq b) / TP + step) switched(clock)) / T

The time of streaming the weights is the data sheet's at the highest clock; on one GPU, or on few numbers of
GPUs, it could not be told from the rest. What is predicted goes through the simulator's own step_cost.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from fuel_ray.errors import ConfigError
from fuel_ray.sim.calibrate import relative_fit
from fuel_ray.sim.clock_axis import ClockAxis
from fuel_ray.sim.pack import PerfModel, load_pack

BANDWIDTH_IS_FULL_FROM_MHZ = 1380  # batch-1 times of three TPs: the share by weight is the same from there on
KEY = ["tp", "batch"]
MEASURED = ["latency_s", "power_w_per_gpu"]
TURNS = 200


@dataclass(frozen=True)
class Fit:
    """The constants of the form; a model is made of them per number of GPUs."""

    axis: ClockAxis
    time_s: dict[str, float]
    energy_j: dict[str, float]
    weights_s: float  # on one GPU
    idle_w: float  # at the highest clock

    def model(self, tp: int) -> PerfModel:
        """As the twin has it, for one of ``tp`` GPUs."""
        t, e, stream_s = self.time_s, self.energy_j, self.weights_s / tp
        base = load_pack("h100-qwen3-8b").perf.constants
        constants = base._replace(
            max_clock_mhz=self.axis.clocks_mhz[-1],
            idle_w=self.idle_w,
            power_cap_w=float("inf"),  # the rows are below it
            decode_s=t["fixed"] + t["clocked"] + stream_s,
            decode_seq_s=t["fixed_seq"] + t["clocked_seq"],
            decode_ctx_s=0.0,  # the published rows do not depend on it
            stream_s=stream_s,
            clock_s=t["clocked"],
            clock_seq_s=t["clocked_seq"],
            hbm_w=e["hbm"] / self.weights_s,
            graph_w=self.idle_w,
            graph_j=(e["hbm"] + e["weight"]) / tp + e["step"],
            graph_seq_j=e["seq"] / tp,
        )
        return PerfModel(constants, self.axis)

    def predicted(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The rows with their measured columns replaced by the model's."""
        models = {tp: self.model(tp) for tp in rows.tp.unique()}
        costs = [models[row.tp].step_cost(row.batch, 0.0, 0, row.clock_mhz) for row in rows.itertuples()]
        return rows.assign(latency_s=[c[0] for c in costs], power_w_per_gpu=[c[1] for c in costs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("fit", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--weights-gb", type=float, default=141.1, help="of the model: Llama-3.3-70B in BF16")
    parser.add_argument("--bandwidth-tb-s", type=float, default=3.35, help="of a GPU: H100 SXM's data sheet")
    parser.add_argument("--lowest-mhz", type=int, default=900, help="lower clocks are left out")
    parser.add_argument("--fit-tp", type=int, nargs="*", help="numbers of GPUs to fit on; default all")
    parser.add_argument("--test-tp", type=int, nargs="*", help="numbers of GPUs to test on; default all")
    flags = parser.parse_args()
    weights_s = flags.weights_gb * 1e9 / (flags.bandwidth_tb_s * 1e12)
    found = fitted(read(flags.fit, flags.lowest_mhz, flags.fit_tp), read_idle(flags.fit), weights_s=weights_s)
    print_fit(found)
    print_errors(found, read(flags.test, flags.lowest_mhz, flags.test_tp))


def read(folder: Path, lowest_mhz: int, tps: list[int] | None) -> pd.DataFrame:
    """Means over contexts, which the rows do not tell apart."""
    path = folder / "decode_grid.csv"
    try:
        rows = pd.read_csv(path)
        rows = rows[rows.clock_mhz >= lowest_mhz]
        rows = rows[rows.tp.isin(tps)] if tps else rows
        means = rows.groupby([*KEY, "clock_mhz"], as_index=False)[MEASURED].mean()
    except (OSError, KeyError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if means.empty:
        raise ConfigError(f"{path}: no row of these TP and clocks")
    return means


def read_idle(folder: Path) -> pd.Series:
    """Idle power by clock, W per GPU."""
    rows = pd.read_csv(folder / "h100_idle_power_by_clock.csv")
    return rows.groupby("clock_mhz").idle_power_w_per_gpu.mean()


def fitted(rows: pd.DataFrame, idle_w: pd.Series, *, weights_s: float) -> Fit:
    """Least squares of relative errors: linear for the times, in turns for the powers."""
    clocks = np.array(sorted(rows.clock_mhz.unique()), float)
    tents = np.column_stack([np.interp(rows.clock_mhz, clocks, unit) for unit in np.eye(len(clocks))])
    inverse = clocks[-1] / rows.clock_mhz
    weights = weights_s / rows.tp
    slow = clocks < BANDWIDTH_IS_FULL_FROM_MHZ
    columns = {"fixed": np.ones(len(rows)), "clocked": inverse, "fixed_seq": rows.batch,
               "clocked_seq": rows.batch * inverse}  # fmt: skip
    columns |= {i: tents[:, i] * weights for i in np.flatnonzero(slow)}
    streaming = np.where(slow, 0.0, 1.0)
    times = relative_fit(columns, rows.latency_s - tents @ streaming * weights, of=rows.latency_s.to_numpy())
    streaming[slow] = [times.pop(i) for i in np.flatnonzero(slow)]
    idle = np.interp(clocks, idle_w.index, idle_w)
    ones = np.ones_like(clocks)
    axis = ClockAxis(*(tuple(table.tolist()) for table in (clocks, streaming, ones, idle / idle[-1])))
    no_energy = dict.fromkeys(("hbm", "weight", "step", "seq"), 0.0)
    start = Fit(axis, times, no_energy, weights_s, float(idle[-1]))
    return with_energies(start, rows, tents, idle)


def with_energies(start: Fit, rows: pd.DataFrame, tents: np.ndarray, idle: np.ndarray) -> Fit:
    """Energies for given switched energies by clock, and these for given energies, in turns."""
    step_s = start.predicted(rows).latency_s.to_numpy()
    power_w = rows.power_w_per_gpu.to_numpy()
    target = power_w - tents @ idle
    inverse_tp, batch = 1 / rows.tp.to_numpy(), rows.batch.to_numpy() / rows.tp.to_numpy()
    switched = np.linspace(0.5, 1.0, tents.shape[1])
    for _ in range(TURNS):
        v = tents @ switched / step_s
        columns = {"hbm": inverse_tp / step_s, "weight": inverse_tp * v, "step": v, "seq": batch * v}
        energy = relative_fit(columns, target, of=power_w)
        by_clock = (energy["weight"] * inverse_tp + energy["step"] + energy["seq"] * batch) / step_s
        rest = target - energy["hbm"] * inverse_tp / step_s - tents[:, -1] * by_clock
        free = {i: tents[:, i] * by_clock for i in range(len(switched) - 1)}
        switched = np.array([*relative_fit(free, rest, of=power_w).values(), 1.0])
    axis = ClockAxis(start.axis.clocks_mhz, start.axis.streaming, tuple(switched.tolist()), start.axis.idle)
    return Fit(axis, start.time_s, energy, start.weights_s, start.idle_w)


def print_fit(found: Fit) -> None:
    print("ms:", {name: round(1e3 * value, 4) for name, value in found.time_s.items()},
          f"weights: {1e3 * found.weights_s:.2f} / TP")  # fmt: skip
    print("J:", {name: round(value, 4) for name, value in found.energy_j.items()})
    axis = found.axis
    print(f"{'MHz':>6} {'streaming':>10} {'switched':>9} {'idle W':>7}")
    for mhz, streaming, switched, idle in zip(
        axis.clocks_mhz, axis.streaming, axis.switched, axis.idle, strict=True
    ):
        print(f"{mhz:>6.0f} {streaming:>10.3f} {switched:>9.3f} {found.idle_w * idle:>7.1f}")


def print_errors(found: Fit, rows: pd.DataFrame) -> None:
    """Absolute errors, and those of the ratios to the highest clock of the same TP and batch."""
    predicted = found.predicted(rows)
    table = rows[[*KEY, "clock_mhz"]].copy()
    for name, values in (("measured", rows), ("model", predicted)):
        figures = values[MEASURED].assign(energy=values.latency_s * values.power_w_per_gpu)
        for what, column in zip(("time", "power", "energy"), figures, strict=True):
            table[f"{what} {name}"] = figures[column]
            top = figures[column].groupby([rows[key] for key in KEY]).transform("last")  # clocks ascend
            table[f"{what} ratio {name}"] = figures[column] / top
    print(f"\nerrors on {len(rows)} rows (TP, batch, clock): mean absolute, and the worst with its sign")
    print(f"{'TP':>3} {'MHz':>5}" + "".join(f" {what:>17}" for what in COLUMNS))
    groups = [((tp, mhz), part) for (tp, mhz), part in table.groupby(["tp", "clock_mhz"])]
    groups += [(("all", mhz), part) for mhz, part in table.groupby("clock_mhz")]
    for (tp, mhz), part in groups:
        cells = [cell(part[f"{what} model"] / part[f"{what} measured"] - 1) for what in COLUMNS]
        print(f"{tp:>3} {mhz:>5}" + "".join(f" {text:>17}" for text in cells))


COLUMNS = ("time", "power", "energy", "time ratio", "power ratio", "energy ratio")


def cell(errors: pd.Series) -> str:
    worst = errors.loc[errors.abs().idxmax()]
    return f"{errors.abs().mean():.1%} ({worst:+.1%})"


if __name__ == "__main__":
    main()
