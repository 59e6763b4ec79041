"""From settings to a live node: a vLLM server that is started or attached to, its GPUs and its load."""

import contextlib
import logging
import os
import secrets
import shlex
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TypeVar

import numpy as np

from fuel_ray.config import LiveConfig, ServingConfig
from fuel_ray.errors import ConfigError
from fuel_ray.live.gpu.nvml import Gpus
from fuel_ray.live.load.loadgen import LoadGenerator
from fuel_ray.live.load.prompts import TokenPrompts
from fuel_ray.live.node import GpuNode
from fuel_ray.live.vllm.kv_monitor import MetricsClient
from fuel_ray.live.vllm.limiter import BatchLimiter
from fuel_ray.live.vllm.server import VllmServer, served_model, server_version
from fuel_ray.sim.pack import load_pack
from fuel_ray.types import NodeSpec
from fuel_ray.workload.spec import Workload

_OUR_FLAGS = ("--max-num-seqs", "--num-gpu-blocks-override")
_OFFLINE = {"VLLM_NO_USAGE_STATS": "1"}

logger = logging.getLogger(__name__)

Live = TypeVar("Live", bound=ServingConfig)


def live_node(
    config: ServingConfig, kv_block_size: int, workload: Workload, *, horizon_s: float, random_start: bool
) -> GpuNode:
    """A vLLM server of this block size under measurement and, where it is allowed, under control.

    Raises:
        ConfigError: a flag is wrong, or the server that is attached to has another block size.
        UnsupportedError: the server cannot have this block size.
        NodeError: no such GPU, or the server did not start.
    """
    live = config.live
    with contextlib.ExitStack() as opened:
        gpus = opened.enter_context(Gpus(live.gpu_ids))
        limiter = _limiter(live)
        if limiter is not None:
            opened.callback(limiter.close)
        server = None
        if live.server is None:
            server = opened.enter_context(_server(config, kv_block_size, limiter))
        url = live.server or (server.url if server is not None else "")
        client = MetricsClient(url)
        opened.callback(client.close)
        spec = _spec(config, kv_block_size, gpus, num_kv_blocks=_num_kv_blocks(client, kv_block_size))
        node = GpuNode(
            spec,
            gpus,
            client,
            limiter=limiter,
            start_load=_loads(live, url, workload, horizon_s, random_start=random_start),
            server=server,
        )
        opened.pop_all()  # the node closes them
    return node


def live_spec(config: ServingConfig, kv_block_size: int) -> NodeSpec:
    """What such a node would be, from its GPUs and the settings.

    Raises:
        NodeError: there is no such GPU.
    """
    with Gpus(config.live.gpu_ids) as gpus:
        return _spec(config, kv_block_size, gpus, num_kv_blocks=None)


@contextlib.contextmanager
def attached(config: Live, kv_block_size: int) -> Iterator[Live]:
    """Settings whose nodes all attach to one server, which is started and stopped here if none is named.

    Raises:
        UnsupportedError: the server cannot have this block size.
        NodeError: it did not start.
    """
    if config.node != "live" or config.live.server is not None:
        yield config
        return
    with contextlib.ExitStack() as opened:
        limiter = _limiter(config.live)
        assert limiter is not None  # as there is no server yet
        opened.callback(limiter.close)
        server = opened.enter_context(_server(config, kv_block_size, limiter))
        live = replace(config.live, server=server.url, limit_file=limiter.path)
        yield replace(config, live=live)


def live_engine(config: ServingConfig, kv_block_size: int, workload: Workload) -> str:
    """Name and version of the engine, from a server that is started, or asked, for it.

    Raises:
        UnsupportedError: the server cannot have this block size.
        NodeError: as ``live_node``.
    """
    node = live_node(config, kv_block_size, workload, horizon_s=1.0, random_start=False)
    with contextlib.closing(node):
        return f"vllm {server_version(node.url)}"


