"""The reward that settings name."""

from fuel_ray.config import ServingConfig
from fuel_ray.objective import Energy, GreenDls, Objective, from_outside
from fuel_ray.outside import reference
from fuel_ray.sim.pack import load_pack

# Mean output and prompt length for which the energy reward's reference is computed
_REFERENCE_SEQS, _REFERENCE_CONTEXT = 16, 16 * 700


def build_objective(config: ServingConfig) -> Objective:
    """The reward that the settings name."""
    if reference(config.reward):
        return from_outside(config.reward, config.slo, miss_price_j=config.miss_price_j)
    if config.reward == "energy":
        perf = load_pack(config.pack, config.clock_axis).perf
        clock_mhz = 0.7 * perf.constants.max_clock_mhz
        duration_s, power_w, _ = perf.step_cost(_REFERENCE_SEQS, _REFERENCE_CONTEXT, 0, clock_mhz)
        return Energy(
            slo=config.slo,
            token_price_j=duration_s * power_w / _REFERENCE_SEQS,
            miss_price_j=config.miss_price_j,
            scale_w=power_w,
        )
    if config.slo_e2e_s is None:
        raise AssertionError("validated before: the GreenDLS rewards need an e2e SLO")
    return GreenDls(
        slo_e2e_s=config.slo_e2e_s,
        kv=config.reward != "greendls",
        normalized=config.reward == "greendls_kv_normalized",
    )
