"""From settings to a live node: a vLLM server that is started or attached to, its GPUs and its load."""

import contextlib
import logging
import os
import re
import secrets
import shlex
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np

from fuel_ray.address import VLLM_KEY, check_variable, flag_name, flag_value
from fuel_ray.codec import clock_range
from fuel_ray.config import ServingConfig
from fuel_ray.errors import ConfigError, GpuError, NodeError
from fuel_ray.live.gpu.nvml import Gpus
from fuel_ray.live.gpu.placement import placement
from fuel_ray.live.gpu.visible import Device, server_environment
from fuel_ray.live.load.loadgen import LoadGenerator
from fuel_ray.live.load.prompts import TokenPrompts
from fuel_ray.live.node import GpuNode
from fuel_ray.live.vllm.cache import CacheConfig
from fuel_ray.live.vllm.endpoint import Endpoint
from fuel_ray.live.vllm.facts import Cards, server_facts
from fuel_ray.live.vllm.kv_monitor import MetricsClient
from fuel_ray.live.vllm.limiter import BatchLimiter
from fuel_ray.live.vllm.parallel import gpus_used
from fuel_ray.live.vllm.server import VllmServer, served_model
from fuel_ray.node_config import LiveConfig
from fuel_ray.sim.pack import load_pack
from fuel_ray.types import NodeSpec, ServerFacts
from fuel_ray.workload.spec import Workload, drawn

_OUR_FLAGS = ("--max-num-seqs", "--num-gpu-blocks-override")
_OFFLINE = {"VLLM_NO_USAGE_STATS": "1"}
ACTOR = "actor:"  # before the name of a run whose actors own the servers, in place of a server's URL
_NO_UUIDS = re.compile(r"invalid literal for int\(\) with base 10: '(GPU|MIG)-")  # vLLM issue 41848

logger = logging.getLogger(__name__)


class LiveServer:
    """The vLLM server that live nodes of one block size run on: one started here, or the one that is named.

    ``config`` are the settings whose nodes attach to it.

    Raises:
        ConfigError: a flag is wrong.
        UnsupportedError: the server cannot have this block size.
        NodeError: no such GPU, or the server did not start.
    """

    def __init__(self, config: ServingConfig, kv_block_size: int) -> None:
        self.config, self._kv_block_size = config, kv_block_size
        self._server: VllmServer | None = None
        self._opened = contextlib.ExitStack()
        if config.live.server is not None:
            return
        # what is wrong with the GPUs, or a key, is said before a server takes its minutes to start
        check_variable(config.live.api_key_env, flag="--live.api-key-env")
        with _gpus(config) as gpus, contextlib.ExitStack() as opened:
            _spec(config, kv_block_size, gpus, None)
            name = f"fuel-ray-limit-{os.getpid()}-{uuid.uuid4().hex[:8]}"
            limiter = opened.enter_context(BatchLimiter(Path(tempfile.gettempdir()) / name))
            self._server = opened.enter_context(_started(config, kv_block_size, limiter.path, gpus.devices))
            _check_placement(gpus, self._server)
            ids = tuple(device.uuid for device in gpus.devices)
            own = _own_access(config.live)
            live = replace(own, server=self._server.url, limit_file=limiter.path, gpu_ids=ids)
            self._opened = opened.pop_all()
        self.config = replace(config, live=live)

    def facts(self) -> tuple[NodeSpec, str, int | None]:
        """What its nodes are, the engine's name and version, and its max_model_len where it says it."""
        return node_facts(self.config, self._kv_block_size)

    def revive(self) -> None:
        """Start the server again if it was started here and has died.

        Raises:
            NodeError: it does not start.
        """
        if self._server is None:
            return
        try:
            self._server.check()
        except NodeError as error:
            logger.warning("block size %d: %s; starting the server again", self._kv_block_size, error)
            self._server.stop()
            self._server.start()

    def close(self) -> None:
        """Stop what was started here; safe to call twice."""
        self._opened.close()


