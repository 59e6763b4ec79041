"""fuel-ray validate: what the simulator predicts for recorded runs, beside what was measured."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tyro

from fuel_ray.errors import ConfigError
from fuel_ray.sim.pack import load_pack
from fuel_ray.sim.recorded import read_trace
from fuel_ray.sim.replay import FIGURES, measured_figures, predicted_figures, relative_errors


@dataclass(frozen=True)
class ValidateConfig:
    """Replay recorded traces on the simulator and print predicted beside measured figures."""

    traces: tyro.conf.Positional[tuple[str, ...]]
    """Trace files: JSON objects with `info` and `requests`."""
    pack: str = "h100-qwen3-8b"
    """Calibration pack: a shipped one by name, or a .json file."""
    json: bool = False
    """Print a list with one object per trace: trace, predicted, measured, errors (0.03 = 3 % too much)."""


def run(config: ValidateConfig) -> int:
    """Print the comparison."""
    if not config.traces:
        raise ConfigError("validate needs at least one trace file")
    pack = load_pack(config.pack)
    results: list[dict[str, Any]] = []
    for path, trace in [(path, read_trace(path)) for path in config.traces]:
        measured, predicted = measured_figures(trace), predicted_figures(trace, pack)
        errors = relative_errors(predicted, measured)
        results.append({"trace": path, "predicted": predicted, "measured": measured, "errors": errors})
    print(json.dumps(results, indent=2) if config.json else "\n\n".join(map(_table, results)))
    return 0


def _table(result: Mapping[str, Any]) -> str:
    lines = [result["trace"], f"{'':>12} {'predicted':>12} {'measured':>12} {'error':>8}"]
    for name in FIGURES:
        unit = {"energy": "J", "mean_power": "W"}.get(name, "s")
        predicted, measured, error = (result[key][name] for key in ("predicted", "measured", "errors"))
        lines.append(f"{name:>12} {predicted:>10.4g} {unit} {measured:>10.4g} {unit} {error:>+8.1%}")
    return "\n".join(lines)
