"""fuel-ray doctor: what a host, or every host of a cluster, lacks for the next command."""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fuel_ray.config import Backend
from fuel_ray.errors import ConfigError, NodeError
from fuel_ray.live.checks import Check, has_driver, host_checks

HOST_S = 60.0
LARGEST_SKEW_S = 0.5
_SIMULATION = Check(
    "GPU",
    "no NVIDIA driver on this host. Simulated nodes need none, so demo, train, sweep and evaluate work. To "
    "see what a real server needs, add --backend live",
)


@dataclass(frozen=True)
class DoctorConfig:
    """Check what this host, or each host of a cluster, needs, and say how to fix what is missing.

    One line per check. The exit code is 1 if something that is needed is missing.
    """

    backend: Backend | None = None
    """What to check for. sim: simulated nodes. live: vLLM on GPUs. None: live if there is an NVIDIA driver,
    or with --cluster, --vllm or --gpu-ids; otherwise sim."""
    cluster: bool = False
    """Check every host of the Ray cluster that runs here or at RAY_ADDRESS; needs fuel_ray[train] or
    fuel_ray[cluster]."""
    cluster_file: Path | None = None
    """Check whether the hosts in this cluster.yaml can be reached by ssh, before `ray up`."""
    block_sizes: tuple[int, ...] = (8, 16, 32, 64)
    """KV block sizes to serve, in tokens."""
    gpu_ids: tuple[str, ...] = ()
    """GPUs to serve on: nvidia-smi's indices, or UUIDs. By default the first of CUDA_VISIBLE_DEVICES."""
    vllm: str = "vllm"
    """Command that runs vLLM; quote it if it has several words."""
    out: Path = Path("results")
    """Folder for results."""


def run(config: DoctorConfig) -> int:
    """Print a line per check; 0 if nothing that is needed is missing, else 1."""
    if config.cluster_file is not None:
        from fuel_ray.cluster.ssh import file_checks  # noqa: PLC0415  (one host needs no YAML)

        return show("", file_checks(config.cluster_file))
    if not config.cluster:
        return show("", _own_checks(config))
    return _cluster(config)


def _own_checks(config: DoctorConfig) -> list[Check]:
    if not shlex.split(config.vllm):
        raise ConfigError("--vllm is empty: give the command that runs vLLM, such as vllm")
    asked = config.cluster or config.vllm != DoctorConfig.vllm or bool(config.gpu_ids)
    live = config.backend == "live" or (config.backend is None and (asked or has_driver()))
    found = host_checks(
        gpu_ids=config.gpu_ids,
        vllm=shlex.split(config.vllm),
        block_sizes=config.block_sizes,
        folder=config.out,
        live=live,
    )
    return found if live or config.backend == "sim" else [_SIMULATION, *found]


def _cluster(config: DoctorConfig) -> int:
    """Every host of the cluster, those without nodes for disk and clock only."""
    from fuel_ray.cluster.hosts import NODE_RESOURCE, connect, on_hosts  # noqa: PLC0415  (one host needs no Ray)

    connect(cluster=True)
    status = 0
    nodes = 0.0
    for there in on_hosts(_own_checks, config, timeout_s=HOST_S):
        nodes += there.resources.get(NODE_RESOURCE, 0.0)
        looked = there.answer
        if isinstance(looked, NodeError):
            looked = [Check("host", str(looked), "see `ray status` and Ray's logs")]
        if there.skew_s is not None:
            looked = [*looked, _clock(there.skew_s)]
        is_node = NODE_RESOURCE in there.resources
        status |= show(f"{there.host}  ", looked if is_node else [c for c in looked if not c.of_a_node])
    remedy = f"start Ray with --resources='{{\"{NODE_RESOURCE}\": 1}}' on every host that is to serve"
    return status | show("", [Check("nodes", f"{nodes:g} in the cluster", None if nodes else remedy)])


def _clock(skew_s: float) -> Check:
    remedy = "synchronise the clocks, with chrony or ntp" if abs(skew_s) > LARGEST_SKEW_S else None
    return Check("clock", f"{skew_s:+.2f} s from this host's clock", remedy)


def show(prefix: str, checks: Iterable[Check]) -> int:
    """A line per check; 1 if one that is needed failed."""
    failed = False
    for check in checks:
        mark = "ok  " if check.remedy is None else "FAIL" if check.needed else "note"
        failed |= mark == "FAIL"
        text = check.found if check.remedy is None else f"{check.found}: {check.remedy}"
        print(f"{mark}  {prefix}{check.what:<12}{' '.join(text.split())}", flush=True)
    return int(failed)
