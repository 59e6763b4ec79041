"""The clock axis's form: fitted on one folder of published rows, its errors printed on another's.

    python benchmarks/clock_axis.py FIT_FOLDER TEST_FOLDER [--fit-tp 4] [--test-tp 8] [--reference-mhz 1830]
        [--prefill]

Each folder holds decode_grid.csv with the columns tp, batch, clock_mhz, latency_s and power_w_per_gpu, and
the first also h100_idle_power_by_clock.csv (clock_mhz, idle_power_w_per_gpu). The second may lack one of the
measured columns. Other columns and files are left aside, prefill_grid.csv and mixed_grid.csv unless --prefill
asks for them: per TP one time and one energy by token are fitted to the first folder's prefills of 512 tokens
or more at its highest clock; what the clock makes of them is predicted.
Fitted are, per GPU, at batch b and x = clock / highest clock:

    T = fixed + clocked / x + (fixed_seq + clocked_seq / x) b + streaming(clock) weights / (TP bandwidth)
    P = idle(clock) + (hbm / TP + ((weight + seq b) / TP + step) switched(clock)) / T

The time of streaming the weights is the data sheet's at the highest clock; on one GPU, or on few numbers of
GPUs, it could not be told from the rest. What is predicted goes through the simulator's own step_cost: linear
between the clocks of the fit, flat beyond them.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from fuel_ray.errors import ConfigError
from fuel_ray.sim.calibrate import AXIS_CLOCKS, relative_fit
from fuel_ray.sim.clock_axis import ClockAxis
from fuel_ray.sim.pack import PerfModel, load_pack

BANDWIDTH_IS_FULL_FROM_MHZ = 1380  # batch-1 times of three TPs: the share by weight is the same from there on
KEY = ["tp", "batch", "tokens"]  # of prompts
MEASURED = ["latency_s", "power_w_per_gpu"]
TURNS = 200
BOUND_BY_ARITHMETIC_FROM = 512  # prompt tokens
PREFILLS = ("prefill_grid.csv", "mixed_grid.csv")


@dataclass(frozen=True)
class Fit:
    """The constants of the form; a model is made of them per number of GPUs."""

    axis: ClockAxis
    time_s: dict[str, float]
    energy_j: dict[str, float]
    weights_s: float  # on one GPU
    idle_w: float  # at the highest clock
    prefill: Mapping[int, dict[str, float]] = field(default_factory=dict)  # its constants, by number of GPUs

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
            **self.prefill.get(tp, {}),
        )
        return PerfModel(constants, self.axis)

    def predicted(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The rows with their measured columns replaced by the model's."""
        models = {tp: self.model(tp) for tp in rows.tp.unique()}
        costs = [
            models[row.tp].step_cost(row.batch, 0.0, row.tokens, row.clock_mhz) for row in rows.itertuples()
        ]
        return rows.assign(latency_s=[c[0] for c in costs], power_w_per_gpu=[c[1] for c in costs])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("fit", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument(
        "--weights-gb", type=positive, default=141.1, help="of the model: Llama-3.3-70B in BF16"
    )
    parser.add_argument(
        "--bandwidth-tb-s", type=positive, default=3.35, help="of a GPU: H100 SXM's data sheet"
    )
    parser.add_argument("--lowest-mhz", type=int, default=900, help="lower clocks are left out")
    parser.add_argument("--reference-mhz", type=int, default=1830, help="ratios are to it, or to the highest")
    parser.add_argument("--fit-tp", type=int, nargs="+", help="numbers of GPUs to fit on; default all")
    parser.add_argument("--test-tp", type=int, nargs="+", help="numbers of GPUs to test on; default all")
    parser.add_argument("--prefill", action="store_true", help="errors of prefill and mixed steps too")
    parser.add_argument(
        "--prefill-clock-share",
        type=positive,
        default=load_pack("h100-qwen3-8b").perf.constants.prefill_clock_share,
        help="of a prefill's time; default: the H100 pack's",
    )
    flags = parser.parse_args(argv)
    weights_s = flags.weights_gb * 1e9 / (flags.bandwidth_tb_s * 1e12)
    try:
        rows, idle_w = read(flags.fit, flags.lowest_mhz, flags.fit_tp), read_idle(flags.fit)
        test = read(flags.test, flags.lowest_mhz, flags.test_tp)
        found = fitted(rows, idle_w, weights_s=weights_s)
        prefills = {}
        if flags.prefill:
            known = read_prefill(flags.fit / PREFILLS[0], flags.lowest_mhz, None)
            found = with_prefill(found, known, share=flags.prefill_clock_share)
            tps = [tp for tp in found.prefill if tp in (flags.test_tp or found.prefill)]
            prefills = {name: read_prefill(flags.test / name, flags.lowest_mhz, tps) for name in PREFILLS}
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_fit(found)
    print_errors(found, test, flags.reference_mhz)
    for name, steps in prefills.items():
        print(f"\n{name}, prefill_clock_share {flags.prefill_clock_share:g}")
        print_errors(found, steps, flags.reference_mhz)
    return 0


def positive(text: str) -> float:
    """A number above 0."""
    if not (value := float(text)) > 0:
        raise ValueError(text)
    return value


def read(folder: Path, lowest_mhz: int, tps: list[int] | None) -> pd.DataFrame:
    """Means over contexts, which the rows do not tell apart; of the measured columns those that there are."""
    path = folder / "decode_grid.csv"
    rows = _numbers(path, ["tp", "batch", "clock_mhz"], optional=MEASURED).assign(tokens=0.0)
    measured = [name for name in MEASURED if name in rows]
    if not measured:
        raise ConfigError(f"{path}: it has neither of the columns {', '.join(MEASURED)}")
    rows = _of(rows, path, lowest_mhz, tps)
    return rows.groupby([*KEY, "clock_mhz"], as_index=False)[measured].mean()


def read_prefill(path: Path, lowest_mhz: int, tps: list[int] | None) -> pd.DataFrame:
    """Steps with prompt tokens: alone, in prefill_grid.csv, or in mixed_grid.csv beside decoding requests."""
    alone = path.name == PREFILLS[0]
    time, *powers = (
        ["latency_s_tree", "power_w_per_gpu_tree", "power_w_per_gpu_measured_table"] if alone else MEASURED
    )
    batch = [] if alone else ["decode_batch"]
    rows = _numbers(path, ["tp", *batch, "prefill_tokens", "clock_mhz", time], powers, all_rows=True)
    power_w = rows.reindex(columns=powers).bfill(axis=1).iloc[:, 0]
    rows = rows.assign(latency_s=rows[time], power_w_per_gpu=power_w, tokens=rows.prefill_tokens)
    rows = rows.assign(batch=0.0 if alone else rows.decode_batch)
    return _of(rows, path, lowest_mhz, tps)[[*KEY, "clock_mhz", *MEASURED]].reset_index(drop=True)


def _of(rows: pd.DataFrame, path: Path, lowest_mhz: int, tps: list[int] | None) -> pd.DataFrame:
    there = sorted(rows.tp.unique())
    rows = rows[(rows.clock_mhz >= lowest_mhz) & rows.tp.isin(tps or there)]
    if rows.empty:
        known = ", ".join(f"{tp:g}" for tp in there)
        raise ConfigError(f"{path}: no row of these TP from {lowest_mhz} MHz on; it has TP {known or 'none'}")
    return rows


def read_idle(folder: Path) -> pd.Series:
    """Idle power by clock, W per GPU."""
    rows = _numbers(folder / "h100_idle_power_by_clock.csv", ["clock_mhz", "idle_power_w_per_gpu"])
    return rows.groupby("clock_mhz").idle_power_w_per_gpu.mean()


def _numbers(
    path: Path, columns: list[str], optional: Sequence[str] = (), *, all_rows: bool = False
) -> pd.DataFrame:
    """Rows that have a number in each of the columns, and in one of the optional ones where there are any.

    With ``all_rows`` a row may lack all of the optional ones.

    Raises:
        ConfigError: the file, a column or a row is not there, or a number is not one above 0.
    """
    try:
        rows = pd.read_csv(path, skipinitialspace=True)
        if missing := [name for name in columns if name not in rows]:
            raise ConfigError(f"{path}: it has no column {', '.join(missing)}")
        used = [*columns, *(name for name in optional if name in rows and rows[name].notna().any())]
        rows = rows[used].apply(pd.to_numeric).astype(float).dropna(subset=columns)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    rows = (
        rows.dropna(subset=used[len(columns) :], how="all")
        if len(used) > len(columns) and not all_rows
        else rows
    )
    if rows.empty or ((rows <= 0) | np.isinf(rows)).any(axis=None):
        raise ConfigError(f"{path}: {'an entry is not a number above 0' if len(rows) else 'it has no row'}")
    return rows


def fitted(rows: pd.DataFrame, idle_w: pd.Series, *, weights_s: float) -> Fit:
    """Least squares of relative errors: linear for the times, in turns for the powers.

    Raises:
        ConfigError: the rows have too few clocks, or no times or powers.
    """
    rows = rows.dropna()
    clocks = np.array(sorted(rows.clock_mhz.unique()), float)
    if len(clocks) < AXIS_CLOCKS or not set(MEASURED) <= set(rows):
        found = f"{len(clocks)} ({', '.join(f'{mhz:g}' for mhz in clocks)})"
        raise ConfigError(
            f"to fit takes {', '.join(MEASURED)} at {AXIS_CLOCKS} clocks; clocks found: {found}"
        )
    tents = np.column_stack([np.interp(rows.clock_mhz, clocks, unit) for unit in np.eye(len(clocks))])
    inverse = clocks[-1] / rows.clock_mhz
    weights = weights_s / rows.tp
    slow = clocks < min(BANDWIDTH_IS_FULL_FROM_MHZ, clocks[-1])
    columns = {"fixed": np.ones(len(rows)), "clocked": inverse, "fixed_seq": rows.batch,
               "clocked_seq": rows.batch * inverse}  # fmt: skip
    columns |= {i: tents[:, i] * weights for i in np.flatnonzero(slow)}
    streaming = np.where(slow, 0.0, 1.0)
    times = relative_fit(columns, rows.latency_s - tents @ streaming * weights, of=rows.latency_s.to_numpy())
    streaming[slow] = [max(1.0, times.pop(i)) for i in np.flatnonzero(slow)]
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
    above_0 = tuple(np.maximum(switched, 0.01).tolist())
    axis = ClockAxis(start.axis.clocks_mhz, start.axis.streaming, above_0, start.axis.idle)
    return Fit(axis, start.time_s, energy, start.weights_s, start.idle_w)


def with_prefill(found: Fit, rows: pd.DataFrame, *, share: float) -> Fit:
    """Time and energy of a prompt token, of steps bound by arithmetic at the highest clock.

    A token of a step bound by reading the weights takes what it does, relative to it, in the H100 pack.
    """
    base = load_pack("h100-qwen3-8b").perf.constants
    long = rows[(rows.tokens >= BOUND_BY_ARITHMETIC_FROM) & (rows.clock_mhz == found.axis.clocks_mhz[-1])]
    prefill = {}
    for tp, steps in long.groupby("tp"):
        m = found.model(tp).constants
        known = steps.dropna()
        energy_j = known.power_w_per_gpu * known.latency_s
        of_weights_j = m.graph_w * m.decode_s + m.graph_j
        if known.empty:
            raise ConfigError(f"prefills of TP {tp:g} have no power")
        columns = ({"by": known.tokens.to_numpy()}, (energy_j - of_weights_j).to_numpy())
        token_j = relative_fit(*columns, of=energy_j.to_numpy())["by"]
        token_s = relative_fit({"by": steps.tokens.to_numpy()}, steps.latency_s.to_numpy())["by"]
        prefill[tp] = {
            "prefill_token_s": token_s,
            "mixed_token_s": token_s * base.mixed_token_s / base.prefill_token_s,
            "prefill_token_j": token_j,
            "prefill_attention_s": 0.0,
            "prefill_clock": 1.0,  # times fall up to the highest clock
            "prefill_clock_share": share,
        }
    if not prefill:
        raise ConfigError(f"no prefill of {BOUND_BY_ARITHMETIC_FROM} tokens or more at the highest clock")
    return replace(found, prefill=prefill)


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


def print_errors(found: Fit, rows: pd.DataFrame, reference_mhz: float) -> None:
    """Absolute errors, and those of the ratios to a reference clock of the same TP and batch."""
    to_mhz = _reference(rows, reference_mhz)
    measured, model = (_figures(values, to_mhz) for values in (rows, found.predicted(rows)[list(rows)]))
    errors = model / measured - 1
    print(f"\nerrors on {len(rows)} rows (TP, batch, clock): mean absolute, and the worst with its sign")
    print(_said(found.axis, rows, to_mhz, reference_mhz))
    print(f"{'TP':>3} {'MHz':>5}" + "".join(f" {what:>17}" for what in errors))
    by_tp = [
        (f"{tp:.0f}", f"{mhz:.0f}", part) for (tp, mhz), part in errors.groupby([rows.tp, rows.clock_mhz])
    ]
    by_clock = [("all", f"{mhz:.0f}", part) for mhz, part in errors.groupby(rows.clock_mhz)]
    for tp, mhz, part in (*by_tp, *by_clock, ("all", "all", errors)):
        print(f"{tp:>3} {mhz:>5}" + "".join(f" {cell(part[what]):>17}" for what in errors))


def _reference(rows: pd.DataFrame, reference_mhz: float) -> pd.Series:
    """For each row the reference clock of its TP and batch: the one asked for, or the highest there is."""
    keys = [rows[key] for key in KEY]
    there = (rows.clock_mhz == reference_mhz).groupby(keys).transform("any")
    return rows.clock_mhz.groupby(keys).transform("max").where(~there, reference_mhz)


def _figures(values: pd.DataFrame, to_mhz: pd.Series) -> pd.DataFrame:
    """Time, power and energy, of which there are those that were measured, and their ratios."""
    columns = {
        what: values[name] for what, name in zip(("time", "power"), MEASURED, strict=True) if name in values
    }
    if len(columns) == len(MEASURED):
        columns["energy"] = columns["time"] * columns["power"]
    at_reference = values.clock_mhz == to_mhz
    keys = [values[key] for key in KEY]
    ratios = {
        f"{what} ratio": (column / column.where(at_reference).groupby(keys).transform("max")).mask(
            at_reference
        )
        for what, column in columns.items()
    }
    return pd.DataFrame(columns | ratios)


def _said(axis: ClockAxis, rows: pd.DataFrame, to_mhz: pd.Series, reference_mhz: float) -> str:
    """What the ratios are to, and which clocks the fit did not have."""
    lines = [f"ratios are to {reference_mhz:g} MHz"]
    if len(others := rows[to_mhz != reference_mhz]):
        used = ", ".join(f"{mhz:g}" for mhz in sorted(to_mhz[others.index].unique()))
        groups = len(others.drop_duplicates(KEY))
        lines.append(f"where a (TP, batch) lacks it, to its highest clock: {used} MHz ({groups} of them)")
    low, high = axis.clocks_mhz[0], axis.clocks_mhz[-1]
    new = sorted(set(rows.clock_mhz) - set(axis.clocks_mhz))
    for what, clocks in (
        ("linear between its neighbours", [mhz for mhz in new if low < mhz < high]),
        (f"beyond {low:g} to {high:g}: tables are flat", [mhz for mhz in new if not low < mhz < high]),
    ):
        if clocks:
            lines.append(f"not fitted, {what}: {', '.join(f'{mhz:g}' for mhz in clocks)} MHz")
    return "\n".join(lines)


def cell(errors: pd.Series) -> str:
    known = errors.dropna()
    return f"{known.abs().mean():.1%} ({known.loc[known.abs().idxmax()]:+.1%})" if len(known) else "-"


if __name__ == "__main__":
    sys.exit(main())
