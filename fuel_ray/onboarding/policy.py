"""What the twin says of the SLO, a policy that is trained on it, and whether that should be deployed."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fuel_ray.arena.config import RecommendConfig
from fuel_ray.arena.recommendation import Fitted, Pair
from fuel_ray.build.nodes import build_loop
from fuel_ray.commands import recommend, train
from fuel_ray.config import TrainVerbConfig
from fuel_ray.onboarding.config import OnboardConfig, settings
from fuel_ray.onboarding.server import HOW_TO_SET_CLOCKS, HOW_TO_SET_LIMITS
from fuel_ray.onboarding.state import Onboarding
from fuel_ray.onboarding.twin import into
from fuel_ray.policies.catalogue import LOAD_TABLE, MAX_PERFORMANCE, TUNED_STATIC, label
from fuel_ray.policies.static import Static
from fuel_ray.record import make_folder, write_json
from fuel_ray.report.wording import (
    DEFAULT_SLO,
    ascii_only,
    change,
    ends,
    energy_than,
    limits_text,
    percent,
    slo_text,
)
from fuel_ray.sim.pack import load_pack
from fuel_ray.tuning.episodes import EPISODE_S, TUNING_SEEDS
from fuel_ray.tuning.runs import Runs
from fuel_ray.types import RequestRecords, Slo

_ASKED = "asked"
_SEEDS = 3
_ROOM = 1.05  # above what is reached, for an SLO that is offered instead


def check_slo(state: Onboarding) -> dict[str, Any]:
    """Whether the twin meets the SLO under the user's load at its highest clock.

    Where it does not that ends the onboarding, and what it can meet is said.
    """
    config = state.twin()
    slo = config.slo
    loop = build_loop(config, state.kv_block_size, horizon_s=float(EPISODE_S), part="first half")
    seeds = TUNING_SEEDS[:_SEEDS]
    runs = Runs(loop, seeds=seeds, seconds=EPISODE_S, slos={_ASKED: slo})
    fastest = Static(loop.node.spec.max_performance)
    score = runs.score(fastest, _ASKED, share=slo.share or 1.0)
    reached = _reached([runs.played(fastest, seed).records for seed in seeds], slo)
    met = score.slo_attainment >= (slo.share or 1.0)
    found = {"slo": asdict(slo), "attained": score.slo_attainment, "met": met, "reached": reached}
    found |= {"energy_j_per_request": score.energy_j_per_request, "seeds": seeds, "seconds": EPISODE_S}
    found["default"] = slo == OnboardConfig().slo
    named = f" ({DEFAULT_SLO})" if found["default"] else ""
    print(f"SLO: {slo_text(slo)}{named}; on the twin at its highest clock, {_attained(found)} (modelled)")
    return found if met else found | {"stop": _cannot(state, found, slo)}


def learn(state: Onboarding) -> dict[str, Any]:
    """`fuel-ray train` on the twin, into train/; a training that was interrupted is gone on with."""
    begun = sorted(state.folder.glob("train-*"))
    config = settings(TrainVerbConfig, state.twin(), resume=begun[-1] if begun else None)
    with into(state.folder, "train", begun):
        train.run(config, state.bar)
    return {"policy": str(_trained(state).relative_to(state.folder)), "steps": config.steps}


def decide(state: Onboarding) -> dict[str, Any]:
    """`fuel-ray recommend`: what to deploy, into policies/, with what everybody does on held-out seeds."""
    config = recommend_config(state, state.twin())
    pairs, best, sentence = recommend.recommended(config)
    fastest = next(pair for pair in pairs if pair.policy == MAX_PERFORMANCE)
    if (folder := state.folder / "policies" / "recommended").exists():
        shutil.copyfile(state.pack_path, folder / "pack.json")  # for a shadow to say what would be saved
    rows = [_row(pair, fastest) for pair in pairs]
    chosen = next(row for row in rows if row["policy"] == best.policy)
    found: dict[str, Any]
    found = {"sentence": sentence, "best": best.policy, "how": best.how, "rows": rows, "seeds": config.seeds}
    notes = [*_room(pairs, chosen, config), *_notes(state)]
    found |= {"headline": _headline(chosen, best), "notes": notes}
    print(ascii_only("\n".join((found["headline"], *found["notes"]))))
    write_json(state.folder / "recommendation.json", found)
    return found


def recommend_config(state: Onboarding, twin: OnboardConfig) -> RecommendConfig:
    """The judge's settings."""
    make_folder(state.folder / "policies")
    entries = (str(_trained(state)), LOAD_TABLE, MAX_PERFORMANCE)
    return settings(RecommendConfig, twin, policies=entries, save=state.folder / "policies" / "recommended")


