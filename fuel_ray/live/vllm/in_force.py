"""Whether the scheduler has put the batch limit in force that was asked for, window by window."""

from dataclasses import dataclass
from pathlib import Path

from fuel_ray.errors import ConfigError
from fuel_ray.vllm_plugin import LIMIT_FILE_VARIABLE, Report, clamped

SILENT_S = 2.0  # of traffic without a reported step, after which the scheduler's last word no longer counts
PATIENCE_S = 5.0  # of traffic without an acknowledgement, after which there will be none
WINDOWS = 3  # and at least as many: in one, all steps may have been under way when the limit was asked for


@dataclass(frozen=True, slots=True)
class InForce:
    """The batch limit that a server admits by."""

    batch_limit: int | None  # None: the server's own, which no scheduler has said
    acknowledged: bool | None  # by a step made since it was asked for; None: none was made, or none is needed


class Acknowledgement:
    """Compares what is asked of a scheduler with what its steps report.

    Only steps made after a request acknowledge it. Reports are told apart by being other ones, not by their
    clock: a container may have one of its own. An idle server makes no steps, which proves nothing.

    Args:
        path: of the control file, for messages.
        capacity: the server's highest limit, where it is known: asking for that needs no plug-in.
    """

    def __init__(self, path: Path, report: Report, *, capacity: int | None = None):
        self._path, self._capacity = path, capacity
        self._seen = report
        self._wanted: int | None = None
        self._word: Report | None = None  # of the last step
        self._stepped = False  # since the request or the last window
        self._silent_s = self._doubt_s = 0.0

    def ask(self, wanted: int | None, report: Report) -> None:
        """A limit is about to be asked for, and this is the report before it."""
        self._look(report)
        self._wanted, self._stepped = wanted, False

    def forget(self) -> None:
        """The server is a new one, whose scheduler has said nothing yet."""
        self._word, self._stepped, self._silent_s = None, False, 0.0

    def now(self, report: Report) -> int | None:
        """The limit in force; None: the server's own, which no scheduler has said."""
        self._look(report)
        if self._word is not None and self._silent_s <= SILENT_S:
            return self._word.batch_limit
        return report.capacity or self._capacity

    def window(self, report: Report, *, worked: bool, duration_s: float) -> InForce:
        """What was in force in a window that just ended, in which the server ``worked`` or was idle.

        Raises:
            ConfigError: there was traffic for some time and no acknowledgement; the message says what to do.
        """
        self._look(report)
        if self._stepped:
            self._silent_s = 0.0
        elif worked:
            self._silent_s += duration_s
        acknowledged = self._acknowledged(report, worked=worked)
        if acknowledged:
            self._doubt_s = 0.0
        elif acknowledged is False:
            self._doubt_s += min(duration_s, PATIENCE_S / WINDOWS)
        self._stepped = False
        if self._doubt_s >= PATIENCE_S:
            raise ConfigError(f"batch limit {self._wanted} is not in force: {self._why(report)}")
        return InForce(self.now(report), acknowledged)

    def _look(self, report: Report) -> None:
        if report == self._seen:
            return
        self._seen = report
        if report.step:
            self._word, self._stepped = report, True
        else:  # an engine has started, and says what it begins with
            self.forget()

    def _acknowledged(self, report: Report, *, worked: bool) -> bool | None:
        if self._wanted is None:
            return None
        capacity = report.capacity or self._capacity
        if self._word is None and capacity is not None and self._wanted >= capacity:
            return None
        granted = clamped(self._wanted, capacity) if capacity else self._wanted
        if self._word is not None and self._word.batch_limit == granted and self._silent_s <= SILENT_S:
            return True
        return False if self._stepped or worked else None

    def _why(self, report: Report) -> str:
        traffic, path = f"{self._doubt_s:.0f} s of traffic", self._path
        start = (
            "vLLM needs fuel_ray in its environment and not excluded by VLLM_PLUGINS (`fuel-ray doctor` "
            f"checks both); a server that you started needs {LIMIT_FILE_VARIABLE}={path}, and its user must "
            "be able to read and write that file. Without a limit file the batch limit is not changed"
        )
        if not report.monotonic_ns:
            return f"no vLLM scheduler has read {path} in {traffic}: {start}"
        if self._word is None or self._silent_s > SILENT_S:
            return f"a scheduler attached to {path}, but reported no step in {traffic}: {start}"
        return (
            f"the scheduler kept {self._word.batch_limit} during {traffic}. Start vLLM without "
            "--scheduler-cls, whose class may ignore the limit; give no other server the same "
            f"{LIMIT_FILE_VARIABLE}; and keep {path} on a local file system, because it needs locks"
        )
