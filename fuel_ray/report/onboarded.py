"""The page of an onboarding: the server, its twin and how well it fits, the policy, the commands to copy."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fuel_ray.disk import whole
from fuel_ray.policies.catalogue import CATALOGUE, MAX_PERFORMANCE, color, label
from fuel_ray.record import read_json
from fuel_ray.report.accuracy import fidelity, profile, signed
from fuel_ray.report.page import Cell, code, heading, page, paragraph, table, tile, tiles
from fuel_ray.report.tables import key_values
from fuel_ray.report.text import when
from fuel_ray.report.wording import (
    DEFAULT_SLO,
    capitalised,
    change,
    ends,
    figure_name,
    limits_text,
    percent,
    slo_text,
)
from fuel_ray.types import Slo

_UNKNOWN = "unknown"
_ON = {True: "on", False: "off", None: _UNKNOWN}
_POLICIES = (
    "Modelled: every policy served the same requests on the twin, n = {seeds} held-out seeds.{small_print} "
    "Only the canary below measures a saving."
)
_AXES, _SEEDS = "lowest and highest value over the clock axes", "95 % interval over the seeds"

Stages = Mapping[str, Mapping[str, Any]]


def write_onboarding(folder: Path) -> Path:
    """Write ``report.html`` into the folder of an onboarding, finished or not, and return its path."""
    target, journal = folder / "report.html", read_json(folder / "onboard.json")
    text = page(f"fuel_ray: {folder.name}", _sections(folder, journal))
    with whole(target) as file:
        file.write(text)
    return target


def _sections(folder: Path, journal: Mapping[str, Any]) -> Iterator[str]:
    stages = journal["stages"]
    found = {name: stage.get("found", {}) for name, stage in stages.items()}
    yield heading(f"fuel_ray: {folder.name}", level=1)
    yield from _answer(stages, found)
    if server := found.get("server"):
        yield heading("The server")
        yield key_values(_server(server))
    if (folder / "pack.json").exists() and (folder / "profile" / "profile.jsonl").exists():
        yield heading("Profile and twin")
        yield from profile(folder, found)
    if rows := found.get("validate", {}).get("rows"):
        yield heading("How accurate is the twin?")
        measured = found["server"]["origin"] == "measured"
        yield from fidelity(found["validate"], rows, source="measured" if measured else "simulated server")
    if load := found.get("load"):
        yield heading("Workload and SLO")
        yield key_values(_load(load, found.get("slo", {})))
    if rows := found.get("recommend", {}).get("rows"):
        yield heading("Policies on this workload")
        yield _policies(rows, best=found["recommend"]["best"])
        told = _POLICIES.format(seeds=found["recommend"]["seeds"], small_print=_small_print(rows))
        yield paragraph(told, style="soft")
    if (folder / "commands.sh").exists():
        yield heading("Commands")
        yield paragraph("Run them in this order; run the next one when the one before shows what you expect.")
        yield code((folder / "commands.sh").read_text(encoding="utf-8").removeprefix("#!/bin/sh\n"))
    yield heading("How this was made")
    facts = {"command": journal.get("command"), "git commit": journal.get("git_commit")}
    yield key_values({name: fact for name, fact in facts.items() if fact})
    yield _stages(stages)


def _answer(stages: Stages, found: Stages) -> Iterator[str]:
    stopped = [(name, stage["why"]) for name, stage in stages.items() if stage["state"] == "stopped"]
    ended = [stage["end"] for stage in found.values() if "end" in stage]
    for name, why in stopped:
        yield paragraph(f"Stopped in stage {name}: {why}", style="headline bad")
    for end in ended:
        yield paragraph(_sentence(end), style="headline bad")
    recommended = found.get("recommend", {})
    if recommended:
        yield paragraph(_sentence(recommended["headline"]), style="headline")
        yield paragraph(recommended["sentence"])
        for note in recommended["notes"]:
            yield paragraph(_sentence(note))
    elif not stopped and not ended:
        yield paragraph("Not finished yet.", style="headline")
    yield tiles(_tiles(found))


def _tiles(found: Stages) -> Iterator[str]:
    if rows := found.get("recommend", {}).get("rows"):
        best = next(row for row in rows if row["policy"] == found["recommend"]["best"])
        range_ = _interval(best["interval_against_max"], best["band_against_max"])
        against = f"J/request vs {label(MAX_PERFORMANCE)}"
        notes = (f"modelled: {range_}" if range_ else "modelled",)
        yield tile(change(best["against_max"]), name=against, notes=notes)
        yield tile(percent(best["attained"]), name="SLO attainment", notes=("modelled",), bad=not best["met"])
    if fidelity := found.get("validate", {}).get("rows"):
        outside, bounds = found["validate"]["outside"], found["validate"]["bounds"]
        for name in ("energy", "tpot_mean"):
            worst = max((row["errors"][name] or 0.0 for row in fidelity), key=abs)
            notes = (f"bound {percent(bounds[name])}",)
            what = f"error of the twin: {figure_name(name)}"
            yield tile(signed(worst), name=what, notes=notes, bad=name in outside)


def _server(server: Mapping[str, Any]) -> dict[str, Any]:
    clocks, limits = server["gpu_clocks_mhz"], server["batch_limits"]
    gpus = ", ".join(server["gpu_uuids"])
    return {
        "address": server["url"]
        or ("started by onboard" if server["origin"] == "measured" else "none (rehearsal on the twin)"),
        "model": server["model"],
        "engine": server["engine"],
        "GPU": f"{server['gpu_name']} ({gpus})" if gpus else server["gpu_name"],
        "KV cache": f"{server['num_kv_blocks'] or _UNKNOWN} blocks of {server['kv_block_size']} tokens",
        "capacity": f"{limits[-1]} requests at once",
        "clocks": f"{len(clocks)} from {clocks[0]} to {clocks[-1]} MHz, which fuel_ray can set"
        if len(clocks) > 1
        else f"{clocks[0]} MHz, which fuel_ray cannot change here",
        "batch limit": f"fuel_ray {'can' if limits[0] < limits[-1] else 'cannot'} set it",
        "tokens per step": str(server.get("max_num_batched_tokens") or _UNKNOWN),
        "longest request": f"{longest} tokens" if (longest := server.get("max_model_len")) else _UNKNOWN,
        "prefix caching": _ON[server.get("prefix_caching")],
        **({"assumed": "; ".join(server["assumed"])} if server.get("assumed") else {}),
        **({"idle power": server["idle_power"]} if server.get("idle_power") else {}),
        "these facts are": server["origin"],
    }


def _load(load: Mapping[str, Any], slo: Mapping[str, Any]) -> dict[str, Any]:
    facts = {"workload": load["workload"], "rate and lengths": load.get("about"), "source": load["origin"]}
    facts = {name: value for name, value in facts.items() if value}
    if not slo:
        return facts
    facts["SLO"] = slo_text(Slo(**slo["slo"]))
    if slo.get("default"):
        facts["source of the SLO"] = DEFAULT_SLO
    if slo["slo"]["share"] is None:
        attained = f"SLO {'met' if slo['met'] else 'missed'}"
    else:
        attained = f"SLO attainment {percent(slo['attained'])}"
    reached = limits_text(slo["reached"])
    facts["at the highest clock"] = f"modelled: {attained}; these limits would be met: {reached}"
    return facts


def _policies(rows: list[Mapping[str, Any]], *, best: str) -> str:
    head = [Cell("policy", style="text"), Cell("J/request")]
    head += [Cell(f"vs {label(MAX_PERFORMANCE)}"), Cell("SLO attainment")]
    head.append(Cell("tuned to", style="text"))
    names = [row["policy"] for row in rows]
    body = [
        [
            Cell(
                _name(row),
                style="text mine" if row["policy"] == best else "text",
                dot=color(row["policy"], names),
            ),
            Cell(f"{row['energy_j_per_request']:.1f}"),
            _against(row),
            Cell(percent(row["attained"]), style="" if row["met"] else "bad"),
            Cell(row["how"], style="text"),
        ]
        for row in sorted(rows, key=lambda row: row["energy_j_per_request"])
    ]
    return table(head, [body])


def _name(row: Mapping[str, Any]) -> str:
    """A policy folder goes by its name."""
    return label(row["policy"]) if row["policy"] in CATALOGUE else f"learned: {row['policy']}"


def _against(row: Mapping[str, Any]) -> Cell:
    if row["policy"] == MAX_PERFORMANCE:
        return Cell("–")
    return Cell(change(row["against_max"]), _interval(row["interval_against_max"], row["band_against_max"]))


def _small_print(rows: Sequence[Mapping[str, Any]]) -> str:
    """What it is, where there is some."""
    if any(row["band_against_max"] for row in rows):
        return f" Small print: {_AXES}."
    return f" Small print: {_SEEDS}." if any(row["interval_against_max"][0] for row in rows) else ""


def _interval(interval: list[float | None], band: list[float] | None) -> str:
    """The clock axes' lowest to highest where there are several, else the interval over seeds."""
    low, high = band or interval
    return "" if low is None or high is None else ends(low, high, change)


def _stages(stages: Stages) -> str:
    head = [Cell("stage", style="text"), Cell("state", style="text"), Cell("time (s)")]
    head.append(Cell("started", style="text"))
    rows = [
        [
            Cell(name, style="text"),
            Cell(stage["state"], style="text"),
            Cell(f"{stage['seconds']:.0f}" if "seconds" in stage else "–"),
            Cell(when(stage["began"]) if "began" in stage else "–", style="text"),
        ]
        for name, stage in stages.items()
    ]
    return table(head, [rows])


def _sentence(text: str) -> str:
    """With a capital and a full stop."""
    return capitalised(text) + ("" if text.endswith((".", "!", "?")) else ".")
