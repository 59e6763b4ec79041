"""A policy as a folder: weights, codec and manifest. Acting needs neither Ray nor torch."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fuel_ray.codec import Codec, Encoder
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
    format: int = FORMAT


class LearnedPolicy:
    """Takes the action of highest Q in every window."""

    def __init__(self, arrays: Mapping[str, np.ndarray], codec: Codec, spec: NodeSpec, *, head: Head) -> None:
        self._arrays = arrays
        self._head = head
        self._codec = codec
        self._encoder = Encoder(codec, spec)

    def reset(self) -> None:
        """Forget the past."""
        self._encoder.reset()

    def decide(self, window: WindowMetrics) -> Knobs:
        """Knobs for the next window."""
        q = q_values(self._arrays, self._encoder.encode(window), head=self._head)
        return self._codec.grid.decode(int(q.argmax()))


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


def read_policy(folder: Path) -> tuple[Manifest, Codec, dict[str, np.ndarray]]:
    """Manifest, codec and weights of a policy folder.

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
    return manifest, codec, arrays


def load_policy(folder: Path, spec: NodeSpec) -> LearnedPolicy:
    """The policy in a folder, ready to control a node.

    Raises:
        PolicyError: the folder is malformed, or was made for another block size, model or GPU.
    """
    manifest, codec, arrays = read_policy(folder)
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
    return LearnedPolicy(arrays, codec, spec, head=manifest.head)
