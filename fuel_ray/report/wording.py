"""Numbers as the report writes them, the same in every sentence, table and tile."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from fuel_ray.stats import Interval

NO_CHANGE = 0.0005  # a change below it rounds to 0.0 %


def percent(share: float) -> str:
    """A share as people write it: 0.954 -> "95.4 %"."""
    return f"{100 * share:.1f} %"


def change(ratio: float) -> str:
    """A ratio as a relative change: 0.9 -> "−10.0 %"."""
    return "0.0 %" if abs(ratio - 1) < NO_CHANGE else f"{100 * (ratio - 1):+.1f} %".replace("-", "−")


def span(interval: Interval, form: Callable[[float], str]) -> str:
    """An interval's ends, or nothing where it is unknown."""
    if interval.low is None or interval.high is None:
        return ""
    return ends(interval.low, interval.high, form)


def ends(low: float, high: float, form: Callable[[float], str]) -> str:
    """From one value to another, with one unit for both."""
    return f"{form(low).removesuffix(' %')} to {form(high)}"


def listed(parts: Sequence[str]) -> str:
    """A list in a sentence: "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def setting(value: Any) -> str:
    """A setting's value; whole numbers in a row as the first to the last, None as a dash."""
    if value is None:
        return "–"
    if not isinstance(value, list):
        return str(value)
    if len(value) > 2 and _in_a_row(value):
        return f"{value[0]} to {value[-1]}"
    return ", ".join(map(setting, value)) or "–"


def _in_a_row(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int) for value in values) and all(
        after - before == 1 for before, after in pairwise(values)
    )
