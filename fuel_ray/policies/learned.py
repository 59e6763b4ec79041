"""A policy as a folder: weights, codec and manifest. Acting needs neither Ray nor torch."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fuel_ray.codec import ActionGrid, Codec, Encoder
from fuel_ray.errors import ConfigError, PolicyError
from fuel_ray.policies.network import Head, q_values
from fuel_ray.types import Knobs, NodeSpec, WindowMetrics

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a policy was made for and how it did."""

    kv_block_sizes: tuple[int, ...]  # tokens; more than one for a conditional policy
    model: str
    gpu_name: str
    engine: str
    pack: str
    pack_sha256: str
    reward: str
    workload: str
    workload_digest: str
    head: Head
    fuel_ray_version: str
    evaluation: dict[str, Any] = field(default_factory=dict)
    tuned_static: dict[str, int] | None = None  # the Knobs that were tuned for the same load
    feature_ranges: dict[str, tuple[float, float]] = field(default_factory=dict)  # seen in training
    format: int = FORMAT


class LearnedPolicy:
    """Takes the action of highest Q in every window; on an observe-only node, among those of its clock."""

    def __init__(self, arrays: Mapping[str, np.ndarray], codec: Codec, spec: NodeSpec, *, head: Head) -> None:
        self._arrays = arrays
        self._head = head
        self._codec = codec
        self._encoder = Encoder(codec, spec)
        self._actions = _actions(codec.grid, spec)

    def reset(self) -> None:
        """Forget the past."""
        self._encoder.reset()

    def decide(self, window: WindowMetrics) -> Knobs:
        """Knobs for the next window."""
        q = q_values(self._arrays, self._encoder.encode(window), head=self._head)[self._actions]
        return self._codec.grid.decode(self._actions[int(q.argmax())])


def _actions(grid: ActionGrid, spec: NodeSpec) -> list[int]:
    """Indices of the actions that make a difference on this node."""
    if len(spec.gpu_clocks_mhz) > 1:
        return list(range(len(grid)))
    (only_mhz,) = spec.gpu_clocks_mhz
    nearest_mhz = min(grid.gpu_clocks_mhz, key=lambda clock_mhz: abs(clock_mhz - only_mhz))
    return [grid.encode(Knobs(limit, nearest_mhz)) for limit in grid.batch_limits]


def save_policy(folder: Path, arrays: Mapping[str, np.ndarray], codec: Codec, manifest: Manifest) -> None:
    """Write a policy folder: ``weights.safetensors``, ``codec.json``, ``manifest.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, folder / "weights.safetensors")
    (folder / "codec.json").write_text(json.dumps(codec.to_dict(), indent=2))
    (folder / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2))


def read_manifest(folder: Path) -> Manifest:
    """What the policy in a folder was made for.

    Raises:
        PolicyError: there is no manifest, it is malformed or of another format.
    """
    try:
        raw = json.loads((folder / "manifest.json").read_text())
        raw["kv_block_sizes"] = tuple(raw["kv_block_sizes"])
        manifest = Manifest(**raw)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise PolicyError(f"{folder} is not a policy folder: {error}") from error
    if manifest.format != FORMAT:
        raise PolicyError(f"{folder}: format {manifest.format}; this version reads {FORMAT}")
    return manifest


@dataclass(frozen=True, slots=True)
class PolicyFolder:
    """What is in a policy folder, checked to be whole but not for a node."""

    path: Path
    manifest: Manifest
    codec: Codec
    arrays: Mapping[str, np.ndarray]

    def policy(self, spec: NodeSpec) -> LearnedPolicy:
        """The policy, at work on a node."""
        return LearnedPolicy(self.arrays, self.codec, spec, head=self.manifest.head)


def read_policy(folder: Path) -> PolicyFolder:
    """The policy in a folder, for any node.

    Raises:
        PolicyError: the folder is malformed.
    """
    manifest = read_manifest(folder)
    try:
        codec = Codec.from_dict(json.loads((folder / "codec.json").read_text()))
        arrays = load_file(folder / "weights.safetensors")
        q = q_values(arrays, np.zeros(len(codec.features), np.float32), head=manifest.head)
        if manifest.head not in get_args(Head) or len(q) != len(codec.grid) or not np.isfinite(q).all():
            raise ValueError(f"weights for {len(q)} actions, some not finite or not {len(codec.grid)}")
    except (OSError, ValueError, TypeError, KeyError, SafetensorError, ConfigError) as error:
        raise PolicyError(f"{folder} is not a policy folder: {error}") from error
    return PolicyFolder(folder, manifest, codec, arrays)


def load_policy(folder: Path, spec: NodeSpec) -> LearnedPolicy:
    """The policy in a folder, ready to control a node.

    Raises:
        PolicyError: the folder is malformed, or was made for another block size, model or GPU.
    """
    found = read_policy(folder)
    manifest = found.manifest
    if spec.kv_block_size not in manifest.kv_block_sizes:
        raise PolicyError(
            f"{folder} was trained for KV block size {manifest.kv_block_sizes}, "
            f"{spec.name} has {spec.kv_block_size}"
        )
    if spec.gpu_name != manifest.gpu_name or spec.model != manifest.model:
        raise PolicyError(
            f"{folder} was trained for {manifest.model} on {manifest.gpu_name}, "
            f"{spec.name} is {spec.model} on {spec.gpu_name}"
        )
    return found.policy(spec)
