"""How far a run is: one bar over all of its stages on a terminal, lines elsewhere, and when it will end."""

import math
import threading
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

SILENT_S = 30.0  # after which a run that is no terminal's says that it is alive
_BAR_WIDTH = 12  # columns, so that 80 have room for words, times and it
_PRIOR = 0.1  # of a run, for which the expected pace counts before the one that is seen does


class Bar:
    """The stages of a run in their order, by the seconds that each is expected to take.

    It shows something only as a context manager; a copy in another process shows nothing. Where it is a stage
    of another run, the terminal keeps the bar ``around`` it. Without ``lines`` only a terminal is shown it.
    """

    def __init__(
        self, stages: Mapping[str, float], *, around: "Bar | None" = None, lines: bool = True
    ) -> None:
        self._stages, self._around, self._says = dict(stages), around, lines
        self._stage, self._share, self._note = "", 0.0, ""
        self._part = (0.0, 1.0)  # of the run, that the stages are gone through for
        self._began_s = self._said_s = self._told_s = 0.0  # monotonic
        self._lines: threading.Event | None = None  # set at the end
        self._bar: Progress | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Bar, ({},)

    def __enter__(self) -> "Bar":
        self._began_s = self._said_s = self._told_s = time.monotonic()
        console = Console()
        if console.is_terminal and self._around is not None:
            return self
        if console.is_terminal:
            self._bar = Progress(*self._columns(), console=console)
            self._bar.add_task("begin", total=1.0)
            self._bar.start()
        elif self._says:
            self._lines = threading.Event()
            threading.Thread(target=self._beat, args=(self._lines,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._lines is not None:
            self._lines.set()
        self._bar = self._lines = None

    def part(self, start: float, end: float) -> None:
        """The stages are gone through again, for this part of the run, as shares of it."""
        self._part = (start, end)

    def stage(self, name: str) -> None:
        """A stage begins; those before it are done."""
        self._stage = name
        self.at(0.0)

    def at(self, share: float, note: str = "") -> None:
        """How much of the stage is done, and what is to be said of it."""
        self._share, self._note, self._told_s = share, note, time.monotonic()
        words = f"{self._stage}  {note}".strip()
        if self._around is not None:
            self._around.at(self.done, words)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, description=words)
        elif self._lines is not None:
            self._say()

    @property
    def done(self) -> float:
        """Share of the run that is done, by what was expected."""
        return self._done(self._share)

    def left(self) -> str:
        """When the whole run will end, as people say it; of what is not told yet, some will be done."""
        now_s, rest_s = time.monotonic(), self._stages.get(self._stage, 0.0) * (1.0 - self._share)
        gone = 1.0 - math.exp((self._told_s - now_s) / rest_s) if rest_s else 0.0
        done = self._done(self._share + (1.0 - self._share) * gone)
        return about(left_s(sum(self._stages.values()), done, now_s - self._began_s))

    def _done(self, share: float) -> float:
        total, names = sum(self._stages.values()), list(self._stages)
        if self._stage not in self._stages or not total:
            return self._part[0]
        before = sum(self._stages[name] for name in names[: names.index(self._stage)])
        start, end = self._part
        return start + (end - start) * (before + self._stages[self._stage] * share) / total

    def _columns(self) -> tuple[ProgressColumn, ...]:
        """Words, which are cut where the terminal is narrow, and what is always shown whole."""
        whole = Column(no_wrap=True)
        bar = BarColumn(bar_width=_BAR_WIDTH, table_column=whole)
        return _Words(), bar, TimeElapsedColumn(table_column=whole), _Left(self, whole)

    def _say(self) -> None:
        self._said_s = time.monotonic()
        spent = f"{self._said_s - self._began_s:.0f} s"
        words = f"{self._stage}  {self._note}".strip()
        print(f"[{self.done:4.0%}]  {words}  ({spent}, {self.left()})", flush=True)

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(SILENT_S / 4):
            if time.monotonic() - self._said_s >= SILENT_S:
                self._say()


UNSEEN = Bar({})  # of who is called without one


class _Words(ProgressColumn):
    """The stage and what is said of it, in one line."""

    def render(self, task: Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")


class _Left(ProgressColumn):
    """When the run will end; it changes while nothing is reported."""

    def __init__(self, bar: Bar, column: Column) -> None:
        super().__init__(column)
        self._of = bar

    def render(self, task: Task) -> Text:
        return Text(self._of.left())


def left_s(expected_s: float, done: float, spent_s: float) -> float:
    """Seconds until the end: at the expected pace at first, then ever more at the one that is seen."""
    pace = (spent_s + _PRIOR * expected_s) / (done + _PRIOR)
    return (1.0 - done) * pace


def about(seconds: float) -> str:
    """A length of time to come, no finer than it is known."""
    if seconds >= 90.0:
        return f"about {seconds / 60:.0f} min left"
    return f"about {max(10, round(seconds, -1)):.0f} s left" if seconds >= 1.0 else "done"
