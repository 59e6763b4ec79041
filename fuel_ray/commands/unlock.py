"""fuel-ray unlock: give back the clocks that stay locked when a controller is killed with its watchdog."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from fuel_ray.errors import ConfigError, FuelRayError
from fuel_ray.live.gpu.lease import Outcome, unlock_gpus

HOST_S = 60.0


@dataclass(frozen=True)
class UnlockConfig:
    """Reset GPU clocks that a killed controller left locked."""

    gpu_ids: tuple[str, ...] = ()
    """GPUs to reset, whoever locked their clocks: nvidia-smi's indices, or UUIDs. None given: those that a
    killed controller left locked."""
    force: bool = False
    """Reset the GPUs of --gpu-ids even while a controller uses them."""
    cluster: bool = False
    """Do it on every host of the Ray cluster that runs here or at RAY_ADDRESS."""


def run(config: UnlockConfig) -> int:
    """Print a line per GPU; 0 if all clocks that were asked for were reset, else 2."""
    if config.force and not config.gpu_ids:
        raise ConfigError("--force needs --gpu-ids: give the GPUs to reset, such as --gpu-ids 0")
    if config.cluster:
        return _unlock_cluster(config)
    return _print("", unlock_gpus(config.gpu_ids, force=config.force))


def _unlock_cluster(config: UnlockConfig) -> int:
    from fuel_ray.cluster.hosts import connect, on_hosts  # noqa: PLC0415  (one host needs no Ray)

    connect(cluster=True)
    status = 0
    for there in on_hosts(_on_host, config.gpu_ids, config.force, timeout_s=HOST_S):
        answer = there.answer
        outcomes = [Outcome(str(answer), failed=True)] if isinstance(answer, FuelRayError) else answer
        status = max(status, _print(f"{there.host}  ", outcomes))
    return status


def _on_host(gpu_ids: tuple[str, ...], force: bool) -> list[Outcome]:
    try:
        return unlock_gpus(gpu_ids, force=force)
    except FuelRayError as error:  # the other hosts are to be unlocked all the same
        return [Outcome(str(error), failed=True)]


def _print(prefix: str, outcomes: Sequence[Outcome]) -> int:
    for outcome in outcomes:
        if outcome.failed:
            print(f"fuel-ray: {prefix}{outcome.text}", file=sys.stderr)
        else:
            print(f"{prefix}{outcome.text}")
    return 2 if any(outcome.failed for outcome in outcomes) else 0
