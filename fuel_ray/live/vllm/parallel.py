"""How many GPUs of this host a ``vllm serve`` with given flags uses."""

from collections.abc import Sequence
from math import prod

from fuel_ray.address import flag_name, flag_value
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
    given = {flag_name(word) for word in flags}
    if "--device-ids" in given:
        raise ConfigError(
            "--live.flags: --device-ids is not allowed here; give the GPUs in order with --live.gpu-ids"
        )
    if given.intersection(_ELSEWHERE):
        return None
    try:
        factors = [_size(flags, names) or 1 for names in _FACTORS]
        replicas = _size(flags, _REPLICAS_HERE) or _size(flags, _REPLICAS) or 1
    except ValueError:
        return None  # vLLM says what is wrong
    return prod(factors) * replicas


def _size(flags: Sequence[str], names: Sequence[str]) -> int | None:
    given = [value for name in names if (value := flag_value(flags, name)) is not None]
    return int(given[-1]) if given else None
