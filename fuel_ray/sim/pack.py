"""Calibration packs: how long an engine step takes and what power it draws, in plain Python."""

import json
from dataclasses import dataclass, fields
from hashlib import sha256
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

from fuel_ray.errors import ConfigError


class PerfModel(NamedTuple):
    """Constants of one (GPU, model) pair; times in s, energies in J, powers in W, clocks in MHz.

    A step has n sequences with ctx tokens in their KV caches and p prompt tokens to compute. Two resources
    share the work. At the highest clock the GPU takes D = ``decode_s + decode_seq_s n + decode_ctx_s ctx``
    for a decode step. With prefill it takes the larger of ``D + mixed_token_s p``, bound by reading the
    weights, and ``prefill_token_s p + decode_seq_s n + decode_ctx_s ctx``, bound by arithmetic; each pair
    of a prompt token and one before it adds ``prefill_attention_s``. The host composes and launches the
    step in a time of its own that does not depend on the GPU's clock; the scheduler overlaps the two.

    The energy is ``graph_w D + graph_j + graph_seq_j n + prefill_token_j p``, plus ``graph_w`` times the
    time of prefill attention.
    """

    max_clock_mhz: float
    idle_w: float
    power_cap_w: float
    frontend_in_s: float  # from the client to the engine
    frontend_out_s: float  # from the engine to the client
    graph_max_tokens: float  # largest step that replays CUDA graphs
    launch_graph_s: float  # a decode step: one CUDA graph
    launch_pieces_s: float  # a step with prefill: a graph per piece between attention layers
    launch_eager_s: float  # a larger step: kernel by kernel
    launch_spread: float  # share of the latter two that is exponentially distributed: the host's other work
    stall_w: float  # power while the GPU waits for the host's launches
    decode_s: float
    decode_seq_s: float
    decode_ctx_s: float
    mixed_token_s: float
    prefill_token_s: float
    prefill_attention_s: float
    graph_w: float
    graph_j: float
    graph_seq_j: float
    prefill_token_j: float
    # Clock axis, with x = clock / max_clock_mhz and n at most shape_max_seqs.
    # Share of a decode step's time that scales with 1 / x: c / (c + f) with c = clock_s + clock_seq_s n.
    clock_s: float
    clock_seq_s: float
    fixed_s: float
    fixed_seq_s: float
    prefill_clock_share: float  # the same of a step bound by arithmetic
    prefill_clock: float  # x at which such steps were measured: the power cap lets them run no faster
    # Power above idle relates to its value at x = 1 (prefill_clock) as
    # (slope_w + slope_seq_w n) x + max(0, x - knee) (knee_w + knee_seq_w n) does.
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


def step_cost(
    m: PerfModel, seqs: float, context: float, prefill: float, clock_mhz: float, attention: float = 0.0
) -> tuple[float, float, float]:
    """GPU time (s), power (W) and effective clock (MHz) of a step.

    Args:
        m: the constants.
        seqs: requests in the step.
        context: tokens in the KV cache of these requests after the step.
        prefill: prompt tokens computed in the step.
        clock_mhz: the pinned SM clock. The power cap stretches a step whose power would pass it at constant
            energy, which is what the H100 of ``h100-qwen3-8b`` was seen to do.
        attention: sum over these prompt tokens of the tokens before them.
    """
    x, measured_x = clock_mhz / m.max_clock_mhz, 1.0
    decode = m.decode_seq_s * seqs + m.decode_ctx_s * context
    shape_seqs = min(seqs, m.shape_max_seqs)
    duration = m.decode_s + decode
    energy = m.graph_w * duration + m.graph_j + m.graph_seq_j * seqs
    scaled = m.clock_s + m.clock_seq_s * shape_seqs
    share = scaled / (scaled + m.fixed_s + m.fixed_seq_s * shape_seqs)
    if prefill > 0:
        arithmetic = m.prefill_token_s * prefill + decode
        duration += m.mixed_token_s * prefill
        if arithmetic > duration:
            duration = arithmetic
            share = m.prefill_clock_share
            shape_seqs = m.shape_max_seqs
            measured_x = m.prefill_clock
            x = min(x, measured_x)
        duration += m.prefill_attention_s * attention
        energy += m.prefill_token_j * prefill + m.graph_w * m.prefill_attention_s * attention
    slope = m.slope_w + m.slope_seq_w * shape_seqs
    knee = m.knee_w + m.knee_seq_w * shape_seqs
    shape = slope * x + max(0.0, x - m.knee) * knee
    measured_shape = slope * measured_x + max(0.0, measured_x - m.knee) * knee
    power = m.idle_w + (energy / duration - m.idle_w) * shape / measured_shape
    duration *= 1.0 - share + share * measured_x / x
    clock_mhz = x * m.max_clock_mhz
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
        path: Traversable = Path(name_or_path)
    elif name_or_path in pack_names():
        path = resources.files("fuel_ray.sim") / "packs" / f"{name_or_path}.json"
    else:
        raise ConfigError(
            f"pack {name_or_path!r} is unknown; shipped are {', '.join(pack_names())}, or give a .json file"
        )
    if not path.is_file():
        raise ConfigError(f"pack {name_or_path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
        return _parse_pack(json.loads(text), digest=sha256(text.encode()).hexdigest())
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ConfigError(f"pack {name_or_path}: malformed: {error}") from error


def _parse_pack(raw: dict[str, Any], *, digest: str) -> Pack:
    clocks = raw["gpu_clocks_mhz"]
    supported = tuple(range(clocks["min"], clocks["max"] + 1, clocks["step"]))
    if not supported or supported[-1] != clocks["max"]:
        raise ValueError(
            f"gpu_clocks_mhz: {clocks['max']} is not a whole number of steps above {clocks['min']}"
        )
    typed: dict[str, Any]
    typed = {f.name: f.type(raw[f.name]) for f in fields(Pack) if f.type in (int, str) and f.name in raw}
    perf = PerfModel(**{name: float(value) for name, value in raw["perf"].items()})
    return Pack(**typed, gpu_clocks_mhz=supported, perf=perf, sha256=digest)
