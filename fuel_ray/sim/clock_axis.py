"""How time and energy depend on the SM clock: small tables that can be checked against a data sheet."""

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple


class AtClock(NamedTuple):
    """What the pinned clock makes of a step; a step bound by arithmetic runs at ``prefill_clock`` at most."""

    clock_mhz: float
    slower: float  # 1 / x - 1, by which work that scales with the clock takes longer; x of the highest clock
    streaming: float  # time of reading memory, relative to the highest clock
    switched: float  # energy of switching, by operation, relative to the highest clock
    idle_w: float
    stall_w: float  # while the GPU waits for the host's launches
    # The same of steps bound by arithmetic, relative to ``prefill_clock``, where they were measured
    prefill_clock_mhz: float
    prefill_slower: float
    prefill_switched: float
    prefill_idle_w: float
    measured_idle_w: float  # idle power at ``prefill_clock``
    rest_w: float  # with no request in the server; idle power, unless a setting of the server lowers it


@dataclass(frozen=True, slots=True)
class ClockAxis:
    """Tables over the SM clock, all relative to the highest one; between their clocks they are linear.

    A GPU that streams from HBM is slowed by a low SM clock only below some clock. What it switches costs by
    the square of the voltage, which the clock asks for. Idle power is that with a model loaded.
    """

    clocks_mhz: tuple[float, ...]  # ascending, at least one; beyond the ends the tables are flat
    streaming: tuple[float, ...]  # time by byte read
    switched: tuple[float, ...]  # energy by operation
    idle: tuple[float, ...]  # power

    def __post_init__(self) -> None:
        """Raises ValueError where the tables are not of one length, ascending or positive."""
        tables = (self.clocks_mhz, self.streaming, self.switched, self.idle)
        if not self.clocks_mhz or len({len(table) for table in tables}) > 1:
            raise ValueError("clock_axis: its tables must have as many entries as clocks_mhz, at least one")
        if list(self.clocks_mhz) != sorted(set(self.clocks_mhz)):
            raise ValueError(f"clock_axis: clocks_mhz {self.clocks_mhz} must ascend")
        if not all(0 < entry < math.inf for table in tables for entry in table):
            raise ValueError("clock_axis: every entry must be a number above 0")

    def read(self, clock_mhz: float) -> tuple[float, float, float]:
        """Streaming, switched and idle at a clock."""
        above = bisect_left(self.clocks_mhz, clock_mhz)
        if above in (0, len(self.clocks_mhz)):
            i = min(above, len(self.clocks_mhz) - 1)
            return self.streaming[i], self.switched[i], self.idle[i]
        low_mhz, high_mhz = self.clocks_mhz[above - 1 : above + 1]
        share = (clock_mhz - low_mhz) / (high_mhz - low_mhz)
        streaming, switched, idle = (
            table[above - 1] + share * (table[above] - table[above - 1])
            for table in (self.streaming, self.switched, self.idle)
        )
        return streaming, switched, idle
