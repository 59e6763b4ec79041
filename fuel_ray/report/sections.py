"""A run folder as one self-contained page, and as a table for the terminal."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fuel_ray.disk import whole
from fuel_ray.errors import ConfigError
from fuel_ray.policies.catalogue import CATALOGUE, JUDGED_BY, color, label
from fuel_ray.report import clocks, figures, tables, text
from fuel_ray.report.data import (
    Run,
    axis_names,
    energy_against,
    energy_over_axes,
    load_run,
    mean_over_axes,
    mean_over_seeds,
    missed,
)
from fuel_ray.report.page import Cell, definitions, figure, folded, heading, page, paragraph, tile, tiles
from fuel_ray.report.wording import ascii_only, change, ends, percent, slo_text, span
from fuel_ray.sim.pack import Pack, load_pack
from fuel_ray.stats import Interval

_SHOWN_BLOCK_SIZE = 16  # vLLM's default; the others are folded
_UNBROKEN = "\u00a0"  # space
_TERMS = {
    "J/request": "GPU energy divided by the number of requests that arrived; lower is better",
    "vs": "change in J/request compared with that policy, on the same requests; −10 % is 10 % less energy",
    "SLO attainment": "share of requests that meet all limits of the SLO; exceeding the target earns nothing",
    "TTFT, TPOT": "time to first token, and time per output token after the first; p99 is the 99th "
    "percentile",
    "workload, seed": "when requests arrive and how long they are; a seed is one random draw of it, and a "
    "held-out seed was used neither in training nor in tuning",
    "block size": "tokens per block of the server's KV cache; fixed while a server runs",
    "batch limit": "how many requests may run at once; the others wait",
    "GPU clock, clock switches": "mean GPU clock over time, and how often the policy changed it",
    "anchor weight": "what the learned policy must expect to gain for each 100 MHz by which it leaves the "
    "best simple rule; none: any gain is enough",
    "small print": "95 % t interval over held-out seeds; in the table of clock axes, the lowest and "
    "highest value",
}
_ENERGY_CURVE = "Energy of each checkpoint on the tuning seeds, without exploration"
_AT_SHARE = ", at the price of a miss at which {} of the requests meet the SLO."
_AS_TRAINED = ". An early checkpoint may use little energy because it misses the SLO."
_REWARD_CURVE = "The reward includes exploration; it should rise and then level off."
_SMOOTHED = "Thin lines: each checkpoint. Bold lines: running mean of up to five."
_SCATTER = (
    "Further left is less energy, further up is higher SLO attainment. Of two policies above the dashed "
    "target, the one further left is better. Bars: 95 % intervals over held-out seeds."
)
_CHOICES = (
    "A policy that follows the load lowers the clock when fewer requests arrive, and raises it before "
    f"requests queue. Thin lines: each control window. Bold lines: mean over {figures.SMOOTH_S} s."
)
_HEAT_MAPS = (
    "Share of control windows in which the learned policy chose each batch limit and GPU clock. Shares below "
    "3 % are coloured but not written. A number at an edge is the lowest value of the cell that begins there."
)


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into the folder of a finished run and return its path.

    Raises:
        ConfigError: the folder is not that of a finished run.
        DiskError: the page cannot be written; one that was there stays.
    """
    run = load_run(run_dir)
    target = run_dir / "report.html"
    text_of_page = page(f"fuel_ray: {run.name}", _sections(run))
    with whole(target) as file:
        file.write(text_of_page)
    return target


def summary_table(run_dir: Path) -> str:
    """The answer and a row per (workload, block size, policy) as plain text.

    Raises:
        ConfigError: the folder is not that of a finished run.
    """
    run = load_run(run_dir)
    lines = []
    for workload in run.workloads:
        lines += [f"workload {workload}", *tables.plain_results(run, workload=workload)]
        lines += [text.misses(run, workload=workload)]
        lines += [text.control(run, workload=workload), ""] if workload == run.control else [""]
    if len(run.axes):
        lines += ["clock axes", *tables.plain_clock_axes(run), text.axis_table(run), text.bands(run), ""]
    answer = (text.headline(run), text.origin(run), text.comparisons(run), text.sample(run))
    lines += [*answer, text.block_sizes(run), text.clock_axis(run)]
    return ascii_only("\n".join(lines)).rstrip()


def _sections(run: Run) -> Iterator[str]:
    main, *others = run.workloads
    yield from _answer(run)
    for workload in [main, *(name for name in others if name != run.control)]:
        yield heading(f"Results on the {workload} workload")
        yield from _results(run, workload)
    yield from _trust(run)
    yield heading("Do the block sizes differ?")
    yield paragraph(text.block_sizes(run))
    yield from _figures(run)
    if run.control is not None:
        yield heading(f"Negative control: the {run.control} workload")
        yield paragraph(text.control(run, workload=run.control))
        yield folded(f"Results on the {run.control} workload", "".join(_results(run, run.control)))
    yield heading("How this run was made")
    yield from _provenance(run)


def _answer(run: Run) -> Iterator[str]:
    answer = text.headline(run)
    yield heading(f"fuel_ray: {run.name}", level=1)
    yield paragraph(answer, style="headline bad" if answer.startswith("Bad news") else "headline")
    yield paragraph(text.origin(run), style="origin")
    yield tiles(_tiles(run))
    yield paragraph(text.sample(run), style="soft")
    for size, reason in (run.info.get("unsupported") or {}).items():
        yield paragraph(f"Block size {size} was not evaluated: {reason}")
    yield heading("How to read this")
    policies = [
        (Cell(label(name), dot=color(name, run.policies)), _meaning(run, name)) for name in run.policies
    ]
    slo = {} if run.slo is None else {"SLO": f"service level objective, here {slo_text(run.slo)}"}
    yield definitions([*policies, *((Cell(term), meaning) for term, meaning in (slo | _TERMS).items())])


