"""How many GPUs of this host a ``vllm serve`` with given flags uses."""

from collections.abc import Iterator, Sequence
from math import prod

from fuel_ray.errors import ConfigError

_TENSOR = ("--tensor-parallel-size", "-tp")
_FACTORS = (_TENSOR, ("--pipeline-parallel-size", "-pp"), ("--prefill-context-parallel-size", "-pcp"))
_REPLICAS, _REPLICAS_HERE = ("--data-parallel-size", "-dp"), ("--data-parallel-size-local", "-dpl")
_ELSEWHERE = ("--nnodes", "-n", "--config")  # more hosts, or flags in a file


def gpus_used(flags: Sequence[str]) -> int | None:
    """Tensor by pipeline by data parallel size; None where the flags do not say it.

    Raises:
        ConfigError: the flags choose the GPUs themselves.
    """
    values = dict(_values(flags))
    if "--device-ids" in values:
        raise ConfigError(
            "--live.flags: --device-ids is set from --live.gpu-ids, which names the GPUs in order"
        )
    if any(name in values for name in _ELSEWHERE):
        return None
    try:
        factors = [_size(values, names) or 1 for names in _FACTORS]
        replicas = _size(values, _REPLICAS_HERE) or _size(values, _REPLICAS) or 1
    except ValueError:
        return None  # vLLM says what is wrong
    return prod(factors) * replicas


def _size(values: dict[str, str], names: Sequence[str]) -> int | None:
    given = [values[name] for name in names if name in values]
    return int(given[-1]) if given else None


def _values(flags: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Flags and what follows them; vLLM takes _ for - in a name, and = before a value."""
    for index, word in enumerate(flags):
        if word.startswith("-"):
            name, given, value = word.partition("=")
            yield name.replace("_", "-"), value if given else (*flags[index + 1 :], "")[0]
