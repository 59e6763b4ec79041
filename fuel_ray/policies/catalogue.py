"""The policies that are known by name: what they are called and drawn in, and how they are made."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, runtime_checkable

from fuel_ray.errors import ConfigError
from fuel_ray.policies.agft import AgftLinUcb
from fuel_ray.policies.anchor import at_work
from fuel_ray.policies.clipper import Clipper
from fuel_ray.policies.eais import Eais
from fuel_ray.policies.feedback import Feedback
from fuel_ray.policies.models import every, fit_batches, fit_steps, token_limits
from fuel_ray.policies.rules import Rule
from fuel_ray.policies.static import LoadTable, Static
from fuel_ray.policies.voltana import Dwell, VoltanaLlm
from fuel_ray.sim.pack import Pack, PerfModel
from fuel_ray.types import Knobs, NodeSpec, Policy, Slo
from fuel_ray.workload.lengths import OUTPUT_TOKENS

MAX_PERFORMANCE, TUNED_STATIC, LOAD_TABLE, LEARNED = "max_performance", "tuned_static", "load_table", "dqn"
REQUESTS_TABLE, RATE_REQUESTS_TABLE, REQUESTS_TRIM = "requests_table", "rate_requests_table", "requests_trim"
PREDICTIVE, PREDICTIVE_TRIM, FAST_LOAD_TABLE = "predictive", "predictive_trim", "load_table_4s"
REFERENCES = (MAX_PERFORMANCE, TUNED_STATIC, LOAD_TABLE)
BEST_RULE = "best_rule"  # whichever simple rule ranked best on the tuning seeds of a load
# The comparison that says most comes first
JUDGED_BY = (TUNED_STATIC, BEST_RULE, LOAD_TABLE, MAX_PERFORMANCE)
DWELL_S = 5.0
OFFSETS_MHZ = (-320.0, 320.0)  # of all clocks of what is tuned for a load, to be more or less careful
CLOSER = (-0.4, 0.4)  # to the TPOT limit, as a share of it, by which a prediction stays below
# Of policies that are not listed below (Tol's muted palette)
_OTHER_COLORS = ("#332288", "#88ccee", "#ddcc77", "#bbbbbb", "#661100", "#6699cc", "#888888", "#aa4466")


@dataclass(frozen=True, slots=True)
class Case:
    """What a policy is made for; what is tuned matters only to entries that are ``tuned``."""

    spec: NodeSpec
    slo: Slo
    pack: Pack | None  # for rules that need a model
    static: Knobs  # tuned for the load; rules that leave the batch limit alone use its limit
    table: LoadTable  # tuned for the load
    rules: Mapping[str, LoadTable | Rule] = field(default_factory=dict)  # tuned for the load, by name
    best_rule: LoadTable | Rule | None = None  # the best simple rule of the load; None: the table
    extra_features: tuple[str, ...] = ()  # code that a policy folder may need


@dataclass(frozen=True, slots=True)
class Entry:
    """A policy for people, and its maker, which gets the one free number in it that may be tuned."""

    label: str
    color: str
    make: Callable[[Case, float], Policy] | None  # None: it is a folder
    settings: tuple[float, ...] = (0.0,)  # that are tried; the last is as published
    tuned: bool = False  # whether something in it is tuned on the load's tuning seeds
    what: str = "a published rule"
    simple: bool = False  # one of the rules of which the best is what a learned policy has to beat
    dial: tuple[float, float] | None = (
        None  # range of its number, which is 0.0 as tuned: higher, more careful
    )


@dataclass(frozen=True, slots=True)
class Contender:
    """A policy by name, and the values that its one free number is tuned over.

    With ``monotone`` a higher number attains the SLO more often and costs more: it is found by bisection.
    ``nominal`` is the number for what was asked, where that is known beforehand.
    """

    name: str
    make: Callable[[float], Policy]
    settings: tuple[float, ...] = (0.0,)
    monotone: bool = False
    nominal: float | None = None


@runtime_checkable
class Learner(Protocol):
    """A policy that learns while it serves: it plays the tuning seeds before it is judged."""

    def keep(self) -> None:
        """Let ``reset`` come back to what is known by now."""
        ...


def untuned(spec: NodeSpec, slo: Slo, pack: Pack | None, *, extra_features: tuple[str, ...] = ()) -> Case:
    """Where nothing was tuned: maximum performance stands for what would be."""
    most = spec.max_performance
    return Case(spec, slo, pack, most, LoadTable((), (most,)), extra_features=extra_features)


def contender(name: str, case: Case) -> Contender:
    """The catalogue's policy of this name, which is not the learned one."""
    entry = CATALOGUE[name]
    assert entry.make is not None, f"{name} is a folder"
    make = partial(entry.make, case)
    if entry.dial is not None:
        return Contender(name, make, entry.dial, monotone=True, nominal=0.0)
    return Contender(name, make, entry.settings)


