"""How much a trained policy leans on each feature: permutation importance, at equal attainment.

    python experiments/studies/importance.py POLICY_FOLDER [--scenario diurnal-scarce] [--slo tight]
        [--seeds 10] [--workers 2] [--out FILE]

One feature at a time is replaced, window by window, by its value in another window drawn at random from
those that the intact policy sees on the tuning seeds. The policy keeps the anchor of its folder: take one
that was trained for this load and SLO. The price of a miss is tuned and swept for each as for any policy in
the arena, so that energies are compared at equal attainment: against the best simple rule, and against the
policy intact; n held-out episodes, 95 % intervals over seeds of this one training. (Breiman, Machine
Learning 45, 2001.)

It asks which features a trained policy could do without. It takes 2 CPU minutes for the simple rules and,
estimated, 1.5 per feature, since a policy with a feature replaced does not run compiled: half an hour for 17.
With ``--seconds 60 --seeds 3 --tuning-seeds 1`` it only shows that it runs.

What to expect: not measured yet at equal attainment. At unequal attainment
(docs/notes/2026-11-26-questions.md, 4 seeds) KV usage mattered most, and seven of 13 features changed the
energy by under 1 %, for rate, running requests and token throughput say nearly the same.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from fuel_ray.arena.axes import axis_rows, played
from fuel_ray.arena.cell import LIMITS_AMPLE, Job, loop_of, tuning_runs
from fuel_ray.arena.config import ArenaConfig
from fuel_ray.arena.equal import Sweep, enough, iso, raw, sweep_of
from fuel_ray.arena.pool import in_processes
from fuel_ray.arena.scenarios import SCENARIOS
from fuel_ray.policies.catalogue import Contender, label
from fuel_ray.policies.learned import LearnedPolicy, PolicyFolder, read_policy
from fuel_ray.stats import Interval
from fuel_ray.tuning.contenders import LOG_PRICES, families
from fuel_ray.tuning.episodes import EPISODE_S, held_out_episodes
from fuel_ray.tuning.runs import Runs, held_out, plays_of
from fuel_ray.tuning.search import LIMITS_SCARCE, Swept, swept
from fuel_ray.tuning.tuned import Tuned, perf_of, tune_on, tuned_case
from fuel_ray.types import NodeSpec, WindowMetrics

SHARE = 0.97


@dataclass(frozen=True, eq=False)
class Bench:
    """A load under an SLO: seeds to tune on, others to be judged on, and the best simple rule there."""

    tuning: Runs
    alone: list[Runs]
    slo: str
    base: Tuned
    rule: Sweep

    @property
    def name(self) -> str:
        return label(self.base.best_rule)

    @property
    def attained(self) -> float:
        """What the rule attains as tuned."""
        return float(self.rule.attained(self.rule.seeds)[0])


def arguments() -> argparse.ArgumentParser:
    """The flags that say a bench."""
    found = argparse.ArgumentParser()
    found.add_argument("--scenario", default="diurnal-scarce", choices=list(SCENARIOS))
    found.add_argument("--slo", default="tight", choices=["interactive", "tight"])
    found.add_argument("--seeds", type=int, default=10)
    found.add_argument("--tuning-seeds", type=int, default=6)
    found.add_argument("--seconds", type=int, default=EPISODE_S)
    found.add_argument("--workers", type=int, default=1)
    found.add_argument("--out", type=Path)
    return found


def bench_of(given: argparse.Namespace) -> Bench:
    """Tune the simple rules as the arena does, and play the best of them on the held-out seeds."""
    scenario, slo = SCENARIOS[given.scenario], given.slo
    job = Job(ArenaConfig(slos=(slo,), tuning_seeds=given.tuning_seeds, seconds=given.seconds), scenario)
    tuning = tuning_runs(job, loop_of(job, job.home))
    limits = LIMITS_AMPLE if scenario.kv_tokens is None else LIMITS_SCARCE
    base = tune_on(tuning, slo, share=SHARE, perf=perf_of(job.config), limits=limits)
    case = tuned_case(job.config, tuning.loop.node.spec, base, slo=tuning.slos[slo])
    (family,) = families(base.best_rule, base.best_rule, case)
    seeds, seconds = held_out_episodes(scenario.workload, given.seeds, given.seconds)
    stage = loop_of(replace(job, config=replace(job.config, seconds=seconds)), scenario, part="second half")
    alone = held_out(stage, seeds, seconds=seconds, slos=tuning.slos)
    found = swept(family, tuning, slo, share=base.share)
    return Bench(tuning, alone, slo, base, judged(found, alone, slo, base.share))


def judged(found: Swept, alone: Sequence[Runs], slo: str, share: float) -> Sweep:
    """What a policy does on the held-out seeds, at all of its settings."""
    rows = axis_rows("", plays_of(found.nominal.policy, alone), alone, slo)
    return sweep_of(played(found, rows, alone, slo), enough=enough(share, of_means=False))


def at_equal(own: Sweep, reference: Sweep) -> str:
    """The change of energy at the attainment of a reference, in percent, with its interval."""
    found = iso([own], reference)
    return "n.r." if found.ratio is None else percent(found.ratio) + (" <" if found.mark else "")


def percent(ratio: Interval) -> str:
    mean, low, high = (None if x is None else 100 * (x - 1) for x in (ratio.mean, ratio.low, ratio.high))
    return f"{mean:+.1f}" + ("" if low is None else f" ({low:+.1f}..{high:+.1f})")


def say(out: Path | None, line: str) -> None:
    """Print a line, and keep it."""
    print(line, flush=True)
    if out is not None:
        with out.open("a") as file:
            file.write(line + "\n")


class Shuffled(LearnedPolicy):
    """The policy with one feature replaced by values that it had in other windows."""

    def replacing(self, feature: int, values: np.ndarray) -> "Shuffled":
        self._feature, self._values, self._rng = feature, values, np.random.default_rng(feature)
        return self

    def observe(self, window: WindowMetrics) -> np.ndarray:
        observation = super().observe(window)
        observation[self._feature] = self._rng.choice(self._values)
        return observation

    def compiled(self, spec: NodeSpec) -> None:
        """Not known to compiled code."""


def at_price(
    own: PolicyFolder, bench: Bench, log_price: float, kind: type[LearnedPolicy] = LearnedPolicy
) -> LearnedPolicy:
    """The policy of the folder under the SLO of the bench, a miss at 10 ** log_price J."""
    codec = replace(own.codec, slo=bench.tuning.slos[bench.slo], miss_price_j=10.0**log_price)
    spec, manifest = bench.tuning.loop.node.spec, own.manifest
    return kind(own.arrays, codec, spec, head=manifest.head, anchor=manifest.anchor)


def with_replaced(own: PolicyFolder, bench: Bench, feature: int, values: np.ndarray) -> tuple[int, Sweep]:
    """What the policy does with a feature replaced by one of these values at random."""

    def make(log_price: float) -> LearnedPolicy:
        policy = at_price(own, bench, log_price, Shuffled)
        assert isinstance(policy, Shuffled)
        return policy.replacing(feature, values)

    return feature, swept_prices(make, bench)[0]


def swept_prices(make: Callable[[float], LearnedPolicy], bench: Bench) -> tuple[Sweep, float]:
    """What a policy does at its prices, and the log10 of the one that was tuned."""
    share = bench.base.share
    found = swept([Contender("", make, LOG_PRICES, monotone=True)], bench.tuning, bench.slo, share=share)
    return judged(found, bench.alone, bench.slo, share), found.nominal.setting


def seen_by(policy: LearnedPolicy, tuning: Runs) -> np.ndarray:
    """What the policy sees on the tuning seeds: (windows, features)."""
    rows = []
    for seed in tuning.seeds:
        windows = tuning.episode(policy, seed).windows
        policy.reset()
        rows += [policy.observe(window) for window in windows]
    return np.array(rows)


def row(name: str, own: Sweep, rule: Sweep, intact: Sweep) -> str:
    """Energy and attainment as tuned, and changes as tuned and at equal attainment."""
    energy_j, attained = own.energy_j[0].sum() / own.requests[0].sum(), own.attained(own.seeds)[0]
    changes = (at_equal(own, rule), percent(raw([own], rule)), at_equal(own, intact))
    return f"| {name} | {energy_j:.2f} | {attained:.3f} | {' | '.join(changes)} |"


def main() -> None:
    flags = arguments()
    flags.add_argument("policy", type=Path)
    given = flags.parse_args()
    own = read_policy(given.policy)
    if "miss_price" not in own.codec.features:
        raise SystemExit(f"{given.policy} was trained at one price of a miss: there is nothing to sweep")
    bench = bench_of(given)
    tell = partial(say, given.out)
    intact, log_price = swept_prices(partial(at_price, own, bench), bench)
    where = f"{given.policy.name} on {given.scenario}, {given.slo} SLO"
    tell(f"**{where}** (n = {len(bench.alone)}, modelled; best simple rule: {bench.name}; 95 % intervals)\n")
    tell("| feature replaced | J/req | of SLO | iso best rule, % | raw | iso intact |\n|---|" + "--:|" * 5)
    tell(row("none", intact, bench.rule, intact))
    seen = seen_by(at_price(own, bench, log_price), bench.tuning)
    varied = [k for k in range(seen.shape[1]) if np.ptp(seen[:, k]) > 0]
    jobs = [(own, bench, k, seen[:, k]) for k in varied]
    for k, sweep in in_processes(with_replaced, jobs, workers=given.workers):
        tell(row(own.codec.features[k], sweep, bench.rule, intact))


if __name__ == "__main__":
    main()