def _trust(run: Run) -> Iterator[str]:
    """What of the numbers was measured, what is modelled, and what depends on that."""
    depends, notes = text.clock_axis(run), text.pack_notes(run)
    if depends or notes:
        yield heading("How much depends on the model?")
    yield paragraph(depends)
    if len(run.axes):
        yield paragraph(text.bands(run))
        yield tables.clock_axes(run)
        yield paragraph(text.axis_table(run), style="soft")
    if (pack := _pack(run)) and (band := clocks.band(run, pack, workload=run.workloads[0])):
        yield figure(band.uri, caption=band.caption)
    if notes:
        yield heading("What the calibration pack rests on", level=3)
        yield definitions((Cell(name), what) for name, what in notes.items())


def _pack(run: Run) -> Pack | None:
    """The pack that the run was modelled with; None where it is not here, or is another by now."""
    try:
        pack = load_pack(str(run.setting("pack")))
    except ConfigError:
        return None
    return pack if pack.sha256 == (run.info.get("pack") or {}).get("sha256") else None


def _meaning(run: Run, policy: str) -> str:
    if policy == run.learned:
        return (
            "the policies that this run trained, one for each block size; each stays near the best simple "
            "rule unless it expects to gain more than its anchor weight"
        )
    return CATALOGUE[policy].what if policy in CATALOGUE else "a further baseline"


def _tiles(run: Run) -> Iterator[str]:
    main = run.workloads[0]
    axes = f"{len(axis_names(run))} clock axes"
    for baseline in JUDGED_BY:
        ratio = energy_against(run, run.learned, baseline, workload=main)
        if ratio is not None:
            notes = _ranges(ratio, energy_over_axes(run, run.learned, baseline), axes, change)
            yield tile(change(ratio.mean), name=f"J/request vs {label(baseline)}", notes=notes)
    share = mean_over_seeds(run, "slo_attainment", workload=main, policy=run.learned)
    if share is not None:
        notes = _ranges(share, mean_over_axes(run, "slo_attainment", run.learned), axes, percent)
        target = run.attainment_target
        name = "SLO attainment" + ("" if target is None else f", target {percent(target)}")
        yield tile(percent(share.mean), name=name, notes=notes, bad=missed(run, share))


def _ranges(
    interval: Interval, by_axis: Sequence[float], axes: str, form: Callable[[float], str]
) -> Iterator[str]:
    """Small lines under a number: its interval, and where it lies under the clock axes."""
    if shown := span(interval, form):
        yield f"95 % interval: {shown.replace(' ', _UNBROKEN)}"
    if by_axis:
        yield f"{axes}: {ends(min(by_axis), max(by_axis), form).replace(' ', _UNBROKEN)}"


def _results(run: Run, workload: str) -> Iterator[str]:
    yield tables.results(run, workload=workload)
    yield paragraph(text.misses(run, workload=workload))


def _figures(run: Run) -> Iterator[str]:
    main = run.workloads[0]
    if len(run.learning):
        yield heading("Learning")
        rewarded = run.learning["reward"].notna().any()
        attained = run.learning["slo_attainment"].dropna().unique()
        end = _AT_SHARE.format(percent(attained[0])) if len(attained) == 1 else _AS_TRAINED
        caption = " ".join((_ENERGY_CURVE + end, *([_REWARD_CURVE] if rewarded else []), _SMOOTHED))
        yield figure(figures.learning_curves(run), caption=caption)
    yield heading("Energy against SLO attainment")
    yield figure(
        figures.energy_against_attainment(run, workload=main), caption=f"Workload {main}. {_SCATTER}"
    )
    yield from _choices(run, main)
    if heat_maps := clocks.decision_heat_maps(run, workload=main):
        yield heading("What the learned policy chose")
        yield figure(heat_maps, caption=f"Workload {main}, one held-out seed. {_HEAT_MAPS}")


def _choices(run: Run, workload: str) -> Iterator[str]:
    panels = {}
    for size in run.block_sizes:
        if drawn := figures.choices_over_time(run, workload=workload, block_size=size):
            caption = f"Block size {size}, workload {workload}, one held-out seed. {_CHOICES}"
            panels[size] = figure(drawn, caption=caption)
    if not panels:
        return
    yield heading("What each policy chose over time")
    yield panels.pop(_SHOWN_BLOCK_SIZE if _SHOWN_BLOCK_SIZE in panels else min(panels))
    for size, panel in panels.items():
        yield folded(f"Block size {size}", panel)


def _provenance(run: Run) -> Iterator[str]:
    info = run.info
    pack = info.get("pack") or {}
    wall_s = info.get("wall_time_s")
    started, seeds = info.get("started"), info.get("seeds") or {}
    facts = {
        "command": info.get("command"),
        "started": started and text.when(started),
        "wall time": None if wall_s is None else f"{wall_s / 60:.1f} min",
        "git commit": info.get("git_commit"),
        "calibration pack": pack.get("name"),
        "pack sha256": pack.get("sha256"),
        **{f"{name.replace('_', '-')} seeds": found for name, found in seeds.items()},
    }
    yield tables.key_values({name: value for name, value in facts.items() if value is not None})
    yield heading("What was tuned", level=3)
    yield tables.chosen_pairs(run)
    yield folded("Configuration", tables.key_values(run.config))
    yield folded("Package versions", tables.key_values(info.get("versions") or {}))
    yield folded("Workload digests", tables.requests(run))
