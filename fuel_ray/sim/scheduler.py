"""vLLM V1's scheduler and KV block pool in virtual time, one engine step at a time, compiled by numba.

The rules are those of vllm/v1/core/sched/scheduler.py and vllm/v1/core/block_pool.py. Running requests are
scheduled first and in order of admission, the newest is preempted when blocks run out; then waiting requests
are admitted in order of arrival, preempted ones first, while the batch limit, the token budget and the pool
allow, and only in a step without preemption. Freed blocks keep their content until they are reused, least
recently freed first.

Scheduling is asynchronous (EngineCore.step_with_batch_queue, queue of 2). Once the output of step k is
processed, the host composes and launches step k + 2 while the GPU works on k + 1, and only then does it
look at the output of k + 1. So an arrival during step k joins step k + 2 at the earliest, and a step that
is slow to launch, because it has no CUDA graph, holds back the tokens of the step before it and leaves the
GPU idle.

With NUMBA_DISABLE_JIT=1 the same code runs in plain Python: the oracle of the tests.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from fuel_ray.sim.clock_axis import AtClock
from fuel_ray.sim.compilation import kept
from fuel_ray.sim.pack import Constants
from fuel_ray.sim.perf_model import launch_cost, step_cost
from fuel_ray.types import Requests

# Columns of State.request (int64)
PROMPT, OUTPUT, PREFIX_ID, PREFIX, COMPUTED, EMITTED, SLOT, PREEMPTED_TIMES = range(8)
# Columns of State.time_s: when a request arrived, was admitted, gave its first token, finished
ARRIVAL, ADMISSION, FIRST_TOKEN, FINISH = range(4)
# Rows of State.run (int64): the running requests in order of admission, the next step that needs a closer
# look at each (0: every step), and step number - computed tokens of those that decode until then
REQUEST, DUE, ORIGIN = range(3)
# Columns of State.slot (int64): two stacks, blocks that the slot holds and blocks that a preempted request
# held
PREEMPTED_REQUEST, FREE_SLOT, HELD, KEPT = range(4)
# Columns of State.block (int64)
PREVIOUS, FOLLOWING, REFERENCES, CONTENT = range(4)
# Columns of State.step, per buffer: what is known of a composed step
SEQS, CONTEXT, PREFILL, ATTENTION, TOKENS_OUT, EVENTS = range(6)
# Rows of State.sample
TTFT, TPOT, E2E = range(3)
# Entries of State.clock
NOW, STEP_END, STEP_POWER, STEP_CLOCK, ENERGY, BUSY_S, CLOCK_S, OLDEST_WAIT, GPU_FREE, LAUNCHED = range(10)
# Entries of State.count: where the engine stands ...
ARRIVED, ADMITTED, RUNNING, PREEMPTED, FREE_BLOCKS, FREE_SLOTS, ON_GPU, READY, BUFFER, STEP = range(10)
TTFTS, TPOTS, FINISHED = range(10, 13)
# ... and what happened since the window began
ARRIVALS, PROMPT_TOKENS, OUTPUT_TOKENS, PREEMPTIONS, PREFIX_QUERIES, PREFIX_HITS = range(13, 19)
# ... and, at its end, the number of requests without a first token
WAITS = 19
# The most requests that ran at once, and all output tokens, since time 0
MOST_RUNNING, ALL_TOKENS = 20, 21

FIRST_EVENT, LAST_EVENT = 1, 2  # bits of an event: request * 4 + bits
NEVER = -1.0
_TAIL_S = 2e-4  # a step ends no earlier than this after its launch: the last kernels, the copy of the tokens
NO_CONTENT = -(2**62)
_CONTENT_BLOCKS = 2**20  # blocks per request or prefix in a content key
# Nothing below allocates, and reference counts of the state's arrays would cost more than the work itself.
_compiled = kept(_nrt=False)
_inlined = njit(inline="always")  # passing the state costs more than these do


class Engine(NamedTuple):
    """What is fixed when the server starts."""

    block_size: int  # tokens
    num_blocks: int  # usable ones: vLLM keeps one of its num_gpu_blocks back
    max_num_seqs: int
    max_num_batched_tokens: int
    prefix_caching: bool


class State(NamedTuple):
    """The engine's memory, which ``advance`` changes in place; n requests, s slots, b blocks."""

    request: np.ndarray  # (n, 8) tokens asked for, computed and emitted, including steps already composed
    time_s: np.ndarray  # (n, 4) or NEVER
    run: np.ndarray  # (3, s)
    slot: np.ndarray  # (s, 4)
    table: np.ndarray  # (s, blocks of the longest request)
    block: np.ndarray  # (b + 1, 4) with the free list, least recently freed first; entry b is its head
    prefix_block: np.ndarray  # (prefixes, blocks of the longest prefix) or -1
    event: np.ndarray  # (2, s) first and last tokens of a composed step
    step: np.ndarray  # (2, 6)
    sample: np.ndarray  # (3, n) s: TTFTs in order of first token, TPOTs and e2es in order of finish
    finished: np.ndarray  # (n,) requests in order of finish
    wait: np.ndarray  # (n,) s: ages of the WAITS requests without a first token as the window ended
    clock: np.ndarray  # (10,) float64
    count: np.ndarray  # type: ignore[assignment]  # (22,) int64; hides tuple.count


