"""Calibration packs: how long an engine step takes and what power it draws, in plain Python."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

from fuel_ray.errors import ConfigError
from fuel_ray.sim.clock_axis import AtClock, ClockAxis
from fuel_ray.sim.fidelity import ERRORS, Fidelity

FORMAT = 2  # of pack files
_ABOUT = ("measured", "transferred", "clock_axis_notes", "sources", "fidelity")  # entries that no run reads
NOMINAL = "nominal"
AXIS_TABLES = tuple(field.name for field in fields(ClockAxis))


class Constants(NamedTuple):
    """Of one (GPU, model) pair at the highest clock; times in s, energies in J, powers in W.

    A step has n sequences with ctx tokens in their KV caches and p prompt tokens to compute. Two resources
    share the work. The GPU takes D = ``decode_s + decode_seq_s n + decode_ctx_s ctx`` for a decode step. With
    prefill it takes the larger of ``D + mixed_token_s p``, bound by reading the weights, and
    ``prefill_token_s p + decode_seq_s n + decode_ctx_s ctx``, bound by arithmetic; each pair of a prompt
    token and one before it adds ``prefill_attention_s``. The host composes and launches the step in a time
    of its own that does not depend on the GPU's clock; the scheduler overlaps the two.

    The energy is ``graph_w D + graph_j + graph_seq_j n + prefill_token_j p``, plus ``graph_w`` times the
    time of prefill attention. Of what is above idle power, ``hbm_w`` times the time of streaming is that of
    the memory; the rest is switched in the chip and falls with the clock's voltage.
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
    # What the clock acts on. Of decode_s, stream_s reads the weights (bytes / bandwidth), clock_s scales with
    # 1 / x and the rest with nothing; of decode_seq_s, clock_seq_s scales with 1 / x; decode_ctx_s streams.
    stream_s: float
    clock_s: float
    clock_seq_s: float
    hbm_w: float  # J per byte x bandwidth
    prefill_clock_share: float  # of a step bound by arithmetic, and of mixed_token_s: the rest stays
    prefill_clock: float  # x at which such steps were measured: the power cap lets them run no faster
    # Utilisation while a step runs, 0..1
    busy_mem_util: float
    idle_cpu_util: float
    busy_cpu_util: float
    idle_cpu_w: float
    busy_cpu_w: float
    # What older packs do not have: tokens of a step leave one by one, the newest request's last, and a host's
    # speed may change for a thousand steps at a time
    frontend_seq_s: float = 0.0  # by token of the step, beside frontend_out_s
    host_slow: float = 0.0  # by which share launches then take longer
    host_slow_share: float = 0.0  # of the steps


_CONSTANTS = frozenset(Constants._fields)


def step_cost(
    m: Constants, at: AtClock, seqs: float, context: float, prefill: float, attention: float
) -> tuple[float, float, float]:
    """GPU time (s), power (W) and effective clock (MHz) of a step.

    Args:
        m: the constants at the highest clock.
        at: what the pinned clock makes of them. The power cap stretches a step whose power would pass it at
            constant energy, which is what the H100 of ``h100-qwen3-8b`` was seen to do.
        seqs: requests in the step.
        context: tokens in the KV cache of these requests after the step.
        prefill: prompt tokens computed in the step.
        attention: sum over these prompt tokens of the tokens before them.
    """
    clock_mhz, idle_w, switched, measured_idle_w = at.clock_mhz, at.idle_w, at.switched, m.idle_w
    decode = m.decode_seq_s * seqs + m.decode_ctx_s * context
    streaming = m.stream_s + m.decode_ctx_s * context
    measured = m.decode_s + decode
    duration = measured + streaming * (at.streaming - 1.0) + (m.clock_s + m.clock_seq_s * seqs) * at.slower
    energy = m.graph_w * measured + m.graph_j + m.graph_seq_j * seqs
    if prefill > 0:
        attention_s = m.prefill_attention_s * attention
        arithmetic = m.prefill_token_s * prefill + decode
        work = m.mixed_token_s * prefill
        if arithmetic > measured + work:
            measured = arithmetic + attention_s
            duration = measured * (1.0 + m.prefill_clock_share * at.prefill_slower)
            clock_mhz, idle_w = at.prefill_clock_mhz, at.prefill_idle_w
            switched, measured_idle_w = at.prefill_switched, at.measured_idle_w
        else:
            measured += work + attention_s
            duration += (work + attention_s) * (1.0 + m.prefill_clock_share * at.slower)
        energy += m.prefill_token_j * prefill + m.graph_w * attention_s
    above_idle = max(0.0, energy - measured_idle_w * measured)
    hbm = min(above_idle, m.hbm_w * streaming)
    power = idle_w + (hbm + (above_idle - hbm) * switched) / duration
    if power > m.power_cap_w:
        stretch = power / m.power_cap_w
        return duration * stretch, m.power_cap_w, clock_mhz / stretch
    return duration, power, clock_mhz


