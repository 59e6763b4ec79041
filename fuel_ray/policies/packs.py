"""Whether the calibration pack that a policy was trained on is the one that is here under its name."""

import contextlib
import logging
from pathlib import Path

from fuel_ray.errors import ConfigError, PolicyError
from fuel_ray.policies.learned import Manifest
from fuel_ray.sim.pack import Pack, load_pack

logger = logging.getLogger(__name__)


def pack_here(manifest: Manifest) -> Pack | None:
    """The shipped pack of the name that a policy was trained on; None: there is none."""
    with contextlib.suppress(ConfigError):
        return load_pack(manifest.pack)
    return None


def pack_mismatch(manifest: Manifest, pack: Pack | None) -> str | None:
    """What to say of a policy that was trained on another file of a pack; None: on this, or another name."""
    if pack is None or pack.name != manifest.pack or pack.sha256 == manifest.pack_sha256:
        return None
    return (
        f"was trained on an older version of calibration pack {manifest.pack}, whose figures have changed "
        "since: train it again"
    )


def check_pack(folder: Path, manifest: Manifest, *, pack: Pack, allow_mismatch: bool) -> None:
    """Check that a policy was trained on the ``pack`` that is used, or else on the shipped one of its name.

    Raises:
        PolicyError: it was trained on another file of that pack, and ``allow_mismatch`` does not take it.
    """
    found = pack_mismatch(manifest, pack if pack.name == manifest.pack else pack_here(manifest))
    if found is None:
        return
    if not allow_mismatch:
        raise PolicyError(f"{folder} {found}, or accept it with --allow-mismatch")
    logger.warning("%s %s", folder, found)
