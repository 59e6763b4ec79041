"""How close a twin is to its server: the profile that it was fitted to, and workloads that it was not."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fuel_ray.report.figures import ProfilePoint, profile_and_model
from fuel_ray.report.page import Cell, figure, paragraph, table
from fuel_ray.report.tables import key_values
from fuel_ray.report.wording import change, figure_name, listed, percent
from fuel_ray.sim.fidelity import ERRORS, Fidelity
from fuel_ray.sim.pack import PerfModel, load_pack

_FEWER_DIGITS_S = (0.1, 0.01)  # a latency below has a decimal more in ms
_UNITS = {"energy": "J", "mean_power": "W"}
_RESTS_ON = {"pack": "pack", "measured": "measured here", "transferred": "taken from elsewhere"}
_PROFILE = (
    "Points: decode steps as {origin}. Lines: the fitted twin at the same points. The energy of a token is "
    "step time × power / requests."
)
_FIDELITY = (
    "The twin was not fitted to this workload, whose seed and rate differ from the profile's. Server and "
    "twin served the same requests. A positive error means that the twin's value is too high. {runs}."
)
_FITTED = (
    "Errors of the twin on the workloads of its own profile. On a new workload, expect the error of one that "
    "was left out of the fit."
)


def profile(folder: Path, found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What was measured of the server's steps beside the fitted twin, and what the twin rests on."""
    points = _points(folder / "profile" / "profile.jsonl", load_pack(str(folder / "pack.json")).perf)
    origin = "measured" if found["server"]["origin"] == "measured" else "simulated"
    if points:
        yield figure(profile_and_model(points), caption=_PROFILE.format(origin=origin))
    fitted = found.get("calibrate", {})
    yield key_values({what: fitted[name] for name, what in _RESTS_ON.items() if name in fitted})
    if rows := load_pack(str(folder / "pack.json")).fidelity:
        yield paragraph(_FITTED, style="soft")
        yield _pack_fidelity(rows)


def fidelity(found: Mapping[str, Any], rows: list[Mapping[str, Any]], *, source: str) -> Iterator[str]:
    """Each figure of a workload that was not fitted, from the server and from the twin, per clock."""
    head = [Cell("figure", style="text")]
    for row in rows:
        head += [Cell(f"{source}, {row['clock_mhz']} MHz"), Cell("twin"), Cell("error")]
    body = [[_figure_cell(name, found), *_errors(name, rows, found)] for name in rows[0]["errors"]]
    yield table(head, [body])
    for row in rows:
        for doubt in row.get("doubts", []):
            yield paragraph(f"Doubt, at {row['clock_mhz']} MHz: {doubt}.")
    requests = [str(row["requests"]) for row in rows]
    same, at = len({*requests}) == 1, " at each clock" if len(rows) > 1 else ""
    runs = (
        f"One run of {requests[0]} requests{at}" if same else f"One run{at}, of {listed(requests)} requests"
    )
    yield paragraph(f"Workload {found['workload']}. {_FIDELITY.format(runs=runs)}", style="soft")


def signed(error: float) -> str:
    """An error as it is shown."""
    return change(1 + error)


def _pack_fidelity(rows: Sequence[Fidelity]) -> str:
    head = [Cell("workload of the profile", style="text"), Cell("requests")]
    head += [*map(Cell, ERRORS.values()), Cell("", style="text")]
    body = [
        [
            Cell(row.trace, style="text"),
            Cell(str(row.requests)),
            *(Cell("–" if (e := getattr(row, name)) is None else signed(e)) for name in ERRORS),
            Cell("left out of the fit" if row.left_out else "fitted", style="text"),
        ]
        for row in rows
    ]
    return table(head, [body])


def _points(path: Path, perf: PerfModel) -> list[ProfilePoint]:
    """Of the decode rows, whose points are named by batch and prompt tokens, as in decode-8x128."""
    rows = [row for line in path.read_text(encoding="utf-8").splitlines() if (row := json.loads(line))]
    points: list[ProfilePoint] = []
    for row in (row for row in rows if row.get("phase") == "decode"):
        clock_mhz, batch = float(row["clock_mhz"]), row["b"]
        known_mhz = min(clock_mhz, perf.constants.max_clock_mhz)
        step_s, power_w, _ = perf.step_cost(batch, batch * row["ctx_mid"], 0, known_mhz)
        measured = (row["itl"], step_s), (row["power_w"], power_w)
        context = int(str(row["point"]).rpartition("x")[2])
        points.append(ProfilePoint(clock_mhz, context, batch, *measured))
    return points


def _figure_cell(name: str, found: Mapping[str, Any]) -> Cell:
    bound = found["bounds"].get(name)
    note = "" if bound is None else f"bound {percent(bound)}"
    return Cell(figure_name(name), note, style="text")


def _errors(name: str, rows: list[Mapping[str, Any]], found: Mapping[str, Any]) -> Iterator[Cell]:
    bound = found["bounds"].get(name)
    for row in rows:
        for source in ("measured", "predicted"):
            value = row[source][name]
            yield Cell("–" if value is None else _amount(name, value))
        error = row["errors"][name]
        outside = bound is not None and error is not None and abs(error) > bound
        yield Cell("–" if error is None else signed(error), style="bad" if outside else "")


def _amount(name: str, value: float) -> str:
    if (unit := _UNITS.get(name)) is not None:
        return f"{value:,.0f} {unit}"
    if value >= 1:
        return f"{value:.2f} s"
    decimals = sum(value < limit_s for limit_s in _FEWER_DIGITS_S)
    return f"{1000 * value:.{decimals}f} ms"