@dataclass(frozen=True, slots=True)
class PerfModel:
    """How long an engine step takes and what power it draws, at any clock."""

    constants: Constants
    axis: ClockAxis
    rest_w: float | None = None  # with no request in the server, at most; None: idle power

    def at(self, clock_mhz: float) -> AtClock:
        """What this clock makes of the constants, all floats: for other types ``advance`` compiles anew."""
        m, clock_mhz = self.constants, float(clock_mhz)
        streaming, switched, idle = self.axis.read(clock_mhz)
        measured_mhz = m.prefill_clock * m.max_clock_mhz
        bound_mhz = min(clock_mhz, measured_mhz)
        _, measured_switched, measured_idle = self.axis.read(measured_mhz)
        _, bound_switched, bound_idle = self.axis.read(bound_mhz)
        stall = switched * clock_mhz / m.max_clock_mhz  # switching by second, as it is by operation above
        idle_w = m.idle_w * idle
        return AtClock(
            clock_mhz=clock_mhz,
            slower=m.max_clock_mhz / clock_mhz - 1.0,
            streaming=streaming,
            switched=switched,
            idle_w=idle_w,
            stall_w=idle_w + (m.stall_w - m.idle_w) * stall,
            prefill_clock_mhz=bound_mhz,
            prefill_slower=measured_mhz / bound_mhz - 1.0,
            prefill_switched=bound_switched / measured_switched,
            prefill_idle_w=m.idle_w * bound_idle,
            measured_idle_w=m.idle_w * measured_idle,
            rest_w=idle_w if self.rest_w is None else min(idle_w, self.rest_w),
        )

    def step_cost(
        self, seqs: float, context: float, prefill: float, clock_mhz: float, attention: float = 0.0
    ) -> tuple[float, float, float]:
        """GPU time (s), power (W) and effective clock (MHz) of a step at a pinned clock."""
        return step_cost(self.constants, self.at(clock_mhz), seqs, context, prefill, attention)

    def replace(self, **constants: float) -> "PerfModel":
        """The model with other constants."""
        return replace(self, constants=self.constants._replace(**constants))


class Setting(NamedTuple):
    """Something of a server's environment that changes the power of a GPU without work, which has no axis."""

    name: str  # NAME=VALUE, as in the environment
    rest_w: float  # with no request in the server
    source: str  # where it was measured, and under what conditions