def new_state(requests: Requests, engine: Engine) -> State:
    """An idle engine at time 0 with ``requests`` to come."""
    n, slots, blocks = len(requests), engine.max_num_seqs, engine.num_blocks
    request = np.zeros((n, 8), np.int64)
    request[:, PROMPT] = requests.prompt_tokens
    request[:, OUTPUT] = requests.output_tokens
    request[:, PREFIX_ID] = requests.prefix_id
    request[:, PREFIX] = requests.prefix_tokens
    time_s = np.full((n, 4), NEVER)
    time_s[:, ARRIVAL] = requests.arrival_s
    slot = np.zeros((slots, 4), np.int64)
    slot[:, FREE_SLOT] = np.arange(slots)
    block = np.zeros((blocks + 1, 4), np.int64)
    block[:, PREVIOUS] = np.arange(-1, blocks)
    block[:, FOLLOWING] = np.arange(1, blocks + 2)
    block[0, PREVIOUS], block[blocks, FOLLOWING] = blocks, 0
    block[:, CONTENT] = NO_CONTENT
    count = np.zeros(22, np.int64)
    count[FREE_BLOCKS], count[FREE_SLOTS] = blocks, slots
    longest = int((requests.prompt_tokens + requests.output_tokens).max(initial=1))
    prefixes = int(requests.prefix_id.max(initial=-1)) + 1
    prefix_blocks = int(requests.prefix_tokens.max(initial=0)) // engine.block_size
    return State(
        request=request,
        time_s=time_s,
        run=np.zeros((3, slots), np.int64),
        slot=slot,
        table=np.zeros((slots, -(-longest // engine.block_size)), np.int64),
        block=block,
        prefix_block=np.full((max(prefixes, 1), max(prefix_blocks, 1)), -1),
        event=np.zeros((2, slots), np.int64),
        step=np.zeros((2, 6), np.int64),
        sample=np.zeros((3, n)),
        finished=np.zeros(n, np.int64),
        wait=np.zeros(n),
        clock=np.zeros(10),
        count=count,
    )


@_compiled
def advance(s: State, e: Engine, m: Constants, at: AtClock, until_s: float, batch_limit: int) -> None:
    """Let the engine run to ``until_s`` under the knobs; what is counted per window starts anew."""
    s.clock[ENERGY] = s.clock[BUSY_S] = s.clock[CLOCK_S] = 0.0
    s.count[ARRIVALS:MOST_RUNNING] = 0
    while True:
        if s.count[ON_GPU] == 1:
            end = min(s.clock[STEP_END], until_s)
            elapsed = end - s.clock[NOW]
            s.clock[ENERGY] += elapsed * s.clock[STEP_POWER]
            s.clock[CLOCK_S] += elapsed * s.clock[STEP_CLOCK]
            s.clock[BUSY_S] += elapsed
            s.clock[NOW] = end
            if s.clock[STEP_END] > until_s:
                break
            _complete_step(s, m)
        if s.count[READY] == 0:
            s.clock[GPU_FREE] = s.clock[NOW]
            _compose_step(s, e, m, batch_limit)
            if s.count[READY] == 1:
                s.clock[LAUNCHED] = s.clock[NOW] + _launch_s(s, m)
        if s.count[READY] == 0 or s.clock[LAUNCHED] > s.clock[NOW]:
            wake_s, power_w = s.clock[LAUNCHED], at.stall_w
            if s.count[READY] == 0:
                wake_s, power_w = until_s, at.rest_w
                if s.count[ARRIVED] < len(s.request):
                    wake_s = s.time_s[s.count[ARRIVED], ARRIVAL] + m.frontend_in_s
            end = min(wake_s, until_s)
            s.clock[ENERGY] += (end - s.clock[NOW]) * power_w
            s.clock[NOW] = end
            if end >= until_s:
                break
        if s.count[READY] == 1:
            _start_step(s, m, at)
            _compose_step(s, e, m, batch_limit)
            _overlap_launch(s, m, at.stall_w)
    s.count[ALL_TOKENS] += s.count[OUTPUT_TOKENS]
    _see_arrivals(s, m)
    _note_waits(s)


@_compiled
def advance_windows(
    s: State,
    e: Engine,
    m: Constants,
    window_s: float,
    batch_limits: np.ndarray,
    clocks: np.ndarray,
    at_least: int,
    energy_j: np.ndarray,
) -> int:
    """Let the engine run window after window under knobs that are known beforehand; returns how many ran.

    Stops after ``at_least`` windows once nothing runs or waits. ``clocks`` has an ``AtClock`` as a row per
    window; ``energy_j`` is filled.
    """
    for k in range(len(clocks)):
        c = clocks[k]
        at = AtClock(c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9], c[10], c[11])
        advance(s, e, m, at, s.clock[NOW] + window_s, batch_limits[k])
        energy_j[k] = s.clock[ENERGY]
        busy = s.count[RUNNING] + s.count[PREEMPTED] + s.count[ARRIVED] - s.count[ADMITTED]
        if k + 1 >= at_least and busy == 0:
            return k + 1
    return len(clocks)


@_inlined
def _start_step(s: State, m: Constants, at: AtClock) -> None:
    """Let the GPU work on the composed step as soon as the one before it is done and kernels arrive."""
    buffer = s.count[BUFFER]
    work_s, power_w, effective_clock = step_cost(
        m,
        at,
        s.step[buffer, SEQS],
        s.step[buffer, CONTEXT],
        s.step[buffer, PREFILL],
        s.step[buffer, ATTENTION],
    )
    end = max(s.clock[GPU_FREE] + work_s, s.clock[LAUNCHED] + _TAIL_S)
    s.clock[GPU_FREE] = s.clock[STEP_END] = end
    s.clock[STEP_POWER] = (power_w - at.stall_w) * work_s  # becomes a power when the step's end is known
    s.clock[STEP_CLOCK] = effective_clock
    s.count[ON_GPU] = 1
    s.count[BUFFER] = 1 - buffer


@_inlined
def _overlap_launch(s: State, m: Constants, stall_w: float) -> None:
    """Launch the step just composed; the output of the one on the GPU is looked at afterwards."""
    if s.count[READY] == 1:
        s.clock[LAUNCHED] = s.clock[NOW] + _launch_s(s, m)
        s.clock[STEP_END] = max(s.clock[STEP_END], s.clock[LAUNCHED])
    s.clock[STEP_POWER] = stall_w + s.clock[STEP_POWER] / (s.clock[STEP_END] - s.clock[NOW])


@_inlined
def _launch_s(s: State, m: Constants) -> float:
    buffer = s.count[BUFFER]
    return launch_cost(m, s.step[buffer, SEQS], s.step[buffer, PREFILL], s.count[STEP])


@_inlined
def _see_arrivals(s: State, m: Constants) -> None:
    arrived = s.count[ARRIVED]
    while arrived < len(s.request) and s.time_s[arrived, ARRIVAL] + m.frontend_in_s <= s.clock[NOW]:
        arrived += 1
    s.count[ARRIVALS] += arrived - s.count[ARRIVED]
    s.count[ARRIVED] = arrived


@_compiled
def _note_waits(s: State) -> None:
    """Write down the ages of the requests that arrived and have no first token, oldest first.

    Requests are admitted in order of arrival, and the newest is preempted first.
    """
    now, waits, preempted = s.clock[NOW], 0, s.count[PREEMPTED]
    for k in range(s.count[RUNNING] + preempted):
        past = k - s.count[RUNNING]
        r = s.run[REQUEST, k] if past < 0 else s.slot[preempted - 1 - past, PREEMPTED_REQUEST]
        if s.time_s[r, FIRST_TOKEN] < 0:
            s.wait[waits] = now - s.time_s[r, ARRIVAL]
            waits += 1
    for r in range(s.count[ADMITTED], s.count[ARRIVED]):
        s.wait[waits] = now - s.time_s[r, ARRIVAL]
        waits += 1
    s.count[WAITS] = waits
    s.clock[OLDEST_WAIT] = s.wait[0] if waits > 0 else 0.0


@_compiled
def _complete_step(s: State, m: Constants) -> None:
    """Deliver the tokens of the step that was on the GPU and free what finished."""
    buffer = 1 - s.count[BUFFER]
    s.count[ON_GPU] = 0
    s.count[OUTPUT_TOKENS] += s.step[buffer, TOKENS_OUT]
    delivered_s = s.clock[NOW] + m.frontend_out_s + m.frontend_seq_s * s.step[buffer, TOKENS_OUT]
    for k in range(s.step[buffer, EVENTS]):
        r = s.event[buffer, k] >> 2
        if s.event[buffer, k] & FIRST_EVENT:
            s.time_s[r, FIRST_TOKEN] = delivered_s
            s.sample[TTFT, s.count[TTFTS]] = delivered_s - s.time_s[r, ARRIVAL]
            s.count[TTFTS] += 1
        if s.event[buffer, k] & LAST_EVENT:
            _finish(s, r, delivered_s)


@_compiled
def _finish(s: State, r: int, delivered_s: float) -> None:
    s.time_s[r, FINISH] = delivered_s
    if s.request[r, OUTPUT] > 1:
        tpot_s = (delivered_s - s.time_s[r, FIRST_TOKEN]) / (s.request[r, OUTPUT] - 1)
        s.sample[TPOT, s.count[TPOTS]] = tpot_s
        s.count[TPOTS] += 1
    s.sample[E2E, s.count[FINISHED]] = delivered_s - s.time_s[r, ARRIVAL]
    s.finished[s.count[FINISHED]] = r
    s.count[FINISHED] += 1
    slot = s.request[r, SLOT]
    _free_blocks(s, slot)
    s.slot[s.count[FREE_SLOTS], FREE_SLOT] = slot
    s.count[FREE_SLOTS] += 1
    at = 0
    while s.run[REQUEST, at] != r:
        at += 1
    _leave_running(s, at)


@_inlined
def _compose_step(s: State, e: Engine, m: Constants, batch_limit: int) -> None:
    """Choose what the next step computes, into the buffer that is not on the GPU."""
    _see_arrivals(s, m)
    buffer = s.count[BUFFER]
    for column in range(EVENTS + 1):
        s.step[buffer, column] = 0
    budget = e.max_num_batched_tokens
    preemptions_before = s.count[PREEMPTIONS]
    s.count[STEP] += 1
    step, running = s.count[STEP], s.count[RUNNING]
    decodes = origins = 0
    k = 0
    while k < running and budget > 0:
        if s.run[DUE, k] > step or _takes_next_block(s, e, k):  # one more token: the hot path
            decodes += 1
            origins += s.run[ORIGIN, k]
            budget -= 1
        else:
            budget = _continue_request(s, e, buffer, k, budget)
            running = s.count[RUNNING]
        k += 1
    for skipped in range(k, running):
        s.run[DUE, skipped] += 1
        s.run[ORIGIN, skipped] += 1
    s.step[buffer, SEQS] += decodes
    s.step[buffer, TOKENS_OUT] += decodes
    s.step[buffer, CONTEXT] += decodes * step - origins
    if s.count[PREEMPTIONS] == preemptions_before:
        while budget > 0 and s.count[RUNNING] < min(batch_limit, e.max_num_seqs):
            budget = _admit(s, e, buffer, budget)
    s.count[READY] = 1 if s.step[buffer, SEQS] > 0 else 0


@_inlined
def _takes_next_block(s: State, e: Engine, k: int) -> bool:
    """Give the k-th running request its next block, if it decodes, needs no more and a block is free."""
    r = s.run[REQUEST, k]
    slot = s.request[r, SLOT]
    held, computed = s.slot[slot, HELD], s.count[STEP] - 1 - s.run[ORIGIN, k]
    left = s.request[r, PROMPT] + s.request[r, OUTPUT] - 2 - computed  # tokens to give after this step's
    if s.run[DUE, k] == 0 or computed < held * e.block_size or left == 0 or s.count[FREE_BLOCKS] == 0:
        return False
    _publish_block(s, e, r, held - 1)
    _take_blocks(s, slot, 1)
    s.run[DUE, k] = s.count[STEP] + min(e.block_size, left)
    return True


@_inlined
def _continue_request(s: State, e: Engine, buffer: int, k: int, budget: int) -> int:
    """Schedule the k-th running request individually; returns the token budget left."""
    r = s.run[REQUEST, k]
    if s.run[DUE, k] > 0:
        _settle(s, e, k)
        full = s.request[r, COMPUTED] == s.slot[s.request[r, SLOT], HELD] * e.block_size
        if full and not _make_room(s, e, k, 1):
            return 0
        _decode(s, e, buffer, k)
        return budget - 1
    if s.request[r, EMITTED] == s.request[r, OUTPUT]:
        return budget  # its last token is on the way
    tokens = min(s.request[r, PROMPT] + s.request[r, EMITTED] - s.request[r, COMPUTED], budget)
    total = s.request[r, COMPUTED] + tokens
    needed = -(-total // e.block_size) - s.slot[s.request[r, SLOT], HELD]
    if not _make_room(s, e, k, needed):
        return 0
    _add_to_step(s, e, buffer, k, tokens)
    return budget - tokens


@_inlined
def _settle(s: State, e: Engine, k: int) -> None:
    """Write down how far the k-th running request came while it decoded without a closer look."""
    if s.run[DUE, k] > 0:
        r = s.run[REQUEST, k]
        s.request[r, COMPUTED] = s.count[STEP] - 1 - s.run[ORIGIN, k]
        s.request[r, EMITTED] = s.request[r, COMPUTED] - s.request[r, PROMPT] + 1
        s.run[DUE, k] = 0
        _publish_last(s, e, r)


@_inlined
def _decode(s: State, e: Engine, buffer: int, k: int) -> None:
    """Account for one token of the k-th running request, which decodes into a block that it holds."""
    r = s.run[REQUEST, k]
    s.request[r, COMPUTED] += 1
    s.step[buffer, SEQS] += 1
    s.step[buffer, CONTEXT] += s.request[r, COMPUTED]
    s.step[buffer, TOKENS_OUT] += 1
    _publish_last(s, e, r)
    _emit(s, e, buffer, k)


@_inlined
def _add_to_step(s: State, e: Engine, buffer: int, k: int, tokens: int) -> None:
    """Account for ``tokens`` of the k-th running request, whose blocks are allocated, in the next step."""
    r = s.run[REQUEST, k]
    before = s.request[r, COMPUTED]
    computed = before + tokens
    s.request[r, COMPUTED] = computed
    s.step[buffer, SEQS] += 1
    s.step[buffer, CONTEXT] += computed
    if tokens > 1 or before < s.request[r, PROMPT]:
        s.step[buffer, PREFILL] += tokens
        s.step[buffer, ATTENTION] += tokens * (computed - tokens // 2)
        s.count[PROMPT_TOKENS] += tokens
    for j in range(before // e.block_size, computed // e.block_size):
        _publish_block(s, e, r, j)
    if computed == s.request[r, PROMPT] + s.request[r, EMITTED]:
        s.step[buffer, TOKENS_OUT] += 1
        _emit(s, e, buffer, k)


@_inlined
def _emit(s: State, e: Engine, buffer: int, k: int) -> None:
    """The k-th running request gives a token at the end of the step; from now on it decodes."""
    r = s.run[REQUEST, k]
    s.request[r, EMITTED] += 1
    emitted, output = s.request[r, EMITTED], s.request[r, OUTPUT]
    bits = (FIRST_EVENT if emitted == 1 else 0) + (LAST_EVENT if emitted == output else 0)
    if bits > 0:
        s.event[buffer, s.step[buffer, EVENTS]] = r * 4 + bits
        s.step[buffer, EVENTS] += 1
    if emitted < output:
        computed = s.request[r, COMPUTED]
        room = s.slot[s.request[r, SLOT], HELD] * e.block_size - computed
        s.run[DUE, k] = s.count[STEP] + min(room + 1, output - emitted)
        s.run[ORIGIN, k] = s.count[STEP] - computed


@_inlined
def _make_room(s: State, e: Engine, k: int, needed: int) -> bool:
    """Allocate blocks for the k-th running request, preempting the newest if need be."""
    slot = s.request[s.run[REQUEST, k], SLOT]
    while needed > s.count[FREE_BLOCKS]:
        victim = s.count[RUNNING] - 1
        while victim > k and _is_ending(s, victim):
            victim -= 1
        _preempt(s, e, victim)
        if victim == k:
            return False
    _take_blocks(s, slot, needed)
    return True


@_compiled
def _is_ending(s: State, k: int) -> bool:
    """Whether the last token of the k-th running request is on the way."""
    r = s.run[REQUEST, k]
    return s.run[DUE, k] == 0 and s.request[r, EMITTED] == s.request[r, OUTPUT]


@_compiled
def _preempt(s: State, e: Engine, k: int) -> None:
    r = s.run[REQUEST, k]
    _settle(s, e, k)
    slot = s.request[r, SLOT]
    s.slot[slot, KEPT] = s.slot[slot, HELD]
    _free_blocks(s, slot)
    _leave_running(s, k)
    s.request[r, COMPUTED] = 0
    s.request[r, PREEMPTED_TIMES] += 1
    s.slot[s.count[PREEMPTED], PREEMPTED_REQUEST] = r
    s.count[PREEMPTED] += 1
    s.count[PREEMPTIONS] += 1


@_compiled
def _admit(s: State, e: Engine, buffer: int, budget: int) -> int:
    """Admit the first waiting request; returns the token budget left, 0 if nothing can be admitted."""
    resumed = s.count[PREEMPTED] > 0
    if resumed:
        r = s.slot[s.count[PREEMPTED] - 1, PREEMPTED_REQUEST]
    elif s.count[ADMITTED] < s.count[ARRIVED]:
        r = s.count[ADMITTED]
        s.request[r, SLOT] = s.slot[s.count[FREE_SLOTS] - 1, FREE_SLOT]
        s.slot[s.request[r, SLOT], KEPT] = 0
    else:
        return 0
    slot = s.request[r, SLOT]
    total = s.request[r, PROMPT] + s.request[r, EMITTED]
    hits, evictable = _cached_blocks(s, e, r, (total - 1) // e.block_size)
    tokens = min(total - hits * e.block_size, budget)
    needed = -(-(hits * e.block_size + tokens) // e.block_size) - hits
    if needed + evictable > s.count[FREE_BLOCKS]:
        return 0
    if resumed:
        s.count[PREEMPTED] -= 1
    else:
        s.count[ADMITTED] += 1
        s.count[FREE_SLOTS] -= 1
        s.time_s[r, ADMISSION] = s.clock[NOW]
        s.count[PREFIX_QUERIES] += total
        s.count[PREFIX_HITS] += hits * e.block_size
    for j in range(hits):
        _hold_block(s, s.table[slot, j])
    s.slot[slot, HELD] = hits
    _take_blocks(s, slot, needed)
    s.request[r, COMPUTED] = hits * e.block_size
    k = s.count[RUNNING]
    s.count[RUNNING] += 1
    s.count[MOST_RUNNING] = max(s.count[MOST_RUNNING], s.count[RUNNING])
    s.run[REQUEST, k] = r
    s.run[DUE, k] = 0
    _add_to_step(s, e, buffer, k, tokens)
    return budget - tokens


@_compiled
def _leave_running(s: State, k: int) -> None:
    s.count[RUNNING] -= 1
    for i in range(k, s.count[RUNNING]):
        for row in range(3):
            s.run[row, i] = s.run[row, i + 1]


# The block pool


@_inlined
def _content_key(s: State, e: Engine, r: int, j: int) -> int:
    """Names the tokens in block j of request r; equal for requests that share them as a prefix."""
    if s.request[r, PREFIX_ID] >= 0 and (j + 1) * e.block_size <= s.request[r, PREFIX]:
        return -1 - (s.request[r, PREFIX_ID] * _CONTENT_BLOCKS + j)
    return r * _CONTENT_BLOCKS + j


@_inlined
def _publish_block(s: State, e: Engine, r: int, j: int) -> None:
    """Block j of request r is full: later requests may find it."""
    if not e.prefix_caching:
        return
    block = s.table[s.request[r, SLOT], j]
    key = _content_key(s, e, r, j)
    s.block[block, CONTENT] = key
    if key < 0:
        known = s.prefix_block[s.request[r, PREFIX_ID], j]
        if known < 0 or s.block[known, CONTENT] != key:
            s.prefix_block[s.request[r, PREFIX_ID], j] = block


@_inlined
def _publish_last(s: State, e: Engine, r: int) -> None:
    """The same for the last block that a decoding request holds, once it is full."""
    last = s.slot[s.request[r, SLOT], HELD] - 1
    if s.request[r, COMPUTED] == (last + 1) * e.block_size:
        _publish_block(s, e, r, last)


@_compiled
def _cached_blocks(s: State, e: Engine, r: int, most: int) -> tuple[int, int]:
    """Write the blocks of r that are still cached into its table; their number, and how many are free."""
    evictable = 0
    if not e.prefix_caching:
        return 0, 0
    slot = s.request[r, SLOT]
    for j in range(most):
        key = _content_key(s, e, r, j)
        block = -1
        if key < 0:
            block = s.prefix_block[s.request[r, PREFIX_ID], j]
        elif j < s.slot[slot, KEPT]:
            block = s.table[slot, j]
        if block < 0 or s.block[block, CONTENT] != key:
            return j, evictable
        s.table[slot, j] = block
        evictable += 1 if s.block[block, REFERENCES] == 0 else 0
    return most, evictable


@_inlined
def _hold_block(s: State, block: int) -> None:
    if s.block[block, REFERENCES] == 0:
        before, after = s.block[block, PREVIOUS], s.block[block, FOLLOWING]
        s.block[before, FOLLOWING] = after
        s.block[after, PREVIOUS] = before
        s.count[FREE_BLOCKS] -= 1
    s.block[block, REFERENCES] += 1


@_inlined
def _take_blocks(s: State, slot: int, needed: int) -> None:
    """Give the slot ``needed`` more blocks, the least recently freed ones, whose content is lost."""
    head = len(s.block) - 1
    block, held = s.block[head, FOLLOWING], s.slot[slot, HELD]
    for j in range(held, held + needed):
        s.block[block, REFERENCES] = 1
        s.block[block, CONTENT] = NO_CONTENT
        s.table[slot, j] = block
        block = s.block[block, FOLLOWING]
    s.block[head, FOLLOWING] = block
    s.block[block, PREVIOUS] = head
    s.slot[slot, HELD] = held + needed
    s.count[FREE_BLOCKS] -= needed


@_compiled
def _free_blocks(s: State, slot: int) -> None:
    """Give the slot's blocks back, the last one first, so that it is also reused first."""
    head = len(s.block) - 1
    last = s.block[head, PREVIOUS]
    for j in range(s.slot[slot, HELD] - 1, -1, -1):
        block = s.table[slot, j]
        s.block[block, REFERENCES] -= 1
        if s.block[block, REFERENCES] == 0:
            s.block[last, FOLLOWING] = block
            s.block[block, PREVIOUS] = last
            last = block
            s.count[FREE_BLOCKS] += 1
    s.block[last, FOLLOWING] = head
    s.block[head, PREVIOUS] = last
    s.slot[slot, HELD] = 0
