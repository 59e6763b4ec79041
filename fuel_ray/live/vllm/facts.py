"""How a running server schedules: by its flags, by what it says, or by what vLLM does by default."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fuel_ray.address import flag_name, flag_value
from fuel_ray.errors import NodeError
from fuel_ray.live.processes import is_local, server_flags
from fuel_ray.live.vllm.cache import CacheConfig
from fuel_ray.live.vllm.endpoint import Endpoint, ask
from fuel_ray.live.vllm.server import server_version
from fuel_ray.types import ServerFacts

ASSUMED = "assumed"
_PAGE = "/server_info"  # of a server with VLLM_SERVER_DEV_MODE=1
_SIZES = {
    "--max-num-seqs": "max_num_seqs",
    "--max-num-batched-tokens": "max_num_batched_tokens",
    "--tensor-parallel-size": "tensor_parallel_size",
    "-tp": "tensor_parallel_size",
}
_WRITTEN = re.compile(r"(\d+(?:\.\d+)?)([kmgKMG]?)")  # as vLLM reads 8192, 8k and 8K
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
_SWITCHES = {
    "prefix_caching": "enable-prefix-caching",
    "chunked_prefill": "enable-chunked-prefill",
    "async_scheduling": "async-scheduling",
}
_IN_CONFIG = {  # where /server_info has them
    "max_num_seqs": ("scheduler_config", "max_num_seqs"),
    "max_num_batched_tokens": ("scheduler_config", "max_num_batched_tokens"),
    "chunked_prefill": ("scheduler_config", "enable_chunked_prefill"),
    "async_scheduling": ("scheduler_config", "async_scheduling"),
    "prefix_caching": ("cache_config", "enable_prefix_caching"),
    "tensor_parallel_size": ("parallel_config", "tensor_parallel_size"),
}
_GIB = 2**30
_MINOR = re.compile(r"0\.(\d+)")
_LARGEST_SINCE = 28  # 0.28 brought the defaults of GPUs of 160 GiB and more

Facts = dict[str, tuple[Any, str]]  # by name: the value, and what says it


@dataclass(frozen=True, slots=True)
class Cards:
    """The GPUs that a server is on, as far as vLLM's defaults depend on them."""

    name: str
    number: int
    memory_bytes: int | None


def server_facts(
    server: Endpoint,
    cache: CacheConfig | None,
    cards: Cards | None,
    *,
    said: Mapping[str, tuple[int | None, str]],
    flags: Sequence[str] = (),
) -> ServerFacts:
    """What is known of a running server: what is said, then its pages, its flags, its vLLM's defaults.

    Args:
        server: how it is spoken to.
        cache: what its page of metrics says.
        cards: what it is on; None: no GPU that is known.
        said: by name of the fact what the user or the scheduler says of it, and by which words.
        flags: that it was started with as far as the caller knows; this host's processes may tell more.
    """
    found: Facts = {name: (value, by) for name, (value, by) in said.items() if value is not None}
    of_flags = _of_flags(flags) | _of_flags(_local_flags(server))
    of_page = (
        {} if cache is None or cache.prefix_caching is None else {"prefix_caching": cache.prefix_caching}
    )
    for facts, by in ((of_page, "/metrics"), (_of_config(server), _PAGE), (of_flags, "its flags")):
        found = {name: (value, by) for name, value in facts.items()} | found
    version = _version(server)
    found = _defaults(cards, version, int(found.get("tensor_parallel_size", (1, ""))[0])) | found
    if cards is not None:
        by = "its one GPU" if cards.number == 1 else f"{ASSUMED}: all of its GPUs"
        found = {"tensor_parallel_size": (cards.number, by)} | found
    return ServerFacts(
        engine=f"vLLM {version or 'of an unknown version'}",
        **dict[str, Any]((name, value) for name, (value, _) in found.items()),
        sources=tuple((name, by) for name, (_, by) in sorted(found.items())),
    )


def assumed(facts: ServerFacts) -> list[str]:
    """Those facts that nobody said, for people."""
    values = [(name, by) for name, by in facts.sources if by.startswith(ASSUMED)]
    return [f"{name} {getattr(facts, name)} ({by.removeprefix(f'{ASSUMED}: ')})" for name, by in values]


def _defaults(cards: Cards | None, version: str | None, world_size: int) -> Facts:
    """What `vllm serve` takes where nothing is said (EngineArgs.get_batch_defaults of 0.32.0).

    That of 160 GiB and more came with 0.28.
    """
    gib = 0.0 if cards is None else (cards.memory_bytes or 0) / _GIB
    found = _MINOR.match(version or "")
    minor = int(found[1]) if found else _LARGEST_SINCE
    if cards is None:
        tokens, seqs, of = 2048 * world_size, 128 * world_size, "a CPU, as no GPU is measured"
    elif gib >= 160 and minor >= _LARGEST_SINCE:
        tokens, seqs, of = 16384, 1024, "a GPU of 160 GiB and more"
    elif gib >= 70 and "a100" not in cards.name.lower():
        tokens, seqs, of = 8192, 1024, "a GPU of 70 GiB and more"
    else:
        tokens, seqs, of = 2048, 256, "such a GPU"
    by = f"{ASSUMED}: vLLM's default on {of}"
    switches = {"prefix_caching": (True, f"{ASSUMED}: vLLM's default")}
    return {"max_num_batched_tokens": (tokens, by), "max_num_seqs": (seqs, by), **switches}


def _of_flags(flags: Sequence[str]) -> dict[str, Any]:
    """What the words of `vllm serve` say."""
    found: dict[str, Any] = {}
    for flag, name in _SIZES.items():
        if (value := flag_value(flags, flag)) is not None and (number := _WRITTEN.fullmatch(value)):
            found[name] = int(float(number[1]) * _UNITS[number[2]])
    given = [flag_name(word) for word in flags]
    for name, switch in _SWITCHES.items():
        last = next((word for word in reversed(given) if word in (f"--{switch}", f"--no-{switch}")), None)
        if last is not None:
            found[name] = last == f"--{switch}"
    return found


def _local_flags(server: Endpoint) -> Sequence[str]:
    parts = urlsplit(server.url)
    if not is_local(parts.hostname or ""):
        return ()
    return server_flags(parts.port or (443 if parts.scheme == "https" else 80))


def _of_config(server: Endpoint) -> dict[str, Any]:
    """What a server in development mode says of itself; nothing where it has no such page."""
    try:
        config = json.loads(ask(server, f"{_PAGE}?config_format=json", timeout_s=10.0))["vllm_config"]
        of = {name: config[part].get(key) for name, (part, key) in _IN_CONFIG.items()}
    except (NodeError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return {name: value for name, value in of.items() if isinstance(value, (bool, int))}


def _version(server: Endpoint) -> str | None:
    try:
        return server_version(server)
    except NodeError:
        return None