@dataclass(frozen=True, slots=True)
class Pack:
    """A calibration pack: a performance model, the server it was fitted on, and where it comes from."""

    name: str
    gpu_name: str
    architecture: str  # NVIDIA's name of it
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
    sha256: str  # of the pack file's figures; what is said about them may be corrected
    clock_axis_notes: str = ""  # which comparison depends on which part of the axis, in a sentence or two
    clock_axis: str = NOMINAL  # which of the clock axes that the data allow
    other_axes: tuple[tuple[str, PerfModel], ...] = ()
    clock_axis_from: str = ""  # the pack whose axis it has; empty: its own
    fidelity: tuple[Fidelity, ...] = ()  # on recorded runs, those that were fitted and those left out
    settings: tuple[Setting, ...] = ()  # those that it may be used under; nominal is none of them

    @property
    def clock_axes(self) -> tuple[str, ...]:
        """Names of the clock axes that the pack has, the nominal one first."""
        names = {self.clock_axis, *dict(self.other_axes)}
        return (NOMINAL, *sorted(names - {NOMINAL}))

    def with_axis(self, name: str) -> "Pack":
        """The pack under another of its clock axes.

        Raises:
            ConfigError: it has none of that name.
        """
        axes = {self.clock_axis: self.perf, **dict(self.other_axes)}
        if name not in axes:
            raise ConfigError(
                f"--clock-axis {name}: unknown; pack {self.name} has {', '.join(self.clock_axes)}"
            )
        perf = axes.pop(name)
        return replace(self, clock_axis=name, perf=perf, other_axes=tuple(axes.items()))

    def with_setting(self, name: str) -> "Pack":
        """The pack, on all of its clock axes, of a server with this in its environment.

        Raises:
            ConfigError: it has no figure for that.
        """
        known = {setting.name: setting for setting in self.settings}
        if name not in known:
            has = ", ".join(known) or "none"
            raise ConfigError(f"--pack {self.name}:{name}: unknown setting; the pack has {has}")
        rest_w = known[name].rest_w
        return replace(
            self,
            perf=replace(self.perf, rest_w=rest_w),
            other_axes=tuple((axis, replace(perf, rest_w=rest_w)) for axis, perf in self.other_axes),
            transferred=f"{self.transferred}; {name}, {rest_w:g} W when idle: {known[name].source}",
        )


def pack_names() -> tuple[str, ...]:
    """Names of the packs that are shipped."""
    folder = resources.files("fuel_ray.sim") / "packs"
    return tuple(sorted(p.name.removesuffix(".json") for p in folder.iterdir() if p.name.endswith(".json")))


def load_pack(name_or_path: str, clock_axis: str = NOMINAL) -> Pack:
    """A shipped pack by name, or a pack file by path (anything that ends in .json).

    Behind a colon may stand a setting of the server: ``h100-qwen3-8b:CUDA_DISABLE_PERF_BOOST=1``.

    Raises:
        ConfigError: there is no such pack, setting or clock axis, or the file is malformed or of an older
            format.
    """
    setting = ""
    if not name_or_path.endswith(".json") and ":" in name_or_path:
        name_or_path, _, setting = name_or_path.rpartition(":")
    if name_or_path.endswith(".json"):
        path: Traversable = Path(name_or_path)
    elif name_or_path in pack_names():
        path = resources.files("fuel_ray.sim") / "packs" / f"{name_or_path}.json"
    else:
        raise ConfigError(
            f"unknown calibration pack {name_or_path!r}: choose from {', '.join(pack_names())}, or give a "
            ".json file"
        )
    if not path.is_file():
        raise ConfigError(f"calibration pack {name_or_path}: there is no such file")
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
        _check_format(name_or_path, raw.get("format"))
        pack = _parse_pack(raw, digest=_digest(raw))
    except KeyError as error:
        raise ConfigError(f"{name_or_path} is not a calibration pack: it has no {error.args[0]}") from error
    except (AttributeError, TypeError, ValueError, OSError) as error:
        raise ConfigError(f"{name_or_path} is not a calibration pack: {error}") from error
    return (pack.with_setting(setting) if setting else pack).with_axis(clock_axis)


def pack_fields(perf: PerfModel) -> dict[str, Any]:
    """What a pack file says of its model: format, constants and clock axis."""
    rounded = {name: float(f"{value:.5g}") for name, value in perf.constants._asdict().items()}
    axis = {name: [float(f"{value:.5g}") for value in getattr(perf.axis, name)] for name in AXIS_TABLES}
    return {"format": FORMAT, "perf": rounded, "clock_axis": axis}


