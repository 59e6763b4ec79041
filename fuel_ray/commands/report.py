"""``fuel-ray report``: a run folder as one self-contained page, and as a table for the terminal."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from fuel_ray.errors import ConfigError
from fuel_ray.report.sections import summary_table, write_report


@dataclass(frozen=True)
class ReportConfig:
    """Write the report of a finished sweep again, from the files in its folder."""

    run_dir: tyro.conf.Positional[Path]
    """Folder of the run, such as results/sweep-20261127-120000."""


def run(config: ReportConfig) -> int:
    """Write the report and print its table."""
    if not (config.run_dir / "run.json").is_file():
        raise ConfigError(
            f"{config.run_dir}: not the folder of a run (no run.json in it); give one such as "
            "results/sweep-20261127-120000"
        )
    report = write_report(config.run_dir)
    print(f"{summary_table(config.run_dir)}\n\nreport    {report}")
    return 0
