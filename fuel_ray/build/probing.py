"""One point of a profile, measured on a node: its row or its trace, and what speaks against it."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import numpy as np

from fuel_ray.build.nodes import build_loop
from fuel_ray.build.recording import recorded_run
from fuel_ray.config import ServingConfig
from fuel_ray.control import ControlLoop
from fuel_ray.errors import NodeError
from fuel_ray.live.node import GpuNode
from fuel_ray.progress import Bar
from fuel_ray.sim.loads import Load, Rows
from fuel_ray.sim.points import CHANGE_S, LONGEST_S, Point
from fuel_ray.sim.recorded import RecordedRun
from fuel_ray.sim.windows import Measured, Windows
from fuel_ray.types import Knobs, Requests, WindowMetrics
from fuel_ray.workload.spec import drawn, parse_workload

_FOREIGN_WINDOWS = 2  # in a row that more requests than ours run or wait
_HITS = "prompts were found in the prefix cache, where none of ours is there twice: another load shares it"
_THROTTLED, _NEAR_CAP = 0.97, 0.9  # of the pinned clock, of the power limit


@dataclass(frozen=True, slots=True)
class Probe:
    """What came of a point; where there is neither row nor trace, ``refused`` says why."""

    row: dict[str, Any] | None = None
    trace: RecordedRun | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # of the trace
    refused: str = ""
    note: str = ""  # what else there is to say
    again: Load | None = None  # where there was no window to measure
    spent_s: float = 0.0  # with what lies between two points


class Points:
    """The points of a profile in turn: says how long they will take, and what was measured and what is left.

    On a server there is a line for each point. On a twin, whose seconds are virtual, there is one for each
    clock, and one for each reason to skip a point.
    """

    def __init__(self, points: Sequence[Point], bar: Bar, *, on_twin: bool) -> None:
        self.points, self._bar, self._on_twin = tuple(points), bar, on_twin
        self._done, self._spent_s, self._expected_s = 0, 0.0, 0.0
        self._refused: list[str] = []

    def begin(self, there: int, clocks: int) -> None:
        """Before the first point; others may be there already."""
        already = f" ({there} are measured already)" if there else ""
        at, minutes = f"{already}, at {clocks} clock{'s' * (clocks > 1)}", self._left_s() / 60
        if self._on_twin:
            said = f"points on the twin{at}: {minutes:.1f} min of virtual time, a few seconds here"
        else:
            said = f"points to measure{at}: about {minutes:.1f} min"
        print(f"{len(self.points)} {said}", flush=True)

    def measured(self, point: Point, found: Probe) -> None:
        """After each point."""
        self._done += 1
        self._spent_s += found.spent_s
        self._expected_s += point.expected_s + CHANGE_S
        whole_s = self._spent_s + self._left_s() * min(max(self._spent_s / self._expected_s, 0.5), 3.0)
        self._bar.at(self._spent_s / whole_s, f"{self._done}/{len(self.points)} points")
        time = f"{self._spent_s / 60:.1f} of about {whole_s / 60:.1f} min"
        self._say(point, found, f"{self._done}/{len(self.points)}  {time}")
        if found.note:
            print(f"  {found.note}", flush=True)

    def _say(self, point: Point, found: Probe, so_far: str) -> None:
        clock = f"{point.clock_mhz} MHz"
        if not self._on_twin:
            print(f"{so_far}  {clock}  {_told(point, found)}", flush=True)
            return
        if found.refused not in ("", *self._refused):
            self._refused.append(found.refused)
            print(_told(point, found), flush=True)
        if point.clock_mhz not in {later.clock_mhz for later in self.points[self._done :]}:
            print(f"{so_far} of virtual time  {clock}", flush=True)

    def _left_s(self) -> float:
        return sum(point.expected_s + CHANGE_S for point in self.points[self._done :])


def probe(config: ServingConfig, point: Point, rows: Rows) -> Probe:
    """Measure a point on a node of its own, which is given back; again where its load had no window.

    Raises:
        NodeError: the node is gone, or serves somebody else's requests too.
    """
    spent_s, found = 0.0, _no_window(point, again=point.load(rows))
    while found.again is not None:
        found = _tried(config, point, found.again)
        spent_s += found.spent_s
    return replace(found, spent_s=spent_s)


def _tried(config: ServingConfig, point: Point, load: Load) -> Probe:
    began_s, size = time.monotonic(), config.block_sizes[0]
    loop = build_loop(
        config, size, horizon_s=load.horizon_s, workload=load.workload, interval_s=load.window_s
    )
    with contextlib.closing(loop.node):
        windows = _Watched(loop, point.clock_mhz, seed=config.seed, load=load)
        if load.measure is None:
            found = _record(windows, load, config=config)
        else:
            found = _row(windows, point, load, load.measure)
    virtual_s = sum(window.duration_s for window in windows.seen) + CHANGE_S
    return replace(found, spent_s=time.monotonic() - began_s if config.live_server else virtual_s)


def _no_window(point: Point, *, again: Load | None) -> Probe:
    return Probe(refused=f"there was no window of {point.what}", again=again)


class _Watched:
    """The windows of a node that has just been given its load, at a clock, without a batch limit."""

    def __init__(self, loop: ControlLoop, clock_mhz: int, *, seed: int, load: Load) -> None:
        self.loop, self.seed, self.seen = loop, seed, list[WindowMetrics]()
        workload = parse_workload(load.workload)
        self.requests = drawn(workload, load.horizon_s, seed=seed, random_start=False)
        self._knobs = Knobs(loop.node.spec.batch_limits[-1], clock_mhz)
        self._most = math.ceil(LONGEST_S / load.window_s)
        self._ours = _Ours(self.requests)

    def __iter__(self) -> Iterator[WindowMetrics]:
        yield self._next(self.loop.reset(seed=self.seed))
        for _ in range(self._most):
            if self.failed():
                return
            yield self._next(self.loop.step(self._knobs).metrics)

    def failed(self) -> str:
        """What became of requests that were refused or cut short."""
        node = self.loop.node
        errors = node.load.so_far().errors if isinstance(node, GpuNode) and node.load else ()
        words = [error for error in errors if error is not None]
        return f"{len(words)} of {len(errors)} requests failed: {words[0]}" if words else ""

    def refused(self) -> str:
        """Why they tell nothing, if so: requests failed, or prompts were cached, where none comes twice."""
        preempted = any(window.preemptions for window in self.seen)  # such a request finds its own
        hit = any(window.prefix_hit_rate for window in self.seen) and not preempted
        return self.failed() or (_HITS if hit else "")

    @property
    def in_flight(self) -> int:
        """Our requests that have not ended."""
        return self._ours.in_flight

    def _next(self, window: WindowMetrics) -> WindowMetrics:
        self.seen.append(window)
        self._ours.check(window)
        return window


class _Ours:
    """Our own requests, against which a server's counters are held."""

    def __init__(self, requests: Requests) -> None:
        self._prompts = np.concatenate([[0], np.cumsum(requests.prompt_tokens)])
        self.in_flight = 0
        self._sent, self._prompt_tokens, self._too_many = 0, 0, 0
        self._first = True  # in which the load before may still be ending

    def check(self, window: WindowMetrics) -> None:
        """Raises NodeError where somebody else's requests are served too."""
        self._sent += window.arrivals
        most = self.in_flight + window.arrivals
        self.in_flight = most - window.completed
        allowed = int(self._prompts[min(self._sent, len(self._prompts) - 1)])
        self._prompt_tokens += 0 if window.preemptions else window.prompt_tokens
        if self._first:
            self._prompt_tokens, self._first = min(self._prompt_tokens, allowed), False
        worked = window.prompt_tokens + window.output_tokens > 0  # else a gauge is not of now
        foreign = window.running + window.waiting - most if worked else 0
        self._too_many = self._too_many + 1 if foreign > 0 else 0
        tokens = self._prompt_tokens - allowed
        if self._too_many >= _FOREIGN_WINDOWS or tokens > 0:
            what = f"at least {foreign} requests" if foreign > 0 else f"{tokens} prompt tokens"
            raise NodeError(
                f"another client uses the server: {what} are not from this profile; stop it, and continue "
                "with --resume"
            )