def _headline(chosen: dict[str, Any], best: Pair) -> str:
    if best.policy == MAX_PERFORMANCE:
        return "On the twin, no policy saves energy under this workload and SLO"
    name = "the trained policy" if isinstance(best.fitted, Fitted) else label(best.policy)
    return (
        f"Modelled, not measured: {name} would use {energy_than(chosen['against_max'])} maximum performance"
        f"{_over_axes(chosen['band_against_max'])}"
    )


def _over_axes(band: tuple[float, float] | None) -> str:
    if band is None:
        return ""
    return f" ({ends(*band, change)} over the clock axes)"


def _room(pairs: list[Pair], chosen: dict[str, Any], config: RecommendConfig) -> list[str]:
    """That nothing is left to choose, where it is so."""
    fitted = next((pair.fitted for pair in pairs if pair.fitted is not None), None)
    if fitted is None or chosen["policy"] != TUNED_STATIC:
        return []
    lowest_mhz = min(config.gpu_clocks_mhz or load_pack(config.pack).gpu_clocks_mhz)
    if fitted.static.gpu_clock_mhz != lowest_mhz or not chosen["met"]:
        return []
    return [
        f"The twin's lowest clock, {lowest_mhz} MHz, meets the SLO under this workload (SLO attainment "
        f"{percent(chosen['attained'])}), so a policy has nothing to choose. Check that workload and SLO are "
        "yours: with a higher load or a tighter SLO there is a choice"
    ]


def _notes(state: Onboarding) -> list[str]:
    """What stands between that and the saving."""
    notes = []
    if not state.sets_clocks:
        notes.append(
            "Nothing can be saved without the privilege to set clocks, which this process lacks or was told "
            f"not to use. {HOW_TO_SET_CLOCKS}"
        )
    if (idle := state.facts.get("idle_power")) and "_BOOST=1: " in idle:
        notes.append(f"Idle power can be lowered without any privilege: {idle}")
    if not state.sets_limits:
        notes.append(f"The policies do not change the batch limit. {HOW_TO_SET_LIMITS}")
    transferred = state.journal.found("calibrate")["transferred"]
    if "clock axis" in transferred:
        axis = next(part for part in transferred.split("; ") if "clock axis" in part)
        notes.append(f"How time and power depend on the clock was not measured here. Source: {axis}")
    return notes


def _trained(state: Onboarding) -> Path:
    return state.folder / "train" / "policies" / f"block_{state.kv_block_size}"


def _row(pair: Pair, fastest: Pair) -> dict[str, Any]:
    change = pair.against(fastest)
    return {
        "policy": pair.policy,
        "how": pair.how,
        "energy_j_per_request": pair.energy_j_per_request,
        "against_max": change.mean,
        "interval_against_max": (change.low, change.high),
        "band_against_max": pair.band_against(fastest),
        "attained": pair.attained,
        "met": pair.met,
    }


def _reached(records: list[RequestRecords], slo: Slo) -> dict[str, float]:
    """What each limited latency could be limited to, in s."""
    limits = slo.limits_s
    share = None if slo.share is None else 1.0 - (1.0 - slo.share) / len(limits)
    reached: dict[str, float] = {}
    for name in limits:
        values_s = np.concatenate([getattr(record, f"{name}_s") for record in records])
        values_s = values_s[np.isfinite(values_s)]
        reached[name] = float(values_s.mean() if share is None else np.quantile(values_s, share))
    return reached


def _attained(found: dict[str, Any]) -> str:
    if found["slo"]["share"] is None:
        return "it is met" if found["met"] else "it is missed"
    return f"SLO attainment is {percent(found['attained'])}"


def _cannot(state: Onboarding, found: dict[str, Any], slo: Slo) -> str:
    offered = {name: max(_ROOM * found["reached"][name], limit_s) for name, limit_s in slo.limits_s.items()}
    can = limits_text({name: float(f"{value_s:.2g}") for name, value_s in offered.items()})
    flags = " ".join(f"--slo-{name}-s {value_s:.2g}" for name, value_s in offered.items())
    return (
        f"according to the twin, the server cannot meet {slo_text(slo)} under this workload, even at its "
        f"highest clock: {_attained(found)}. It can meet {can}. Lower the load, or continue with these "
        f"limits: fuel-ray onboard --resume {state.folder} {flags}"
    )
