"""Who takes part: the published rules, each with the one number in it that may be tuned, and the learned."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fuel_ray.policies.agft import AgftLinUcb
from fuel_ray.policies.anchor import WEIGHTS, Anchor
from fuel_ray.policies.clipper import Clipper
from fuel_ray.policies.eais import Eais
from fuel_ray.policies.feedback import Feedback
from fuel_ray.policies.learned import LearnedPolicy, load_policy, read_manifest
from fuel_ray.policies.models import fit_batches, fit_steps, token_limits
from fuel_ray.policies.static import LoadTable
from fuel_ray.policies.voltana import Dwell, VoltanaLlm
from fuel_ray.sim.pack import Pack
from fuel_ray.types import Knobs, NodeSpec, Policy, Slo

MARGINS = (-0.45, -0.3, -0.15, 0.0)  # of VoltanaLLM's limits
BOUNDS = (0.6, 0.75, 0.85, 0.95)  # share of a limit above which feedback raises the clock
LOG_PRICES = (0.7, 3.7)  # log10 of J per missed limit, between which a priced policy's is searched
DWELL_S = 5.0


@dataclass(frozen=True, slots=True)
class Contender:
    """A policy by name, and the values that its one free number is tuned over.

    With ``monotone`` a higher number keeps the promise more often and costs more: it is found by bisection.
    """

    name: str
    make: Callable[[float], Policy]
    settings: tuple[float, ...] = (0.0,)
    monotone: bool = False


def published(spec: NodeSpec, slo: Slo, pack: Pack, *, static: Knobs) -> list[Contender]:
    """The peers' rules for this node and promise; those that leave the limit alone use tuned static's."""
    ttft_s, tpot_s = token_limits(slo)
    clocks, limit, capacity = spec.gpu_clocks_mhz, static.batch_limit, spec.batch_limits[-1]
    coarse = clocks[::-1][::4][::-1]
    steps = fit_steps(pack.perf, coarse, max_num_seqs=capacity)
    batches = fit_batches(pack.perf, clocks[::-1][::8][::-1], max_batch=capacity)
    kv_tokens = (spec.num_kv_blocks or 0) * spec.kv_block_size

    def voltana(margin: float) -> VoltanaLlm:
        return VoltanaLlm(
            steps, ttft_s=ttft_s, tpot_s=tpot_s, batch_limit=limit, kv_tokens=kv_tokens, margin=margin
        )

    def feedback(high: float) -> Feedback:
        return Feedback(spec, ttft_s=ttft_s, tpot_s=tpot_s, batch_limit=limit, low=0.9 * high, high=high)

    e2e_s = slo.e2e_s or ttft_s + 220.0 * tpot_s  # the default workload's mean output
    return [
        Contender("Clipper", lambda _: Clipper(spec, slo)),
        Contender("Clipper, if binding", lambda _: Clipper(spec, slo, only_while_binding=True)),
        Contender("EAIS", lambda _: Eais(batches, slo_s=e2e_s, max_batch=capacity)),
        Contender("VoltanaLLM", voltana, MARGINS),
        Contender("VoltanaLLM, dwell", lambda x: Dwell(voltana(x), dwell_s=DWELL_S), MARGINS),
        Contender("feedback", feedback, BOUNDS),
        Contender("AGFT", lambda _: AgftLinUcb(spec, slo, batch_limit=limit, clocks_mhz=coarse)),
    ]


def learned(
    folders: Sequence[Path], spec: NodeSpec, slo: Slo, table: LoadTable, extra_features: Sequence[str] = ()
) -> list[tuple[Contender, ...]]:
    """Policies from folders, each as the variants of which the best on the training seeds takes part.

    The price of a miss is tuned where a policy was trained for many prices. One whose reward is energy is
    kept near the load table, how near is tuned; where it is priced, it takes part once more without.

    Raises:
        PolicyError: a folder is malformed, or made for another node.
    """
    families: list[tuple[Contender, ...]] = []
    for folder in folders:
        policy, name = load_policy(folder, spec, extra_features=extra_features), folder.name
        if read_manifest(folder).reward != "energy":
            families.append((free(name, policy, slo),))
            continue
        families.append(kept_near(name, policy, slo, table))
        if policy.priced:
            families.append((free(f"{name}, free", policy, slo),))
    return families


def free(name: str, policy: LearnedPolicy, slo: Slo) -> Contender:
    """The policy as it was trained, with its price to be tuned."""
    alone = policy.near(None)
    if not policy.priced:
        return Contender(name, lambda _: alone)
    return Contender(name, lambda x: alone.for_slo(slo, miss_price_j=10.0**x), LOG_PRICES, True)


def kept_near(name: str, policy: LearnedPolicy, slo: Slo, table: LoadTable) -> tuple[Contender, ...]:
    """The policy near this table, a variant for each weight."""

    def at(weight: float) -> Contender:
        own = policy.near(Anchor(table, weight))
        if not policy.priced or weight == WEIGHTS[-1]:
            return Contender(name, lambda _: own)
        return Contender(name, lambda x: own.for_slo(slo, miss_price_j=10.0**x), LOG_PRICES, True)

    return tuple(at(weight) for weight in WEIGHTS)
