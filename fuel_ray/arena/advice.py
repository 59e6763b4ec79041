"""What to deploy of the pairs that were compared, and the sentences that say so."""

from collections.abc import Sequence

from fuel_ray.arena.recommendation import Pair
from fuel_ray.policies.catalogue import SIMPLE, TUNED_STATIC, label
from fuel_ray.report.wording import (
    NO_CHANGE,
    ascii_only,
    bare,
    capitalised,
    change,
    ends,
    energy_than,
    in_brackets,
    percent,
    with_interval,
)
from fuel_ray.tuning.search import SLACK

AS_GOOD = 0.005  # of energy: within it of the best policy a simple rule is recommended instead
LEGEND = (
    "vs: change in J/request at equal SLO attainment, so not the quotient of the J/request shown. (..): 95 % "
    "interval. [..]: range over the clock axes. All modelled."
)
_AS_GOOD = f"it uses at most {percent(AS_GOOD)} more energy than the best policy"


def line(pair: Pair, static: Pair) -> str:
    """One pair, for the terminal, beside tuned static at the same block size; [..] over the clock axes."""
    shares = [pair.attained + moved for moved in (0.0, *(p.attained_change for p in pair.axes.values()))]
    least, most = max(min(shares), 0.0), min(max(shares), 1.0)
    attained = percent(pair.attained) + (f" [{bare(ends(least, most, percent))}]" if pair.axes else "")
    against = "" if pair is static else f"  {_changed(pair, static)} vs tuned static"
    return ascii_only(
        f"recommend  block size {pair.kv_block_size:>3}  {label(pair.policy):<23}"
        f" {pair.energy_j_per_request:7.2f} J/request{against}  SLO attainment {attained}"
        f"{pair.how and f'  ({pair.how})'}"
    )


def recommendation(pairs: Sequence[Pair], *, share: float | None) -> tuple[Pair, str]:
    """The pair to deploy and a sentence or two; chosen on the tuning seeds, judged on the held-out ones.

    A pair is one of least energy that attains what was asked on the tuning seeds; a block size at which less
    can be had than at another counts as missing it. It is deployed if on the held-out seeds it meets the SLO,
    or as much of it as tuned static, within ``SLACK``, and surely beats it: the interval of the difference
    excludes none. Under no other clock axis may it be worse than tuned static, in energy or in this; where it
    is, the next best is looked at in the same way. Energies are compared at equal attainment. A simple rule
    of which all this holds too and that takes at most ``AS_GOOD`` more is deployed instead.
    """
    bar = (min if share is None else max)(pair.asked for pair in pairs)

    def rank(pair: Pair) -> tuple[bool, bool, float]:
        missed, figure = pair.tuned_rank
        return abs(pair.asked - bar) > SLACK, missed, figure

    ranked = sorted(pairs, key=rank)
    static = next(pair for pair in ranked if pair.policy == TUNED_STATIC)
    best = next((pair for pair in ranked if pair.policy != TUNED_STATIC), None)
    if best is None or any(rank(best)[:2]) or not _meets(best, static, share):
        why = "" if best is None else " No other policy meets the SLO."
        return static, f"Recommended: {_named(static)}.{why}{_warning(static, share)}"
    than_static = best.against(static)
    if than_static.high is None or than_static.high >= 1.0:
        return static, (
            f"Recommended: {_named(static)}. No other policy saves energy beyond the 95 % interval: the best "
            f"of them, {_named(best)}, {_uses(than_static.mean)} tuned "
            f"static{in_brackets(than_static, change)}.{_warning(static, share)}"
        )
    if refused := _refused(best, static, share):
        chosen, sentence = recommendation([pair for pair in pairs if pair is not best], share=share)
        return chosen, (
            f"{sentence} {capitalised(_named(best))} {_uses(than_static.mean)} tuned static"
            f"{in_brackets(than_static, change)}, but {refused}."
        )
    deployable = [pair for pair in ranked if not any(rank(pair)[:2])]
    chosen = _simpler(best, static, deployable, share) or best
    others = [best] if chosen is not best else [pair for pair in ranked if pair is not best]
    why = "" if chosen is best else f" As a simple rule it is preferred: {_AS_GOOD}."
    return chosen, (
        f"Recommended: {_named(chosen)}. It {_uses(chosen.against(static).mean)} {_named(static)}"
        f"{_ranges(chosen, static)}.{why}{_runner_up(others, chosen)}{_warning(chosen, share)}"
    )


