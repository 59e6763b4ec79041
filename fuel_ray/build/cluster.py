"""From settings to nodes of a Ray cluster: what is built on their machines, and with which GPUs."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

from fuel_ray.cluster.hosts import on_node, require_nodes
from fuel_ray.cluster.node import RemoteNode
from fuel_ray.config import ServingConfig
from fuel_ray.types import Node

SIM_START_S = 60.0  # Ray starts a process, which imports and compiles

Built = TypeVar("Built")


def remote_node(config: ServingConfig, build: Callable[[ServingConfig], Node]) -> RemoteNode:
    """A node of the cluster, made there by ``build``.

    Raises:
        ConfigError: there is no cluster, or it has no node of this kind.
        NodeError: the node did not start.
    """
    gpus = gpus_per_node(config)
    require_nodes(1, gpus=gpus, wait_s=config.node_wait_s)
    return RemoteNode(partial(_build, _there(config), build), gpus=gpus, start_s=_start_s(config))


def ask_node(config: ServingConfig, ask: Callable[[ServingConfig], Built]) -> Built:
    """What ``ask`` says on a free node of the cluster; a simulated one is the same everywhere.

    Raises:
        ConfigError: there is no cluster, or it has no node of this kind.
        NodeError: no answer.
    """
    if not config.live_server:
        return ask(_there(config))
    gpus = gpus_per_node(config)
    require_nodes(1, gpus=gpus, wait_s=config.node_wait_s)
    return on_node(partial(_build, _there(config), ask), gpus=gpus, timeout_s=_start_s(config))


def gpus_per_node(config: ServingConfig) -> int:
    """GPUs that a node of the cluster has to itself."""
    return len(config.live.gpu_ids) if config.live_server else 0


def _build(config: ServingConfig, build: Callable[[ServingConfig], Built], gpu_ids: tuple[str, ...]) -> Built:
    """On the node's machine: build with the GPUs that Ray gave to it."""
    if gpu_ids:
        config = replace(config, live=replace(config.live, gpu_ids=gpu_ids))
    return build(config)


def _there(config: ServingConfig) -> ServingConfig:
    """The same settings as the node's own machine sees them."""
    return replace(config, node=config.backend)


def _start_s(config: ServingConfig) -> float:
    """How long a node may take: until one is free, and until its server answers."""
    return config.node_wait_s + (config.live.start_timeout_s if config.live_server else SIM_START_S)
