"""What the twin says of the SLO, a policy that is trained on it, and whether that should be deployed."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fuel_ray.arena.config import RecommendConfig
from fuel_ray.arena.recommendation import Pair
from fuel_ray.build.nodes import build_loop
from fuel_ray.commands import recommend, train
from fuel_ray.commands.train import TrainVerbConfig
from fuel_ray.onboarding.config import OnboardConfig, settings
from fuel_ray.onboarding.state import Onboarding, Stopped
from fuel_ray.onboarding.twin import into
from fuel_ray.policies.catalogue import LOAD_TABLE, MAX_PERFORMANCE
from fuel_ray.policies.static import Static
from fuel_ray.record import make_folder, write_json
from fuel_ray.tuning.episodes import EPISODE_S, TUNING_SEEDS
from fuel_ray.tuning.runs import Runs
from fuel_ray.types import RequestRecords, Slo

_ASKED = "asked"
_SEEDS = 3
_ROOM = 1.05  # above what is reached, for an SLO that is offered instead


def check_slo(state: Onboarding) -> dict[str, Any]:
    """Whether the twin meets the SLO under the user's load at its highest clock.

    Raises:
        Stopped: it does not; the message says what it can meet.
    """
    config = state.twin()
    slo = config.slo
    loop = build_loop(config, state.kv_block_size, horizon_s=float(EPISODE_S), part="first half")
    seeds = TUNING_SEEDS[:_SEEDS]
    runs = Runs(loop, seeds=seeds, seconds=EPISODE_S, slos={_ASKED: slo})
    fastest = Static(loop.node.spec.max_performance)
    score = runs.score(fastest, _ASKED, share=slo.share or 1.0)
    reached = _reached([runs.played(fastest, seed)[2] for seed in seeds], slo)
    met = score.slo_attainment >= (slo.share or 1.0)
    found = {"slo": asdict(slo), "attained": score.slo_attainment, "met": met, "reached": reached}
    found |= {"energy_j_per_request": score.energy_j_per_request, "seeds": seeds, "seconds": EPISODE_S}
    limits = ", ".join(f"{name.upper()} {limit_s:g} s" for name, limit_s in slo.limits_s.items())
    whom = "on average" if slo.share is None else f"for {slo.share:.0%} of the requests"
    print(f"SLO: {limits} {whom}; by the twin at its highest clock {_attained(found)} (modelled)")
    if not met:
        stop = Stopped(_cannot(state, found, limits, whom))
        stop.found = found
        raise stop
    return found


def learn(state: Onboarding) -> dict[str, Any]:
    """`fuel-ray train` on the twin, into train/; a training that was interrupted is gone on with."""
    begun = sorted(state.folder.glob("train-*"))
    config = settings(TrainVerbConfig, state.twin(), resume=begun[-1] if begun else None)
    if begun:
        train.run(config)
        begun[-1].rename(state.folder / "train")
    else:
        with into(state.folder, "train"):
            train.run(config)
    return {"policy": str(_trained(state)), "steps": config.steps}


def decide(state: Onboarding) -> dict[str, Any]:
    """`fuel-ray recommend`: what to deploy, into policies/, with what everybody does on held-out seeds."""
    config = recommend_config(state, state.twin())
    pairs, best, sentence = recommend.recommended(config)
    fastest = next(pair for pair in pairs if pair.policy == MAX_PERFORMANCE)
    rows = [_row(pair, fastest) for pair in pairs]
    found = {"sentence": sentence, "best": best.policy, "rows": rows, "seeds": config.seeds}
    found |= {"how": best.how, "static": best.policy == "tuned_static", "saved": best.fitted is not None}
    (chosen,) = (row for row in rows if row["policy"] == best.policy)
    saving = 1.0 - chosen["against_max"]
    band = chosen["band_against_max"]
    span = "" if band is None else f" [{1 - band[1]:.1%}..{1 - band[0]:.1%} over the clock axes]"
    found["saving"] = saving
    print(f"against maximum performance that saves {saving:.1%}{span} of the energy: modelled, not measured")
    write_json(state.folder / "recommendation.json", found)
    return found


def recommend_config(state: Onboarding, twin: OnboardConfig) -> RecommendConfig:
    """The judge's settings."""
    make_folder(state.folder / "policies")
    entries = (str(_trained(state)), LOAD_TABLE, MAX_PERFORMANCE)
    return settings(RecommendConfig, twin, policies=entries, save=state.folder / "policies" / "recommended")


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
    return f"{found['attained']:.1%} meet it"


def _cannot(state: Onboarding, found: dict[str, Any], limits: str, whom: str) -> str:
    offered = {
        name: max(_ROOM * reached_s, found["slo"][f"{name}_s"])
        for name, reached_s in found["reached"].items()
    }
    can = ", ".join(f"{name.upper()} {value_s:.2g} s" for name, value_s in offered.items())
    flags = " ".join(f"--slo-{name}-s {value_s:.2g}" for name, value_s in offered.items())
    return (
        f"the server cannot meet {limits} {whom} under this load, not even at its highest clock, by the twin: "
        f"{_attained(found)}. It can meet {can}; or give it less load. To go on with that: "
        f"fuel-ray onboard --resume {state.folder} {flags}"
    )
