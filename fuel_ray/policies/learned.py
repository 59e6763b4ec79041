"""A policy as a folder: weights, codec and manifest. Acting needs neither Ray nor torch."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fuel_ray.codec import ActionGrid, Codec, Encoder
from fuel_ray.disk import whole, writing
from fuel_ray.drift import Range
from fuel_ray.errors import ConfigError, PolicyError
from fuel_ray.outside import reference
from fuel_ray.policies.anchor import WEIGHTS, Anchor, GridAnchor, knobs_of
from fuel_ray.policies.compiled import LAYERS, network_parts, untethered
from fuel_ray.policies.network import Head, folded, q_values
from fuel_ray.policies.rules import Rule, server_of
from fuel_ray.policies.static import Compiled, LoadTable, are_counts
from fuel_ray.types import Knobs, NodeSpec, Slo, WindowMetrics

FORMAT = 1
_NOT_USED = ("format", "evaluation")  # keys of manifest.json
MAX_JSON_BYTES = 2**20

# What reading damaged or hostile files raises; weights are safetensors, so that nothing in them can be run
_MALFORMED = (
    *(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, SafetensorError, ConfigError),
)


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
    algorithm: str = "dqn"
    tuned_static: Knobs | None = None  # tuned for the same load
    feature_ranges: Mapping[str, Range] = field(default_factory=dict)  # seen in training
    anchor: Anchor | None = None  # tuned for the same load
    slo: Slo | None = None  # of the deployment; None: that of the training
    needs: tuple[str, ...] = ()  # features from outside, package.module:FEATURES

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        anchor = None if self.anchor is None else self.anchor.to_dict()
        plain = {**asdict(self), "anchor": anchor, "format": FORMAT}
        return plain if self.needs else {key: value for key, value in plain.items() if key != "needs"}

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> "Manifest":
        """The inverse of ``to_dict``; a value that makes no sense is a ValueError."""
        typed = {key: value for key, value in raw.items() if key not in _NOT_USED}
        typed["kv_block_sizes"], typed["needs"] = tuple(raw["kv_block_sizes"]), tuple(raw.get("needs", ()))
        ranges = raw.get("feature_ranges", {})
        typed["feature_ranges"] = {name: (low, high) for name, (low, high) in ranges.items()}
        for name, typed_from in (("anchor", Anchor.from_dict), ("tuned_static", _knobs), ("slo", _slo)):
            typed[name] = None if raw.get(name) is None else typed_from(raw[name])
        return _checked(Manifest(**typed))


class LearnedPolicy:
    """Takes the action of highest Q in every window; on an observe-only node, among those of its clock.

    With an anchor, Q less the penalty for leaving it.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        codec: Codec,
        spec: NodeSpec,
        *,
        head: Head,
        anchor: Anchor | None = None,
    ) -> None:
        self._arrays = arrays
        clocks, price_j = len(codec.grid.gpu_clocks_mhz), codec.miss_price_j
        self._acting = folded(arrays, clocks=clocks, miss_price_j=price_j)
        self._head = head
        self.codec = codec  # what it sees and may choose
        self._spec = spec
        self._encoder = Encoder(codec, spec)
        self._actions = _actions(codec.grid, spec)
        self.anchor = anchor  # what it is kept near
        self._anchored = None if anchor is None else GridAnchor(anchor, codec.grid, spec, codec.slo)

    @property
    def priced(self) -> bool:
        """Whether it was trained for many prices of a miss, so that one can be chosen."""
        return "miss_price" in self.codec.features

    def for_slo(self, slo: Slo, *, miss_price_j: float) -> "LearnedPolicy":
        """The same policy for another SLO and price; limits that are not in ``slo`` stay as they were."""
        own = self.codec.slo
        both = replace(own, ttft_s=slo.ttft_s or own.ttft_s, tpot_s=slo.tpot_s or own.tpot_s)
        codec = replace(self.codec, slo=both, miss_price_j=miss_price_j)
        return LearnedPolicy(self._arrays, codec, self._spec, head=self._head, anchor=self.anchor)

    def near(self, anchor: Anchor | None) -> "LearnedPolicy":
        """The same policy, kept near this anchor or none."""
        return LearnedPolicy(self._arrays, self.codec, self._spec, head=self._head, anchor=anchor)

    def reset(self) -> None:
        self._encoder.reset()
        if self._anchored is not None:
            self._anchored.reset()

    def decide(self, window: WindowMetrics) -> Knobs:
        observation = self.observe(window)
        if self._anchored is None:
            return self.act(observation)
        base = self._anchored.decide(window)
        return self._anchored.decode(self._best(observation, self._anchored.penalty(base)), base)

    def compiled(self, spec: NodeSpec) -> Compiled | None:
        """None where the network or the anchor is of a kind that cannot be compiled."""
        parts = network_parts(self._acting, self.codec, self._spec)
        own = untethered(self.codec.grid) if self._anchored is None else self._anchored.compiled(spec)
        if parts is None or own is None or len(self._actions) < len(self.codec.grid):
            return None
        base, _ = own
        if self.anchor is not None:
            parts |= {"per_100_mhz": self.anchor.weight, "reach_mhz": self.anchor.reach_mhz}
            parts |= {"lower_limits": self.anchor.lower_limits}
        return base._replace(**parts), server_of(spec, self.codec.slo)

    def observe(self, window: WindowMetrics) -> np.ndarray:
        """What it sees of a window: (features,) float32."""
        return self._encoder.encode(window)

    def act(self, observation: np.ndarray) -> Knobs:
        """The knobs of highest Q, without an anchor."""
        return self.codec.grid.decode(self._best(observation))

    def _best(self, observation: np.ndarray, penalty: np.ndarray | float = 0.0) -> int:
        """The index of the action of highest Q less penalty."""
        q = q_values(self._acting, observation, head=self._head) - penalty
        return self._actions[int(q[self._actions].argmax())]


