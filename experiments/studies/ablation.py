"""What each part of the default preset is worth: trainings that differ in one thing, at equal attainment.

    python experiments/studies/ablation.py --out FOLDER [--only NAME ...] [--steps 60000] [--trainings 3]
        [--scenarios diurnal-scarce --slos tight]

Every variant is trained for the load, as often as ``--trainings``, and all of them play one arena cell per
load and SLO (by default the default load, tight) as policies NAME#0, NAME#1, ..: price and anchor are tuned
and swept for each as for the DQN. Flags are those of ``fuel-ray arena``; nothing is searched in hindsight and
the published rules do not play. The table says energy against the best simple rule at equal attainment with
its 95 % interval over seeds and trainings, as tuned, and the attainment.

dqn                the default preset
no-branches        it learns by temporal differences from what it does, on as many windows
no-branches-200k   the same on 200,000 windows, as live nodes are advised
steps-180k         three times the windows, in a larger buffer
no-anchor          it plays without the rule: any clock, any batch limit
fixed-price        one price of a miss and a smooth head in place of a priced one, so without branches too;
                   its dial moves all clocks
one-result         the weights of one training result, not the mean of two
hold-1, hold-6     windows for which another action is held in a branch (3)
horizon-10, -40    windows after which branches are compared (20)
more-limits        a grid with more batch limits, some of them lower than the rule's, which are not taken
lower-limits       the same, and the lower ones are tried and taken
rllib-dqn, ppo     RLlib's own on as many windows
...-same-time      RLlib's own for as long as the default's training took, by their measured rates

It asks which parts of the default preset earn their place. It takes a CPU minute for the baselines and,
estimated, per training: 1.5 CPU minutes (dqn and what differs in branches), 3 to 5 (others on 60,000
windows; RLlib's perhaps 10) or 7 (200,000); then half a minute per policy for its dial and held-out seeds, 2
for fixed-price. All of it, 16 variants in 3 trainings each: about 180 CPU minutes. ``--only`` picks variants;
a ``-same-time`` needs the plain one and dqn. With ``--steps 600 --trainings 1 --seconds 60 --seeds 3
--tuning-seeds 1 --axis-seeds 0`` it only shows that it runs.

What to expect (docs/arena.md, 2026-11-27, default workload, tight, n = 10, 3 trainings): dqn -0.5 % against
the best simple rule. No variant differs from it beyond the noise but no-branches, which gains nothing over
the rule, and no-anchor, which is worse (+4.5 %). One training of RLlib's DQN: as good as dqn on as many
windows, which take five times as long, and the rule itself in as much time. The others: not measured yet.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from specialists import TRAININGS, Variant, study, unless_given

from fuel_ray.codec import PRICED_FEATURES
from fuel_ray.commands.arena import parse

CELL = {"--scenarios": ("diurnal-scarce",), "--slos": ("tight",), "--no-oracle": (), "--no-peers": ()}
UNPRICED = tuple(name for name in PRICED_FEATURES if name != "miss_price")
LIMITS = ("--grid-batch-limits", "16", "24", "32", "40", "128")
RLLIB_DQN, PPO = ("--train.algorithm", "rllib-dqn"), ("--train.algorithm", "ppo")
VARIANTS = (
    Variant("dqn"),
    Variant("no-branches", ("--train.branch-tries", "0")),
    Variant("no-branches-200k", ("--train.branch-tries", "0", "--steps", "200000")),
    Variant("steps-180k", ("--steps", "180000", "--train.buffer-size", "200000")),
    Variant("no-anchor", ("--no-anchor",)),
    Variant("fixed-price", ("--mode", "fixed_price", "--train.head", "smooth", "--features", *UNPRICED)),
    Variant("one-result", ("--train.average-results", "1")),
    Variant("hold-1", ("--train.branch-hold", "1")),
    Variant("hold-6", ("--train.branch-hold", "6")),
    Variant("horizon-10", ("--train.branch-horizon", "10")),
    Variant("horizon-40", ("--train.branch-horizon", "40")),
    Variant("more-limits", LIMITS),
    Variant("lower-limits", ("--train.lower-limits", *LIMITS)),
    Variant("rllib-dqn", RLLIB_DQN),
    Variant("rllib-dqn-same-time", RLLIB_DQN, as_long=("rllib-dqn", "dqn")),
    Variant("ppo", PPO),
    Variant("ppo-same-time", PPO, as_long=("ppo", "dqn")),
)
NAMES = [variant.name for variant in VARIANTS]


def parsed(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """What this study adds to the flags of an arena, and these."""
    arguments = argparse.ArgumentParser(allow_abbrev=False)
    arguments.add_argument("--only", nargs="+", default=NAMES, choices=NAMES)
    arguments.add_argument("--steps", type=int, help="windows of every training that names none")
    arguments.add_argument("--trainings", type=int, default=TRAININGS)
    return arguments.parse_known_args(argv)


def main() -> None:
    given, flags = parsed()
    steps = () if given.steps is None else ("--steps", str(given.steps))
    chosen = [v for v in VARIANTS if v.name in given.only]
    variants = [replace(v, flags=(*steps, *v.flags), trainings=given.trainings) for v in chosen]
    print(study(parse([*unless_given(CELL, flags), *flags], prog="ablation"), variants))


if __name__ == "__main__":
    main()
