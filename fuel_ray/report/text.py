"""The report's sentences: what the numbers say, good or bad, in plain words."""

import re
from collections.abc import Callable, Mapping
from datetime import datetime

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
    unsure,
)
from fuel_ray.report.wording import NO_CHANGE, change, ends, energy_than, listed, percent, span, with_interval
from fuel_ray.stats import Interval

SMALLEST_DIFFERENCE = 0.01  # block sizes closer than this do not differ: they were within 1 % on a real H100
_HEADLINE_BASELINES = 2
_EASIER = "Missing the target makes it easier to save energy, so their energy cannot be compared directly."
_DOUBT = "The 95 % interval begins below it for"

_IN_PROSE = {BEST_RULE: "the best simple rule", LOAD_TABLE: "the load table"}


def headline(run: Run) -> str:
    """What was saved compared with what, and whether within the SLO; begins with "Bad news" on a failure."""
    workload = run.workloads[0]
    attainment = mean_over_seeds(run, "slo_attainment", workload=workload, policy=run.learned)
    if attainment is None:
        return f"This run has no learned policy on the {workload} workload to judge."
    ratios = _ratios(run)
    news = _news(missed=missed(run, attainment), ratios=ratios)
    return f"{news}{_uses(ratios)}{_slo(run, attainment)}"


def comparisons(run: Run) -> str:
    """The learned policy beside each baseline, with intervals, in a line."""
    parts = [f"{with_interval(ratio, change)} vs {label(name)}" for name, ratio in _ratios(run).items()]
    return f"The learned policy changes the energy per request by {listed(parts)}." if parts else ""


def clock_axis(run: Run) -> str:
    """Which comparison depends on which part of the clock axis; nothing of a real server."""
    notes = (run.info.get("pack") or {}).get("clock_axis_notes")
    if not notes or not _modelled(run):
        return ""
    return f"How time and energy depend on the GPU clock is modelled, and so is every saving. {notes}"


def bands(run: Run) -> str:
    """The comparisons from the lowest to the highest of the clock axes; nothing where there is but one."""
    found = {name: energy_over_axes(run, run.learned, name) for name in JUDGED_BY}
    energy = [f"{ends(min(r), max(r), change)} vs {label(name)}" for name, r in found.items() if r]
    shares = mean_over_axes(run, "slo_attainment", run.learned)
    if not energy or not shares:
        return ""
    return (
        f"Under the {len(axis_names(run))} clock axes that the pack's data allow, the learned policy changes "
        f"the energy per request by {listed(energy)}. Its SLO attainment is "
        f"{ends(min(shares), max(shares), percent)}{_below(run, shares)}."
    )


def axis_table(run: Run) -> str:
    """How to read the table over the clock axes."""
    names = axis_names(run)
    n, of = run.axes["seed"].nunique(), run.summary["seed"].nunique()
    evaluated = (
        f"All axes were evaluated on all {of} held-out seeds."
        if n == of
        else f"The other axes were evaluated on {n} of the {of} held-out seeds; the change that each makes "
        "there is applied to the result of all seeds."
    )
    return (
        "Each value is the mean over block sizes under the pack's nominal clock axis. The range beside it is "
        f"the lowest and highest value under {len(names)} axes ({', '.join(names)}). Nothing was trained or "
        f"tuned again for the other axes. {evaluated}"
    )


def sample(run: Run) -> str:
    """What the headline's numbers are means of."""
    workload, sizes = run.workloads[0], [str(size) for size in run.block_sizes]
    scope = f"mean over block sizes {listed(sizes)}" if len(sizes) > 1 else f"block size {sizes[0]}"
    sent = digests(run)
    seeds = sum(name == workload for name, _ in sent)
    paired = all(len(found) == 1 for found in sent.values())
    warning = "" if paired else " Warning: policies served different requests at the same seed."
    return (
        f"Workload {workload}, {scope}, n = {seeds} held-out seeds. Intervals are 95 % t intervals over the "
        "seeds; comparisons are paired by seed. Each policy is compared as it was tuned, at the SLO "
        f"attainment that it reached.{warning}"
    )


def origin(run: Run) -> str:
    """Whether the numbers are modelled or measured, and with what."""
    if not _modelled(run):
        return "Measured on hardware."
    name = (run.info.get("pack") or {}).get("name") or run.setting("pack") or "unnamed"
    return f"Modelled, not measured: every number comes from a simulated node with calibration pack {name}."


def pack_notes(run: Run) -> dict[str, str]:
    """What of the pack was measured, taken from elsewhere and assumed; nothing of a real server."""
    notes = (run.info.get("pack") or {}).get("notes")
    if not notes or not _modelled(run):
        return {}
    measured, _, rest = notes.removesuffix(".").removeprefix("Measured: ").partition(". Transferred: ")
    taken, *assumed = re.split(r"(?:^|[.;] )assumed: ", rest, flags=re.IGNORECASE)
    found = {"measured": measured, "taken from elsewhere": taken, "assumed": ". ".join(assumed)}
    return {name: what for name, what in found.items() if what}


def misses(run: Run, *, workload: str) -> str:
    """Who misses the attainment target, whose interval begins below it, or that nobody's does."""
    if run.attainment_target is None:
        return "This run has no SLO attainment target."
    target = f"the SLO attainment target of {percent(run.attainment_target)}"
    below = _where(run, workload, lambda share: missed(run, share), shown=True)
    doubtful = _where(run, workload, lambda share: unsure(run, share))
    if not below and not doubtful:
        return f"Every policy meets {target} at every block size{_surely(run, workload)}."
    if not below:
        return f"Every policy meets {target} on average. {_DOUBT} {'; '.join(doubtful)}."
    told = f"These policies miss {target}: {'; '.join(below)}. {_EASIER}"
    return f"{told} The others meet it on average. {_DOUBT} {'; '.join(doubtful)}." if doubtful else told