def live_node(
    config: ServingConfig, kv_block_size: int, workload: Workload, *, horizon_s: float, random_start: bool
) -> GpuNode:
    """A node on the running server that the settings name; see ``LiveServer``."""
    live = config.live
    if live.server is None:
        raise ConfigError("a live node attaches to a server: build it with the config of a LiveServer")
    with contextlib.ExitStack() as opened:
        gpus = opened.enter_context(_gpus(config))
        limiter = None
        if live.limit_file is not None:
            limiter = BatchLimiter(Path(live.limit_file), capacity=_capacity(config))
        if limiter is not None:
            opened.callback(limiter.close)
        server = server_endpoint(live)
        client = MetricsClient(server)
        opened.callback(client.close)
        cache = _cache(client, kv_block_size)
        spec = _spec(config, kv_block_size, gpus, cache)
        spec = replace(spec, server=_facts(config, server, cache, gpus, limiter))
        start_load = _loads(live, server, workload, horizon_s, random_start=random_start)
        node = GpuNode(spec, gpus, client, limiter=limiter, start_load=start_load)
        opened.pop_all()  # the node closes them
    return node


def live_spec(config: ServingConfig, kv_block_size: int) -> NodeSpec:
    """What such a node would be, from its GPUs and the settings.

    Raises:
        NodeError: there is no such GPU.
    """
    with _gpus(config) as gpus:
        return _spec(config, kv_block_size, gpus, None)


def node_facts(config: ServingConfig, kv_block_size: int) -> tuple[NodeSpec, str, int | None]:
    """A running server's node, its engine and version, and its max_model_len where it says it.

    Raises:
        NodeError: it does not answer.
    """
    server, live = server_endpoint(config.live), config.live
    with _gpus(config) as gpus, contextlib.closing(MetricsClient(server)) as client:
        cache = _cache(client, kv_block_size)
        spec = _spec(config, kv_block_size, gpus, cache)
        facts = _facts(config, server, cache, gpus, None)
    model = served_model(server, name=live.served_model, like=live.model)
    return replace(spec, server=facts), facts.engine, model.max_model_len


def server_endpoint(live: LiveConfig) -> Endpoint:
    """How the server that the settings name is spoken to, one that was started with their flags too."""
    server = Endpoint.of(str(live.server), live, flag="--live.server")
    certificate = flag_value(shlex.split(live.flags), "--ssl-certfile")
    return server if certificate is None else server.showing(Path(certificate))


def num_gpus(config: ServingConfig) -> int:
    """How many GPUs a node has: those that are named, else as many as the server that is started uses.

    Raises:
        ConfigError: the server uses more or fewer than are named.
    """
    named = len([name for entry in config.live.gpu_ids for name in entry.split(",")])
    if not (config.live.server or ACTOR).startswith(ACTOR):
        return named or 1
    used = gpus_used(shlex.split(config.live.flags))
    if used is None:
        return named or 1
    if named and named != used:
        idle = "idle GPUs would be measured" if named > used else "the server would not start"
        raise ConfigError(
            f"--live.gpu-ids gives {named} GPU(s), but --live.flags make the server use {used}, so {idle}: "
            f"give {used}, or set --tensor-parallel-size in --live.flags"
        )
    return used


def _gpus(config: ServingConfig) -> Gpus:
    """Opened, once it is clear that their energy can be had."""
    gpus = Gpus(config.live.gpu_ids, default=num_gpus(config))
    try:
        gpus.require_energy()
    except BaseException:
        gpus.close()
        raise
    return gpus


def _spec(config: ServingConfig, kv_block_size: int, gpus: Gpus, cache: CacheConfig | None) -> NodeSpec:
    return NodeSpec(
        name=f"live-{gpus.uuids[0]}-b{kv_block_size}",
        gpu_name=gpus.name,
        gpu_uuids=gpus.uuids,
        model=config.live.model,
        kv_block_size=kv_block_size,
        num_kv_blocks=None if cache is None else cache.num_gpu_blocks,
        batch_limits=(1 if _sets_limits(config) else _capacity(config), _capacity(config)),
        gpu_clocks_mhz=_clocks_mhz(config, gpus),
    )


def _clocks_mhz(config: ServingConfig, gpus: Gpus) -> tuple[int, ...]:
    """Those that may be chosen; one if the clocks cannot be set."""
    settable = gpus.settable_clocks_mhz(wanted=config.live.clock_control == "on")
    wanted = set(config.gpu_clocks_mhz)
    if len(settable) == 1 or not wanted:
        return settable
    if not wanted <= set(settable):
        given = " ".join(map(str, sorted(wanted - set(settable))))
        raise ConfigError(f"--gpu-clocks-mhz {given}: not supported by {gpus.name}; {clock_range(settable)}")
    return tuple(sorted(wanted))


def _capacity(config: ServingConfig) -> int:
    return config.max_num_seqs or load_pack(config.pack).max_num_seqs


def _sets_limits(config: ServingConfig) -> bool:
    """Whether the batch limit can be set: that of a server started elsewhere needs its limit file."""
    return config.live.server is None or config.live.limit_file is not None


