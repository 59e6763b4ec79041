"""From a policy folder and the URL of a running server to a node under control; needs no simulator."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from fuel_ray.address import Access
from fuel_ray.control import ControlLoop, StepRecord
from fuel_ray.deploy.canary import Canary
from fuel_ray.deploy.deployment import Attached
from fuel_ray.deploy.estimate import SavingEstimate
from fuel_ray.deploy.fit import check_fit
from fuel_ray.deploy.limits import check_judged, how_judged
from fuel_ray.deploy.rule import Rule
from fuel_ray.drift import DriftDetector
from fuel_ray.errors import ConfigError, GpuError, NodeError, PolicyError
from fuel_ray.guard import Guard
from fuel_ray.live.gpu.lease import unlock
from fuel_ray.live.gpu.lease_state import state_folder, state_path
from fuel_ray.live.gpu.nvml import Gpus
from fuel_ray.live.gpu.placement import Placement, placement_of
from fuel_ray.live.node import GpuNode
from fuel_ray.live.vllm.cache import CacheConfig
from fuel_ray.live.vllm.endpoint import Endpoint
from fuel_ray.live.vllm.kv_monitor import MetricsClient
from fuel_ray.live.vllm.limiter import BatchLimiter, check_creatable
from fuel_ray.live.vllm.metrics import MetricsSnapshot
from fuel_ray.live.vllm.server import served_model, server_version
from fuel_ray.node_config import GuardConfig
from fuel_ray.objective import Energy
from fuel_ray.policies.learned import PolicyFolder
from fuel_ray.policies.packs import pack_here
from fuel_ray.sim.pack import Pack, load_pack
from fuel_ray.types import Knobs, NodeSpec, Policy

SCRAPE_S = 2.0  # a page that takes longer is a lost window
ATTACH_S = 2.0  # for a busy scheduler to find a new limit file

_RULES = GuardConfig(latency=True, drift=True, switches_per_minute=30)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Target(Access):
    """The running server, its GPUs, and what a policy may set."""

    server: str = "http://127.0.0.1:8000"
    """URL of the running server, which is never stopped."""
    served_model: str | None = None
    """Model name to request from a server that has several. None: the policy's model."""
    gpu_ids: tuple[str, ...] = ()
    """GPUs of the server: nvidia-smi's indices, or UUIDs. The beginning of a UUID (GPU-4f2, MIG-4f2) is
    enough. By default the first of CUDA_VISIBLE_DEVICES."""
    strict: bool = False
    """Fail, instead of warning, if no process of the server runs on these GPUs."""
    limit_file: Path | None = None
    """The server's FUEL_RAY_LIMIT_FILE. None: its batch limit is not changed."""
    max_num_seqs: int | None = None
    """Requests that the server can run at once. This is its highest batch limit. None: what its scheduler
    reports."""
    clock_control: Literal["on", "off"] = "on"
    """off: never set clocks, so that the policy chooses the batch limit only."""
    shadow: bool = False
    """Change nothing; record what the policy would do."""
    allow_mismatch: bool = False
    """Accept a policy for another model, GPU, pack, clocks or batch limits, but not for another block
    size."""
    guard: GuardConfig = _RULES


