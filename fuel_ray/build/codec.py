"""What policies see and may choose, and how windows are scored."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np

from fuel_ray import __version__
from fuel_ray.build.nodes import build_loop, twin_of
from fuel_ray.codec import GREENDLS_GRID, SEED_GRID, ActionGrid, Codec, Encoder, RunningScale, node_grid
from fuel_ray.config import LearnConfig
from fuel_ray.drift import observed_ranges
from fuel_ray.errors import ConfigError
from fuel_ray.policies.learned import Manifest
from fuel_ray.sim.pack import load_pack
from fuel_ray.types import NodeSpec, WindowMetrics
from fuel_ray.workload.spec import parse_workload

# What a generalist is trained on: KV pools (tokens; None: the pack's) with the highest rate of each, which is
# a little beyond what the pool serves within the SLO
POOLS = ((14_000, 8.0), (26_000, 14.0), (None, 24.0))
_SCALE_EPISODES = 20
_RANGE_EPISODES = 60
_MIXED_RANGE_EPISODES = 200  # each is one draw of rates and lengths


def build_grid(config: LearnConfig, spec: NodeSpec) -> ActionGrid:
    """The action grid that the settings name, for this node.

    Raises:
        ConfigError: it has batch limits, and the node's cannot be set.
    """
    if config.grid != "node" and spec.batch_limits[0] == spec.batch_limits[1]:
        raise ConfigError(
            f"--grid {config.grid} has several batch limits, but the server's batch limit cannot be set: "
            "give its FUEL_RAY_LIMIT_FILE with --live.limit-file, or use --grid node"
        )
    if config.grid == "seed":
        return SEED_GRID
    if config.grid == "greendls":
        return GREENDLS_GRID
    return node_grid(
        spec,
        clock_step_mhz=config.grid_clock_step_mhz,
        lowest_clock_share=config.grid_lowest_clock_share,
        batch_limits=config.grid_batch_limits,
    )


def build_codec(config: LearnConfig, spec: NodeSpec) -> Codec:
    """What policies see and may choose on this node."""
    features = config.features
    if config.conditional and "kv_block_size" not in features:
        features = (*features, "kv_block_size")
    return Codec(
        features=features,
        grid=build_grid(config, spec),
        slo=config.slo,
        miss_price_j=config.miss_price_j,
        extra_features=config.extra_features,
        running_scale=_random_scale(config, spec.kv_block_size)
        if config.normalisation == "running"
        else None,
    )


@lru_cache(maxsize=64)
def _random_scale(config: LearnConfig, kv_block_size: int) -> RunningScale:
    """Mean and spread of the features while random actions are taken, the same in every process."""
    size = config.block_sizes[0] if config.conditional else kv_block_size
    scale = RunningScale()
    codec, spec, episodes = _random_episodes(config, size)
    encoder = Encoder(replace(codec, running_scale=scale), spec, learn_scale=True)
    for episode in episodes:
        encoder.reset()
        for window in episode:
            encoder.encode(window)
    return scale


def _random_episodes(
    config: LearnConfig, kv_block_size: int, *, episodes: int = _SCALE_EPISODES
) -> tuple[Codec, NodeSpec, Iterator[Iterator[WindowMetrics]]]:
    """Windows of the twin under random actions, and the codec of fixed scales for them."""
    plain = replace(twin_of(config), normalisation="fixed")
    if config.mode == "generalist":
        plain = replace(plain, workload=f"mixed:high_rps={dict(POOLS).get(config.kv_tokens, 14.0)}")
    rng = np.random.default_rng(config.seed)
    steps = config.train.episode_steps
    loop = build_loop(plain, kv_block_size, horizon_s=float(steps + 1), random_start=True, part="first half")
    codec = build_codec(plain, loop.node.spec)

    def episode() -> Iterator[WindowMetrics]:
        yield loop.reset(seed=int(rng.integers(2**31)))
        for _ in range(steps):
            yield loop.step(codec.grid.decode(int(rng.integers(len(codec.grid))))).metrics

    return codec, loop.node.spec, (episode() for _ in range(episodes))


def build_manifest(
    config: LearnConfig, spec: NodeSpec, *, block_sizes: tuple[int, ...], engine: str
) -> Manifest:
    """What a policy that is trained so is made for."""
    pack = load_pack(config.pack)
    episodes = _MIXED_RANGE_EPISODES if config.mode == "generalist" else _RANGE_EPISODES
    return Manifest(
        kv_block_sizes=block_sizes,
        model=spec.model,
        gpu_name=spec.gpu_name,
        engine=engine,
        pack=pack.name,
        pack_sha256=pack.sha256,
        reward=config.reward,
        workload=config.workload,
        workload_digest=parse_workload(config.workload).digest(),
        head=config.train.head,
        algorithm=config.train.algorithm,
        needs=config.extra_features,
        fuel_ray_version=__version__,
        feature_ranges=observed_ranges(*_random_episodes(config, block_sizes[0], episodes=episodes)),
    )
