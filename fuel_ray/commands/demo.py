"""A first result: what the example policy saves on a simulated node, beside what could be had without it."""

from dataclasses import dataclass
from functools import partial

from fuel_ray.arena.config import EvaluateConfig
from fuel_ray.arena.evaluation import Evaluation, comparison, evaluate_policies
from fuel_ray.flags import parse_flags
from fuel_ray.policies.anchor import at_work
from fuel_ray.policies.catalogue import BEST_RULE, LEARNED, MAX_PERFORMANCE, TUNED_STATIC
from fuel_ray.policies.learned import read_policy
from fuel_ray.policies.shipped import SHIPPED
from fuel_ray.policies.static import Static
from fuel_ray.types import NodeSpec, Policy

_LAST = (
    "Modelled, not measured: all policies served the same requests on a simulated H100.\n"
    "Train your own policies: fuel-ray sweep --preset quick. For your own server: fuel-ray onboard --help"
)


@dataclass(frozen=True)
class DemoConfig:
    """Show in less than a minute what a trained policy saves on a simulated H100. No files are written.

    Four policies serve the default workload: maximum performance, the best fixed pair of batch limit and
    clock, the best simple rule, and a DQN, the shipped policy `example`.
    """

    seeds: int = 3
    """Held-out seeds to evaluate on. Each is an episode with the same arrivals for every policy."""
    seconds: int = 1200
    """Seconds of arrivals per episode. The workload repeats after 1200 s."""


def parse(argv: list[str], *, prog: str) -> DemoConfig:
    """Settings from flags."""
    return parse_flags(DemoConfig, argv, prog=prog)


def run(config: DemoConfig) -> int:
    """Serve, and print a table."""
    folder = read_policy(SHIPPED["example"])
    (size,), manifest = folder.manifest.kv_block_sizes, folder.manifest
    static, anchor = manifest.tuned_static, manifest.anchor
    assert static is not None and anchor is not None, "the example has what was tuned for its load"

    def policies(spec: NodeSpec) -> dict[str, Policy]:
        return {
            MAX_PERFORMANCE: Static(spec.max_performance),
            TUNED_STATIC: Static(static),
            BEST_RULE: at_work(anchor.rule, spec, folder.slo),
            LEARNED: folder.policy(spec),
        }

    own = EvaluateConfig(block_sizes=(size,), seeds=config.seeds, seconds=config.seconds)
    found = Evaluation([], [])
    evaluate_policies(
        own,
        size,
        own.workload,
        policies,
        seeds=own.seeds,
        seconds=own.seconds,
        into=found,
        say=partial(print, flush=True),
    )
    print(f"\n{comparison(found.rows, own, partial=False)}\n\n{_LAST}")
    return 0