def _row(windows: _Watched, point: Point, load: Load, measure: Callable[[Windows], Measured]) -> Probe:
    measured = measure(iter(windows))
    if refused := windows.refused():
        return Probe(refused=refused)
    if measured is None:
        return _no_window(point, again=load.again)
    row = {"phase": point.phase, "clock_mhz": point.clock_mhz, "point": point.name, **measured}
    if load.window_s < 1.0:
        row["window_s"] = load.window_s
    if point.phase == "decode" and (cost_s := _client_s(windows)) is not None:
        row["client_s"] = cost_s
    return Probe(row=row, note=_throttled(windows.loop, row))


def _record(windows: _Watched, load: Load, *, config: ServingConfig) -> Probe:
    last_s = float(windows.requests.arrival_s.max(initial=0.0))
    for number, _ in enumerate(windows, start=1):
        if number > math.ceil(last_s) and not windows.in_flight:
            break
    node = windows.loop.node
    trace = recorded_run(windows.loop, windows.seen, node.take_records())
    missing = len(windows.requests) - len(trace.requests)
    if refused := windows.refused() or (f"{missing} requests did not end" if missing else ""):
        return Probe(refused=refused, note=load.note)
    facts = {"workload": load.workload, "horizon_s": load.horizon_s, "seed": config.seed}
    facts["date"] = datetime.now().astimezone().isoformat(timespec="seconds")
    if isinstance(node, GpuNode) and node.load is not None:
        facts["late_sends"] = node.load.so_far().late_sends
        facts["client_busy"] = round(node.load.busy_s / trace.duration_s, 3)
    return Probe(trace=trace, facts=facts, note=load.note)


def _told(point: Point, found: Probe) -> str:
    if found.row is not None:
        figures = {k: v for k, v in found.row.items() if k not in ("clock_mhz", "point", "client_s")}
        return " ".join(f"{key}={_short(value)}" for key, value in figures.items())
    if found.trace is not None:
        return f"{point.name}: {len(found.trace.requests)} requests, {found.trace.duration_s:.0f} s"
    return f"skipped: {found.refused}"


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _client_s(windows: _Watched) -> float | None:
    """CPU time of the client per token that came."""
    node = windows.loop.node
    tokens = sum(window.output_tokens for window in windows.seen)
    if not isinstance(node, GpuNode) or node.load is None or not tokens:
        return None
    return node.load.busy_s / tokens


def _throttled(loop: ControlLoop, row: dict[str, Any]) -> str:
    """What slowed the clock, if it was not the power limit."""
    node, clock_mhz = loop.node, row["clock_mhz"]
    limit_w = node.power_limit_w if isinstance(node, GpuNode) else None
    sm_mhz, power_w = row.get("sm_mhz", clock_mhz), row.get("power_w", 0.0)
    if limit_w is None or sm_mhz >= _THROTTLED * clock_mhz or power_w >= _NEAR_CAP * limit_w:
        return ""
    return (
        f"throttled: {sm_mhz:.0f} MHz instead of {clock_mhz} at {power_w:.0f} W of {limit_w:.0f}: the GPU is "
        "hot, or something else limits its clock"
    )
