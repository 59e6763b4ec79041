"""The report's sentences: what the numbers say, good or bad, in plain words."""

from collections.abc import Mapping

from fuel_ray.policies.catalogue import BEST_RULE, JUDGED_BY, LOAD_TABLE, MAX_PERFORMANCE, TUNED_STATIC, label
from fuel_ray.report.data import (
    Run,
    axis_names,
    block_size_ratios,
    digests,
    energy_against,
    energy_over_axes,
    mean_over_axes,
    mean_over_seeds,
    missed,
)
from fuel_ray.stats import Interval

SMALLEST_DIFFERENCE = 0.01  # block sizes closer than this do not differ: they were within 1 % on a real H100

_IN_PROSE = {
    TUNED_STATIC: "the tuned static pair",
    BEST_RULE: "the best simple rule",
    LOAD_TABLE: "the load table",
}


def percent(share: float) -> str:
    """A share as people write it: 0.954 -> "95.4 %"."""
    return f"{100 * share:.1f} %"


def headline(run: Run) -> str:
    """The answer in one sentence; begins with "Bad news" where the learned policy fails."""
    workload = run.workloads[0]
    attainment = mean_over_seeds(run, "slo_attainment", workload=workload, policy=run.learned)
    if attainment is None:
        return f"This run has no learned policy on the {workload} workload to judge."
    ratios = {name: energy_against(run, run.learned, name, workload=workload) for name in JUDGED_BY}
    energy = [
        f"{_more(r)} than under {_in_prose(name)}{_range(r)}" for name, r in ratios.items() if r is not None
    ]
    answer = f"learned policy's energy per request is {_and(energy)}, and it" if energy else "learned policy"
    news = _news(missed=missed(run, attainment), ratios=ratios)
    return f"{news} {answer} meets the SLO for {_shares(run, attainment)}."


def clock_axis(run: Run) -> str:
    """Which comparison hangs on which part of the clock axis; nothing of a real server."""
    notes = (run.info.get("pack") or {}).get("clock_axis_notes")
    simulated = (run.setting("backend") or "sim") == "sim"
    return f"Every saving is modelled over the GPU clock. {notes}" if notes and simulated else ""


def bands(run: Run) -> str:
    """The headline from the lowest to the highest of the clock axes; nothing where there is but one."""
    found = {name: energy_over_axes(run, run.learned, name) for name in JUDGED_BY}
    ratios = {name: of_axes for name, of_axes in found.items() if of_axes}
    shares = mean_over_axes(run, "slo_attainment", run.learned)
    if not ratios or not shares:
        return ""
    energy = [f"{_between(min(r), max(r))} than under {_in_prose(name)}" for name, r in ratios.items()]
    return (
        f"Over the {len(axis_names(run))} clock axes that the pack's data allow, {_axis_sample(run)}, its "
        f"energy is {_and(energy)}, and it meets the SLO for {100 * min(shares):.1f} to "
        f"{percent(max(shares))} of requests."
    )


def axis_table(run: Run) -> str:
    """How to read the table over the clock axes."""
    names = axis_names(run)
    return (
        "Each figure is under the pack's nominal clock axis and, in small print or brackets, from the lowest "
        f"to the highest of {len(names)} axes ({', '.join(names)}): the same policies and baselines, nothing "
        f"trained or tuned again, averaged over block sizes, {_axis_sample(run)}. MHz: the mean clock chosen."
    )


def _axis_sample(run: Run) -> str:
    """Seeds of the clock axes, which may be fewer than the headline's."""
    n, of = run.axes["seed"].nunique(), run.summary["seed"].nunique()
    return (
        f"on all {of} held-out seeds"
        if n == of
        else f"by what each changes on {n} of the {of} held-out seeds"
    )


def sample(run: Run) -> str:
    """What the headline averages over."""
    workload, sizes = run.workloads[0], [str(size) for size in run.block_sizes]
    scope = f"averaged over block sizes {_and(sizes)}" if len(sizes) > 1 else f"block size {sizes[0]}"
    sent = digests(run)
    seeds = sum(name == workload for name, _ in sent)
    paired = all(len(found) == 1 for found in sent.values())
    warning = "" if paired else " Warning: policies faced different requests at the same seed."
    brackets = "compared as tuned, each at the attainment that it reached; brackets: paired 95 % t intervals"
    return f"Workload {workload}, {scope}; n = {seeds} held-out seeds; {brackets}.{warning}"


def origin(run: Run) -> str:
    """Whether the numbers are modelled or measured, and with what."""
    pack = run.info.get("pack") or {}
    if run.info.get("origin") == "measured" or (run.setting("backend") or "sim") != "sim":
        return "Measured on hardware."
    name = pack.get("name") or run.setting("pack") or "unnamed"
    return (
        f"Modelled, not measured: every number comes from a simulated node with calibration pack {name}. "
        f"{pack.get('notes', '')}"
    ).strip()


