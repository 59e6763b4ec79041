"""From settings to nodes that Ray actors own: where they are, with which GPUs, on which server."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, TypeVar

from fuel_ray.build.live import ACTOR, LiveServer, num_gpus
from fuel_ray.build.nodes import is_kept, numbered
from fuel_ray.cluster.hosts import driver_resource, require_nodes
from fuel_ray.cluster.node import NoServer, RemoteNode, Server, end_actors, facts_of, node_actor
from fuel_ray.config import ServingConfig
from fuel_ray.errors import UnsupportedError
from fuel_ray.types import Node, NodeSpec

SIM_START_S = 60.0  # Ray starts a process, which imports and compiles

Kept = TypeVar("Kept", bound=ServingConfig)
# What a node is, its engine and its max_model_len, or why there is none
Answer = tuple[NodeSpec, str, int | None] | UnsupportedError


def remote_node(
    config: ServingConfig, kv_block_size: int, build: Callable[[ServingConfig], Node]
) -> RemoteNode:
    """A node that an actor owns, made there by ``build``: on a server that the run keeps, or on its own."""
    there, start_s = _there(config), _start_s(config)
    made = partial(_on_server, there, build)
    if is_kept(config):
        return RemoteNode(made, name=_actor_name(config, kv_block_size), start_s=start_s)
    gpus = gpus_per_node(config)
    require_nodes(1, gpus=gpus, wait_s=config.node_wait_s)
    return RemoteNode(made, serve=partial(_serve, there, kv_block_size), gpus=gpus, start_s=start_s)


def gpus_per_node(config: ServingConfig) -> int:
    """GPUs that a node of the cluster has to itself."""
    return num_gpus(config) if config.live_server and config.node == "ray" else 0


@contextlib.contextmanager
def kept_servers(
    config: Kept, *, run: str, at_once: int, nodes_each: int
) -> Iterator[tuple[Kept, dict[int, Answer]]]:
    """Start the servers of the first ``at_once`` block sizes together and keep them while the block runs.

    A block size that is refused makes room for the next. Gives the settings whose nodes are on these servers,
    and what each of those asked is. They are in named actors of this process, which end with it, however it
    ends.

    Raises:
        ConfigError: the cluster has too few nodes.
        NodeError: a server did not start.
    """
    gpus, here = gpus_per_node(config), driver_resource() if config.node == "live" else None
    if config.node == "ray":
        require_nodes(at_once * nodes_each, gpus=gpus, wait_s=config.node_wait_s)
    kept = replace(config, live=replace(config.live, server=ACTOR + run))
    actors: dict[tuple[int, int], Any] = {}
    answers: dict[tuple[int, int], Any] = {}
    left = config.block_sizes
    try:
        while room := min(at_once - len(actors) // nodes_each, len(left)):
            for size, k in product(left[:room], range(nodes_each)):
                name, serve = _actor_name(numbered(kept, k), size), partial(_serve, _there(config), size)
                actors[size, k] = node_actor(serve, gpus=gpus, name=name, resources=here)
            asked = {key: actor for key, actor in actors.items() if key not in answers}
            answers |= facts_of(asked, timeout_s=_start_s(config))
            refused = [key for key in asked if isinstance(answers[key], UnsupportedError)]
            end_actors([actors.pop(key) for key in refused])
            left = left[room:]
        yield kept, {size: answers[size, 0] for size in config.block_sizes if (size, 0) in answers}
    finally:
        end_actors(actors.values())


def _actor_name(config: ServingConfig, kv_block_size: int) -> str:
    return f"{str(config.live.server).removeprefix(ACTOR)}-block-{kv_block_size}"


def _serve(config: ServingConfig, kv_block_size: int, gpu_ids: tuple[str, ...]) -> Server:
    """In the actor: its server, on the GPUs that Ray gave to it."""
    if config.node != "live":
        return NoServer(gpu_ids)
    if gpu_ids:
        config = replace(config, live=replace(config.live, gpu_ids=gpu_ids))
    return LiveServer(config, kv_block_size)


def _on_server(config: ServingConfig, build: Callable[[ServingConfig], Node], server: Server) -> Node:
    """In the actor: the node."""
    return build(replace(config, live=server.config.live) if isinstance(server, LiveServer) else config)


def _there(config: ServingConfig) -> ServingConfig:
    """The same settings as the node's own machine sees them."""
    live = replace(config.live, server=None) if is_kept(config) else config.live
    return replace(config, node="live" if config.live_server else "sim", live=live)


def _start_s(config: ServingConfig) -> float:
    """How long a node may take: until one is free, and until its server answers."""
    return config.node_wait_s + (config.live.start_timeout_s if config.live_server else SIM_START_S)
