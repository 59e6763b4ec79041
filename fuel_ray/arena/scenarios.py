"""The workloads and SLOs that policies are compared on, each defined once, by name."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fuel_ray.config import ServingConfig
from fuel_ray.errors import ConfigError
from fuel_ray.types import Slo

SloName = Literal["interactive", "tight", "seed"]
INTERACTIVE = Slo(ttft_s=1.0, tpot_s=0.05)
TIGHT_STRETCH = 1.1  # TPOT limit of the tight SLO, by its 95th percentile at maximum performance


@dataclass(frozen=True, slots=True)
class Scenario:
    """A load on a KV pool; what is tuned for ``tuned_on`` is used where a load was never seen before."""

    name: str
    workload: str
    kv_tokens: int | None  # None: the pack's own, which is ample
    what: str
    control: bool = False  # nothing to adapt to: a policy that saves here is lucky or wrong
    tuned_on: str | None = None


# Capacity of the default node (26,000 KV tokens) is 12 req/s: at it 97 % meet the interactive SLO, at 16 none
SCENARIOS = {
    s.name: s
    for s in (
        Scenario("steady-30", "steady:rate_rps=3.6", 26_000, "30 % of capacity", control=True),
        Scenario("steady-60", "steady:rate_rps=7.2", 26_000, "60 % of capacity", control=True),
        Scenario("steady-90", "steady:rate_rps=10.8", 26_000, "90 % of capacity", control=True),
        Scenario("diurnal-scarce", "diurnal", 26_000, "1 to 12 req/s in 20 min, scarce KV: the default"),
        Scenario("diurnal-ample", "diurnal:high_rps=20", None, "1 to 20 req/s in 20 min, ample KV"),
        Scenario("mmpp", "mmpp", None, "2 or 20 req/s, changing once a minute by chance, ample KV"),
        Scenario("azure-conv", "azure-conv", None, "Azure conversations, ample KV"),
        Scenario("azure-conv-x2", "azure-conv:rate_scale=2", None, "the same twice as fast"),
        Scenario("azure-code", "azure-code:rate_scale=0.3", None, "Azure code at 0.3 of its rate, ample KV"),
        Scenario("chat-prefix", "chat-prefix:high_rps=20", 26_000, "80 % of prompts share 500 tokens"),
        Scenario("kv-starved", "diurnal:high_rps=7", 14_000, "1 to 7 req/s on 14,000 KV tokens"),
        Scenario("overload", "piecewise:rates=4@500+16@60+4@640", 26_000, "a minute beyond capacity"),
        Scenario(
            "shifted",
            "diurnal:high_rps=5,prompt_mean=800,output_mean=300",
            26_000,
            "longer requests, with what was tuned for diurnal-scarce",
            tuned_on="diurnal-scarce",
        ),
    )
}


def scenarios_of(names: Sequence[str]) -> tuple[Scenario, ...]:
    """The scenarios of these names; all of them if there are none.

    Raises:
        ConfigError: a name is unknown.
    """
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown:
        raise ConfigError(f"--scenarios {unknown[0]}: unknown; choose from {', '.join(SCENARIOS)}")
    return tuple(SCENARIOS[name] for name in dict.fromkeys(names or SCENARIOS))


def serving(scenario: Scenario, base: ServingConfig) -> ServingConfig:
    """The settings of a node under this load."""
    return replace(base, workload=scenario.workload, kv_tokens=scenario.kv_tokens)


def slo_of(name: SloName, tpot_p95_s: float) -> Slo:
    """The SLO of this name, given what the 95th percentile of TPOT is at maximum performance."""
    if name == "interactive":
        return INTERACTIVE
    if name == "tight":
        return replace(INTERACTIVE, tpot_s=TIGHT_STRETCH * tpot_p95_s)
    return Slo(e2e_s=10.0, share=None)
