"""Numbers and limits as reports, tables and the terminal write them."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from fuel_ray.stats import Interval
from fuel_ray.types import LatencyName, Slo

_FIGURES = {"p50": "median {}", "mean": "mean {}", "p99": "{} p99"}
NO_CHANGE = 0.0005  # a change below it rounds to 0.0 %
DEFAULT_SLO = "the default; set your own with --slo-ttft-s, --slo-tpot-s, --slo-e2e-s and --slo-share"


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


def with_interval(interval: Interval, form: Callable[[float], str]) -> str:
    """A value and, where it is known, its interval: "−10.0 % (−10.4 to −9.6)"."""
    return form(interval.mean) + in_brackets(interval, form)


def in_brackets(interval: Interval, form: Callable[[float], str]) -> str:
    """What follows a value: its interval without a unit, or nothing where it is unknown."""
    shown = bare(span(interval, form))
    return f" ({shown})" if shown else ""


def ends(low: float, high: float, form: Callable[[float], str]) -> str:
    """From one value to another, with one unit for both."""
    return f"{form(low).removesuffix(' %')} to {form(high)}"


def bare(text: str) -> str:
    """A range whose unit stands beside it already."""
    return text.replace(" %", "")


def energy_than(ratio: float, what: str = " energy per request") -> str:
    """How much energy in words, up to the name of what it is compared with."""
    if abs(ratio - 1) < NO_CHANGE:
        return f"as much{what} as"
    return f"{percent(abs(ratio - 1))} {'less' if ratio < 1 else 'more'}{what} than"


def slo_text(slo: Slo) -> str:
    """The limits, and who has to meet them."""
    return f"{limits_text(slo.limits_s)} {whom(slo)}"


def limits_text(limits_s: Mapping[LatencyName, float]) -> str:
    """Latencies and their limits."""
    return ", ".join(f"{latency_name(name)} {duration(limit_s)}" for name, limit_s in limits_s.items())


def latency_name(name: str) -> str:
    """As people write it: tpot is TPOT."""
    return name if name == "e2e" else name.upper()


def figure_name(name: str) -> str:
    """As people write it: tpot_mean is mean TPOT."""
    what, _, which = name.partition("_")
    if which not in _FIGURES or what == "mean":
        return name.replace("_", " ")
    return _FIGURES[which].format(latency_name(what))


def duration(seconds: float) -> str:
    """Three digits of it."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def whom(slo: Slo) -> str:
    """Which part of the requests has to meet the limits."""
    return "on average" if slo.share is None else f"for {100 * slo.share:g} % of requests"


def ascii_only(text: str) -> str:
    """Text for a terminal of any encoding."""
    return text.replace("−", "-").replace("–", "-")


def capitalised(text: str) -> str:
    """As a sentence begins."""
    return text[:1].upper() + text[1:]


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
