"""The questions that the design leaves open, each answered by trainings that differ in one thing.

    python experiments/studies/questions.py [--only features ...] [--steps 120000] [--seeds 10] [--out FILE]

Every row is one DQN of the plain preset, trained on the default workload or the one named; the best of its
last four checkpoints taken on tuning seeds, evaluated on held-out seeds. Changes are against the first row of
their table, paired by seed, 95 % t intervals. One training per row: what two trainings of the same
settings differ by is in the table "seeds".

It takes a training of 120,000 windows per row (23 rows; 200,000 take 91 to 103 s on a core)
and the evaluation of each; ``--only`` picks tables.

What to expect (docs/notes/2026-11-26-questions.md, --steps 40000): 10 to 13 features lie within 3.6
% of each other and whoever saves more misses more; GreenDLS's reward saves as much as ours and keeps the SLO
for 60 % of requests only; without prefix caching the chat costs 44.6 % more; under scarce KV the block sizes
8 to 64 lie within 0.9 % of each other, and one conditional policy for all four misses more than a policy for
each.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fuel_ray.arena.cell import held_out_rows
from fuel_ray.arena.scenarios import INTERACTIVE
from fuel_ray.build.codec import build_codec
from fuel_ray.build.nodes import build_loop, build_spec
from fuel_ray.codec import SEED_FEATURES
from fuel_ray.config import PRESETS, SweepConfig
from fuel_ray.policies.learned import LearnedPolicy
from fuel_ray.stats import paired_ratio
from fuel_ray.training.trials import Trained, run_trials, start_ray
from fuel_ray.tuning.episodes import EPISODE_S, HELD_OUT_SEED, TUNING_SEEDS
from fuel_ray.tuning.runs import Runs, Score, plays_of
from fuel_ray.types import Slo

PLAIN = replace(PRESETS["plain"], block_sizes=(16,))
TEN = replace(PLAIN, features=SEED_FEATURES)
CHAT = replace(PLAIN, workload="chat-prefix:high_rps=20")
AMPLE = replace(PLAIN, workload="diurnal:high_rps=20", kv_tokens=None, slo_tpot_s=0.018)
SIZES = (8, 16, 32, 64)


def _more(*names: str) -> SweepConfig:
    return replace(TEN, features=(*SEED_FEATURES, *names))


# table: rows of (label, settings, block sizes that share the policy, the one evaluated)
QUESTIONS: dict[str, list[tuple[str, SweepConfig, tuple[int, ...]]]] = {
    "seeds": [(f"plain, training seed {seed}", replace(PLAIN, seed=seed), (16,)) for seed in (0, 1, 2)],
    "features": [
        ("10, those of the seed", TEN, (16,)),
        ("11, and prefix hit rate", _more("prefix_cache_hit_rate"), (16,)),
        ("12, and prefix hit rate, SLO attainment", _more("prefix_cache_hit_rate", "slo_attainment"), (16,)),
        ("12, and used and free KV share", _more("kv_used_share", "kv_free_share"), (16,)),
        ("13, plain: and rate average, clock, oldest wait", PLAIN, (16,)),
    ],
    "normalisation": [
        ("fixed scales", TEN, (16,)),
        ("running mean and spread", replace(TEN, normalisation="running"), (16,)),
    ],
    "reward": [
        ("energy", PLAIN, (16,)),
        ("greendls_kv_normalized", replace(PLAIN, reward="greendls_kv_normalized", slo_e2e_s=10.0), (16,)),
    ],
    "prefix caching": [
        ("on", CHAT, (16,)),
        ("off", replace(CHAT, prefix_caching=False), (16,)),
    ],
    "scarce KV": [(f"block {size}", PLAIN, (size,)) for size in SIZES],
    "conditional": [("one for 8, 16, 32, 64", replace(PLAIN, block_sizes=SIZES, conditional=True), SIZES)],
    "ample KV": [(f"block {size}", AMPLE, (size,)) for size in SIZES],
}


@dataclass(frozen=True, slots=True)
class Row:
    """A policy at one block size, per held-out seed."""

    label: str
    energy_j: np.ndarray
    requests: np.ndarray
    attained: float


def answer(label: str, config: SweepConfig, sizes: tuple[int, ...], given: Any) -> Iterator[Row]:
    """Train once and evaluate at every size."""
    config = replace(config, block_sizes=sizes, steps=given.steps)
    grid = build_codec(config, build_spec(config, config.block_sizes[0])).grid
    start_ray(config)
    with tempfile.TemporaryDirectory() as folder:
        (trained,) = run_trials(config, Path(folder), grid, {})
    for size in sizes:
        arrays = _best(config, trained, size)
        policy = _policy(config, arrays, size)
        runs = [_runs(config, size, [HELD_OUT_SEED + i], config.slo) for i in range(given.seeds)]
        rows = held_out_rows(label, plays_of(policy, runs), runs, "asked")
        requests = np.array([row["requests"] for row in rows])
        attained = np.average([row["slo_attainment"] for row in rows], weights=requests)
        name = label if len(sizes) == 1 else f"{label}, at {size}"
        yield Row(name, np.array([row["energy_j"] for row in rows]), requests, float(attained))


def _best(config: SweepConfig, trained: Trained, size: int) -> dict[str, np.ndarray]:
    tuning = _runs(config, size, TUNING_SEEDS[:4], config.slo)

    def rank(arrays: dict[str, np.ndarray]) -> tuple[bool, float]:
        score: Score = tuning.score(_policy(config, arrays, size), "asked", share=config.tune_share)
        return score.rank(config.tune_share)

    return min((result.arrays for result in trained.results[-4:]), key=rank)


def _policy(config: SweepConfig, arrays: dict[str, np.ndarray], size: int) -> LearnedPolicy:
    spec = build_loop(config, size, horizon_s=1.0).node.spec
    return LearnedPolicy(arrays, build_codec(config, spec), spec, head=config.train.head)


def _runs(config: SweepConfig, size: int, seeds: Sequence[int], slo: Slo) -> Runs:
    loop = build_loop(config, size, horizon_s=float(EPISODE_S))
    asked = replace(slo, e2e_s=None) if slo.ttft_s else INTERACTIVE
    return Runs(loop, seeds=seeds, seconds=float(EPISODE_S), slos={"asked": asked})


def table(title: str, rows: Sequence[Row]) -> str:
    lines = [
        f"\n**{title}**\n",
        "| | J/request | against the first, % (95 %) | of SLO |",
        "|---|--:|--:|--:|",
    ]
    for row in rows:
        change = paired_ratio(row.energy_j, rows[0].energy_j)
        low, high = change.low or change.mean, change.high or change.mean
        shown = (
            "-"
            if row is rows[0]
            else f"{100 * change.mean - 100:+.1f} ({100 * low - 100:+.1f}..{100 * high - 100:+.1f})"
        )
        lines.append(
            f"| {row.label} | {row.energy_j.sum() / row.requests.sum():.2f} | {shown} | {row.attained:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--only", nargs="*", default=list(QUESTIONS), choices=list(QUESTIONS))
    arguments.add_argument("--steps", type=int, default=120_000)
    arguments.add_argument("--seeds", type=int, default=10)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    for title in given.only:
        rows = [row for question in QUESTIONS[title] for row in answer(*question, given)]
        print(table(title, rows), flush=True)
        if given.out is not None:
            with given.out.open("a") as file:
                file.write(table(title, rows) + "\n")


if __name__ == "__main__":
    main()
