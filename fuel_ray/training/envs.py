"""Training environments."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import product
from typing import Any

from fuel_ray.build.codec import POOLS, build_codec
from fuel_ray.build.nodes import build_node, numbered, patience
from fuel_ray.build.objective import build_objective
from fuel_ray.config import LearnConfig, from_dict, to_dict
from fuel_ray.control import ControlLoop
from fuel_ray.env import ParallelServingEnv, ServingEnv
from fuel_ray.errors import ConfigError
from fuel_ray.guard import Guard
from fuel_ray.objective import Energy
from fuel_ray.policies.anchor import Anchor, GridAnchor
from fuel_ray.training.env_settings import env_settings
from fuel_ray.types import Node

_TPOTS_S = (0.0095, 0.011, 0.0125, 0.015, 0.018, 0.021, 0.03, 0.05)
_PRICES_J = (10.0, 30.0, 70.0, 150.0, 300.0, 700.0, 1500.0, 4000.0)
_Pools = Sequence[tuple[int | None, str]]  # KV tokens and workload


def learning_settings(config: LearnConfig) -> dict[str, Any]:
    """Those that a verb adds are left out."""
    names = {field.name for field in fields(LearnConfig)}
    return {name: value for name, value in to_dict(config).items() if name in names}


def make_env(settings: Mapping[str, Any]) -> ServingEnv | ParallelServingEnv:
    """What RLlib makes from its env_config: one environment, or ``num_envs`` side by side.

    The env_config is that of our own trials, or has the arguments of ``gymnasium.make``.

    Raises:
        ConfigError: an argument is unknown or has a wrong value.
    """
    count = settings.get("num_envs")
    builds = _builds({name: value for name, value in settings.items() if name != "num_envs"}, count or 1)
    return builds[0]() if count is None else ParallelServingEnv(builds)


def _builds(settings: Mapping[str, Any], count: int) -> list[Callable[[], ServingEnv]]:
    if not isinstance(settings.get("config"), Mapping):
        return [partial(serving_env, **settings)] * count
    if unknown := set(settings) - {"config", "block_sizes", "anchors"}:
        raise ConfigError(f"env_config: unknown key {', '.join(sorted(unknown))} beside config")
    config = from_dict(settings["config"], base=LearnConfig(), source="env_config")
    raw = settings.get("anchors", {}).get(str(settings["block_sizes"][0]))
    anchor = None if raw is None else Anchor.from_dict(raw)
    nodes = [numbered(config, k) for k in range(count)]
    return [partial(build_env, own, settings["block_sizes"], anchor=anchor) for own in nodes]


def build_env(
    config: LearnConfig,
    block_sizes: Sequence[int],
    *,
    anchor: Anchor | None = None,
    whole_windows: bool = False,
) -> ServingEnv:
    """A training environment over these block sizes, and over what the mode varies besides; a node per pool.

    Episodes begin at a random point of the workload. ``anchor`` is what a specialist, on one block size of a
    simulated node, explores near to, with its rule beside it.
    """
    pools, tpots_s, prices_j = _varied(config)
    if config.mode != "specialist" or config.node != "sim":
        anchor = None  # a real node has no second one beside it
    loops, codecs, shadows = [], [], []
    for size, (kv_tokens, workload) in product(block_sizes, pools):
        own = replace(config, kv_tokens=kv_tokens)
        build = partial(build_node, own, size, horizon_s=float(config.train.episode_steps + 1))
        make_node = partial(
            build, workload=workload, random_start=config.mode != "generalist", part="first half"
        )
        node, shadow = make_node(), None if anchor is None else make_node()
        codec = build_codec(config, node.spec)
        for tpot_s, price_j in product(tpots_s, prices_j):
            priced = replace(own, slo_tpot_s=tpot_s, miss_price_j=price_j)
            loops.append(_loop(priced, node))
            codecs.append(replace(codec, slo=priced.slo, miss_price_j=price_j))
            shadows.append(None if shadow is None else _loop(priced, shadow))
    return ServingEnv(
        loops,
        codecs[0],
        steps=config.train.episode_steps,
        failures=patience(config),
        codecs=codecs,
        anchor=None
        if anchor is None
        else GridAnchor(anchor, codecs[0].grid, loops[0].node.spec, codecs[0].slo),
        shadows=shadows,
        whole_windows=whole_windows,
    )


def _varied(config: LearnConfig) -> tuple[_Pools, Sequence[float | None], Sequence[float]]:
    """KV pools with their loads, TPOT limits and prices of a miss to train on, in every combination."""
    if config.mode == "generalist":
        return [(tokens, f"mixed:high_rps={rps}") for tokens, rps in POOLS], _TPOTS_S, _PRICES_J
    prices_j = _PRICES_J if config.mode == "specialist" else (config.miss_price_j,)
    return [(config.kv_tokens, config.workload)], [config.slo_tpot_s], prices_j


def _loop(priced: LearnConfig, node: Node) -> ControlLoop:
    """A node under control at the price and the SLO of the settings; rewards have one size at any of many."""
    objective = build_objective(priced)
    if isinstance(objective, Energy) and priced.mode != "fixed_price":
        objective = replace(objective, scale_w=objective.scale_w * (1.0 + priced.miss_price_j / 200.0))
    return ControlLoop(node, objective, guard=Guard(priced.guard.rules(priced.slo, node.spec)))


def serving_env(*, render_mode: None = None, **settings: Any) -> ServingEnv:
    """What ``gymnasium.make("fuel_ray.env:fuel_ray/Serving-v0", ...)`` makes.

    Raises:
        ConfigError: an argument is unknown or has a wrong value.
    """
    if render_mode is not None:  # TypeError: Stable-Baselines3 asks so whether there is one
        raise TypeError(
            f"fuel_ray/Serving-v0 has no render modes, so render_mode={render_mode!r} is not possible"
        )
    config = env_settings(settings)
    if config.node == "ray":
        from fuel_ray.cluster.hosts import connect  # noqa: PLC0415  (only this kind of node waits for Ray)

        connect(cluster=True)
    return build_env(config, config.block_sizes, whole_windows=True)