def _actions(grid: ActionGrid, spec: NodeSpec) -> list[int]:
    """Indices of the actions that make a difference on this node."""
    if len(spec.gpu_clocks_mhz) > 1:
        return list(range(len(grid)))
    (only_mhz,) = spec.gpu_clocks_mhz
    nearest_mhz = min(grid.gpu_clocks_mhz, key=lambda clock_mhz: abs(clock_mhz - only_mhz))
    return [grid.encode(Knobs(limit, nearest_mhz)) for limit in grid.batch_limits]


def save_policy(folder: Path, arrays: Mapping[str, np.ndarray], codec: Codec, manifest: Manifest) -> None:
    """Write a policy folder: ``weights.safetensors``, ``codec.json``, ``manifest.json``.

    Raises:
        DiskError: it cannot be written; a policy that was there stays whole.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    weights = save({name: np.ascontiguousarray(a) for name, a in arrays.items()})
    with (
        whole(folder / "weights.safetensors", "wb") as weights_file,
        whole(folder / "codec.json") as codec_file,
        whole(folder / "manifest.json") as manifest_file,
    ):  # all are written before the first takes its place
        weights_file.write(weights)
        codec_file.write(json.dumps(codec.to_dict(), indent=2))
        manifest_file.write(json.dumps(manifest.to_dict(), indent=2))
        for file in (weights_file, codec_file, manifest_file):
            file.flush()


def save_rule(folder: Path, rule: LoadTable | Rule, manifest: Manifest, *, slo: Slo, clock_mhz: int) -> None:
    """Write a simple rule as a policy folder: a network that never gains anything, held to the rule for good.

    ``clock_mhz`` is any clock of the GPU, since a grid needs one.

    Raises:
        DiskError: it cannot be written; a policy that was there stays whole.
    """
    (limit, *_), _ = knobs_of(rule)
    nothing = {"weight": np.zeros((1, 1), np.float32), "bias": np.zeros(1, np.float32)}
    layers = (*LAYERS, "value")
    arrays = {f"{layer}.{kind}": array for layer in layers for kind, array in nothing.items()}
    codec = Codec(("running_of_capacity",), ActionGrid((limit,), (clock_mhz,)), slo)
    held = Anchor(rule, WEIGHTS[-1])
    save_policy(folder, arrays, codec, replace(manifest, head="additive", slo=slo, anchor=held))


def read_manifest(folder: Path) -> Manifest:
    """What the policy in a folder was made for.

    Raises:
        PolicyError: there is no manifest, it is malformed or of another format.
    """
    try:
        raw = _json(folder / "manifest.json")
        if raw.get("format", FORMAT) != FORMAT:
            raise PolicyError(
                f"{folder}: has format {raw['format']}, and this version reads {FORMAT}: train again"
            )
        return Manifest.from_dict(raw)
    except _MALFORMED as error:
        raise PolicyError(_no_folder(folder, error)) from error


def _json(path: Path) -> Any:
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} has {size} bytes; at most {MAX_JSON_BYTES}")
    return json.loads(path.read_text())


def _checked(manifest: Manifest) -> Manifest:
    """Types that a hand or a hostile one may have changed."""
    for name in (f.name for f in fields(Manifest) if f.type is str):
        _expect(isinstance(getattr(manifest, name), str), f"{name} is not a text")
    _expect(are_counts(manifest.kv_block_sizes), "kv_block_sizes are not block sizes")
    _expect(all(reference(name) == name for name in manifest.needs), "needs are not package.module:NAME")
    _expect(manifest.head in get_args(Head), f"head {manifest.head!r} is unknown")
    for name, (low, high) in manifest.feature_ranges.items():
        _expect(-math.inf < low <= high < math.inf, f"the range of {name} is not one")
    return manifest


def _knobs(raw: Mapping[str, Any]) -> Knobs:
    knobs = Knobs(**raw)
    _expect(are_counts((knobs.batch_limit, knobs.gpu_clock_mhz)), "tuned_static is not a pair of knobs")
    return knobs


def _slo(raw: Mapping[str, Any]) -> Slo:
    slo = Slo(**raw)
    limits = (slo.ttft_s, slo.tpot_s, slo.e2e_s, slo.share)
    _expect(all(limit is None or 0 < limit < math.inf for limit in limits), f"{slo} is no SLO")
    _expect(slo.share is None or slo.share <= 1, f"{slo} is no SLO")
    return slo


def _check_codec(codec: Codec) -> None:
    grid = codec.grid
    for name, values in (("batch_limits", grid.batch_limits), ("gpu_clocks_mhz", grid.gpu_clocks_mhz)):
        _expect(are_counts(values) and values == tuple(sorted(set(values))), f"{name} do not ascend")
    _slo(asdict(codec.slo))
    if (scale := codec.running_scale) is not None:
        _expect(type(scale.count) is int and scale.count >= 0, "the scale's count is no count")
        size = len(codec.features) if scale.count else 0
        for of_each in (scale.mean, scale.sum_of_squares):
            _expect(len(of_each) == size and all(map(math.isfinite, of_each)), "the scale is not one")
        _expect(all(spread >= 0 for spread in scale.sum_of_squares), "the scale has a negative spread")


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


@dataclass(frozen=True, slots=True)
class PolicyFolder:
    """What is in a policy folder, checked to be whole but not for a node."""

    path: Path
    manifest: Manifest
    codec: Codec
    arrays: Mapping[str, np.ndarray]

    @property
    def slo(self) -> Slo:
        """That of the deployment that it was chosen for, or else of its training."""
        return self.manifest.slo or self.codec.slo

    def policy(self, spec: NodeSpec) -> LearnedPolicy:
        """The policy, at work on a node."""
        manifest = self.manifest
        return LearnedPolicy(self.arrays, self.codec, spec, head=manifest.head, anchor=manifest.anchor)


def read_policy(folder: Path, *, extra_features: Sequence[str] = ()) -> PolicyFolder:
    """The policy in a folder, for any node; ``extra_features`` are those that the user named.

    Raises:
        PolicyError: the folder is malformed, or needs features that are not named.
    """
    manifest = read_manifest(folder)
    if missing := [name for name in manifest.needs if name not in extra_features]:
        raise PolicyError(f"{folder} needs your own features: add --extra-features {' '.join(missing)}")
    try:
        codec = Codec.from_dict(_json(folder / "codec.json"), extra_features=manifest.needs)
        _check_codec(codec)
        arrays = load_file(folder / "weights.safetensors")
        _expect(all(np.isfinite(array).all() for array in arrays.values()), "some weights are not finite")
        acting = folded(arrays, clocks=len(codec.grid.gpu_clocks_mhz))
        q = q_values(acting, np.zeros(len(codec.features), np.float32), head=manifest.head)
        _expect(q.shape == (len(codec.grid),), f"weights for {q.shape} actions, not {len(codec.grid)}")
    except _MALFORMED as error:
        raise PolicyError(_no_folder(folder, error)) from error
    return PolicyFolder(folder, manifest, codec, arrays)


def _no_folder(folder: Path, error: Exception) -> str:
    """Why a folder is none of a policy, and what one is."""
    if isinstance(error, FileNotFoundError):
        lacking = Path(error.filename).name
        why = f"it has no {lacking}; give a folder such as results/sweep-.../policies/block_16"
    else:
        why = str(error)
    return f"{folder} is not a policy folder: {why}"


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Names of the folders; the whole path where two have the same name, as those of two sweeps have."""
    names = [folder.name for folder in folders]
    return [str(folder) if names.count(folder.name) > 1 else folder.name for folder in folders]


def load_policy(folder: Path, spec: NodeSpec, *, extra_features: Sequence[str] = ()) -> LearnedPolicy:
    """The policy in a folder, ready to control a node; ``extra_features`` are those that the user named.

    Raises:
        PolicyError: as ``read_policy``, or it was made for another block size, model or GPU.
    """
    found = read_policy(folder, extra_features=extra_features)
    manifest = found.manifest
    for what, own, there in (
        ("KV block size", manifest.kv_block_sizes, spec.kv_block_size),
        ("model", (manifest.model,), spec.model),
        ("GPU", (manifest.gpu_name,), spec.gpu_name),
    ):
        if there not in own:
            raise PolicyError(
                f"{folder} was trained for {what} {', '.join(map(str, own))}, and {spec.name} has {there}"
            )
    return found.policy(spec)
