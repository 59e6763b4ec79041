"""A run folder as the report reads it, and the paired comparisons made from it."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from fuel_ray.errors import ConfigError
from fuel_ray.policies.catalogue import LEARNED, REFERENCES
from fuel_ray.sim.pack import NOMINAL
from fuel_ray.stats import Interval, mean_of, relative_energy
from fuel_ray.types import Slo

ENERGY = "energy_j_per_request"
_COLUMNS = (
    *("block_size", "policy", "workload", "seed", "workload_digest", "slo_attainment", ENERGY),
    *("ttft_p99_s", "tpot_p99_s", "mean_gpu_clock_mhz", "mean_batch_limit", "clock_switches"),
)
_KNOBS = [f"{kind}.{knob}" for kind in ("chosen", "applied") for knob in ("batch_limit", "gpu_clock_mhz")]


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What a finished sweep left in its folder."""

    name: str
    info: Mapping[str, Any]  # run.json as it is
    config: Mapping[str, Any]  # its config, flattened: dotted key -> value
    summary: pd.DataFrame  # one row per (block_size, policy, workload, seed)
    learning: pd.DataFrame  # one row per (block_size, training iteration); may be empty
    steps: pd.DataFrame  # one row per control window of one seed; may be empty
    axes: pd.DataFrame  # the summary's rows under each clock axis, for some seeds; may be empty

    @property
    def block_sizes(self) -> list[int]:
        """Block sizes that were evaluated, ascending."""
        return sorted(int(size) for size in self.summary["block_size"].unique())

    @property
    def policies(self) -> list[str]:
        """Policies in the order of the tables: references, others as they come, the learned one last."""
        present = list(self.summary["policy"].unique())
        others = [name for name in present if name not in (*REFERENCES, self.learned)]
        return [name for name in (*REFERENCES, *others, self.learned) if name in present]

    @property
    def learned(self) -> str:
        """The learned policy, which is called as the algorithm that trained it."""
        return str(self.setting("algorithm") or LEARNED)

    @property
    def workloads(self) -> list[str]:
        """Workloads, the one that was trained for first."""
        present = list(self.summary["workload"].unique())
        main = self.setting("workload")
        return sorted(present, key=lambda name: (name != main, name == self.control))

    @property
    def control(self) -> str | None:
        """The negative control's workload; None if it is the main one or was not run."""
        name = self.setting("control_workload")
        ran = name in set(self.summary["workload"]) and name != self.setting("workload")
        return str(name) if ran else None

    @property
    def attainment_target(self) -> float | None:
        """Share of requests that must meet the SLO, 0..1."""
        target = self.setting("slo_share")
        return None if target is None else float(target)

    @property
    def slo(self) -> Slo | None:
        """The limits and the share of requests that has to meet them; None where no limit is known."""
        ttft_s, tpot_s, e2e_s = (self.setting(f"slo_{name}_s") for name in ("ttft", "tpot", "e2e"))
        return Slo(ttft_s, tpot_s, e2e_s, self.attainment_target) if ttft_s or tpot_s or e2e_s else None

    def setting(self, name: str) -> Any:
        """A config value by the last part of its key; None where the run has no such key."""
        return next((value for key, value in self.config.items() if key.split(".")[-1] == name), None)


def load_run(run_dir: Path) -> Run:
    """Read a run folder; learning.csv and steps.jsonl may be missing."""
    with _reading(run_dir / "run.json") as path:
        info = json.loads(path.read_text())
    with _reading(run_dir / "summary.csv") as path:
        summary = pd.read_csv(path, dtype={"policy": str, "workload": str, "workload_digest": str})
    if missing := [name for name in _COLUMNS if name not in summary]:
        raise ConfigError(f"{path} has no column {', '.join(missing)}")
    if summary.empty:
        raise ConfigError(f"{path} has no rows: nothing was evaluated")
    return Run(
        name=run_dir.resolve().name,
        info=info,
        config=dict(_flat(info.get("config", {}))),
        summary=summary,
        learning=_optional(run_dir / "learning.csv", pd.read_csv),
        steps=_optional(run_dir / "steps.jsonl", _read_steps),
        axes=_optional(run_dir / "clock_axes.csv", pd.read_csv),
    )


def mean_over_seeds(
    run: Run, column: str, *, workload: str, policy: str, block_size: int | None = None
) -> Interval | None:
    """Mean of a column over the seeds, each averaged over the block sizes; None without values."""
    values = list(_by_seed(_cells(run, column, workload, policy, block_size)).values())
    return mean_of(values) if values else None