def _spec(config: ServingConfig, kv_block_size: int, gpus: Gpus, *, num_kv_blocks: int | None) -> NodeSpec:
    return NodeSpec(
        name=f"live-{gpus.uuids[0]}-b{kv_block_size}",
        gpu_name=gpus.name,
        gpu_uuids=gpus.uuids,
        model=config.live.model,
        kv_block_size=kv_block_size,
        num_kv_blocks=num_kv_blocks,
        batch_limits=(1, _capacity(config)),
        gpu_clocks_mhz=_clocks_mhz(config, gpus),
    )


def _clocks_mhz(config: ServingConfig, gpus: Gpus) -> tuple[int, ...]:
    """Those that may be chosen; one if the clocks are not ours to set."""
    supported = gpus.supported_clocks_mhz
    if config.live.clock_control == "off" or not gpus.can_set_clocks():
        if config.live.clock_control == "on":
            logger.warning("the clocks of %s may not be set here: the node is observe-only", gpus.name)
        return supported[-1:] or (round(gpus.read().sm_clock_mhz),)
    wanted = set(config.gpu_clocks_mhz)
    if not wanted <= set(supported):
        raise ConfigError(f"--gpu-clocks-mhz: {gpus.name} does not support {sorted(wanted - set(supported))}")
    return tuple(sorted(wanted)) or supported


def _capacity(config: ServingConfig) -> int:
    return config.max_num_seqs or load_pack(config.pack).max_num_seqs


def _limiter(live: LiveConfig) -> BatchLimiter | None:
    if live.server is not None:
        return None if live.limit_file is None else BatchLimiter(Path(live.limit_file))
    return BatchLimiter(Path(tempfile.gettempdir()) / f"fuel-ray-limit-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def _server(config: ServingConfig, kv_block_size: int, limiter: BatchLimiter | None) -> VllmServer:
    flags = shlex.split(config.live.flags)
    for flag in flags:
        if flag.split("=")[0] in _OUR_FLAGS:
            raise ConfigError(f"--live.flags: {flag} is set from --max-num-seqs and --kv-tokens")
    own = ["--max-num-seqs", str(_capacity(config))]
    if config.kv_tokens is not None:
        own += ["--num-gpu-blocks-override", str(config.kv_tokens // kv_block_size)]
    if not config.prefix_caching:
        own.append("--no-enable-prefix-caching")
    return VllmServer(
        config.live.model,
        log_path=config.out / f"vllm-block-{kv_block_size}.log",
        kv_block_size=kv_block_size,
        executable=shlex.split(config.live.vllm),
        flags=(*own, *flags),
        env=_OFFLINE,
        limit_file=limiter.path if limiter is not None else None,
        start_timeout_s=config.live.start_timeout_s,
    )


def _num_kv_blocks(client: MetricsClient, kv_block_size: int) -> int | None:
    cache = client.scrape().cache_config
    if cache is None:
        return None
    if cache.block_size != kv_block_size:
        raise ConfigError(f"{client.url} has KV block size {cache.block_size}, not {kv_block_size}")
    return cache.num_gpu_blocks


def _loads(
    live: LiveConfig, url: str, workload: Workload, horizon_s: float, *, random_start: bool
) -> Callable[[int], LoadGenerator]:
    model = served_model(url)
    episodes = count(secrets.randbits(32))

    def start_load(seed: int) -> LoadGenerator:
        rng = np.random.default_rng(seed)
        period_s = workload.period_s
        start_s = rng.uniform(0.0, period_s) if random_start and period_s else 0.0
        requests = workload.generate(horizon_s, rng=rng, start_s=start_s)
        # The same seed means the same arrivals and lengths, never the same tokens: a policy must not find its
        # predecessor's prompts in the prefix cache.
        tokens = np.random.default_rng((seed, next(episodes)))
        prompts = TokenPrompts(requests, vocab_size=live.vocab_size, rng=tokens)
        return LoadGenerator(url, requests, prompts=prompts, model=model, timeout_s=live.request_timeout_s)

    return start_load