def _runner_up(others: Sequence[Pair], chosen: Pair) -> str:
    if not others:
        return ""
    ratio = others[0].against(chosen)
    return (
        f" Runner-up: {_named(others[0])}; it {_uses(ratio.mean)} the recommended policy"
        f"{in_brackets(ratio, change)}."
    )


def _simpler(best: Pair, static: Pair, deployable: Sequence[Pair], share: float | None) -> Pair | None:
    """A simple rule that is as good as the best policy, and may as well be deployed."""
    if best.policy in SIMPLE:
        return None
    for rule in (pair for pair in deployable if pair.policy in SIMPLE and _meets(pair, static, share)):
        surely = rule.against(static).high
        as_good = rule.against(best).mean <= 1.0 + AS_GOOD
        if as_good and surely is not None and surely < 1.0 and not _refused(rule, static, share):
            return rule
    return None


def _refused(best: Pair, static: Pair, share: float | None) -> str:
    """Under which clock axis the pair is worse than tuned static, and by how much; empty if under none.

    The worst axis is named, and attainment that is lost comes before energy.
    """
    under = {axis: (pair, static.axes[axis]) for axis, pair in best.axes.items()}
    lost = {axis: pair.attained for axis, (pair, other) in under.items() if not _meets(pair, other, share)}
    if lost:
        axis = min(lost, key=lambda name: lost[name])
        pair, other = under[axis]
        return (
            f"under the clock axis {axis} its SLO attainment is {percent(pair.attained)}, that of tuned "
            f"static {percent(other.attained)}"
        )
    ratios = {axis: pair.against(other).mean for axis, (pair, other) in under.items()}
    axis = max(ratios, key=lambda name: ratios[name], default="")
    if not ratios or ratios[axis] <= 1.0:
        return ""
    more = _uses(ratios[axis]) if ratios[axis] > 1.0 + NO_CHANGE else "saves nothing compared with"
    return f"under the clock axis {axis} it {more} tuned static"


def _meets(pair: Pair, static: Pair, share: float | None) -> bool:
    """Whether the SLO is met on held-out seeds, or as well as by tuned static."""
    if share is None:
        return pair.met or not static.met
    return pair.attained >= min(share, static.attained) - SLACK


def _warning(pair: Pair, share: float | None) -> str:
    if pair.met if share is None else pair.attained >= share - SLACK:
        return ""
    asked = "" if share is None else f" for {100 * share:g} % of requests"
    return f" It does not meet the SLO{asked}: the workload is more than this node can serve within it."


def _named(pair: Pair) -> str:
    how = [pair.how] if pair.how else []
    told = ", ".join([*how, f"SLO attainment {percent(pair.attained)}"])
    name = f'"{label(pair.policy)}"' if "," in label(pair.policy) else label(pair.policy)
    return f"{name} at block size {pair.kv_block_size} ({told})"


def _uses(ratio: float) -> str:
    return f"uses {energy_than(ratio)}"


def _ranges(pair: Pair, other: Pair) -> str:
    """The interval, and the lowest and highest over the clock axes, as changes."""
    return in_brackets(pair.against(other), change) + _band(pair, other)


def _changed(pair: Pair, other: Pair) -> str:
    """The change of energy with both."""
    return with_interval(pair.against(other), change) + _band(pair, other)


def _band(pair: Pair, other: Pair) -> str:
    band = pair.band_against(other)
    return "" if band is None else f" [{bare(ends(*band, change))}]"