def energy_against(
    run: Run, policy: str, reference: str, *, workload: str, block_size: int | None = None
) -> Interval | None:
    """Energy per request of one policy over that of another, paired by seed; None if they share none."""
    own, other = (_cells(run, ENERGY, workload, name, block_size) for name in (policy, reference))
    both = own.index.intersection(other.index)
    return relative_energy(_by_seed(own[both]), _by_seed(other[both]))


def energy_over_axes(run: Run, policy: str, reference: str) -> list[float]:
    """The policy's energy over the reference's under each clock axis, the nominal one first.

    Each is the figure of all seeds, moved by what the axis changes of it on those that it was played on.
    """
    return _over_axes(run, lambda one: energy_against(one, policy, reference, workload=run.workloads[0]))


def mean_over_axes(run: Run, column: str, policy: str) -> list[float]:
    """The mean of a column under each clock axis, the nominal one first; moved likewise, shares to 0..1."""
    means = _over_axes(
        run, lambda one: mean_over_seeds(one, column, workload=run.workloads[0], policy=policy)
    )
    return [min(max(mean, 0.0), 1.0) for mean in means] if column == "slo_attainment" else means


def axis_names(run: Run) -> list[str]:
    """The clock axes that were evaluated, the nominal one first; none where there is but one."""
    names = map(str, run.axes["clock_axis"].unique() if len(run.axes) else ())
    return sorted(names, key=lambda name: (name != NOMINAL, name))


def _over_axes(run: Run, figure: Callable[[Run], Interval | None]) -> list[float]:
    """A figure under each clock axis, on the workload trained for."""
    under = {axis: figure(_under(run, axis)) for axis in axis_names(run)}
    of_all, of_same = figure(run), under.get(run.setting("clock_axis") or NOMINAL)
    moved = of_all.mean - of_same.mean if of_all is not None and of_same is not None else 0.0
    return [found.mean + moved for found in under.values() if found is not None]


@lru_cache
def _under(run: Run, axis: str) -> Run:
    return replace(run, summary=where(run.axes, clock_axis=axis))


def block_size_ratios(run: Run, policy: str, *, workload: str) -> dict[tuple[int, int], Interval]:
    """Energy per request at block size a over that at b, paired by seed, for each pair a > b."""
    own = {size: _by_seed(_cells(run, ENERGY, workload, policy, size)) for size in run.block_sizes}
    ratios = {(a, b): relative_energy(own[a], own[b]) for a in own for b in own if a > b}
    return {pair: ratio for pair, ratio in ratios.items() if ratio is not None}


def digests(run: Run) -> dict[tuple[str, int], list[str]]:
    """Digests of the requests that were sent, by (workload, seed); more than one breaks the pairing."""
    found: Any = run.summary.groupby(["workload", "seed"])["workload_digest"].unique()
    return {key: sorted(map(str, of_seed)) for key, of_seed in found.items()}


def missed(run: Run, attainment: Interval | None) -> bool:
    """True when the mean attainment is below the run's target."""
    target = run.attainment_target
    return attainment is not None and target is not None and attainment.mean < target


def unsure(run: Run, attainment: Interval) -> bool:
    """True when the mean attainment meets the target but its interval, as shown, begins below."""
    target, low = run.attainment_target, attainment.low
    return target is not None and low is not None and round(low, 3) < target <= attainment.mean


def where(rows: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """The rows whose columns have these values; None: any."""
    for name, value in values.items():
        if value is not None and len(rows):
            rows = rows[rows[name] == value]
    return rows


@lru_cache(maxsize=4096)  # tables ask for the same ones again and again
def _cells(run: Run, column: str, workload: str, policy: str, block_size: int | None = None) -> pd.Series:
    """A column indexed by (block_size, seed), without unknown values."""
    rows = where(run.summary, workload=workload, policy=policy, block_size=block_size)
    return rows.set_index(["block_size", "seed"])[column].dropna()


def _by_seed(cells: pd.Series) -> dict[int, float]:
    means = cells.groupby("seed").mean()
    return dict(zip(means.index.tolist(), means.tolist(), strict=True))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    try:
        yield path
    except (OSError, KeyError, TypeError, ValueError) as error:  # pandas and json raise ValueErrors
        raise ConfigError(f"cannot report on {path}: {error}") from error


def _optional(path: Path, read: Callable[[Path], pd.DataFrame]) -> pd.DataFrame:
    with _reading(path):
        return read(path) if path.exists() and path.stat().st_size else pd.DataFrame()


def _read_steps(path: Path) -> pd.DataFrame:
    with path.open() as lines:
        steps = pd.json_normalize([json.loads(line) for line in lines])
    columns = steps[["block_size", "policy", "workload", "time_s", "arrivals", *_KNOBS]]
    return columns.assign(in_system=steps["running"] + steps["waiting"])
