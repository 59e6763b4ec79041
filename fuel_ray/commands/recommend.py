"""Which (block size, policy) pair to deploy for a load and a promise; tuned static where none is better."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fuel_ray.arena.config import RecommendConfig
from fuel_ray.arena.recommendation import Pair, by_size, line, of_size, recommendation, save
from fuel_ray.build.nodes import build_spec
from fuel_ray.errors import ConfigError
from fuel_ray.flags import parse_serving, validate_tune_share
from fuel_ray.policies.learned import (
    load_policy,
)
from fuel_ray.record import make_folder
from fuel_ray.tuning.episodes import TUNING_SEEDS
from fuel_ray.workload.spec import parse_workload


def parse(argv: list[str], *, prog: str) -> RecommendConfig:
    """Settings from flags.

    Raises:
        ConfigError: a flag is wrong, or no folder holds a policy for one of the block sizes.
        PolicyError: a folder is malformed, or made for another model or GPU.
    """
    config = parse_serving(RecommendConfig, argv, prog=prog)
    if config.node != "sim":
        raise ConfigError("recommend compares on simulated nodes; `fuel-ray evaluate` has live ones")
    for name, low, high in (
        ("seeds", 2, 10_000), ("tuning_seeds", 1, len(TUNING_SEEDS)), ("seconds", 60, 86_400),
        ("workers", 1, 256),
    ):  # fmt: skip
        if not low <= getattr(config, name) <= high:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} {getattr(config, name)}: must be from {low} to {high}")
    validate_tune_share(config.tune_share, config.slo_share)
    if not config.policies:
        raise ConfigError("--policies: give at least one folder, such as results/sweep-.../policies")
    config = replace(config, policies=tuple(f for folder in config.policies for f in _folders(folder)))
    parse_workload(config.workload)
    for size in config.block_sizes:
        for folder in of_size(config, size):
            load_policy(folder, build_spec(config, size), extra_features=config.extra_features)
    if not any(of_size(config, size) for size in config.block_sizes):
        raise ConfigError(f"--policies: none is for block size {', '.join(map(str, config.block_sizes))}")
    return config


def _folders(folder: Path) -> Iterator[Path]:
    if (folder / "manifest.json").is_file():
        yield folder
        return
    inside = sorted(path.parent for path in folder.glob("*/manifest.json"))
    if not inside:
        raise ConfigError(f"--policies {folder}: no policy folder, and none in it")
    yield from inside


def run(config: RecommendConfig) -> int:
    """Print every pair and the recommendation."""
    if config.save is not None:
        make_folder(config.save)
    pairs: list[Pair] = []
    for found in by_size(config):
        for pair in found:
            print(line(pair), flush=True)
        pairs += found
    best, sentence = recommendation(pairs, share=config.slo.share)
    print("\n" + sentence)
    if config.save is not None and best.told is not None:
        save(best, best.told, config)
        print(f"wrote {config.save}; to deploy: fuel-ray deploy --policy {config.save} ...")
    elif config.save is not None:
        print(f"nothing written to {config.save}: a static pair needs no policy")
    return 0
