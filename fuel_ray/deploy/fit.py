"""Whether a policy was made for a server: what must be the same, and what is only said."""

import logging
import re
from collections.abc import Iterator

from fuel_ray.errors import PolicyError
from fuel_ray.live.vllm.server import ServedModel
from fuel_ray.policies.anchor import knobs_of
from fuel_ray.policies.learned import PolicyFolder
from fuel_ray.policies.packs import pack_here, pack_mismatch
from fuel_ray.types import NodeSpec

SUPPORTED = ((0, 20), (0, 33))  # lowest and highest version of vLLM

_ENGINE = "vLLM"

logger = logging.getLogger(__name__)


def check_fit(
    folder: PolicyFolder,
    spec: NodeSpec,
    model: ServedModel,
    engine: str | None,
    *,
    unsure: int | None,
    allow_mismatch: bool,
) -> None:
    """Check that a policy was made for this node; another version of vLLM is only said.

    ``unsure`` is a block size that the server's page gives and that need not be its attention's.

    Raises:
        PolicyError: it was made for another; the message names all that differs.
    """
    manifest = folder.manifest
    if spec.kv_block_size not in manifest.kv_block_sizes:
        sizes = ", ".join(map(str, manifest.kv_block_sizes))
        raise PolicyError(
            f"{folder.path} was trained for KV block size {sizes}, and the server has {spec.kv_block_size}: "
            "use the policy of that block size"
        )
    found = list(_mismatches(folder, spec, model))
    if unsure not in (None, spec.kv_block_size):
        shown = f"it was trained for KV block size {spec.kv_block_size}, and the server reports {unsure}"
        found.append(f"{shown}, which for a hybrid model may be another than that of its attention")
    if found and not allow_mismatch:
        differ = "; ".join(found)
        raise PolicyError(f"{folder.path} does not fit: {differ}; --allow-mismatch accepts it")
    for mismatch in (*found, *_notes(manifest.engine, engine)):
        logger.warning("%s: %s", folder.path, mismatch)


def _mismatches(folder: PolicyFolder, spec: NodeSpec, model: ServedModel) -> Iterator[str]:
    manifest, grid = folder.manifest, folder.codec.grid
    if (changed := pack_mismatch(manifest, pack_here(manifest))) is not None:
        yield f"it {changed}"
    if not model.fits(manifest.model):
        yield f"it was trained for model {manifest.model}, and the server has {spec.model}"
    if spec.gpu_name != manifest.gpu_name:
        yield f"it was trained for GPU {manifest.gpu_name}, and this is {spec.gpu_name}"
    if not manifest.engine.startswith(_ENGINE):
        yield f"it was trained for {manifest.engine}, and the server is {_ENGINE}"
    anchor = manifest.anchor
    limits, clocks_mhz = ((), ()) if anchor is None else knobs_of(anchor.rule)
    highest = max((*grid.batch_limits, *limits))
    if highest > spec.batch_limits[-1]:
        yield f"its highest batch limit is {highest}, and the server's is {spec.batch_limits[-1]}"
    clocks = {*grid.gpu_clocks_mhz, *clocks_mhz}
    missing = sorted(clocks - set(spec.gpu_clocks_mhz))
    if missing and len(spec.gpu_clocks_mhz) > 1:
        yield f"the GPU does not support its clocks of {', '.join(map(str, missing))} MHz"


def _notes(trained_for: str, version: str | None) -> Iterator[str]:
    """What there is to say of the server's version of vLLM."""
    if version is None:
        yield f"it was trained for {trained_for}; the server's version is unknown (it has no /version)"
        return
    if trained_for.casefold() != f"{_ENGINE} {version}".casefold():
        yield (
            f"it was trained for {trained_for}, and the server is {_ENGINE} {version}: energy and latency "
            "may differ a little; --canary measures what the policy saves"
        )
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and not SUPPORTED[0] <= (int(numbers[1]), int(numbers[2])) <= SUPPORTED[1]:
        lowest, highest = (".".join(map(str, bound)) for bound in SUPPORTED)
        yield f"{_ENGINE} {version} is not supported; fuel_ray supports {lowest} to {highest}"