def misses(run: Run, *, workload: str) -> str:
    """Who misses the attainment target, or that nobody does."""
    if run.attainment_target is None:
        return "This run has no SLO attainment target."
    names = []
    for policy in run.policies:
        sizes = []
        for size in run.block_sizes:
            mean = mean_over_seeds(run, "slo_attainment", workload=workload, policy=policy, block_size=size)
            sizes += [f"{size} ({percent(mean.mean)})"] if mean is not None and missed(run, mean) else []
        names += [f"{label(policy)} at block size {_and(sizes)}"] if sizes else []
    if not names:
        return f"Every policy meets the attainment target of {percent(run.attainment_target)} throughout."
    return (
        f"Below the SLO attainment target of {percent(run.attainment_target)}: {'; '.join(names)}. "
        "Their energy is not at the same attainment as the others'."
    )


def block_sizes(run: Run) -> str:
    """Whether the block sizes differ at all for the learned policy."""
    workload = run.workloads[0]
    ratios = block_size_ratios(run, run.learned, workload=workload)
    if not ratios:
        return "Fewer than two block sizes have a learned policy, so block sizes cannot be compared."
    if any(ratio.low is None for ratio in ratios.values()):
        return "One seed gives no interval, so this run cannot say whether the block sizes differ."
    apart = {pair: ratio for pair, ratio in ratios.items() if _differs(ratio)}
    (a, b), widest = max((apart or ratios).items(), key=lambda item: abs(item[1].mean - 1))
    fact = f"block size {a} uses {_more(widest)} energy per request than {b}{_range(widest)}"
    if not apart:
        return (
            "The block sizes do not differ for the learned policy: every difference is below 1 % or its "
            f"interval includes zero. The largest: {fact}.{_untrained(run)}"
        )
    return (
        f"The block sizes differ for the learned policy: {fact}. {len(apart)} of {len(ratios)} pairs differ "
        f"by 1 % or more with an interval that excludes zero.{_untrained(run)} Each block size trained its "
        "own policy once, so a difference may also come from the training."
    )


def control(run: Run, *, workload: str) -> str:
    """What the negative control says about the comparison itself."""
    ratio = energy_against(run, run.learned, TUNED_STATIC, workload=workload)
    aim = "Under this load a fixed pair is as good as it gets; adapting should gain nothing"
    if ratio is None:
        return f"{aim}; this run has no such comparison."
    if not _differs(ratio):
        verdict = "no gain, as it should be"
    elif ratio.mean < 1:
        verdict = "a gain, so distrust the comparison: is the static pair well tuned?"
    else:
        verdict = "a loss where nothing was to be gained"
    return f"{aim}. The learned policy uses {_more(ratio)} energy than the pair{_range(ratio)}: {verdict}."


def _news(*, missed: bool, ratios: Mapping[str, Interval | None]) -> str:
    """How the headline begins."""
    maximum, static = ratios[MAX_PERFORMANCE], ratios[TUNED_STATIC]
    faults = ["the SLO attainment target is missed"] if missed else []
    if maximum is not None and maximum.mean >= 1:
        faults.append("nothing is saved")
    elif static is not None and static.mean > 1 and static.excludes(1.0):
        faults.append("a tuned static pair saves more")
    return f"Bad news, {_and(faults)}: the" if faults else "The"


def _untrained(run: Run) -> str:
    """The largest difference where no training can blur it."""
    ratios = block_size_ratios(run, MAX_PERFORMANCE, workload=run.workloads[0])
    if not ratios:
        return ""
    (a, b), widest = max(ratios.items(), key=lambda item: abs(item[1].mean - 1))
    return (
        " Under maximum performance, where nothing is learned, the largest difference is "
        f"{percent(abs(widest.mean - 1))} ({a} against {b})."
    )


def _differs(ratio: Interval) -> bool:
    return ratio.excludes(1.0) and abs(ratio.mean - 1) >= SMALLEST_DIFFERENCE


def _in_prose(policy: str) -> str:
    return _IN_PROSE.get(policy, label(policy))


def _more(ratio: Interval) -> str:
    return f"{percent(abs(ratio.mean - 1))} {'less' if ratio.mean < 1 else 'more'}"


def _range(ratio: Interval) -> str:
    if ratio.low is None or ratio.high is None:
        return ""
    unclear = "" if ratio.excludes(1.0) else ": no clear difference"
    return f" ({_between(ratio.low, ratio.high)}{unclear})"


def _between(low: float, high: float) -> str:
    """From one ratio to another, as changes."""
    if low <= 1 <= high:
        return f"{percent(1 - low)} less to {percent(high - 1)} more"
    small, large = sorted((abs(low - 1), abs(high - 1)))
    return f"{100 * small:.1f} to {percent(large)} {'less' if high < 1 else 'more'}"


def _shares(run: Run, attainment: Interval) -> str:
    notes = []
    if attainment.low is not None and attainment.high is not None:
        notes.append(f"{100 * attainment.low:.1f} to {percent(attainment.high)}")
    if run.attainment_target is not None:
        notes.append(f"target {percent(run.attainment_target)}")
    return f"{percent(attainment.mean)} of requests" + (f" ({'; '.join(notes)})" if notes else "")


def _and(parts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
