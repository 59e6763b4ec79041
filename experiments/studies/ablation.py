"""What each choice of the generalist preset is worth: trainings that differ in one thing.

    python experiments/studies/ablation.py [--steps 200000] [--seeds 5] [--only NAME ...] [--out FILE]

It asks which of the generalist's settings (held actions, smooth head, prioritised replay, gamma and n-step,
averaging) earn their place. Each row is one training (seed 0, block size 16). Its price of a miss is tuned
per cell on four tuning seeds, as in the arena. Cells show the change of energy per request against tuned
static on held-out seeds in %, with the attainment in brackets. Differences of a point or two are within what
two trainings of the same settings differ by (row "seed 1").

It takes a training per row, 91 to 103 s for 200,000 windows on one core (docs/notes/2026-11-26-arena.md),
and its tuning and held-out episodes in five cells after it; ``--only`` picks rows.

What to expect (docs/notes/2026-11-25-generalist.md): no row beats "the preset" in all five
cells. The preset is at -17.7, -25.3, -11.8, -8.6 and -0.6 % in the order of CELLS, uniform replay with gamma
0.9 at -11.2, -23.0, -10.7, -10.1 and -0.3 %. That was with the pack's format 1 and fewer features.

The default preset learns from branches and not by these settings: the study is of the generalist alone.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from fuel_ray.arena.cell import LIMITS_AMPLE, Job, held_out_rows, loop_of, tuning_runs
from fuel_ray.arena.config import ArenaConfig
from fuel_ray.arena.scenarios import SCENARIOS, SloName
from fuel_ray.build.codec import build_codec
from fuel_ray.build.nodes import build_spec
from fuel_ray.config import PRESETS, SweepConfig
from fuel_ray.policies.catalogue import Contender
from fuel_ray.policies.learned import LearnedPolicy
from fuel_ray.policies.static import Static
from fuel_ray.training.trials import averaged, run_trials, start_ray
from fuel_ray.tuning.contenders import LOG_PRICES
from fuel_ray.tuning.episodes import HELD_OUT_SEED
from fuel_ray.tuning.runs import Runs, plays_of
from fuel_ray.tuning.search import LIMITS_SCARCE, tuned
from fuel_ray.tuning.search import tune_static_pair as tune_static

CELLS: tuple[tuple[str, SloName], ...] = (
    ("diurnal-scarce", "interactive"),
    ("diurnal-scarce", "tight"),
    ("diurnal-ample", "tight"),
    ("mmpp", "tight"),
    ("steady-30", "tight"),
)
BASE = replace(PRESETS["generalist"], block_sizes=(16,))


def _with(**changes: object) -> SweepConfig:
    return replace(BASE, train=replace(BASE.train, **changes))


VARIANTS: dict[str, SweepConfig] = {
    "the preset": BASE,
    "seed 1": replace(BASE, seed=1),
    "actions held for 1 window": _with(hold_steps=1),
    "additive head, 75 MHz": replace(_with(head="additive"), grid_clock_step_mhz=75),
    "uniform replay": _with(priority=0.0),
    "gamma 0.9, 3 steps": _with(gamma=0.9, n_step=3),
    "gamma 0.97, 5 steps": _with(gamma=0.97),
}


class Cell:
    """A scenario and a promise, with tuned static and what it costs on held-out seeds."""

    def __init__(self, scenario: str, slo: SloName, seeds: int) -> None:
        own = SCENARIOS[scenario]
        job = Job(ArenaConfig(slos=(slo,), seeds=seeds, tuning_seeds=4), own)
        self.slo = slo
        self.tuning = tuning_runs(job, loop_of(job, own))
        loop = loop_of(job, own, part="second half")
        limits = LIMITS_AMPLE if own.kv_tokens is None else LIMITS_SCARCE
        self.static, self.share = tune_static(self.tuning, slo, share=0.97, limits=limits)
        slos = self.tuning.slos
        self.alone = [Runs(loop, seeds=[HELD_OUT_SEED + i], seconds=1200, slos=slos) for i in range(seeds)]
        self.static_j, self.static_kept = self.figures(Static(self.static))

    def figures(self, policy: Static | LearnedPolicy) -> tuple[float, float]:
        """J per request and attainment."""
        rows = held_out_rows("", plays_of(policy, self.alone), self.alone, self.slo)
        requests = [row["requests"] for row in rows]
        kept = float(np.average([row["slo_attainment"] for row in rows], weights=requests))
        return sum(row["energy_j"] for row in rows) / sum(requests), kept

    def shown(self, config: SweepConfig, arrays: dict[str, np.ndarray]) -> str:
        """The learned policy's change against tuned static."""
        spec = self.tuning.loop.node.spec
        plain = LearnedPolicy(arrays, build_codec(config, spec), spec, head=config.train.head)
        promise = self.tuning.slos[self.slo]
        contender = Contender("", lambda x: plain.for_slo(promise, miss_price_j=10.0**x), LOG_PRICES, True)
        policy, _ = tuned([contender], self.tuning, self.slo, share=self.share)
        assert isinstance(policy, LearnedPolicy)
        energy_j, kept = self.figures(policy)
        return f"{100 * (energy_j / self.static_j - 1):+.1f} ({kept:.3f})"


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--steps", type=int, default=200_000)
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    cells = [Cell(scenario, slo, given.seeds) for scenario, slo in CELLS]
    head = "| | " + " | ".join(f"{scenario}, {slo}" for scenario, slo in CELLS) + " |"
    _say(head + "\n|---|" + "--:|" * len(CELLS), given.out)
    static = " | ".join(f"{cell.static_j:.1f} J ({cell.static_kept:.3f})" for cell in cells)
    _say(f"| tuned static | {static} |", given.out)
    for name in given.only:
        config = replace(
            VARIANTS[name], steps=given.steps, train=replace(VARIANTS[name].train, average_results=1)
        )
        grid = build_codec(config, build_spec(config, config.block_sizes[0])).grid
        start_ray(config)
        with tempfile.TemporaryDirectory() as folder:
            (trained,) = run_trials(config, Path(folder), grid, {})
        ends = {"": averaged(trained.results, last=3)[-1].arrays}
        if name == "the preset":
            ends[", last result alone"] = trained.results[-1].arrays
        for note, arrays in ends.items():
            shown = " | ".join(cell.shown(config, arrays) for cell in cells)
            _say(f"| {name}{note} | {shown} |", given.out)


def _say(line: str, out: Path | None) -> None:
    print(line, flush=True)
    if out is not None:
        with out.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
