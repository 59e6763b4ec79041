"""How a running server lets the limits of an SLO be judged: exactly, within bounds, or not at all."""

import math
from collections.abc import Iterator

from fuel_ray.errors import NodeError
from fuel_ray.histogram import Histogram
from fuel_ray.live.vllm.metrics import HISTOGRAMS, MetricsSnapshot
from fuel_ray.types import LatencyName, Slo


def check_judged(url: str, slo: Slo, page: MetricsSnapshot) -> None:
    """Raises NodeError where the page lacks a histogram that the SLO needs; one without requests will do."""
    missing = [name for name in slo.limits_s if getattr(page, name) is None]
    if missing:
        metrics, limited = (
            " and no ".join(HISTOGRAMS[name] for name in missing),
            " and ".join(map(_name, missing)),
        )
        raise NodeError(
            f"{url} has no {metrics}, which is needed for the SLO's limit on {limited}: start vLLM without "
            "--disable-log-stats, use a newer vLLM, or use a policy without this limit"
        )


def how_judged(slo: Slo, page: MetricsSnapshot) -> Iterator[str]:
    """A sentence per limit; for those between two bounds of the server's, which bound is nearest."""
    for name, limit_s in slo.limits_s.items():
        how = _how(limit_s, getattr(page, name), mean=slo.share is None)
        yield f"SLO limit {_name(name)} {_ms(limit_s)}: {how}"


def _name(name: LatencyName) -> str:
    return name if name == "e2e" else name.upper()


def _how(limit_s: float, histogram: Histogram | None, *, mean: bool) -> str:
    if histogram is None or not histogram.upper_bounds_s:
        return "attainment is known once the server has served a request"
    summed = histogram.sum_s is not None
    if mean and summed:
        return "the mean is known exactly"
    finite_s = [bound_s for bound_s in histogram.upper_bounds_s if math.isfinite(bound_s)]
    if limit_s in finite_s and not mean:
        return f"attainment is exact, because {_ms(limit_s)} is a bucket bound of the server's histogram"
    below_s = max((bound_s for bound_s in finite_s if bound_s < limit_s), default=0.0)
    above_s = min((bound_s for bound_s in finite_s if bound_s >= limit_s), default=None)
    between = f"above {_ms(below_s)}" if above_s is None else f"between {_ms(below_s)} and {_ms(above_s)}"
    nearest_s = min(finite_s, key=lambda bound_s: abs(bound_s - limit_s), default=limit_s)
    known = "the window's mean" if summed else "the counts"
    return (
        f"attainment is known within bounds, because requests {between} are in one bucket of the server's "
        f"histogram; they count as misses only if {known} allow no other reading. {_ms(nearest_s)} would be "
        "exact"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.4g} ms" if seconds < 1.0 else f"{seconds:.4g} s"
