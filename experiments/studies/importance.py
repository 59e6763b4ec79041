"""How much a trained policy leans on each feature: permutation importance.

    python experiments/studies/importance.py POLICY_FOLDER [--scenario diurnal-scarce] [--slo tight]
        [--seeds 5]

One feature at a time is replaced, window by window, by its value in another window drawn at random from the
same episode run with the policy intact. It has no anchor, and the price of a miss is the one tuned for it
intact; what is shown is what happens to energy and attainment, n held-out episodes, 95 % t intervals,
paired by seed. (Breiman, Machine Learning 45, 2001.)

It asks which features a trained policy could do without. It takes one episode of 1,200 windows per feature
and seed and the tuning of the price before them.

What to expect (docs/notes/2026-11-26-questions.md, a DQN of 2026-11-25, 4 seeds): KV usage matters most (-5.1
% energy, 0.962 in place of 0.970 of requests within the SLO); seven of 13 features change the energy by under
1 %, for rate, running requests and token throughput say nearly the same.
"""

import argparse
from pathlib import Path
from typing import get_args

import numpy as np

from fuel_ray.arena.cell import Job, loop_of, tuning_runs
from fuel_ray.arena.config import ArenaConfig
from fuel_ray.arena.scenarios import SCENARIOS, SloName
from fuel_ray.policies.learned import LearnedPolicy, load_policy
from fuel_ray.stats import paired_ratio
from fuel_ray.tuning.contenders import free
from fuel_ray.tuning.episodes import HELD_OUT_SEED, run_episode
from fuel_ray.tuning.search import tune_static_pair, tuned
from fuel_ray.types import Knobs, WindowMetrics


class Shuffled:
    """The policy with one feature replaced by values seen in other windows; none replaced: it remembers."""

    def __init__(self, policy: LearnedPolicy, feature: int | None, seen: list[np.ndarray], seed: int) -> None:
        self._policy, self._feature, self._seen = policy, feature, seen
        self._rng = np.random.default_rng(seed)

    def reset(self) -> None:
        self._policy.reset()

    def decide(self, window: WindowMetrics) -> Knobs:
        observation = self._policy.observe(window)
        if self._feature is None:
            self._seen.append(observation.copy())
        else:
            other = self._seen[int(self._rng.integers(len(self._seen)))]
            observation[self._feature] = other[self._feature]
        return self._policy.act(observation)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("policy", type=Path)
    arguments.add_argument("--scenario", default="diurnal-scarce", choices=list(SCENARIOS))
    arguments.add_argument("--slo", default="tight", choices=get_args(SloName))
    arguments.add_argument("--seeds", type=int, default=5)
    given = arguments.parse_args()
    scenario = SCENARIOS[given.scenario]
    job = Job(ArenaConfig(slos=(given.slo,), tuning_seeds=4), scenario)
    loop = loop_of(job, scenario)
    tuning = tuning_runs(job, loop)
    stage = loop_of(job, scenario, part="second half")
    slo = tuning.slos[given.slo]
    _, share = tune_static_pair(tuning, given.slo, share=0.97, limits=(40, 48))
    contender = free(given.policy.name, load_policy(given.policy, loop.node.spec), slo)
    policy, setting = tuned([contender], tuning, given.slo, share=share)
    assert isinstance(policy, LearnedPolicy)
    print(f"{given.policy.name} on {given.scenario}, {given.slo} SLO, a miss costs {10**setting:.0f} J\n")
    print("| feature replaced | energy, % (95 %) | of SLO |\n|---|--:|--:|")
    seen: list[list[np.ndarray]] = [[] for _ in range(given.seeds)]
    intact: list[float] = []
    for k in (None, *range(len(policy.codec.features))):
        energies_j, kept, requests = [], 0, 0
        for i in range(given.seeds):
            episode = run_episode(stage, Shuffled(policy, k, seen[i], i), seed=HELD_OUT_SEED + i)
            energies_j.append(episode.totals.energy_j)
            kept += int(episode.records.meets(slo).sum())
            requests += episode.totals.arrivals
        intact = energies_j if k is None else intact
        change = paired_ratio(energies_j, intact)
        low, high = change.low or change.mean, change.high or change.mean
        name = "none" if k is None else policy.codec.features[k]
        shown = f"{100 * change.mean - 100:+.1f} ({100 * low - 100:+.1f}..{100 * high - 100:+.1f})"
        print(f"| {name} | {'-' if k is None else shown} | {kept / requests:.3f} |", flush=True)


if __name__ == "__main__":
    main()
