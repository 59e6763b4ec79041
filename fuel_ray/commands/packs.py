"""fuel-ray packs: the calibration packs that there are, what of each is measured, and how far off it is."""

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import tyro

from fuel_ray.sim.fidelity import ERRORS, Fidelity, fidelity_table
from fuel_ray.sim.pack import Pack, load_pack, pack_fields, pack_names

_WIDTH, _LABEL = 110, 13  # columns


@dataclass(frozen=True)
class PacksConfig:
    """List the shipped calibration packs, or show the given ones in full."""

    packs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Packs to show in full: shipped ones by name, or .json files. None given: list the shipped ones."""
    json: bool = False
    """Print JSON: a list with one object per pack."""


def run(config: PacksConfig) -> int:
    """Print them."""
    packs, full = list(map(load_pack, config.packs or pack_names())), bool(config.packs)
    if config.json:
        print(json.dumps([_facts(pack, full=full) for pack in packs], indent=2))
    else:
        print("\n\n".join(_text(pack, full=full) for pack in packs))
    return 0


def _facts(pack: Pack, *, full: bool) -> dict[str, Any]:
    """What a program may want to know of a pack."""
    same = (
        "name",
        "gpu_name",
        "architecture",
        "model",
        "engine",
        "measured",
        "transferred",
        "clock_axis_from",
    )
    limits = (
        "clock_axis_notes",
        "max_num_seqs",
        "max_num_batched_tokens",
        "max_model_len",
        "kv_tokens",
        "sha256",
    )
    facts = {
        **{name: getattr(pack, name) for name in same},
        "clock_axes": list(pack.clock_axes),
        "settings": [setting._asdict() for setting in pack.settings],
        "fidelity": [asdict(row) for row in pack.fidelity],
    }
    if full:
        facts |= {name: getattr(pack, name) for name in limits} | pack_fields(pack.perf)
        facts["gpu_clocks_mhz"] = list(pack.gpu_clocks_mhz)
    return facts


def _text(pack: Pack, *, full: bool) -> str:
    lines = {
        "measured": pack.measured,
        "transferred": pack.transferred,
        "clock axes": ", ".join(pack.clock_axes)
        + (f"; taken from {pack.clock_axis_from}" if pack.clock_axis_from else ""),
        **{f"--pack {pack.name}:{s.name}": f"{s.rest_w:g} W when idle; {s.source}" for s in pack.settings},
        "fidelity": _within(pack.fidelity),
    }
    if full:
        lines |= dict(_server(pack))
    text = [f"{pack.name}: {pack.model} on {pack.gpu_name}, {pack.engine}"]
    text += [line for name, what in lines.items() if what for line in _wrapped(name, what)]
    if full:
        text += fidelity_table(pack.fidelity).splitlines() if pack.fidelity else []
        text += ["  constants at the highest clock:", *_wrapped("", _joined(pack.perf.constants._asdict()))]
    return "\n".join(text)


def _server(pack: Pack) -> Iterator[tuple[str, str]]:
    clocks = pack.gpu_clocks_mhz
    yield "axis notes", pack.clock_axis_notes
    yield "clocks", f"{len(clocks)} from {clocks[0]} to {clocks[-1]} MHz"
    yield (
        "server",
        f"{pack.max_num_seqs} requests, {pack.max_num_batched_tokens} tokens per step, "
        f"{pack.max_model_len} per request, KV pool of {pack.kv_tokens} tokens",
    )
    yield "sha256", pack.sha256


def _within(rows: Sequence[Fidelity]) -> str:
    """The largest errors over the traces that the fit had not seen, or else over all."""
    if not rows:
        return "unknown (no table in the file); `fuel-ray validate` compares the pack with your traces"
    held_out = [row for row in rows if row.left_out]
    found = [
        f"{label} within {max(known):.1%}"
        for name, label in ERRORS.items()
        if (known := [abs(error) for row in held_out or rows if (error := getattr(row, name)) is not None])
    ]
    n, kind = len(held_out or rows), "not seen by the fit" if held_out else "seen by the fit"
    return f"{n} trace{'s' * (n > 1)} {kind}: {', '.join(found) or 'errors unknown'}"


def _joined(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.5g}" for name, value in values.items())


def _wrapped(name: str, what: str) -> list[str]:
    """Under a name in a column of its own; a longer name stands on the line before."""
    own_line = [f"  {name}"] if len(name) > _LABEL - 2 else []
    first = f"  {'' if own_line else name:<{_LABEL}}"
    return own_line + textwrap.wrap(
        what, _WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False
    )