def label(name: str) -> str:
    """What people call a policy; one that is not listed has the name that it was given."""
    return CATALOGUE[name].label if name in CATALOGUE else name


def color(name: str, among: Sequence[str]) -> str:
    """The colour of a policy in every figure and table; those that are not listed take the next free one."""
    if name in CATALOGUE:
        return CATALOGUE[name].color
    others = [other for other in among if other not in CATALOGUE]
    return _OTHER_COLORS[others.index(name) % len(_OTHER_COLORS)]


def _static(case: Case, offset_mhz: float) -> Policy:
    clock_mhz = case.spec.nearest_clock_mhz(round(case.static.gpu_clock_mhz + offset_mhz))
    return Static(replace(case.static, gpu_clock_mhz=clock_mhz))


def _load_table(case: Case, offset_mhz: float) -> Policy:
    return at_work(case.table.moved(offset_mhz), case.spec, case.slo)


def _rule(name: str) -> Callable[[Case, float], Policy]:
    """A maker of a tuned rule; where it was not tuned, tuned static stands for it."""

    def make(case: Case, by: float) -> Policy:
        if name not in case.rules:
            return Static(case.static)
        return at_work(case.rules[name].moved(by), case.spec, case.slo)

    return make


def _clipper_binding(case: Case, _: float) -> Policy:
    return Clipper(case.spec, case.slo, only_while_binding=True)


def _eais(case: Case, _: float) -> Policy:
    ttft_s, tpot_s = token_limits(case.slo)
    capacity = case.spec.batch_limits[-1]
    models = fit_batches(_perf(case), every(case.spec.gpu_clocks_mhz, 8), max_batch=capacity)
    slo_s = case.slo.e2e_s or ttft_s + OUTPUT_TOKENS * tpot_s
    if not math.isfinite(slo_s):
        raise ConfigError("eais needs --slo-e2e-s, or --slo-ttft-s and --slo-tpot-s")
    return Eais(models, slo_s=slo_s, max_batch=capacity)


def _voltana(case: Case, margin: float) -> Policy:
    spec, (ttft_s, tpot_s) = case.spec, token_limits(case.slo)
    return VoltanaLlm(
        fit_steps(_perf(case), every(case.spec.gpu_clocks_mhz, 4), max_num_seqs=spec.batch_limits[-1]),
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        batch_limit=case.static.batch_limit,
        kv_tokens=(spec.num_kv_blocks or 0) * spec.kv_block_size,
        margin=margin,
    )


def _voltana_dwell(case: Case, margin: float) -> Policy:
    return Dwell(_voltana(case, margin), dwell_s=DWELL_S)


def _feedback(case: Case, high: float) -> Policy:
    ttft_s, tpot_s = token_limits(case.slo)
    limit = case.static.batch_limit
    return Feedback(case.spec, ttft_s=ttft_s, tpot_s=tpot_s, batch_limit=limit, low=0.9 * high, high=high)


def _agft(case: Case, _: float) -> Policy:
    clocks_mhz = every(case.spec.gpu_clocks_mhz, 4)
    return AgftLinUcb(case.spec, case.slo, batch_limit=case.static.batch_limit, clocks_mhz=clocks_mhz)


def _perf(case: Case) -> PerfModel:
    if case.pack is None:
        raise ConfigError("this rule needs a model of the GPU: give --pack")
    return case.pack.perf


