"""From settings to objects: the one place that chooses what a node is made of."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Literal, TypeVar

from fuel_ray.build.live import ACTOR, LiveServer, live_node, live_spec, node_facts
from fuel_ray.build.objective import build_objective
from fuel_ray.config import ServingConfig
from fuel_ray.control import ControlLoop
from fuel_ray.errors import ConfigError
from fuel_ray.guard import Guard
from fuel_ray.sim.node import SimulatedNode
from fuel_ray.sim.pack import load_pack
from fuel_ray.types import Node, NodeSpec
from fuel_ray.workload.spec import parse_workload
from fuel_ray.workload.stretches import Stretches

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
    """A node as the settings describe it; a live one is on the server that they name (see ``LiveServer``).

    ``random_start`` begins each episode at a random point of the workload's period. A recorded trace always
    does: nothing else in it would differ from seed to seed. ``part`` matters to such a trace alone; of its
    second half the seeds are disjoint stretches.

    Raises:
        ConfigError: pack or workload is unknown or malformed.
        NodeError: no such GPU, or the server does not answer.
    """
    if config.node == "ray" or is_kept(config):
        from fuel_ray.build.cluster import remote_node  # noqa: PLC0415  (only this kind of node waits for Ray)

        build = partial(build_node, kv_block_size=kv_block_size, horizon_s=horizon_s)
        build = partial(build, workload=workload, random_start=random_start, part=part)
        return remote_node(config, kv_block_size, build)
    load = parse_workload(config.workload if workload is None else workload)
    if (halves := load.halves) is not None:
        random_start = True
        load = {"whole": load, "first half": halves[0], "second half": Stretches(halves[1])}[part]
    if config.node == "live":
        return live_node(config, kv_block_size, load, horizon_s=horizon_s, random_start=random_start)
    return SimulatedNode(
        load_pack(config.pack, config.clock_axis),
        load,
        kv_block_size=kv_block_size,
        horizon_s=horizon_s,
        kv_tokens=config.kv_tokens,
        max_num_seqs=config.max_num_seqs,
        limit_control=config.limit_control == "on",
        gpu_clocks_mhz=config.gpu_clocks_mhz,
        prefix_caching=config.prefix_caching,
        random_start=random_start,
    )


def build_spec(config: ServingConfig, kv_block_size: int) -> NodeSpec:
    """What such a node is, without starting a server.

    Raises:
        NodeError: there is no such GPU here.
    """
    if config.live_server:
        return live_spec(config, kv_block_size)
    return build_node(twin_of(config), kv_block_size, horizon_s=1.0).spec


def described(config: ServingConfig, kv_block_size: int) -> tuple[NodeSpec, str, int | None]:
    """What a node is, its engine and version, and its max_model_len where that is said.

    Raises:
        NodeError: the server of a live one does not answer.
    """
    if config.live_server:
        return node_facts(config, kv_block_size)
    pack = load_pack(config.pack)
    return build_spec(config, kv_block_size), pack.engine, pack.max_model_len


def twinned(config: Settings, specs: Iterable[NodeSpec]) -> Settings:
    """The settings with the choice of clocks limited to those that these live nodes and their twin all have.

    Raises:
        ConfigError: there is none, so the pack is of another GPU.
    """
    if not config.live_server:
        return config
    pack = load_pack(config.pack, config.clock_axis)
    common = set(pack.gpu_clocks_mhz).intersection(*(spec.gpu_clocks_mhz for spec in specs))
    if not common:
        raise ConfigError(
            f"--pack {pack.name}: the node's GPU supports none of the pack's clocks; fit a pack to your GPU "
            "with `fuel-ray profile` and `fuel-ray calibrate`"
        )
    return replace(config, gpu_clocks_mhz=tuple(sorted(common)))


def twin_of(config: Settings) -> Settings:
    """The simulated node of the same settings, for what a live one has no time for."""
    return replace(config, node="sim")


@contextlib.contextmanager
def served(config: Settings, kv_block_size: int) -> Iterator[Settings]:
    """Settings whose nodes can be built: a live one's server is started here, and stopped after the block."""
    if config.node != "live" or is_kept(config):
        yield config
        return
    print(f"serve  block {kv_block_size}: starting, log in {config.out}", flush=True)
    with contextlib.closing(LiveServer(config, kv_block_size)) as server:
        yield replace(config, live=server.config.live)


def is_kept(config: ServingConfig) -> bool:
    """Whether the servers are a run's, in actors of their own."""
    return config.live_server and (config.live.server or "").startswith(ACTOR)


def numbered(config: Settings, number: int) -> Settings:
    """The settings for one of several nodes of a trial."""
    if not is_kept(config) or not number:
        return config
    return replace(config, live=replace(config.live, server=f"{config.live.server}-{number}"))


def patience(config: ServingConfig) -> int:
    """Failures of a node in a row after which it is given up; until then an actor starts it again."""
    return config.node_failures if config.node == "ray" or is_kept(config) else 1


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
