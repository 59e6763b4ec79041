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
    "no NVIDIA driver here. Simulated nodes need none: training, comparing and `fuel-ray demo` work. What a "
    "real server lacks here is said by --backend live",
)


@dataclass(frozen=True)
class DoctorConfig:
    """Say what works and what to do, a line each; exit code 1 if something that is needed is missing."""

    backend: Backend | None = None
    """Nodes of the next command: live needs GPUs and vLLM, sim does not. None: live on a cluster, where an
    NVIDIA driver is, and with --vllm or --gpu-ids; else sim."""
    cluster: bool = False
    """Look at every host of the Ray cluster that runs here or at RAY_ADDRESS, not only at this host."""
    cluster_file: Path | None = None
    """Look whether the hosts of this cluster.yaml answer by ssh, before `ray up` waits for them."""
    block_sizes: tuple[int, ...] = (8, 16, 32, 64)
    """KV block sizes that are to be served, in tokens."""
    gpu_ids: tuple[str, ...] = ()
    """A node's GPUs, by nvidia-smi's index or by UUID; none given: the first of CUDA_VISIBLE_DEVICES."""
    vllm: str = "vllm"
    """Command that runs vLLM; several words as in a shell."""
    out: Path = Path("results")
    """Folder that results go to."""


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
        raise ConfigError("--vllm is empty; the command that runs vLLM")
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
            looked = [Check("host", str(looked), "`ray status` and its logs say more")]
        if there.skew_s is not None:
            looked = [*looked, _clock(there.skew_s)]
        is_node = NODE_RESOURCE in there.resources
        status |= show(f"{there.host}  ", looked if is_node else [c for c in looked if not c.of_a_node])
    remedy = f"start Ray with --resources='{{\"{NODE_RESOURCE}\": 1}}' on the hosts that shall serve"
    return status | show("", [Check("nodes", f"{nodes:g} in the cluster", None if nodes else remedy)])


def _clock(skew_s: float) -> Check:
    remedy = "synchronise it, by chrony or ntp" if abs(skew_s) > LARGEST_SKEW_S else None
    return Check("clock", f"{skew_s:+.2f} s off this host's", remedy)


def show(prefix: str, checks: Iterable[Check]) -> int:
    """A line per check; 1 if one that is needed failed."""
    failed = False
    for check in checks:
        mark = "ok  " if check.remedy is None else "FAIL" if check.needed else "note"
        failed |= mark == "FAIL"
        text = check.found if check.remedy is None else f"{check.found}: {check.remedy}"
        print(f"{mark}  {prefix}{check.what:<12}{' '.join(text.split())}", flush=True)
    return int(failed)