def variant_fields(perf: PerfModel, others: Mapping[str, PerfModel]) -> dict[str, Any]:
    """What a pack file says of the model under other clock axes: the entries that differ."""
    own, variants = pack_fields(perf), dict[str, Any]()
    for name, other in others.items():
        found = pack_fields(other)
        differ = {
            part: {key: value for key, value in found[part].items() if value != own[part][key]}
            for part in ("clock_axis", "perf")
        }
        variants[name] = {part: entries for part, entries in differ.items() if entries}
    return variants


def _check_format(name_or_path: str, found: Any) -> None:
    if found == FORMAT:
        return
    said = "no format" if found is None else f"format {found!r}"
    raise ConfigError(
        f"{name_or_path} is not a calibration pack that this version can read: it has {said}, and needs "
        f"format {FORMAT}; write it with `fuel-ray calibrate`"
    )


def _digest(raw: dict[str, Any]) -> str:
    """What identifies a pack: all that its figures are, and nothing that is said about them."""
    figures = {name: value for name, value in raw.items() if name not in _ABOUT}
    return sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()


def _parse_pack(raw: dict[str, Any], *, digest: str) -> Pack:
    clocks = raw["gpu_clocks_mhz"]
    supported = tuple(range(clocks["min"], clocks["max"] + 1, clocks["step"]))
    if not supported or supported[-1] != clocks["max"]:
        raise ValueError(
            f"gpu_clocks_mhz: {clocks['max']} is not a whole number of steps above {clocks['min']}"
        )
    typed: dict[str, Any]
    typed = {f.name: f.type(raw[f.name]) for f in fields(Pack) if f.type in (int, str) and f.name in raw}
    typed.pop("clock_axis")  # a table in the file
    axes = {name: _variant(raw, name) for name in dict(raw.get("clock_axis_variants", {}))}
    return Pack(
        **typed,
        gpu_clocks_mhz=supported,
        perf=_perf(raw, {}),
        sha256=digest,
        other_axes=tuple(axes.items()),
        fidelity=tuple(map(_fidelity, raw.get("fidelity", ()))),
        settings=tuple(_setting(name, **entry) for name, entry in dict(raw.get("settings", {})).items()),
    )


def _fidelity(row: dict[str, Any]) -> Fidelity:
    errors = {name: None if row[name] is None else float(row[name]) for name in ERRORS}
    return Fidelity(**row | errors | {"trace": str(row["trace"]), "requests": int(row["requests"])})


def _setting(name: str, *, rest_w: Any, source: Any) -> Setting:
    return Setting(name, rest_w=float(rest_w), source=str(source))


def _variant(raw: dict[str, Any], name: str) -> PerfModel:
    """The model under one of the other axes; what is wrong with it is said by its name."""
    variant = raw["clock_axis_variants"][name]
    try:
        if name == NOMINAL:
            raise ValueError("that is the name of the axis without variants")
        return _perf(raw, variant)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"clock_axis_variants, {name}: {error}") from error


def _perf(raw: dict[str, Any], variant: dict[str, Any]) -> PerfModel:
    """The model under an axis, whose entries replace those of the nominal one."""
    tables = raw["clock_axis"] | variant.get("clock_axis", {})
    constants = Constants._field_defaults | raw["perf"] | variant.get("perf", {})
    unknown = {*variant} - {"clock_axis", "perf"} | {*tables} - {*AXIS_TABLES} | {*constants} - _CONSTANTS
    if unknown:
        raise ValueError(f"it has no such entry: {', '.join(sorted(unknown))}")
    columns = {name: tuple(map(float, tables[name])) for name in AXIS_TABLES}
    values = {name: float(constants[name]) for name in Constants._fields}
    if wrong := [name for name, value in values.items() if not math.isfinite(value)]:
        raise ValueError(f"perf: {', '.join(wrong)}: not a finite number")
    return PerfModel(Constants(**values), ClockAxis(**columns))
