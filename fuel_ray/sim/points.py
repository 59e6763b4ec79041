"""The points of a profile: what is measured on a server, in which order, and how long it takes.

A point is a load at one clock. Most are bursts of equal requests whose windows make a row of the profile, the
others are recorded as traces.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

from fuel_ray.sim.loads import TRACES, Load, Rows, Server, prefills, sustained
from fuel_ray.sim.windows import REPEATS, decode, idle, passed

LONGEST_S = 120.0  # in which a row's windows have to be there
CHANGE_S = 0.6  # between two points: the load is stopped, the node given back and taken again
WARM_UP = "warmup"
LOWER_TRACES = ("mixed-few", "mixed-many", "load-high")  # at two more clocks
CLOCKS = 8  # from half of the highest clock to the highest
_SETTLED_S = 1.4  # the first window is at the highest clock, and a change takes up to 0.2 s
_FEWEST_OUTPUTS = 64  # tokens, of a request that decodes
_HALF_S = 0.5  # windows where requests end before one of 1 s lies between the first token and the last


@dataclass(frozen=True, slots=True)
class Point:
    """One thing to measure; its load follows from the rows of its clock so far, None if they do not tell."""

    clock_mhz: int
    name: str  # at a clock there is one
    what: str
    expected_s: float
    load: Callable[[Rows], Load | None]

    @property
    def phase(self) -> str:
        """Of its row."""
        return self.name.partition("-")[0]

    @property
    def is_trace(self) -> bool:
        """Whether it is recorded as a trace; else it makes a row."""
        return self.name in TRACES


@dataclass(frozen=True, slots=True)
class Lengths:
    """What the rows are of."""

    batches: tuple[int, ...]  # requests that decode together
    contexts: tuple[int, ...]  # their prompt tokens
    prompts: tuple[int, ...]  # tokens of the prefills
    output_tokens: int  # that a decoding request may have
    windows: int  # per decode point


def fitting(lengths: Lengths, server: Server) -> tuple[Lengths, tuple[str, ...]]:
    """The lengths that the server can serve, and what is left out, in words."""
    longest = min(server.max_model_len, server.kv_tokens)
    contexts = tuple(n for n in lengths.contexts if n + _FEWEST_OUTPUTS <= longest)
    prompts = tuple(n for n in lengths.prompts if n + 2 <= longest)
    long = [f"contexts of {n} tokens" for n in lengths.contexts if n not in contexts]
    long += [f"prompts of {n} tokens" for n in lengths.prompts if n not in prompts]
    left_out = [f"{what} (the server accepts {longest} tokens with the output)" for what in long]
    left_out += [
        f"{n} requests at once (the server runs {server.max_num_seqs} at most)"
        for n in lengths.batches
        if n > server.max_num_seqs
    ]
    batches = tuple(n for n in lengths.batches if n <= server.max_num_seqs)
    found = replace(
        lengths,
        batches=batches or (server.max_num_seqs,),
        contexts=contexts or (longest // 4,),
        prompts=prompts or (longest // 2,),
    )
    return found, tuple(left_out)


def all_points(
    clocks_mhz: Sequence[int], lengths: Lengths, *, server: Server, token_s: float, traces: bool = True
) -> tuple[Point, ...]:
    """What to measure, from the highest clock down; ``token_s`` is about how long a prompt token takes."""
    clocks = sorted(set(clocks_mhz), reverse=True)
    lower = {clocks[len(clocks) // 2], clocks[-1]} - {clocks[0]}
    found: list[Point] = []
    for clock_mhz in clocks:
        slower_s = token_s * server.clocks_mhz[-1] / clock_mhz
        found += _points(clock_mhz, lengths, server=server, token_s=slower_s)
        names = tuple(TRACES) if clock_mhz == clocks[0] else LOWER_TRACES if clock_mhz in lower else ()
        found += _traces(clock_mhz, names if traces else (), server=server)
    return tuple(found)


def warm_up(clock_mhz: int, lengths: Lengths, server: Server) -> Point:
    """Before the first: what a server compiles when it is needed takes its time here, in no row."""
    longest = max(lengths.prompts)
    outputs = min(300, server.max_model_len - 128, server.kv_tokens // 16)
    requests = f"0.1@128/{outputs}*{min(8, server.max_num_seqs)}+2@{longest}/2+3@{longest}/2"
    load = Load(f"listed:requests={requests}", LONGEST_S, partial(passed, n=4))
    return Point(clock_mhz, WARM_UP, "warm-up", 5.0, lambda rows: load)


def spread(clocks_mhz: Sequence[int]) -> tuple[int, ...]:
    """Eight of the ascending clocks, from half of the highest to the highest."""
    upper = [clock_mhz for clock_mhz in clocks_mhz if clock_mhz >= clocks_mhz[-1] / 2]
    return tuple(sorted({upper[round(i * (len(upper) - 1) / (CLOCKS - 1))] for i in range(CLOCKS)}))


def _points(clock_mhz: int, lengths: Lengths, *, server: Server, token_s: float) -> Iterator[Point]:
    begin_s, windows = _begin_s(clock_mhz, server), lengths.windows
    idling = Load("burst:count=0", LONGEST_S, partial(idle, n=windows))
    yield Point(clock_mhz, "idle", "idle", 1.0 + windows, lambda rows: idling)
    for context, n in product(lengths.contexts, lengths.batches):
        what = f"{n} requests with {context} prompt tokens that decode together"
        expected_s = math.ceil(begin_s + n * context * token_s) + windows
        load = partial(_decoding, begin_s=begin_s, n=n, context=context, lengths=lengths, server=server)
        yield Point(clock_mhz, f"decode-{n}x{context}", what, expected_s, load)
    for tokens in lengths.prompts:
        expected_s = math.ceil(begin_s + REPEATS * max(0.4, 3 * tokens * token_s))
        of_length = partial(prefills, begin_s=begin_s, tokens=tokens)
        yield Point(clock_mhz, f"prefill-{tokens}", f"{tokens} tokens", expected_s, of_length)
    tokens = max(lengths.prompts)
    what = f"prefills of {tokens} tokens, one after the other"
    at_once = partial(sustained, begin_s=begin_s, tokens=tokens)
    yield Point(clock_mhz, f"prefill_sustained-{tokens}", what, math.ceil(begin_s) + 6.0, at_once)


def _decoding(
    rows: Rows, *, begin_s: float, n: int, context: int, lengths: Lengths, server: Server
) -> Load | None:
    if n * (context + _FEWEST_OUTPUTS) > server.kv_tokens:
        return None
    most = min(server.max_model_len, server.kv_tokens) - context
    tries = dict.fromkeys(((min(lengths.output_tokens, most), 1.0), (most, 1.0), (most, _HALF_S)))
    again: Load | None = None
    for outputs, window_s in reversed(tries):
        load = f"burst:count={n},after_s={begin_s},lengths=fixed,prompt_mean={context},output_mean={outputs}"
        enough = math.ceil(lengths.windows / window_s)
        measure = partial(decode, n=n, context=context, enough=enough)
        again = Load(load, LONGEST_S, measure, window_s=window_s, again=again)
    return again


def _traces(clock_mhz: int, names: Sequence[str], *, server: Server) -> Iterator[Point]:
    begin_s = _begin_s(clock_mhz, server)
    for name in names:
        load, expected_s, what = TRACES[name]
        expected_s += begin_s
        yield Point(clock_mhz, name, what, expected_s, partial(load, begin_s=begin_s, server=server))


def _begin_s(clock_mhz: int, server: Server) -> float:
    return 0.1 if clock_mhz == server.clocks_mhz[-1] else _SETTLED_S
