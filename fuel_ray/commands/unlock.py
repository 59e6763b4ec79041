"""fuel-ray unlock: give back the clocks that stay locked when a controller is killed with its watchdog."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fuel_ray.errors import ConfigError, GpuError
from fuel_ray.live.lease import unlock
from fuel_ray.live.lease_state import owners, state_folder
from fuel_ray.live.nvml import Gpus


@dataclass(frozen=True)
class UnlockConfig:
    """Give the clocks of GPUs that a killed run left locked back to the driver."""

    gpu_ids: tuple[str, ...] = ()
    """NVML indices or UUIDs of GPUs to reset whoever locked them; none: those that a dead controller left."""
    force: bool = False
    """Reset the GPUs of --gpu-ids even while a controller has them."""


def run(config: UnlockConfig) -> int:
    """Print a line per GPU; 0 if all clocks that were asked for were reset, else 2.

    Raises:
        ConfigError: --force without --gpu-ids, a GPU named twice, or the state folder cannot be written to.
        GpuError: there is no such GPU, or no driver.
    """
    if config.force and not config.gpu_ids:
        raise ConfigError("--force needs --gpu-ids, the GPUs to reset")
    folder = state_folder()
    uuids = _named(config.gpu_ids) if config.gpu_ids else _stale(folder)
    done = [_unlocked(uuid, folder, force=config.force) for uuid in uuids]
    return 0 if all(done) else 2


def _named(gpu_ids: Sequence[str]) -> tuple[str, ...]:
    with Gpus(gpu_ids) as gpus:
        return gpus.uuids


def _stale(folder: Path) -> tuple[str, ...]:
    found = owners(folder)
    living = {uuid: owner for uuid, owner in found.items() if owner is not None and owner.lives()}
    for uuid, owner in living.items():
        print(f"GPU {uuid}: left to {owner}")
    if not found:
        print(f"no clocks are recorded as locked in {folder}")
    return tuple(uuid for uuid in found if uuid not in living)


def _unlocked(uuid: str, folder: Path, *, force: bool) -> bool:
    try:
        unlock(uuid, folder=folder, force=force)
    except GpuError as error:
        print(f"fuel-ray: {error}", file=sys.stderr)
        return False
    print(f"GPU {uuid}: clocks given back")
    return True