@contextlib.contextmanager
def _started(
    config: ServingConfig, kv_block_size: int, limit_file: Path, devices: Sequence[Device]
) -> Iterator[VllmServer]:
    """On these devices by UUID, or where this vLLM takes none (before mid-2026) by number in PCI order."""
    server = _server(config, kv_block_size, limit_file, server_environment(devices))
    try:
        server.start()
    except NodeError:
        if not server.printed(_NO_UUIDS):
            raise
        logger.warning("this vLLM accepts no UUIDs in CUDA_VISIBLE_DEVICES; starting it again with indices")
        server = _server(config, kv_block_size, limit_file, server_environment(devices, by_index=True))
        server.start()
    with server:
        yield server


def _check_placement(gpus: Gpus, server: VllmServer) -> None:
    """Raises GpuError where the server is on other cards than those that it was given."""
    found = placement(gpus, frozenset(server.pids()))
    if found.found == "wrong":
        raise GpuError(f"{found.text}, although CUDA_VISIBLE_DEVICES named these cards for the server")
    logger.log(logging.WARNING if found.found == "unknown" else logging.INFO, "%s", found.text)


def _server(config: ServingConfig, kv_block_size: int, limit_file: Path, on: dict[str, str]) -> VllmServer:
    flags = shlex.split(config.live.flags)
    for flag in flags:
        if flag_name(flag) in _OUR_FLAGS:
            raise ConfigError(f"--live.flags: {flag} is not allowed here; use --max-num-seqs or --kv-tokens")
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "fuel_ray" not in plugins.split(","):
        logger.warning("VLLM_PLUGINS=%s excludes fuel_ray, so batch limits will have no effect", plugins)
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
        env=_OFFLINE | on | _key(config.live),
        limit_file=limit_file,
        start_timeout_s=config.live.start_timeout_s,
    )


def _key(live: LiveConfig) -> dict[str, str]:
    """The key that a server of our own demands: that of the named variable, else of vLLM's."""
    return {VLLM_KEY: os.environ.get(VLLM_KEY if live.api_key_env is None else live.api_key_env, "").strip()}


def _own_access(live: LiveConfig) -> LiveConfig:
    """How a server of our own is spoken to; a key that it does not know is not sent to it."""
    variable = live.api_key_env
    if variable is None:
        variable = VLLM_KEY if os.environ.get(VLLM_KEY, "").strip() else ""
    return replace(live, api_key_env=variable, metrics_url=None)


def _cache(client: MetricsClient, kv_block_size: int) -> CacheConfig | None:
    cache = client.scrape().cache_config
    if cache is not None and not cache.may_have(kv_block_size):
        raise ConfigError(
            f"--block-sizes {kv_block_size}: the server at {client.url} has KV block size {cache.block_size}"
        )
    return cache


def _facts(
    config: ServingConfig,
    server: Endpoint,
    cache: CacheConfig | None,
    gpus: Gpus,
    limiter: BatchLimiter | None,
) -> ServerFacts:
    tokens = config.live.max_num_batched_tokens
    said: dict[str, tuple[int | None, str]]
    said = {"max_num_batched_tokens": (tokens, "--live.max-num-batched-tokens")}
    if config.max_num_seqs is not None or limiter is None:
        said["max_num_seqs"] = (config.max_num_seqs, "--max-num-seqs")
    else:
        said["max_num_seqs"] = (limiter.capacity, "its scheduler")
    cards = Cards(gpus.name, len(gpus.devices), gpus.memory_bytes())
    return server_facts(server, cache, cards, said=said, flags=shlex.split(config.live.flags))


def _loads(
    live: LiveConfig, server: Endpoint, workload: Workload, horizon_s: float, *, random_start: bool
) -> Callable[[int], LoadGenerator]:
    model = served_model(server, name=live.served_model, like=live.model).name
    episodes = count(secrets.randbits(32))

    def start_load(seed: int) -> LoadGenerator:
        requests = drawn(workload, horizon_s, seed=seed, random_start=random_start)
        # The same seed means the same arrivals and lengths, never the same tokens: a policy must not find its
        # predecessor's prompts in the prefix cache.
        tokens = np.random.default_rng((seed, next(episodes)))
        prompts = TokenPrompts(requests, vocab_size=live.vocab_size, rng=tokens)
        return LoadGenerator(server, requests, prompts=prompts, model=model, timeout_s=live.request_timeout_s)

    return start_load