def attach(
    target: Target, folder: PolicyFolder | Rule, *, interval_s: float, trial: Canary | None = None
) -> Attached:
    """A control loop around a running server and the policy for it, on trial where that is asked for.

    Raises:
        PolicyError: the policy does not fit the server; the message names all that differs.
        ConfigError: the fallback is not one of the node's settings, or a rule lacks something.
        NodeError: the server does not answer, there is no such GPU, or another controller has it.
    """
    with contextlib.ExitStack() as opened:
        gpus = opened.enter_context(Gpus(target.gpu_ids, default=1))
        gpus.require_energy()
        found = _placement(target, gpus)
        if target.clock_control == "on" and not target.shadow:
            _give_back_left(gpus.uuids)
        server = Endpoint.of(target.server, target)
        client = MetricsClient(server, timeout_s=SCRAPE_S)
        opened.callback(client.close)
        page = client.scrape()
        cache = _cache(client, page)
        check_judged(client.url, folder.slo, page)
        limiter = None
        if target.limit_file is not None and target.shadow:
            check_creatable(target.limit_file)
        elif target.limit_file is not None:
            limiter = BatchLimiter(target.limit_file, leased=True, capacity=target.max_num_seqs)
            opened.callback(limiter.close)
        model = served_model(server, name=target.served_model, like=_model(folder))
        spec = _spec(target, folder, gpus, cache, limiter, name=server.url, model=model.name)
        if isinstance(folder, PolicyFolder):
            engine, unsure = server_version(server), cache.block_size if cache.uncertain else None
            check_fit(folder, spec, model, engine, unsure=unsure, allow_mismatch=target.allow_mismatch)
        if len(spec.gpu_clocks_mhz) == 1 and limiter is None and not target.shadow:
            logger.warning(
                "neither the clock nor the batch limit can be set here, so the policy has no effect"
            )
        guard = _guard(target.guard, folder, spec)
        policy: Policy = folder.policy(spec)
        if trial is not None:
            policy = trial.over(policy, spec.max_performance)
        node = GpuNode(spec, gpus, client, limiter=limiter, shadow=target.shadow)
        opened.pop_all()  # the node closes them
    logger.log(logging.INFO if found.found == "right" else logging.WARNING, "%s", found.text)
    return Attached(
        loop=ControlLoop(node, _objective(folder), interval_s=interval_s, guard=guard),
        policy=policy,
        check=partial(_check_same, client, spec, server),
        saved_j=_saving(folder, spec),
        judged=tuple(how_judged(folder.slo, page)),
    )


def _placement(target: Target, gpus: Gpus) -> Placement:
    """Whether the server is on these GPUs; GpuError where it is not and --strict was given."""
    found = placement_of(gpus, target.server)
    if found.found == "wrong" and target.strict:
        raise GpuError(f"--strict, {target.server}: {found.text}")
    return found


def _spec(
    target: Target,
    folder: PolicyFolder | Rule,
    gpus: Gpus,
    cache: CacheConfig,
    limiter: BatchLimiter | None,
    *,
    name: str,
    model: str,
) -> NodeSpec:
    wanted = target.clock_control == "on"
    shown = gpus.supported_clocks_mhz if wanted and target.shadow else ()
    return NodeSpec(
        name=f"{name} on {', '.join(gpus.uuids)}",
        gpu_name=gpus.name,
        gpu_uuids=gpus.uuids,
        model=model,
        kv_block_size=_block_size(folder, cache),
        num_kv_blocks=cache.num_gpu_blocks,
        batch_limits=(1, _capacity(target, folder, limiter)),
        gpu_clocks_mhz=shown or gpus.settable_clocks_mhz(wanted=wanted),
    )


def _block_size(folder: PolicyFolder | Rule, cache: CacheConfig) -> int:
    """The page's; the policy's where the page does not say that of a hybrid model's attention."""
    sizes = folder.manifest.kv_block_sizes if isinstance(folder, PolicyFolder) else ()
    return sizes[0] if cache.uncertain and len(sizes) == 1 else cache.block_size


def _guard(config: GuardConfig, folder: PolicyFolder | Rule, spec: NodeSpec) -> Guard:
    """The rules that are asked for; where they say None, the SLO's own wait and the tuned static pair."""
    slo = folder.slo
    tuned = folder.manifest.tuned_static if isinstance(folder, PolicyFolder) else None
    if config.max_wait_s is None:
        config = replace(config, max_wait_s=slo.wait_limit_s)
    if config.fallback is None and tuned is not None and _can_be_set(tuned, spec):
        config = replace(config, fallback=f"{tuned.batch_limit}@{tuned.gpu_clock_mhz}")
    drift = None
    if config.drift and isinstance(folder, PolicyFolder):
        drift = DriftDetector(folder.codec, spec, ranges=folder.manifest.feature_ranges)
    return Guard(config.rules(slo, spec), drift=drift)


