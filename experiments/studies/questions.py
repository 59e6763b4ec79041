"""The questions that the design leaves open, each answered by trainings that differ in one thing.

    python experiments/studies/questions.py --out FOLDER [--only features ...] [--steps N] [--trainings 3]
        [--slos tight]

A question is a cell of the arena, or one for each node where the nodes differ, in FOLDER/QUESTION/CELL. Each
of its variants is trained for the cell, as often as ``--trainings``, and plays in it as NAME#0, NAME#1, ..:
price and anchor, or the offset of its clocks, are tuned and swept, so that the tables compare energy with
the best simple rule of the cell at equal attainment, with 95 % intervals over seeds and trainings. Flags are
those of ``fuel-ray arena``; nothing is searched in hindsight and the published rules do not play. Cells of
different nodes have rules of their own: compare their J/req at the attainments that stand beside it.

features          the seed's ten features, and some more or scaled by their running mean and spread; without
                  branches, which need features that can be compiled
reward            energy or GreenDLS's reward, the plain preset's DQN at one price
prefix caching    the prefix-heavy chat with and without it
scarce KV         block sizes 8 to 64, a DQN each, on the default load
ample KV          the same on diurnal 1..20
conditional       one DQN for the four sizes, on as many windows as each of those beside it; without branches

It takes half a CPU minute of baselines per cell and, per training, 1 CPU minute (60,000 windows on branches)
or, estimated, 3 (``reward``, ``conditional``) or 7 (``features``: not compiled, so that scoring takes most of
it); then a minute per policy in the arena, 2 where it is not compiled. In 3 trainings each: prefix caching 10
CPU minutes, scarce KV 20, and estimated ample KV 20, reward 25, conditional 70, features 150. ``--only``
picks questions. With ``--steps 600 --trainings 1 --seconds 60 --seeds 3 --tuning-seeds 1 --axis-seeds 0`` it
shows that it runs.

What to expect (docs/notes/2026-11-27-questions.md): without prefix caching the chat is overloaded, 20 % of
the SLO at most; with scarce KV the DQN of block size 64 is better than its best simple rule (-1.6 %), and
those of 8, 16 and 32 do not differ from theirs beyond the interval. The others were not measured yet at equal
attainment. With 40,000 windows at unequal attainment (docs/notes/2026-11-26-questions.md) whoever saved more
missed more; GreenDLS's reward kept the SLO for 60 % of requests; and one policy for all four sizes missed
more than one for each.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace

from specialists import TRAININGS, Variant, study, unless_given

from fuel_ray.codec import PLAIN_FEATURES, PRICED_FEATURES, SEED_FEATURES
from fuel_ray.commands.arena import parse

ARENA = {"--slos": ("tight",), "--no-oracle": (), "--no-peers": ()}
DEFAULT, AMPLE, CHAT = (
    {"--scenarios": (name,)} for name in ("diurnal-scarce", "diurnal-ample", "chat-prefix")
)
SIZES = ("8", "16", "32", "64")
FREE = ("--train.branch-tries", "0")
GREENDLS = ("--reward", "greendls_kv_normalized", "--slo-e2e-s", "10", "--no-anchor")
DQN = Variant("dqn")
TOGETHER = Variant("one-for-all", (*FREE, "--conditional", "--block-sizes", *SIZES))


@dataclass(frozen=True, slots=True)
class Stage:
    """A cell: what is said of it to the arena, and who plays."""

    name: str
    flags: Mapping[str, tuple[str, ...]]
    variants: tuple[Variant, ...]


def _seen(name: str, features: tuple[str, ...], *flags: str) -> Variant:
    return Variant(name, (*FREE, "--features", *features, *flags))


def _sizes(load: Mapping[str, tuple[str, ...]], *variants: Variant) -> list[Stage]:
    return [Stage(f"block_{size}", {**load, "--block-sizes": (size,)}, variants) for size in SIZES]


TEN, HITS = (*SEED_FEATURES, "miss_price"), "prefix_cache_hit_rate"
QUESTIONS: dict[str, list[Stage]] = {
    "features": [
        Stage(
            "cell",
            DEFAULT,
            (
                _seen("seed-10", TEN),
                _seen("seed-10-running-scale", TEN, "--normalisation", "running"),
                _seen("seed-and-hit-rate", (*TEN, HITS)),
                _seen("seed-and-hit-rate-attainment", (*TEN, HITS, "slo_attainment")),
                _seen("seed-and-kv-shares", (*TEN, "kv_used_share", "kv_free_share")),
                _seen("plain-13", (*PLAIN_FEATURES, "miss_price")),
                _seen("default", PRICED_FEATURES),
            ),
        )
    ],
    "reward": [
        Stage(
            "cell",
            DEFAULT,
            (
                Variant("energy", ("--preset", "plain", "--no-anchor")),
                Variant("greendls-kv", ("--preset", "plain", *GREENDLS)),
            ),
        )
    ],
    "prefix caching": [
        Stage("on", CHAT, (DQN,)),
        Stage("off", {**CHAT, "--no-prefix-caching": ()}, (DQN,)),
    ],
    "scarce KV": _sizes(DEFAULT, DQN),
    "ample KV": _sizes(AMPLE, DQN),
    "conditional": _sizes(DEFAULT, TOGETHER, Variant("one-for-each", FREE)),
}


def main() -> None:
    arguments = argparse.ArgumentParser(allow_abbrev=False)
    arguments.add_argument("--only", nargs="+", default=list(QUESTIONS), choices=list(QUESTIONS))
    arguments.add_argument("--steps", help="windows of every training")
    arguments.add_argument("--trainings", type=int, default=TRAININGS)
    given, flags = arguments.parse_known_args()
    steps = () if given.steps is None else ("--steps", given.steps)
    for question, stage in ((name, stage) for name in given.only for stage in QUESTIONS[name]):
        config = parse([*unless_given({**ARENA, **stage.flags}, flags), *flags], prog="questions")
        shared = config.out / question  # by all cells of a question
        variants = [
            replace(
                v,
                flags=(*v.flags, *steps),
                trainings=given.trainings,
                root=shared if v is TOGETHER else None,
            )
            for v in stage.variants
        ]
        print(f"\n{question}, {stage.name}")
        print(study(replace(config, out=shared / stage.name), variants), flush=True)


if __name__ == "__main__":
    main()
