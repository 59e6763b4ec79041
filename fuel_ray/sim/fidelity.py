"""How far a pack is off recorded runs: rows of its table, and the table for people."""

from collections.abc import Sequence
from dataclasses import dataclass

ERRORS = {"energy": "energy", "tpot_mean": "mean TPOT", "e2e_mean": "mean e2e", "ttft_p50": "median TTFT"}


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How far the prediction of a recorded run was off, as fractions too high; None: unknown."""

    trace: str  # name of the run
    requests: int
    left_out: bool  # the constants were fitted without it
    energy: float | None
    tpot_mean: float | None
    e2e_mean: float | None
    ttft_p50: float | None


def fidelity_table(rows: Sequence[Fidelity]) -> str:
    """Errors of each run's prediction, for people."""
    head = f"{'trace':>24} {'requests':>8}" + "".join(f" {name:>11}" for name in ERRORS.values())
    return "\n".join([head, *map(_line, rows)])


def _line(row: Fidelity) -> str:
    errors = ("unknown" if (e := getattr(row, name)) is None else f"{e:+z.1%}" for name in ERRORS)
    how = "left out of the fit" if row.left_out else "fitted"
    return f"{row.trace:>24} {row.requests:>8}" + "".join(f" {error:>11}" for error in errors) + f"   {how}"
