"""The loads of a profile: what each is made of, given what was measured before it at the same clock."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fuel_ray.sim.windows import REPEATS, Measured, Windows, prefill

Rows = Sequence[Mapping[str, Any]]

# with which a client's thread is half busy, where no row tells: benchmarks/client_load.py
CLIENT_CHUNKS_PER_S = 12_000.0
LOAD_S = 30.0  # of arrivals of the open-loop loads
_BEHIND_S = 1.5  # from the start of the decoding requests to the first that comes to them
_SUSTAINED_S = 5.0  # how long many prompts wait for each other
_SHORT = (16, 32, 64, 100, 150, 200)  # tokens, whose prefill is bound by its launch
_MIXED = (256, 512, 1024, 2048, 4096)
_PROMPT, _OUTPUT = (512, 4096), (220, 1024)  # mean and most of a chat workload, as steady's default
_LOW, _HIGH = 0.15, 0.65  # of what the server can do


@dataclass(frozen=True, slots=True)
class Server:
    """What bounds a load."""

    clocks_mhz: tuple[int, ...]  # that can be set, ascending
    max_num_seqs: int
    max_model_len: int  # tokens
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent. Without ``measure``, which makes a row of windows, it is recorded as a trace."""

    workload: str
    horizon_s: float  # in which requests arrive
    measure: Callable[[Windows], Measured] | None = None
    note: str = ""  # what there is to say of it
    window_s: float = 1.0
    again: "Load | None" = None  # what is sent next where this one had no window to measure


def prefills(rows: Rows, *, begin_s: float, tokens: int) -> Load:
    """Prompts one by one, so far apart that none waits for another."""
    apart_s = max(0.4, 3 * tokens * (_token_s(rows) or 0.0))
    load = f"{_burst(REPEATS, begin_s)},every_s={apart_s:.3g},prompt_mean={tokens},output_mean=2"
    return Load(load, 120.0, partial(prefill, tokens=tokens, clients=1))


def sustained(rows: Rows, *, begin_s: float, tokens: int) -> Load:
    """As many prompts at once as the server has to do for some seconds."""
    token_s = _token_s(rows)
    n = 64 if token_s is None else min(max(round(_SUSTAINED_S / (tokens * token_s)), 16), 256)
    load = f"{_burst(n, begin_s)},prompt_mean={tokens},output_mean=1"
    return Load(load, 120.0, partial(prefill, tokens=tokens, clients=n))


def mixed(rows: Rows, *, begin_s: float, server: Server, most: int) -> Load | None:
    """Prompts of several lengths that come to requests that decode."""
    token_s, n = _token_s(rows), _decoding(rows, server, most=most)
    if token_s is None or n is None:
        return None
    prompts = [tokens for tokens in _MIXED if tokens + 8 <= _longest(server)] * 3
    return _coming(
        rows, prompts, n, begin_s=begin_s, server=server, apart_s=lambda t: max(0.35, 3 * t * token_s)
    )


def launches(rows: Rows, *, begin_s: float, server: Server, most: int) -> Load | None:
    """Short prompts with few output tokens, on an idle server or, with ``most``, on one that decodes."""
    n = _decoding(rows, server, most=most) if most else 0
    prompts = [tokens for tokens in _SHORT if tokens + 8 <= _longest(server)] * 5
    if n is None:
        return None
    return _coming(rows, prompts, n, begin_s=begin_s, server=server, apart_s=lambda t: 0.22)


def streams(rows: Rows, *, begin_s: float, server: Server) -> Load:
    """Many short answers to the shortest prompts: what the front end costs."""
    outputs = 16
    rate_rps = min(
        50.0, 0.5 * client_chunks_per_s(rows) / outputs, 0.1 * _capacity_rps(rows, server, 16, outputs)
    )
    n = max(8, round(3.5 * rate_rps))
    load = f"{_burst(n, begin_s)},every_s={1 / rate_rps:.4g},prompt_mean=16,output_mean={outputs}"
    return Load(load, begin_s + 4.0)


