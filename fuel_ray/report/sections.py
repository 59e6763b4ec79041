"""A run folder as one self-contained page, and as a table for the terminal."""

from collections.abc import Iterator
from pathlib import Path

from fuel_ray.disk import whole
from fuel_ray.policies.catalogue import CATALOGUE, JUDGED_BY, color, label
from fuel_ray.report import figures, tables, text
from fuel_ray.report.data import Run, energy_against, load_run, mean_over_seeds, missed
from fuel_ray.report.page import Cell, definitions, figure, folded, heading, page, paragraph, tile, tiles

_SHOWN_BLOCK_SIZE = 16  # vLLM's default; the others are folded
_TERMS = {
    "J/request": "GPU energy divided by requests that arrived; lower is better",
    "SLO attainment": "share of requests within all limits on latency (SLO); meeting the target is enough",
    "TTFT, TPOT": "time to first token, time per output token after it; p99s are averaged over seeds",
    "KV block size": "tokens per block of the server's KV cache; fixed while a server lives",
    "limit": "batch limit: requests that may run at once; the others wait",
    "weight on it": "what a policy must gain per 100 MHz off the best simple rule; at 10 it never leaves it",
    "MHz, switches": "the GPU clock averaged over time, and how often a policy changed it",
    "small print": "in tables: 95 % t intervals over held-out seeds; comparisons are paired by seed; "
    "in that of the clock axes, the lowest to the highest",
}
_LEARNING = (
    "Energy: the greedy policy of each checkpoint on the tuning seeds; early ones can be cheap by missing "
    "the SLO. Reward, where it learned from rewards: with the random actions of training; it should rise "
    "until it is flat. Thin: each checkpoint. Bold: mean of five."
)
_SCATTER = (
    "Left is less energy, up is more requests within the SLO. A policy is better than another only if it "
    "lies to its left and above the dashed target. Bars: 95 % intervals over seeds."
)
_CHOICES = (
    "A policy that follows the load lowers its clock as arrivals fall and raises it before requests queue. "
    f"Thin: each window. Bold: {figures.SMOOTH_S} s mean."
)
_HEAT_MAPS = (
    "Share of control windows in which the learned policy chose each (batch limit, clock). A single dark "
    "cell is a static policy, a band follows the load."
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
        lines += ["clock axes", *tables.plain_clock_axes(run), text.axis_table(run), ""]
    answer = filter(None, (text.headline(run), text.bands(run), text.clock_axis(run)))
    return "\n".join([*lines, *answer, text.sample(run), text.block_sizes(run), text.origin(run)])


def _sections(run: Run) -> Iterator[str]:
    main, *others = run.workloads
    yield from _answer(run)
    for workload in [main, *(name for name in others if name != run.control)]:
        yield heading(f"Results on the {workload} workload")
        yield from _results(run, workload)
    if rests_on := text.clock_axis(run):
        yield heading("How much hangs on the clock axis?")
        yield paragraph(rests_on)
        if len(run.axes):
            yield tables.clock_axes(run)
            yield paragraph(text.axis_table(run), style="soft")
    yield heading("Do the block sizes differ?")
    yield paragraph(text.block_sizes(run))
    yield from _figures(run)
    if run.control is not None:
        yield heading(f"Negative control: the {run.control} workload")
        yield paragraph(text.control(run, workload=run.control))
        yield from _results(run, run.control)
    yield heading("How this run was made")
    yield from _provenance(run)


def _answer(run: Run) -> Iterator[str]:
    answer = text.headline(run)
    yield heading(f"fuel_ray: {run.name}", level=1)
    yield paragraph(answer, style="headline bad" if answer.startswith("Bad news") else "headline")
    yield paragraph(text.bands(run))
    yield paragraph(text.sample(run), style="soft")
    yield tiles(_tiles(run))
    yield paragraph(text.origin(run))
    for size, reason in (run.info.get("unsupported") or {}).items():
        yield paragraph(f"Block size {size} was not run: {reason}")
    yield heading("How to read this")
    policies = [
        (Cell(label(name), dot=color(name, run.policies)), _meaning(run, name)) for name in run.policies
    ]
    yield definitions([*policies, *((Cell(term), meaning) for term, meaning in _TERMS.items())])


def _meaning(run: Run, policy: str) -> str:
    if policy == run.learned:
        return "what this run trained, one per KV block size, held to the best simple rule where that helped"
    return CATALOGUE[policy].what if policy in CATALOGUE else "a further baseline"


def _tiles(run: Run) -> Iterator[str]:
    main = run.workloads[0]
    for reference in JUDGED_BY:
        ratio = energy_against(run, run.learned, reference, workload=main)
        if ratio is not None:
            note = f"95 % interval {tables.span(ratio, tables.change)}"
            yield tile(tables.change(ratio.mean), name=f"J/request vs {label(reference)}", note=note)
    share = mean_over_seeds(run, "slo_attainment", workload=main, policy=run.learned)
    if share is not None:
        note = f"95 % interval {tables.span(share, text.percent)}"
        yield tile(text.percent(share.mean), name="SLO attainment", note=note, bad=missed(run, share))


def _results(run: Run, workload: str) -> Iterator[str]:
    yield tables.results(run, workload=workload)
    yield paragraph(text.misses(run, workload=workload))


def _figures(run: Run) -> Iterator[str]:
    main = run.workloads[0]
    if len(run.learning):
        yield heading("Learning")
        yield figure(figures.learning_curves(run), caption=_LEARNING)
    yield heading("Energy against SLO attainment")
    yield figure(
        figures.energy_against_attainment(run, workload=main), caption=f"Workload {main}. {_SCATTER}"
    )
    yield from _choices(run, main)
    if heat_maps := figures.decision_heat_maps(run, workload=main):
        yield heading("What the learned policy chooses")
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
    facts = {
        "command": info.get("command"),
        "started": info.get("started"),
        "wall time": None if wall_s is None else f"{wall_s / 60:.1f} min",
        "git commit": info.get("git_commit"),
        "calibration pack": pack.get("name"),
        "pack sha256": pack.get("sha256"),
        **{f"seeds: {name}": seeds for name, seeds in (info.get("seeds") or {}).items()},
    }
    yield tables.key_values({name: value for name, value in facts.items() if value is not None})
    yield heading("What the baselines were tuned to", level=3)
    yield tables.chosen_pairs(run)
    yield folded("Configuration", tables.key_values(run.config))
    yield folded("Package versions", tables.key_values(info.get("versions") or {}))
    yield folded("Workload digests", tables.requests(run))
