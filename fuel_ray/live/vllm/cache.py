"""The KV cache, as the labels of vllm:cache_config_info tell of it: one series per engine, or several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CACHE_METRIC = "vllm:cache_config_info"

Labels = Mapping[str, str]

_ENGINE = ("engine", "engine_index", "engine_id")
_NO_BLOCKS = "wait until its engine has started, or start it with --num-gpu-blocks-override"
_MOST_RANKS = 16  # that context parallelism is used with
_ATTENTION, _TOKENS = "effective_attention_block_size", "kv_cache_size_tokens"


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The KV cache of all engines."""

    block_size: int  # tokens of an attention layer's block
    num_gpu_blocks: int
    scheduler_block_size: int | None = None  # what the page calls block_size where that is another
    uncertain: bool = False  # a hybrid model's page that does not say its attention's block size
    prefix_caching: bool | None = None  # whether full blocks are found again, as the page says it

    def may_have(self, block_size: int) -> bool:
        """Whether a server that was asked for this block size can say this."""
        return self.uncertain or block_size in (self.block_size, self.scheduler_block_size)

    def used_blocks(self, kv_usage: float) -> int:
        """Blocks in use; vLLM's usage is a share of ``usable_blocks``."""
        return round(kv_usage * self.usable_blocks)

    @property
    def usable_blocks(self) -> int:
        """All but the null block, which vLLM V1 never hands out (block_pool.py, get_usage)."""
        return max(1, self.num_gpu_blocks - 1)


def engine_of(labels: Labels) -> str:
    """Which engine a series is of; empty where there is but one."""
    return next((labels[name] for name in _ENGINE if labels.get(name)), "")


def cache_info(samples: Sequence[tuple[Labels, float]]) -> dict[str, Labels]:
    """What each engine says of its cache: the last that is whole, as older ones stay beside it."""
    found: dict[str, Labels] = {}
    for labels, value in samples:
        before = found.get(engine_of(labels), {})
        if value and (_whole(labels) or not _whole(before)):
            found[engine_of(labels)] = labels
    return found


def num_blocks(labels: Labels) -> int | None:
    """KV blocks of an engine, or of all of them; None before it has started."""
    return _number(labels, "num_gpu_blocks") or _number(labels, "num_gpu_blocks_override")


def cache_config(info: Mapping[str, Labels]) -> CacheConfig | str:
    """The cache of all engines, or what the page lacks."""
    engines = list(info.values())
    if not engines:
        return f"its KV block size ({CACHE_METRIC} is not on the page)"
    sizes = {_block_size(labels) for labels in engines}
    size = sizes.pop()
    if size is None or sizes:
        return f"one KV block size ({CACHE_METRIC} has {_shown(engines, 'block_size')})"
    blocks = [num_blocks(labels) or 0 for labels in engines]
    if not all(blocks):
        shown = _shown(engines, "num_gpu_blocks")
        return f"its number of KV blocks ({CACHE_METRIC} has {shown}); {_NO_BLOCKS}"
    scheduler, tokens = _number(engines[0], "block_size"), _number(engines[0], _TOKENS)
    hybrid = tokens is not None and _number(engines[0], _ATTENTION) is None and tokens > blocks[0] * size
    total = _all_blocks(engines[0], blocks)
    other = None if scheduler == size else scheduler
    caching = {"True": True, "False": False}.get(engines[0].get("enable_prefix_caching", ""))
    return CacheConfig(size, total, other, uncertain=hybrid, prefix_caching=caching)


def _block_size(labels: Labels) -> int | None:
    """What --block-size means: a block of full attention on one rank.

    ``block_size`` may be the smallest of a hybrid model's kinds, or what it was before vLLM enlarged it;
    the effective size is right, but with context parallelism (DCP) it is that of all ranks together.
    """
    shown, effective = _number(labels, "block_size"), _number(labels, _ATTENTION)
    if shown is None or effective is None:
        return effective or shown
    of_ranks = effective % shown == 0 and effective // shown <= _MOST_RANKS
    fills = (num_blocks(labels) or 0) * effective == _number(labels, _TOKENS)  # with blocks of one kind only
    return shown if of_ranks and fills else effective


def _shown(engines: Sequence[Labels], label: str) -> str:
    return " and ".join(dict.fromkeys(f'{label}="{engine.get(label, "")}"' for engine in engines))


def _all_blocks(first: Labels, blocks: Sequence[int]) -> int:
    """Of engines that each say their own; vLLM's front end shows the sum under every engine's label."""
    tokens, size = _number(first, _TOKENS), _number(first, "block_size")
    own = tokens is not None and size is not None and blocks[0] * size <= tokens
    summed = len(set(blocks)) == 1 and not own and _number(first, "num_gpu_blocks")
    return blocks[0] if summed else sum(blocks)


def _whole(labels: Labels) -> bool:
    return bool(num_blocks(labels) and _number(labels, "block_size"))


def _number(labels: Labels, name: str) -> int | None:
    return int(labels[name]) or None if labels.get(name, "").isdecimal() else None