def chat(rows: Rows, *, begin_s: float, server: Server, share: float) -> Load | None:
    """Open-loop arrivals of a chat workload, at a share of what the server can do."""
    longest = _longest(server)
    (prompt, most_prompt), (output, most_output) = _PROMPT, _OUTPUT
    most_output = min(most_output, longest // 4)
    most_prompt = min(most_prompt, longest - most_output)
    prompt, output = min(prompt, most_prompt // 2), min(output, most_output // 2)
    rate_rps, note = share * _capacity_rps(rows, server, prompt, output), ""
    if rate_rps <= 0:
        return None
    bearable_rps = client_chunks_per_s(rows) / output
    if rate_rps > bearable_rps:
        note = f"the rate is {bearable_rps:.3g} req/s; at {rate_rps:.3g} the client would be the bottleneck"
        rate_rps = bearable_rps
    lengths = (
        f"prompt_mean={prompt},max_prompt_tokens={most_prompt},"
        f"output_mean={output},max_output_tokens={most_output}"
    )
    rates = f"0@{begin_s}+{rate_rps:.4g}@{LOAD_S}"
    return Load(f"piecewise:rates={rates},{lengths}", begin_s + LOAD_S, note=note)


def client_chunks_per_s(rows: Rows) -> float:
    """Tokens per second with which the thread of the client is half busy."""
    costs_s = [row["client_s"] for row in rows if row.get("client_s") and row.get("b", 0) >= 8]
    return 0.5 / max(costs_s) if costs_s else CLIENT_CHUNKS_PER_S


TRACES: Mapping[str, tuple[Callable[..., Load | None], float, str]] = {  # load, about how many s, in words
    "mixed-few": (partial(mixed, most=4), 9.0, "prompts that arrive while 4 requests decode"),
    "mixed-many": (partial(mixed, most=48), 9.0, "prompts that arrive while many requests decode"),
    "launch-idle": (partial(launches, most=0), 8.0, "short prompts on an idle server"),
    "launch-busy": (partial(launches, most=8), 10.0, "short prompts that arrive while 8 requests decode"),
    "streams": (streams, 6.0, "many short streams"),
    "load-low": (partial(chat, share=_LOW), LOAD_S + 5.0, "chat at a low rate"),
    "load-high": (partial(chat, share=_HIGH), LOAD_S + 10.0, "chat at two thirds of the capacity"),
}


def _burst(n: int, begin_s: float) -> str:
    return f"burst:count={n},after_s={begin_s},lengths=fixed"


def _coming(
    rows: Rows,
    prompts: Sequence[int],
    n: int,
    *,
    begin_s: float,
    server: Server,
    apart_s: Callable[[int], float],
) -> Load:
    """Prompts one after the other to ``n`` requests that decode for about as long."""
    entries, at_s = [], begin_s + (_BEHIND_S if n else 0.0)
    for tokens in prompts:
        entries.append(f"{at_s:.3f}@{tokens}/{4 if tokens in _SHORT else 8}")
        at_s += apart_s(tokens)
    if n:
        steps = (at_s - begin_s) / _step_s(rows, n)
        outputs = min(round(steps), server.max_model_len - 128, _room(server) // n - 128)
        entries.insert(0, f"{begin_s:.3f}@128/{max(outputs, 8)}*{n}")
    return Load(f"listed:requests={'+'.join(entries)}", round(at_s + 0.5, 3))


def _decoding(rows: Rows, server: Server, *, most: int) -> int | None:
    """How many may decode together: so many that the client bears it and the pool has room."""
    for n in sorted({4, 8, 16, 32, most}, reverse=True):
        step_s = _step_s(rows, n)
        fits = n <= most and n + 4 <= server.max_num_seqs and n * 512 <= _room(server)
        if fits and step_s and n / step_s <= client_chunks_per_s(rows):
            return n
    return None


def _room(server: Server) -> int:
    """Tokens of the pool, beside the longest prompt that comes."""
    return server.kv_tokens - min(_MIXED[-1] + 8, _longest(server))


def _longest(server: Server) -> int:
    """Tokens of a request that leaves some of the pool to others."""
    return min(server.max_model_len, server.kv_tokens // 2)


def _capacity_rps(rows: Rows, server: Server, prompt: int, output: int) -> float:
    """Requests per second that decode at the best of the measured batches and are prefilled in between."""
    token_s = _token_s(rows) or 0.0
    seqs = [
        row for row in rows if row["phase"] == "decode" and row["b"] * (prompt + output) <= server.kv_tokens
    ]
    return max((1 / (output * row["itl"] / row["b"] + prompt * token_s) for row in seqs), default=0.0)


def _step_s(rows: Rows, n: int) -> float:
    """Of the measured batch that is nearest; 0.0 without any."""
    found = [row for row in rows if row["phase"] == "decode"]
    return float(min(found, key=lambda row: abs(row["b"] - n))["itl"]) if found else 0.0


def _token_s(rows: Rows) -> float | None:
    """About how long a prompt token takes, of the longest prompt so far."""
    found = [row for row in rows if row["phase"] == "prefill"]
    return found[-1]["ttft_p50"] / found[-1]["n_in"] if found else None