_MARGINS = (-0.9, -0.6, -0.3, 0.3, 0.6, 0.0)  # of VoltanaLLM's limits
_BOUNDS = (0.6, 0.75, 0.85, 0.95)  # share of a limit above which feedback raises the clock
# Most are Okabe and Ito's colour-blind-safe palette
CATALOGUE: dict[str, Entry] = {
    MAX_PERFORMANCE: Entry(
        *("maximum performance", "#7a7a7a"),
        lambda case, _: Static(case.spec.max_performance),
        what="the highest clock and no batch limit: a server without a controller",
    ),
    TUNED_STATIC: Entry(
        *("tuned static", "#e69f00"),
        _static,
        tuned=True,
        dial=OFFSETS_MHZ,
        what="the one pair of GPU clock and batch limit that meets the SLO with the least energy on the "
        "tuning seeds",
    ),
    LOAD_TABLE: Entry(
        *("load table", "#009e73"),
        _load_table,
        tuned=True,
        simple=True,
        dial=OFFSETS_MHZ,
        what="a GPU clock and batch limit for each range of the recent arrival rate",
    ),
    FAST_LOAD_TABLE: Entry(
        *("load table, 4 s", "#66c2a5"),
        _rule(FAST_LOAD_TABLE),
        tuned=True,
        simple=True,
        dial=OFFSETS_MHZ,
        what="the load table with the arrival rate averaged over 4 s, tuned separately",
    ),
    REQUESTS_TABLE: Entry(
        *("requests table", "#44aa99"),
        _rule(REQUESTS_TABLE),
        tuned=True,
        simple=True,
        dial=OFFSETS_MHZ,
        what="a clock for each range of the requests in the system, running or waiting",
    ),
    RATE_REQUESTS_TABLE: Entry(
        *("rate and requests table", "#117733"),
        _rule(RATE_REQUESTS_TABLE),
        tuned=True,
        simple=True,
        dial=OFFSETS_MHZ,
        what="a clock for each range of the recent arrival rate and of the requests in the system",
    ),
    REQUESTS_TRIM: Entry(
        *("requests table, trimmed", "#999933"),
        _rule(REQUESTS_TRIM),
        tuned=True,
        simple=True,
        dial=OFFSETS_MHZ,
        what="the requests table, with a linear correction for queue, KV cache usage, time between tokens "
        "and prompts",
    ),
    PREDICTIVE: Entry(
        *("predictive", "#aa4499"),
        _rule(PREDICTIVE),
        tuned=True,
        simple=True,
        dial=CLOSER,
        what="the clock with the least energy per token at which a model of the GPU predicts TPOT within "
        "its limit",
    ),
    PREDICTIVE_TRIM: Entry(
        *("predictive, trimmed", "#882255"),
        _rule(PREDICTIVE_TRIM),
        tuned=True,
        simple=True,
        dial=CLOSER,
        what="the predictive rule, with a linear correction for queue, KV cache usage, time between tokens "
        "and prompts",
    ),
    "clipper": Entry("Clipper", "#cc79a7", lambda case, _: Clipper(case.spec, case.slo)),
    "clipper_binding": Entry("Clipper, if binding", "#8c3d6b", _clipper_binding),
    "eais": Entry("EAIS", "#d55e00", _eais),
    "voltana": Entry("VoltanaLLM", "#56b4e9", _voltana, _MARGINS, tuned=True),
    "voltana_dwell": Entry("VoltanaLLM, dwell", "#1f78b4", _voltana_dwell, _MARGINS, tuned=True),
    "feedback": Entry("feedback", "#f0e442", _feedback, _BOUNDS, tuned=True),
    "agft": Entry("AGFT", "#6a51a3", _agft, tuned=True),
    BEST_RULE: Entry(
        "best simple rule",
        "#aa3377",
        make=None,
        what="the simple rule that meets the SLO with the least energy on the tuning seeds: what learning "
        "has to beat",
    ),
    LEARNED: Entry("learned (DQN)", "#0072b2", make=None),
    "ppo": Entry("learned (PPO)", "#0072b2", make=None),
    "rllib-dqn": Entry("learned (RLlib's DQN)", "#8c564b", make=None),
}
PLAYABLE = tuple(name for name, entry in CATALOGUE.items() if entry.make is not None)
SIMPLE = tuple(name for name, entry in CATALOGUE.items() if entry.simple)
PUBLISHED = tuple(name for name in PLAYABLE if name not in (*REFERENCES, *SIMPLE))
