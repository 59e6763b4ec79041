"""From settings to objects: the one place that chooses what a node is made of."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import product
from typing import Any, Literal, TypeVar

import numpy as np

from fuel_ray import __version__
from fuel_ray.build.live import live_engine, live_node, live_spec
from fuel_ray.codec import GREENDLS_GRID, SEED_GRID, ActionGrid, Codec, Encoder, RunningScale, node_grid
from fuel_ray.config import PRESETS, LearnConfig, ServingConfig
from fuel_ray.control import ControlLoop
from fuel_ray.drift import observed_ranges
from fuel_ray.env import ServingEnv
from fuel_ray.errors import ConfigError
from fuel_ray.guard import Guard
from fuel_ray.objective import Energy, GreenDls, Objective
from fuel_ray.policies.anchor import Anchor, Tether
from fuel_ray.policies.learned import Manifest
from fuel_ray.sim.node import SimulatedNode
from fuel_ray.sim.perf_model import load_pack, step_cost
from fuel_ray.types import Node, NodeSpec, WindowMetrics
from fuel_ray.workload import parse_workload

# Mean output and prompt length for which the energy reward's reference is computed
_REFERENCE_SEQS, _REFERENCE_CONTEXT = 16, 16 * 700
_SCALE_EPISODES = 20
# What a generalist is trained on: KV pools (tokens; None: the pack's) with the highest rate of each, which is
# a little beyond what the pool serves within the SLO; TPOT limits; prices of a miss
_POOLS = ((14_000, 8.0), (26_000, 14.0), (None, 24.0))
_TPOTS_S = (0.0095, 0.011, 0.0125, 0.015, 0.018, 0.021, 0.03, 0.05)
_PRICES_J = (10.0, 30.0, 70.0, 150.0, 300.0, 700.0, 1500.0, 4000.0)

# Of a recorded trace, of which there is only one: what is learned from and tuned on, what is reported on
Part = Literal["whole", "first half", "second half"]

Settings = TypeVar("Settings", bound=ServingConfig)


def build_node(
    config: ServingConfig,
    kv_block_size: int,
    *,
    horizon_s: float,
    workload: str | None = None,
    random_start: bool = False,
    part: Part = "whole",
) -> Node:
    """A node as the settings describe it; a live one starts its server, which takes a minute or two.

    ``random_start`` begins each episode at a random point of the workload's period. A recorded trace always
    does: nothing else in it would differ from seed to seed. ``part`` matters to such a trace alone.

    Raises:
        ConfigError: pack or workload is unknown or malformed.
        UnsupportedError: the live server cannot have this block size.
        NodeError: no such GPU, or the live server did not start.
    """
    if config.node == "ray":
        from fuel_ray.build.cluster import remote_node  # noqa: PLC0415  (only this kind of node waits for Ray)

        build = partial(build_node, kv_block_size=kv_block_size, horizon_s=horizon_s)
        return remote_node(config, partial(build, workload=workload, random_start=random_start, part=part))
    load = parse_workload(config.workload if workload is None else workload)
    if (halves := load.halves) is not None:
        random_start = True
        load = {"whole": load, "first half": halves[0], "second half": halves[1]}[part]
    if config.node == "live":
        return live_node(config, kv_block_size, load, horizon_s=horizon_s, random_start=random_start)
    return SimulatedNode(
        load_pack(config.pack),
        load,
        kv_block_size=kv_block_size,
        horizon_s=horizon_s,
        kv_tokens=config.kv_tokens,
        max_num_seqs=config.max_num_seqs,
        gpu_clocks_mhz=config.gpu_clocks_mhz,
        prefix_caching=config.prefix_caching,
        random_start=random_start,
    )


def build_spec(config: ServingConfig, kv_block_size: int) -> NodeSpec:
    """What such a node is, without starting a server.

    Raises:
        NodeError: there is no such GPU.
    """
    if config.node == "ray":
        from fuel_ray.build.cluster import ask_node  # noqa: PLC0415  (only this kind of node waits for Ray)

        return ask_node(config, partial(build_spec, kv_block_size=kv_block_size))
    if config.node == "live":
        return live_spec(config, kv_block_size)
    return build_node(config, kv_block_size, horizon_s=1.0).spec


def build_engine(config: ServingConfig, kv_block_size: int) -> str:
    """Name and version of what serves; a live server is started to say it.

    Raises:
        UnsupportedError: the live server cannot have this block size.
        NodeError: no such GPU, or the live server did not start.
    """
    if config.node == "ray":
        from fuel_ray.build.cluster import ask_node  # noqa: PLC0415  (only this kind of node waits for Ray)

        return ask_node(config, partial(build_engine, kv_block_size=kv_block_size))
    if config.node == "live":
        return live_engine(config, kv_block_size, parse_workload(config.workload))
    return load_pack(config.pack).engine


def twinned(config: Settings) -> Settings:
    """The settings with the choice of clocks limited to those that both a live node and its twin have.

    Raises:
        ConfigError: there is none, so the pack is of another GPU.
        NodeError: there is no such GPU.
    """
    if not config.live_server:
        return config
    pack, spec = load_pack(config.pack), build_spec(config, config.block_sizes[0])
    common = tuple(clock for clock in spec.gpu_clocks_mhz if clock in set(pack.gpu_clocks_mhz))
    if not common:
        raise ConfigError(
            f"--pack {pack.name}: {spec.gpu_name} has none of its clocks; fit one with `fuel-ray profile` "
            "and `fuel-ray calibrate`"
        )
    return replace(config, gpu_clocks_mhz=common)


def twin_of(config: Settings) -> Settings:
    """The simulated node of the same settings, for what a live one has no time for."""
    return replace(config, node="sim")


def build_objective(config: ServingConfig) -> Objective:
    """The reward that the settings name."""
    if config.reward == "energy":
        perf = load_pack(config.pack).perf
        duration_s, power_w, _ = step_cost(
            perf, _REFERENCE_SEQS, _REFERENCE_CONTEXT, 0, 0.7 * perf.max_clock_mhz
        )
        return Energy(
            slo=config.slo,
            token_price_j=duration_s * power_w / _REFERENCE_SEQS,
            miss_price_j=config.miss_price_j,
            scale_w=power_w,
        )
    if config.slo_e2e_s is None:
        raise AssertionError("validated before: the GreenDLS rewards need an e2e SLO")
    return GreenDls(
        slo_e2e_s=config.slo_e2e_s,
        kv=config.reward != "greendls",
        normalized=config.reward == "greendls_kv_normalized",
    )


def build_grid(config: LearnConfig, spec: NodeSpec) -> ActionGrid:
    """The action grid that the settings name, for this node."""
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
    config: LearnConfig, kv_block_size: int
) -> tuple[Codec, NodeSpec, Iterator[Iterator[WindowMetrics]]]:
    """Windows of the twin under random actions, and the codec of fixed scales for them."""
    plain = replace(twin_of(config), normalisation="fixed")
    if config.generalist:
        plain = replace(plain, workload=f"mixed:high_rps={dict(_POOLS).get(config.kv_tokens, 14.0)}")
    rng = np.random.default_rng(config.seed)
    steps = config.train.episode_steps
    loop = build_loop(plain, kv_block_size, horizon_s=float(steps + 1), random_start=True, part="first half")
    codec = build_codec(plain, loop.node.spec)

    def episode() -> Iterator[WindowMetrics]:
        yield loop.reset(seed=int(rng.integers(2**31)))
        for _ in range(steps):
            yield loop.step(codec.grid.decode(int(rng.integers(len(codec.grid))))).metrics

    return codec, loop.node.spec, (episode() for _ in range(_SCALE_EPISODES))


def build_manifest(config: LearnConfig, block_sizes: tuple[int, ...], engine: str) -> Manifest:
    """What a policy that is trained so is made for."""
    pack = load_pack(config.pack)
    spec = build_spec(config, block_sizes[0])
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
        fuel_ray_version=__version__,
        feature_ranges=observed_ranges(*_random_episodes(config, block_sizes[0])),
    )


def build_loop(
    config: ServingConfig,
    kv_block_size: int,
    *,
    horizon_s: float,
    workload: str | None = None,
    random_start: bool = False,
    part: Part = "whole",
    interval_s: float = 1.0,
) -> ControlLoop:
    """A node under control."""
    node = build_node(
        config, kv_block_size, horizon_s=horizon_s, workload=workload, random_start=random_start, part=part
    )
    guard = Guard(config.guard.rules(config.slo, node.spec))
    return ControlLoop(node, build_objective(config), interval_s=interval_s, guard=guard)


def build_env(config: LearnConfig, block_sizes: Sequence[int], *, anchor: Anchor | None = None) -> ServingEnv:
    """A training environment over these block sizes; episodes begin at a random point of the workload.

    ``anchor`` is what a specialist, on one block size of a simulated node, explores near to.
    """
    if config.generalist:
        return _any_load(config, block_sizes)
    if config.specialist:
        return _any_price(config, block_sizes, anchor)
    steps = config.train.episode_steps
    build = partial(build_loop, config, horizon_s=float(steps + 1), random_start=True, part="first half")
    loops = [build(size) for size in block_sizes]
    return ServingEnv(loops, build_codec(config, loops[0].node.spec), steps=steps, failures=_patience(config))


def _patience(config: ServingConfig) -> int:
    """Failures of a node in a row after which training on it is given up."""
    return config.node_failures if config.node == "ray" else 1


def _any_load(config: LearnConfig, block_sizes: Sequence[int]) -> ServingEnv:
    """Loads, pools, TPOT limits and prices in every combination; combinations on one pool share its node."""
    steps = config.train.episode_steps
    loops, codecs = [], []
    for size, (kv_tokens, high_rps) in product(block_sizes, _POOLS):
        own = replace(config, kv_tokens=kv_tokens)
        node = build_node(own, size, horizon_s=float(steps + 1), workload=f"mixed:high_rps={high_rps}")
        codec = build_codec(config, node.spec)
        for tpot_s, price_j in product(_TPOTS_S, _PRICES_J):
            told = replace(own, slo_tpot_s=tpot_s, miss_price_j=price_j)
            loops.append(_priced(told, node))
            codecs.append(replace(codec, slo=told.slo, miss_price_j=price_j))
    return ServingEnv(loops, codecs[0], steps=steps, codecs=codecs)


def _any_price(config: LearnConfig, block_sizes: Sequence[int], anchor: Anchor | None) -> ServingEnv:
    """The load of the settings at every price; on the twin, beside its load table if that is given."""
    steps = config.train.episode_steps
    if config.node != "sim":
        anchor = None  # a real node has no second one beside it
    loops, codecs, shadows = [], [], []
    for size in block_sizes:
        build = partial(build_node, config, size, horizon_s=float(steps + 1))
        make_node = partial(build, random_start=True, part="first half")
        node, shadow = make_node(), None if anchor is None else make_node()
        codec = build_codec(config, node.spec)
        for price_j in _PRICES_J:
            told = replace(config, miss_price_j=price_j)
            loops.append(_priced(told, node))
            codecs.append(replace(codec, miss_price_j=price_j))
            shadows.append(None if shadow is None else _priced(told, shadow))
    tether = None if anchor is None else Tether(anchor, codecs[0].grid)
    return ServingEnv(
        loops,
        codecs[0],
        steps=steps,
        failures=_patience(config),
        codecs=codecs,
        tether=tether,
        shadows=shadows,
    )


def _priced(told: LearnConfig, node: Node) -> ControlLoop:
    """A node under control at the price and the promise of the settings."""
    objective = build_objective(told)
    if isinstance(objective, Energy):  # rewards of one size, whatever the price
        objective = replace(objective, scale_w=objective.scale_w * (1.0 + told.miss_price_j / 200.0))
    return ControlLoop(node, objective, guard=Guard(told.guard.rules(told.slo, node.spec)))


def serving_env(kv_block_size: int = 16, preset: str = "default", **_: Any) -> ServingEnv:
    """What ``gymnasium.make("fuel_ray.env:fuel_ray/Serving-v0")`` makes."""
    return build_env(PRESETS[preset], [kv_block_size])