def when(started: str) -> str:
    """A time in ISO's form as people write it, to the minute."""
    return f"{datetime.fromisoformat(started):%Y-%m-%d %H:%M %Z}".strip()


def _where(run: Run, workload: str, holds: Callable[[Interval], bool], *, shown: bool = False) -> list[str]:
    """Policies for whose attainment something holds, with the block sizes where it does."""
    found = []
    for policy in run.policies:
        sizes = []
        for size in run.block_sizes:
            mean = mean_over_seeds(run, "slo_attainment", workload=workload, policy=policy, block_size=size)
            if mean is not None and holds(mean):
                sizes.append(f"{size} ({percent(mean.mean)})" if shown else str(size))
        found += (
            [f"{label(policy)} at block size{'s' if len(sizes) > 1 else ''} {listed(sizes)}"] if sizes else []
        )
    return found


def _surely(run: Run, workload: str) -> str:
    """What the intervals add, where there are any."""
    known = mean_over_seeds(run, "slo_attainment", workload=workload, policy=run.policies[0])
    return "" if known is None or known.low is None else ", and so does the lower end of its 95 % interval"


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
    interval = _brackets(span(widest, change))
    fact = f"block size {a} uses {energy_than(widest.mean)} block size {b}{interval}"
    if not apart:
        return (
            "The block sizes do not differ for the learned policy: every difference is below 1 % or its "
            f"interval includes 0. The largest difference: {fact}.{_untrained(run)}"
        )
    return (
        f"The block sizes differ for the learned policy: {fact}. {len(apart)} of {len(ratios)} pairs differ "
        f"by 1 % or more with an interval that excludes 0.{_untrained(run)} The policy of each block size "
        "comes from one training, so the training may also cause a difference."
    )


def control(run: Run, *, workload: str) -> str:
    """What the negative control says about the comparison itself."""
    ratio = energy_against(run, run.learned, TUNED_STATIC, workload=workload)
    aim = (
        "The arrival rate of this workload is constant, so the learned policy should save no energy compared "
        "with tuned static"
    )
    if ratio is None:
        return f"{aim}. This run did not evaluate both."
    if not _differs(ratio):
        verdict = "no saving, as expected"
    elif ratio.mean < 1:
        verdict = "a saving, so distrust the comparison; tuned static may be badly tuned"
    else:
        verdict = "more energy without a reason"
    fact = f"It uses {energy_than(ratio.mean)} tuned static{_brackets(span(ratio, change))}"
    return f"{aim}. {fact}: {verdict}."


def _ratios(run: Run) -> dict[str, Interval]:
    """The learned policy's energy over that of each baseline that ran."""
    found = {name: energy_against(run, run.learned, name, workload=run.workloads[0]) for name in JUDGED_BY}
    return {name: ratio for name, ratio in found.items() if ratio is not None}


def _news(*, missed: bool, ratios: Mapping[str, Interval]) -> str:
    """How the headline begins."""
    maximum, static = ratios.get(MAX_PERFORMANCE), ratios.get(TUNED_STATIC)
    faults = ["the SLO is missed"] if missed else []
    if maximum is not None and maximum.mean >= 1:
        faults.append("nothing is saved")
    elif static is not None and static.mean > 1 and static.excludes(1.0):
        faults.append("tuned static uses less energy")
    return f"Bad news: {listed(faults)}. " if faults else ""


def _uses(ratios: Mapping[str, Interval]) -> str:
    """The learned policy's energy beside that of the baselines that say most."""
    parts: list[str] = []
    for name, ratio in list(ratios.items())[:_HEADLINE_BASELINES]:
        what = "" if parts else " energy per request"
        unsure_of = "" if ratio.low is None or ratio.excludes(1.0) else " (no significant difference)"
        parts.append(f"{energy_than(ratio.mean, what)} {_IN_PROSE.get(name, label(name))}{unsure_of}")
    return f"The learned policy uses {listed(parts)}. " if parts else ""


def _slo(run: Run, attainment: Interval) -> str:
    """Whether the attainment target is met, surely or on average."""
    if run.attainment_target is None:
        return f"Its SLO attainment is {percent(attainment.mean)}."
    target = percent(run.attainment_target)
    if missed(run, attainment):
        return f"Its SLO attainment is only {percent(attainment.mean)}; the target is {target}."
    if unsure(run, attainment):
        return (
            f"Its SLO attainment is {percent(attainment.mean)} on average, but the 95 % interval "
            f"({span(attainment, percent)}) begins below the target of {target}."
        )
    return f"Its SLO attainment is {percent(attainment.mean)}; the target is {target}."


def _below(run: Run, shares: list[float]) -> str:
    """Under how many axes the target is missed, if under any."""
    target = run.attainment_target
    n = sum(target is not None and share < target for share in shares)
    return f", below the target under {n} of them" if n else ""


def _untrained(run: Run) -> str:
    """The largest difference that no training can have caused."""
    ratios = block_size_ratios(run, MAX_PERFORMANCE, workload=run.workloads[0])
    if not ratios:
        return ""
    widest = max(abs(ratio.mean - 1) for ratio in ratios.values())
    most = f"at most {percent(widest)}" if widest >= NO_CHANGE else "less than 0.1 %"
    return f" At maximum performance, where nothing is learned, block sizes differ by {most}."


def _modelled(run: Run) -> bool:
    return run.info.get("origin") != "measured" and (run.setting("backend") or "sim") == "sim"


def _differs(ratio: Interval) -> bool:
    return ratio.excludes(1.0) and abs(ratio.mean - 1) >= SMALLEST_DIFFERENCE


def _brackets(text: str) -> str:
    return f" ({text})" if text else ""
