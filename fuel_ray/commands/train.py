"""fuel-ray train: a policy per KV block size, without the comparison that a sweep adds."""

from dataclasses import replace
from functools import partial

from fuel_ray.algorithms import branches
from fuel_ray.config import TrainVerbConfig
from fuel_ray.progress import Bar
from fuel_ray.report.wording import slo_text
from fuel_ray.training.policies import train_policies
from fuel_ray.training.run import expected_s, in_rounds, parse_run, running


def parse(argv: list[str], *, prog: str) -> TrainVerbConfig:
    """Settings from flags; with --resume, those of the run."""
    config = parse_run(TrainVerbConfig, argv, prog=prog)
    per_episode = config.steps_per_episode or config.train.episode_steps
    steps = config.steps if config.episodes is None else config.episodes * per_episode
    own = config.train if branches(config) else replace(config.train, episode_steps=per_episode)
    return replace(config, steps=steps, train=own)


def run(config: TrainVerbConfig, around: Bar | None = None) -> int:
    """Train, or resume a training; prints where the policies are.

    As a stage of the bar ``around`` it leaves such words to the run that it is a stage of.
    """
    loads, own = [config.workload], Bar(expected_s(config), around=around)
    with running(config, "train", loads, held_out=(), is_stage=around is not None) as run_dir, own as bar:
        print(f"SLO    {slo_text(config.slo)}")
        work = partial(train_policies, run_dir=run_dir, workloads=loads, bar=bar)
        in_rounds(config, run_dir, work, table="learning.csv", bar=bar)
    if around is None:
        print(f"\npolicies  {run_dir / 'policies'}")
    return 0
