"""From settings to objects: the one place that chooses what a node is made of."""

from dataclasses import replace
from functools import partial
from typing import Literal, TypeVar

from fuel_ray.build.live import live_engine, live_node, live_spec
from fuel_ray.build.objective import build_objective
from fuel_ray.config import ServingConfig
from fuel_ray.control import ControlLoop
from fuel_ray.errors import ConfigError
from fuel_ray.guard import Guard
from fuel_ray.sim.node import SimulatedNode
from fuel_ray.sim.pack import load_pack
from fuel_ray.types import Node, NodeSpec
from fuel_ray.workload.spec import parse_workload

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
