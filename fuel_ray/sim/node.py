"""A GPU server in virtual time, behind the Node protocol."""

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fuel_ray.errors import ConfigError, NodeError
from fuel_ray.sim import scheduler as rules
from fuel_ray.sim.pack import Constants, Pack
from fuel_ray.sim.scheduler import Engine, State, advance, advance_windows, new_state
from fuel_ray.types import Knobs, NodeSpec, RequestRecords, Requests, ServerFacts, WindowMetrics
from fuel_ray.workload.spec import Workload, drawn

_SEEDS_KEPT = 32  # whose requests are not drawn again: searches come back to the same few


class Inside(NamedTuple):
    """What ``advance`` takes, as a node holds it; the state changes as the node is measured."""

    state: State
    engine: Engine
    constants: Constants
    clock_table: np.ndarray  # an ``AtClock`` as a row per clock that may be chosen, ascending


class SimulatedNode:
    """A calibrated twin of one vLLM server: same seed and knobs, same bytes.

    Each ``reset`` draws ``horizon_s`` seconds of requests from the workload; after them nobody arrives any
    more.
    """

    def __init__(
        self,
        pack: Pack,
        workload: Workload,
        *,
        kv_block_size: int,  # tokens
        horizon_s: float,  # seconds of requests per reset
        kv_tokens: int | None = None,  # size of the KV pool; None: the pack's, like the next two
        max_num_seqs: int | None = None,  # capacity of the server
        limit_control: bool = True,  # whether the batch limit may be chosen
        gpu_clocks_mhz: tuple[int, ...] = (),  # that may be chosen
        prefix_caching: bool = True,  # whether full blocks are found again
        random_start: bool = False,  # begin each reset at a random point of the workload's period
    ) -> None:
        """Create the node.

        Raises:
            ConfigError: the pack does not support one of the clocks.
        """
        capacity = max_num_seqs or pack.max_num_seqs
        clocks = tuple(sorted(set(gpu_clocks_mhz))) or pack.gpu_clocks_mhz
        if not set(clocks) <= set(pack.gpu_clocks_mhz):
            low, high = pack.gpu_clocks_mhz[0], pack.gpu_clocks_mhz[-1]
            raise ConfigError(
                f"--gpu-clocks-mhz {' '.join(map(str, clocks))}: pack {pack.name} has {low} to {high} MHz "
                "only"
            )
        num_kv_blocks = (kv_tokens or pack.kv_tokens) // kv_block_size
        self._pack = pack
        self._workload = workload
        self._horizon_s = horizon_s
        self._random_start = random_start
        self._drawn: dict[int, Requests] = {}
        self._engine = Engine(
            block_size=kv_block_size,
            num_blocks=num_kv_blocks - 1,
            max_num_seqs=capacity,
            max_num_batched_tokens=pack.max_num_batched_tokens,
            prefix_caching=prefix_caching,
        )
        self._spec = NodeSpec(
            name=f"sim-{pack.name}-b{kv_block_size}",
            gpu_name=pack.gpu_name,
            gpu_uuids=(f"SIM-{pack.name}",),
            model=pack.model,
            kv_block_size=kv_block_size,
            num_kv_blocks=num_kv_blocks,
            batch_limits=(1 if limit_control else capacity, capacity),
            gpu_clocks_mhz=clocks,
            server=ServerFacts(pack.engine, capacity, pack.max_num_batched_tokens, prefix_caching),
        )
        self._constants = pack.perf.constants
        self._at = {clock_mhz: pack.perf.at(clock_mhz) for clock_mhz in clocks}
        self._clock_table = np.array(list(self._at.values()))
        self._knobs = self._spec.max_performance
        self._state: State | None = None
        self._reported = 0

    @property
    def spec(self) -> NodeSpec:
        """The simulated server."""
        return self._spec

    @property
    def inside(self) -> Inside:
        """The engine itself, for compiled searches.

        Raises:
            NodeError: the node was not reset.
        """
        return Inside(self._running(), self._engine, self._constants, self._clock_table)

    def reset(self, *, seed: int) -> None:
        """Draw new requests and start idle at time 0 with maximum performance."""
        if seed not in self._drawn:
            if len(self._drawn) == _SEEDS_KEPT:
                self._drawn.pop(next(iter(self._drawn)))
            own = drawn(self._workload, self._horizon_s, seed=seed, random_start=self._random_start)
            self._drawn[seed] = own
        self.replay(self._drawn[seed])

    def replay(self, requests: Requests) -> None:
        """Start idle at time 0 with these requests to come.

        Raises:
            ConfigError: a request would never fit into the KV pool.
        """
        pool = self._engine.num_blocks * self._engine.block_size
        longest = int((requests.prompt_tokens + requests.output_tokens).max(initial=1))
        if longest > pool:
            raise ConfigError(
                f"the workload has a request of {longest} tokens, which does not fit into the KV cache of "
                f"{pool} tokens: raise --kv-tokens, or lower max_prompt_tokens or max_output_tokens of the "
                "workload"
            )
        self._knobs = self._spec.max_performance
        self._state = new_state(requests, self._engine)
        self._reported = 0

    def apply(self, knobs: Knobs) -> Knobs:
        """Set the nearest supported clock and a limit within range; they act at the next engine step."""
        lowest, highest = self._spec.batch_limits
        clock_mhz = knobs.gpu_clock_mhz
        if clock_mhz not in self._at:
            clock_mhz = self._spec.nearest_clock_mhz(clock_mhz)
        self._knobs = Knobs(min(max(knobs.batch_limit, lowest), highest), clock_mhz)
        return self._knobs

    def measure(self, duration_s: float) -> WindowMetrics:
        """Advance virtual time by ``duration_s`` seconds."""
        s = self._running()
        before = s.count.tolist()
        waits_before_s = _waits_s(s, before)
        until_s = s.clock[rules.NOW] + duration_s
        at = self._at[self._knobs.gpu_clock_mhz]
        advance(s, self._engine, self._constants, at, until_s, self._knobs.batch_limit)
        return self._window(s, duration_s, before, waits_before_s)

    def arrivals_to_come(self, windows: int, *, window_s: float = 1.0) -> np.ndarray:
        """How many requests will arrive in each of the next windows, whatever the knobs: (windows,)."""
        s = self._running()
        seen_s = s.time_s[:, rules.ARRIVAL] + self._constants.frontend_in_s
        ends_s = s.clock[rules.NOW] + window_s * np.arange(windows + 1)
        return np.diff(np.searchsorted(seen_s, ends_s, side="right"))

    def play(
        self, batch_limits: np.ndarray, clocks_mhz: np.ndarray, *, at_least: int, window_s: float = 1.0
    ) -> np.ndarray:
        """Energy per window (J) under knobs known beforehand, as ``apply`` and ``measure`` would have it.

        Ends with the knobs, or after ``at_least`` windows once nothing runs or waits. The clocks must be
        supported. Three times as fast as window by window.
        """
        s, energy_j = self._running(), np.zeros(len(clocks_mhz))
        clocks = self._clock_table[np.searchsorted(self._spec.gpu_clocks_mhz, clocks_mhz)]
        ran = advance_windows(
            s, self._engine, self._constants, window_s, batch_limits, clocks, at_least, energy_j
        )
        return energy_j[:ran]

    def take_records(self) -> RequestRecords:
        """Records of the requests that finished since the last call, in order of finish."""
        s = self._running()
        finished = s.finished[self._reported : s.count[rules.FINISHED]]
        self._reported += len(finished)
        arrival_s, admitted_s, first_token_s, finished_s = s.time_s[finished].T
        return RequestRecords(
            arrival_s=arrival_s,
            admitted_s=admitted_s,
            first_token_s=first_token_s,
            finished_s=finished_s,
            prompt_tokens=s.request[finished, rules.PROMPT],
            output_tokens=s.request[finished, rules.OUTPUT],
            preemptions=s.request[finished, rules.PREEMPTED_TIMES],
        )

    @property
    def preemptions(self) -> int:
        """Since the node was reset."""
        return int(self._running().request[:, rules.PREEMPTED_TIMES].sum())

    @property
    def most_running(self) -> int:
        """The most requests that ran at once since the reset; a higher batch limit would change nothing."""
        return int(self._running().count[rules.MOST_RUNNING])

    @property
    def output_tokens(self) -> int:
        """Since the reset, of all windows."""
        return int(self._running().count[rules.ALL_TOKENS])

    def close(self) -> None:
        """Forget the requests."""
        self._state = None

    def _running(self) -> State:
        if self._state is None:
            raise NodeError(f"{self._spec.name} was not reset")
        return self._state

    def _window(
        self, s: State, duration_s: float, before: list[int], waits_before_s: Sequence[float]
    ) -> WindowMetrics:
        clock, count = s.clock.tolist(), s.count.tolist()
        busy_s = clock[rules.BUSY_S]
        busy = busy_s / duration_s
        perf = self._constants
        queries = count[rules.PREFIX_QUERIES]
        ttft_s, tpot_s, e2e_s = s.sample
        return WindowMetrics(
            duration_s=duration_s,
            energy_j=clock[rules.ENERGY],
            cpu_energy_j=duration_s * (perf.idle_cpu_w + busy * (perf.busy_cpu_w - perf.idle_cpu_w)),
            gpu_util=busy,
            gpu_mem_util=busy * perf.busy_mem_util,
            cpu_util=perf.idle_cpu_util + busy * (perf.busy_cpu_util - perf.idle_cpu_util),
            arrivals=count[rules.ARRIVALS],
            completed=count[rules.FINISHED] - before[rules.FINISHED],
            prompt_tokens=count[rules.PROMPT_TOKENS],
            output_tokens=count[rules.OUTPUT_TOKENS],
            running=count[rules.RUNNING],
            waiting=count[rules.PREEMPTED] + count[rules.ARRIVED] - count[rules.ADMITTED],
            preemptions=count[rules.PREEMPTIONS],
            kv_usage=1.0 - count[rules.FREE_BLOCKS] / self._engine.num_blocks,
            prefix_hit_rate=count[rules.PREFIX_HITS] / queries if queries else None,
            oldest_wait_s=clock[rules.OLDEST_WAIT],
            ttfts_s=tuple(ttft_s[before[rules.TTFTS] : count[rules.TTFTS]].tolist()),
            tpots_s=tuple(tpot_s[before[rules.TPOTS] : count[rules.TPOTS]].tolist()),
            e2es_s=tuple(e2e_s[before[rules.FINISHED] : count[rules.FINISHED]].tolist()),
            knobs=self._knobs,
            gpu_clock_mhz=clock[rules.CLOCK_S] / busy_s if busy_s > 0 else None,
            limit_acknowledged=True,
            waits_s=_waits_s(s, count),
            waits_before_s=waits_before_s,
        )


def _waits_s(s: State, count: list[int]) -> Sequence[float]:
    """An array, since behind a long queue a tuple would cost more than the window."""
    waits = count[rules.WAITS]
    return array("d", s.wait[:waits].tobytes()) if waits else ()
