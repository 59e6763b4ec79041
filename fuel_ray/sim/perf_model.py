"""How long one engine step takes and what power it draws, from a calibration pack."""

import json
from dataclasses import dataclass
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from numba import njit

from fuel_ray.errors import ConfigError


class PerfModel(NamedTuple):
    """Constants of one (GPU, model) pair; times in s, energies in J, powers in W, clocks in MHz.

    With n scheduled requests, ctx their context tokens and p prefill tokens, at the highest clock:
    a decode step takes ``decode_s + decode_seq_s n + decode_ctx_s ctx``; a step that also prefills and still
    fits a
    CUDA graph adds ``mixed_s + mixed_token_s p``; a larger one takes the larger of ``eager_floor_s`` and
    ``eager_token_s p + decode_seq_s n + decode_ctx_s ctx``.
    """

    max_clock_mhz: float
    idle_w: float
    power_cap_w: float
    frontend_in_s: float  # from the client to the engine
    frontend_out_s: float  # from the engine to the client
    graph_max_tokens: float  # largest step that replays a CUDA graph
    decode_s: float
    decode_seq_s: float
    decode_ctx_s: float
    mixed_s: float
    mixed_token_s: float
    eager_floor_s: float
    eager_token_s: float
    graph_w: float  # energy of a graph step: (graph_w + graph_seq_w n) T + graph_j + graph_seq_j n
    graph_seq_w: float
    graph_j: float
    graph_seq_j: float
    eager_w: float  # energy of a larger step: eager_w T + eager_token_j p
    eager_token_j: float
    # Clock axis, with x = clock / max_clock_mhz and n at most shape_max_seqs.
    # Share of a decode step's time that scales with 1 / x: c / (c + f), c = clock_s + clock_seq_s n, f
    # likewise.
    clock_s: float
    clock_seq_s: float
    fixed_s: float
    fixed_seq_s: float
    eager_clock_share: float
    # Power relates to its value at x = 1 as
    # static_w + (slope_w + slope_seq_w n) x + max(0, x - knee) (knee_w + knee_seq_w n) does.
    static_w: float
    slope_w: float
    slope_seq_w: float
    knee: float
    knee_w: float
    knee_seq_w: float
    shape_max_seqs: float
    # Utilisation while a step runs, 0..1
    busy_mem_util: float
    idle_cpu_util: float
    busy_cpu_util: float
    idle_cpu_w: float
    busy_cpu_w: float


@njit(cache=True, _nrt=False)
def step_cost(
    m: PerfModel, seqs: float, context: float, prefill: float, clock_mhz: float
) -> tuple[float, float, float]:
    """Duration (s), power (W) and effective clock (MHz) of a step.

    Args:
        m: the constants.
        seqs: requests in the step.
        context: tokens in the KV cache of these requests after the step.
        prefill: prompt tokens computed in the step.
        clock_mhz: the pinned SM clock. The power cap stretches a step whose power would pass it at constant
        energy,     which is what the H100 of ``h100-qwen3-8b`` was seen to do.
    """
    x = clock_mhz / m.max_clock_mhz
    decode = m.decode_seq_s * seqs + m.decode_ctx_s * context
    shape_seqs = min(seqs, m.shape_max_seqs)
    if seqs + prefill > m.graph_max_tokens and prefill > 0:
        duration = max(m.eager_floor_s, m.eager_token_s * prefill + decode)
        energy = m.eager_w * duration + m.eager_token_j * prefill
        share = m.eager_clock_share
        shape_seqs = m.shape_max_seqs
    else:
        duration = m.decode_s + decode
        if prefill > 0:
            duration += m.mixed_s + m.mixed_token_s * prefill
        energy = (m.graph_w + m.graph_seq_w * seqs) * duration + m.graph_j + m.graph_seq_j * seqs
        scaled = m.clock_s + m.clock_seq_s * shape_seqs
        share = scaled / (scaled + m.fixed_s + m.fixed_seq_s * shape_seqs)
    slope = m.slope_w + m.slope_seq_w * shape_seqs
    knee = m.knee_w + m.knee_seq_w * shape_seqs
    highest = m.static_w + slope + (1.0 - m.knee) * knee
    shape = (m.static_w + slope * x + max(0.0, x - m.knee) * knee) / highest
    power = max(m.idle_w, energy / duration * shape)
    duration *= 1.0 - share + share / x
    if power > m.power_cap_w:
        stretch = power / m.power_cap_w
        return duration * stretch, m.power_cap_w, clock_mhz / stretch
    return duration, power, clock_mhz


@dataclass(frozen=True, slots=True)
class Pack:
    """A calibration pack: a performance model, the server it was fitted on, and where it comes from."""

    name: str
    gpu_name: str
    model: str
    engine: str
    gpu_clocks_mhz: tuple[int, ...]  # supported SM clocks, ascending
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int  # tokens
    kv_tokens: int  # size of the KV pool of the server that was measured
    perf: PerfModel
    measured: str  # which axes were measured on this very server
    transferred: str  # which were taken from elsewhere or assumed, and from where
    sources: tuple[str, ...]
    sha256: str  # of the pack file


def pack_names() -> tuple[str, ...]:
    """Names of the packs that are shipped."""
    folder = resources.files("fuel_ray.sim") / "packs"
    return tuple(sorted(p.name.removesuffix(".json") for p in folder.iterdir() if p.name.endswith(".json")))


def load_pack(name_or_path: str) -> Pack:
    """A shipped pack by name, or a pack file by path (anything that ends in .json).

    Raises:
        ConfigError: there is no such pack, or the file is malformed.
    """
    if name_or_path.endswith(".json"):
        path = Path(name_or_path)
        if not path.is_file():
            raise ConfigError(f"pack {name_or_path}: no such file")
        text = path.read_text()
    elif name_or_path in pack_names():
        text = (resources.files("fuel_ray.sim") / "packs" / f"{name_or_path}.json").read_text()
    else:
        raise ConfigError(
            f"pack {name_or_path!r} is unknown; shipped are {', '.join(pack_names())}, or give a .json file"
        )
    try:
        return _parse_pack(json.loads(text), digest=sha256(text.encode()).hexdigest())
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"pack {name_or_path}: malformed: {error}") from error


def _parse_pack(raw: dict[str, Any], *, digest: str) -> Pack:
    clocks = raw["gpu_clocks_mhz"]
    unknown = set(raw["perf"]) - set(PerfModel._fields)
    missing = set(PerfModel._fields) - set(raw["perf"])
    if unknown or missing:
        raise ValueError(f"perf: unknown {sorted(unknown)}, missing {sorted(missing)}")
    supported = tuple(range(clocks["min"], clocks["max"] + 1, clocks["step"]))
    if not supported or supported[-1] != clocks["max"]:
        raise ValueError(
            f"gpu_clocks_mhz: {clocks['max']} is not a whole number of steps above {clocks['min']}"
        )
    return Pack(
        name=raw["name"],
        gpu_name=raw["gpu_name"],
        model=raw["model"],
        engine=raw["engine"],
        gpu_clocks_mhz=supported,
        max_num_seqs=int(raw["max_num_seqs"]),
        max_num_batched_tokens=int(raw["max_num_batched_tokens"]),
        max_model_len=int(raw["max_model_len"]),
        kv_tokens=int(raw["kv_tokens"]),
        perf=PerfModel(**{name: float(value) for name, value in raw["perf"].items()}),
        measured=raw["measured"],
        transferred=raw["transferred"],
        sources=tuple(raw["sources"]),
        sha256=digest,
    )