def _can_be_set(knobs: Knobs, spec: NodeSpec) -> bool:
    """Whether the node has these knobs; its one clock, if it has one, is not chosen."""
    clocks, (lowest, highest) = spec.gpu_clocks_mhz, spec.batch_limits
    return lowest <= knobs.batch_limit <= highest and (len(clocks) == 1 or knobs.gpu_clock_mhz in clocks)


def _saving(folder: PolicyFolder | Rule, spec: NodeSpec) -> Callable[[StepRecord], float | None]:
    """By the pack that the policy was trained on, where that is at hand."""
    pack = folder.pack if isinstance(folder, Rule) else _trained_on(folder)
    if pack is None:
        return lambda record: None
    estimate, most = SavingEstimate(pack.perf, spec), spec.max_performance
    return lambda record: estimate.saved_j(record.metrics, record.verdict.knobs, reference=most)


def _trained_on(folder: PolicyFolder) -> Pack | None:
    own = folder.path / "pack.json"  # of a server's owner, which is nowhere else to be found
    pack = load_pack(str(own)) if own.is_file() else pack_here(folder.manifest)
    return pack if pack is not None and pack.sha256 == folder.manifest.pack_sha256 else None


def _objective(folder: PolicyFolder | Rule) -> Energy:
    """Negative watts, missed limits included at the policy's own price."""
    price_j = folder.codec.miss_price_j if isinstance(folder, PolicyFolder) else 0.0
    return Energy(folder.slo, token_price_j=0.0, miss_price_j=price_j, scale_w=1.0, lowest=-math.inf)


def _model(folder: PolicyFolder | Rule) -> str | None:
    return folder.manifest.model if isinstance(folder, PolicyFolder) else None


def _cache(client: MetricsClient, page: MetricsSnapshot) -> CacheConfig:
    if page.cache_config is None:
        raise NodeError(f"{client.url} does not report {page.cache_unknown}")
    return page.cache_config


def _check_same(client: MetricsClient, spec: NodeSpec, server: Endpoint) -> None:
    """Raises PolicyError where there is another server at the same address."""
    cache = _cache(client, client.scrape())
    size = spec.kv_block_size if cache.may_have(spec.kv_block_size) else cache.block_size
    found = size, cache.num_gpu_blocks, served_model(server, like=spec.model).name
    expected = spec.kv_block_size, spec.num_kv_blocks, spec.model
    if found != expected:
        raise PolicyError(
            "the server has changed: block size, number of blocks and model are "
            f"{', '.join(map(str, found))}, and were {', '.join(map(str, expected))}"
        )


def _capacity(target: Target, folder: PolicyFolder | Rule, limiter: BatchLimiter | None) -> int:
    """The server's highest batch limit."""
    if target.max_num_seqs is not None:
        return target.max_num_seqs
    if isinstance(folder, Rule):
        raise ConfigError(
            f"--policy {folder.entry}: a rule needs the server's capacity; give it with --max-num-seqs"
        )
    deadline_s = time.monotonic() + ATTACH_S
    while limiter is not None and time.monotonic() < deadline_s:
        with contextlib.suppress(NodeError):
            return limiter.status().capacity
        time.sleep(0.05)
    highest = folder.codec.grid.batch_limits[-1]
    if limiter is not None:
        logger.warning(
            "the scheduler has not read %s yet (an idle server reads it at its next request); until then its "
            "capacity is assumed to be the policy's highest batch limit, %d; --max-num-seqs sets it",
            limiter.path,
            highest,
        )
    return highest


def _give_back_left(uuids: Sequence[str]) -> None:
    """Clocks that a dead controller, or a failed attempt to give back, left locked: before all else."""
    folder = state_folder()
    for uuid in uuids:
        if state_path(folder, uuid).exists():
            unlock(uuid, folder=folder)
