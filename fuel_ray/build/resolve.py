"""What the nodes of a run are: each is asked once, and everything else follows by arithmetic."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from fuel_ray.build.codec import build_codec
from fuel_ray.build.nodes import build_spec, twinned
from fuel_ray.codec import Codec
from fuel_ray.config import LearnConfig
from fuel_ray.errors import UnsupportedError
from fuel_ray.sim.pack import load_pack
from fuel_ray.types import NodeSpec

Learning = TypeVar("Learning", bound=LearnConfig)


@dataclass(frozen=True, slots=True)
class Setup:
    """A node of one block size: what it is, what policies see and may choose on it, what serves."""

    spec: NodeSpec
    codec: Codec
    engine: str  # name and version


@dataclass(frozen=True, slots=True)
class Resolved(Generic[Learning]):
    """The settings whose nodes are there, and what they are."""

    config: Learning  # with the block sizes that can be served
    setups: Mapping[int, Setup]  # by block size
    unsupported: Mapping[int, str] = field(default_factory=dict)  # why, by block size


@contextlib.contextmanager
def resolve(config: Learning, *, run: str, at_once: int | None = None) -> Iterator[Resolved[Learning]]:
    """Ask each node once what it is; the server of a live one is started for that, and kept in the block.

    Of live nodes, the first ``at_once`` block sizes that can be served are taken; None: all.
    """
    if not config.live_server:
        engine = load_pack(config.pack).engine
        specs = {size: build_spec(config, size) for size in config.block_sizes}
        yield Resolved(config, {size: Setup(s, build_codec(config, s), engine) for size, s in specs.items()})
        return
    from fuel_ray.build.cluster import kept_servers  # noqa: PLC0415  (only live nodes wait for Ray)

    at_once, each = at_once or len(config.block_sizes), config.nodes_per_trial
    with kept_servers(config, run=run, at_once=at_once, nodes_each=each) as (kept, answers):
        refused = {size: str(found) for size, found in answers.items() if isinstance(found, UnsupportedError)}
        known = {size: found for size, found in answers.items() if not isinstance(found, UnsupportedError)}
        served = replace(twinned(kept, [spec for spec, *_ in known.values()]), block_sizes=tuple(known))
        setups = {}
        for size, (raw, engine, _) in known.items():
            spec = replace(raw, gpu_clocks_mhz=served.gpu_clocks_mhz)
            setups[size] = Setup(spec, build_codec(served, spec), engine)
        yield Resolved(served, setups, refused)
