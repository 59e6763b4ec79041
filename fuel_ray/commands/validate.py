"""fuel-ray validate: what the simulator predicts for recorded runs, beside what was measured."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import tyro

from fuel_ray.errors import ConfigError
from fuel_ray.sim.doubts import pack_doubts, run_doubts
from fuel_ray.sim.pack import NOMINAL, Pack, load_pack
from fuel_ray.sim.profile import is_simulated
from fuel_ray.sim.recorded import RecordedRun, read_trace
from fuel_ray.sim.replay import (
    BOUNDS,
    FIGURES,
    beyond_bounds,
    measured_figures,
    predicted_figures,
    relative_errors,
)

Result = Mapping[str, Any]


@dataclass(frozen=True)
class ValidateConfig:
    """Replay recorded traces on the twin, and print what it predicts beside what was measured."""

    traces: tyro.conf.Positional[tuple[str, ...]]
    """Traces, such as those of `fuel-ray benchmark --save-trace` and `fuel-ray evaluate --node live`."""
    pack: str = "h100-qwen3-8b"
    """Calibration pack: a shipped one by name (`fuel-ray packs` lists them), or a .json file."""
    clock_axis: str = NOMINAL
    """Clock axis of the pack, which says how step time and power depend on the GPU clock: nominal, or another
    one that the pack has, such as low or high."""
    json: bool = False
    """Print JSON: a list with one object per trace, with trace, source (what "measured" is: measured, or
    simulated), predicted, measured, errors (0.03 = 3 % too high; null = not measured), beyond (errors above
    the accepted bounds) and warnings."""


def run(config: ValidateConfig) -> int:
    """Print the comparison."""
    if not config.traces:
        raise ConfigError("validate needs at least one trace file: fuel-ray validate TRACE.json")
    pack = load_pack(config.pack, config.clock_axis)
    traces = {path: read_trace(path) for path in config.traces}
    results = [compared(path, traces[path], pack) for path in config.traces]
    print(json.dumps(results, indent=2) if config.json else text(results))
    return 0


def compared(path: str, trace: RecordedRun, pack: Pack) -> dict[str, Any]:
    """What was measured in a recorded run, what the pack predicts of it, and what speaks against either."""
    measured, predicted = measured_figures(trace), predicted_figures(trace, pack)
    errors = relative_errors(predicted, measured)
    return {
        "trace": path,
        "source": "simulated" if is_simulated(str(trace.info.get("origin"))) else "measured",
        "predicted": predicted,
        "measured": measured,
        "errors": errors,
        "beyond": beyond_bounds(errors),
        "warnings": [*run_doubts(trace), *pack_doubts(trace, pack)],
    }


def text(results: Sequence[Result]) -> str:
    """The comparisons for people, with a verdict each, and their means."""
    return "\n\n".join([*map(_table, results), *_means(results)])


def _table(result: Result) -> str:
    lines = [result["trace"], f"{'':>12} {'predicted':>12} {result['source']:>12} {'error':>8}"]
    for name in FIGURES:
        unit = {"energy": "J", "mean_power": "W"}.get(name, "s")
        predicted, measured, error = (result[key][name] for key in ("predicted", "measured", "errors"))
        lines.append(
            f"{name:>12} {predicted:>10.4g} {unit} {_known(measured, '.4g'):>10} {unit} {_error(error)}"
        )
    lines.append(f"{_verdict(result)}")
    return "\n".join([*lines, *(f"warning: {line}" for line in result["warnings"])])


def _verdict(result: Result) -> str:
    """What is within the bounds that the product sets itself, and what is not."""
    unknown = [name for name in BOUNDS if result["errors"][name] is None]
    but = f"; {', '.join(unknown)} not measured" if unknown else ""
    if not result["beyond"]:
        bounds = ", ".join(f"{name} {bound:.0%}" for name, bound in BOUNDS.items() if name not in unknown)
        return f"verdict: within the bounds ({bounds}){but}"
    beyond = ", ".join(
        f"{name} {error:+z.1%} (bound {BOUNDS[name]:.0%})" for name, error in result["beyond"].items()
    )
    return f"verdict: beyond the bounds: {beyond}{but}"


def _means(results: Sequence[Result]) -> list[str]:
    """Of several traces, the errors of what has a bound: their mean, that of their sizes, and the largest."""
    if len(results) < 2:
        return []
    lines = [
        f"mean of {len(results)} traces",
        f"{'':>12} {'error':>8} {'size':>8} {'largest':>8} {'bound':>6}",
    ]
    for name, bound in BOUNDS.items():
        errors = [result["errors"][name] for result in results if result["errors"][name] is not None]
        figures = (fmean(errors), fmean(map(abs, errors)), max(errors, key=abs)) if errors else (None,) * 3
        mean, size, largest = figures
        lines.append(f"{name:>12} {_error(mean)} {_known(size, '.1%'):>8} {_error(largest)} {bound:>6.0%}")
    within = sum(not result["beyond"] for result in results)
    return ["\n".join([*lines, f"verdict: {within} of {len(results)} traces within the bounds"])]


def _known(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _error(value: float | None) -> str:
    return f"{_known(value, '+z.1%'):>8}"
