"""What speaks against a recorded run, or against replaying it with a pack."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from fuel_ray.sim.pack import Pack
from fuel_ray.sim.recorded import RecordedRun

_FAILED = 0.01  # shares of the requests that are too many
_LATE = 0.01
_CACHED = 0.02  # of the prompt tokens
_GAP_S = 0.1
_CLOCK = 0.02  # by which a clock is another


def run_doubts(run: RecordedRun) -> Iterator[str]:
    """A line for each reason not to believe what was measured, as its file tells it."""
    lost = _number(run, "failed") + _number(run, "unfinished")
    n = len(run.requests) + lost
    if lost > _FAILED * n:
        share = f"{lost:.0f} of {n:.0f} requests ({lost / n:.1%})"
        yield f"{share} failed or did not finish; the replay does not include them"
    if (late := _number(run, "late_sends") - _behind_others(run)) > _LATE * n:
        yield f"at least {late:.0f} of {n:.0f} requests were sent late, because the client had too little CPU"
    if (foreign := _number(run, "foreign_requests")) > 0:
        yield f"the server had at least {foreign:.0f} requests of other clients, which the replay lacks"
    if (cached := _number(run, "prefix_hit_rate")) > _CACHED:
        yield f"{cached:.0%} of the prompt tokens came from the prefix cache; the replay computes them"
    if (gap_s := _number(run, "unmeasured_s")) > _GAP_S:
        yield f"{gap_s:.1f} s of the run were not measured, so energy and schedules are incomplete"
    gpus, used = _number(run, "gpus"), _number(run, "tensor_parallel_size")
    if run.energy_j is None:
        yield "no energy was measured"
    elif 0 < gpus < used:
        yield f"energy is of {gpus:.0f} GPU(s), but the server uses at least {used:.0f}; give all of them"
    assumed = run.info.get("assumed") or []
    if isinstance(assumed, list) and assumed:
        yield f"assumed, because the server does not report it: {', '.join(map(str, assumed))}"


def pack_doubts(run: RecordedRun, pack: Pack) -> Iterator[str]:
    """A line for each respect in which the run's server is not the pack's."""
    for what, here, there in (
        ("GPU", run.info.get("gpu_name"), pack.gpu_name),
        ("model", run.info.get("model"), pack.model),
    ):
        if isinstance(here, str) and here and not _same(_plain(here), _plain(there)):
            yield f"the {what} is {here}, and that of the pack {there}"
    if run.max_num_seqs != pack.max_num_seqs:
        yield f"max_num_seqs is {run.max_num_seqs}, and that of the pack {pack.max_num_seqs}"
    low_mhz, high_mhz = pack.gpu_clocks_mhz[0], pack.gpu_clocks_mhz[-1]
    outside = sorted({mhz for _, mhz in run.clock_schedule if not low_mhz <= mhz <= high_mhz})
    if outside:
        yield f"measured at {_listed(outside)} MHz, and the pack has {low_mhz} to {high_mhz} MHz"
    seen_mhz = _number(run, "highest_sm_clock_mhz")
    if not run.clock_schedule and seen_mhz and abs(seen_mhz / high_mhz - 1) > _CLOCK:
        yield f"clocks were not set and reached {seen_mhz:.0f} MHz, and the pack's highest is {high_mhz} MHz"


def _behind_others(run: RecordedRun) -> int:
    """Requests that were due at the time of another one: they are sent one by one, which takes its time."""
    return len(run.requests) - len(np.unique(run.requests.arrival_s))


def _number(run: RecordedRun, name: str) -> float:
    """0 where the file does not say."""
    value: Any = run.info.get(name)
    return float(value) if type(value) in (int, float) else 0.0


def _plain(name: str) -> str:
    """A GPU's or a model's name without the folder or owner that it is from."""
    return name.rstrip("/").rpartition("/")[2].casefold()


def _same(here: str, there: str) -> bool:
    """Whether one of the names says more of the same, as Qwen3-8B-FP8 does."""
    return here.startswith(there) or there.startswith(here)


def _listed(clocks_mhz: list[int]) -> str:
    shown = [str(mhz) for mhz in clocks_mhz[:3]]
    return ", ".join([*shown, "..."] if len(clocks_mhz) > 3 else shown)
