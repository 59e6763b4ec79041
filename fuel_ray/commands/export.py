"""fuel-ray export: an RLlib checkpoint of a sweep or a training as a policy folder."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fuel_ray.build.codec import build_codec, build_manifest
from fuel_ray.build.nodes import build_spec
from fuel_ray.config import LearnConfig, from_dict
from fuel_ray.errors import PolicyError
from fuel_ray.flags import check_named
from fuel_ray.policies.learned import read_policy, save_policy
from fuel_ray.record import read_json
from fuel_ray.training.checkpoint import is_checkpoint, q_network
from fuel_ray.types import NodeSpec

_RUN_JSON = "run.json"


@dataclass(frozen=True)
class ExportConfig:
    """Turn an RLlib checkpoint into a policy folder, which `fuel-ray deploy` can use without Ray."""

    checkpoint: Path
    """Checkpoint in its run's folder: results/sweep-.../tune*/TRIAL/checkpoint_000015."""
    out: Path | None = None
    """Policy folder to write. None: `policy` in the checkpoint."""
    extra_features: tuple[str, ...] = ()
    """package.module:FEATURES that the run used."""
    reward: str | None = None
    """package.module:Class, if the run used a reward of your own."""
    workload: str | None = None
    """package.module:function, with its values, if the run used a workload of your own."""


def run(config: ExportConfig) -> int:
    """Write the policy folder and print where it is.

    Raises:
        PolicyError: this is no checkpoint of a run, or holds more than weights.
        ConfigError: the run's settings cannot be read.
        DiskError: the folder cannot be written.
    """
    if not is_checkpoint(config.checkpoint):
        raise PolicyError(
            f"--checkpoint {config.checkpoint}: not an RLlib checkpoint (no module_state.pkl in it); give a "
            "folder such as results/sweep-.../tune/TRIAL/checkpoint_000004"
        )
    checkpoint = config.checkpoint.resolve()
    run_dir = next((folder for folder in checkpoint.parents if (folder / _RUN_JSON).is_file()), None)
    if run_dir is None:
        raise PolicyError(
            f"--checkpoint {checkpoint}: none of the folders above it has a {_RUN_JSON}, which has the "
            "settings of the run; move the checkpoint back into the folder of its run"
        )
    settings, sizes = _trained(checkpoint.parent / "params.json")
    loaded = replace(
        settings, train=replace(settings.train, algorithm="dqn")
    )  # whatever it was, not used here
    check_named(loaded, (*config.extra_features, config.reward or "", config.workload or ""))
    facts = read_json(run_dir / _RUN_JSON)
    spec = _spec(settings, sizes[0], facts)
    engine = facts.get("engine") or "unknown"
    manifest = build_manifest(settings, spec, block_sizes=sizes, engine=engine)
    trained_on = facts.get("pack", {}).get("sha256", manifest.pack_sha256)  # its file may have changed since
    manifest = replace(manifest, pack_sha256=trained_on)
    folder = config.out or checkpoint / "policy"
    save_policy(folder, q_network(checkpoint), build_codec(settings, spec), manifest)
    read_policy(folder, extra_features=config.extra_features)  # the settings may say another shape
    print(f"wrote {folder}")
    return 0


def _spec(settings: LearnConfig, kv_block_size: int, facts: Mapping[str, Any]) -> NodeSpec:
    """The node that it was trained on; the run says it, since a live one may be elsewhere."""
    raw = facts.get("nodes", {}).get(str(kv_block_size))
    if raw is None:
        return build_spec(settings, kv_block_size)
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in raw.items()}
    return NodeSpec(**values | {"server": None})


def _trained(params: Path) -> tuple[LearnConfig, tuple[int, ...]]:
    """The settings and the block sizes that a trial was trained with."""
    try:
        raw = read_json(params)["env_config"]
        sizes = tuple(int(size) for size in raw["block_sizes"])
        return from_dict(raw["config"], base=LearnConfig(), source=str(params)), sizes
    except (KeyError, TypeError, ValueError) as error:
        raise PolicyError(
            f"{params} lacks the settings that the trial was trained with: {error!r}"
        ) from error
