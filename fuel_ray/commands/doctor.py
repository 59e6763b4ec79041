"""fuel-ray doctor: what a host, or every host of a cluster, lacks for the next command."""

import shlex
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fuel_ray.cluster.hosts import NODE_RESOURCE, connect, on_hosts
from fuel_ray.config import Backend
from fuel_ray.errors import ConfigError, NodeError
from fuel_ray.live.checks import Check, host_checks

SSH_S = 8
HOST_S = 60.0
LARGEST_SKEW_S = 0.5


@dataclass(frozen=True)
class DoctorConfig:
    """Say what works and what to do, a line each; exit code 1 if something that is needed is missing."""

    backend: Backend = "live"
    """Nodes of the next command: live needs GPUs and vLLM, sim does not."""
    cluster: bool = False
    """Look at every host of the Ray cluster that runs here or at RAY_ADDRESS, not only at this host."""
    cluster_file: Path | None = None
    """Look whether the hosts of this cluster.yaml answer by ssh, before `ray up` waits for them."""
    block_sizes: tuple[int, ...] = (8, 16, 32, 64)
    """KV block sizes that are to be served, in tokens."""
    gpu_ids: tuple[str, ...] = ("0",)
    """NVML indices or UUIDs of a node's GPUs."""
    vllm: str = "vllm"
    """Command that runs vLLM; several words as in a shell."""
    out: Path = Path("results")
    """Folder that results go to."""


def run(config: DoctorConfig) -> int:
    """Print a line per check; 0 if nothing that is needed is missing, else 1.

    Raises:
        ConfigError: there is no such cluster or file.
    """
    if config.cluster_file is not None:
        return _print("", _file_checks(config.cluster_file))
    if not config.cluster:
        return _print("", _own_checks(config))
    return _cluster(config)


def _own_checks(config: DoctorConfig) -> list[Check]:
    if not shlex.split(config.vllm):
        raise ConfigError("--vllm is empty; the command that runs vLLM")
    return host_checks(
        gpu_ids=config.gpu_ids,
        vllm=shlex.split(config.vllm),
        block_sizes=config.block_sizes,
        folder=config.out,
        live=config.backend == "live",
    )


def _cluster(config: DoctorConfig) -> int:
    """Every host of the cluster, those without nodes for disk and clock only."""
    connect(cluster=True)
    status = 0
    nodes = 0.0
    for there in on_hosts(_own_checks, config, timeout_s=HOST_S):
        nodes += there.resources.get(NODE_RESOURCE, 0.0)
        looked = [_lost(there.answer)] if isinstance(there.answer, NodeError) else there.answer
        if there.skew_s is not None:
            looked = [*looked, _clock(there.skew_s)]
        is_node = NODE_RESOURCE in there.resources
        status |= _print(f"{there.host}  ", looked if is_node else [c for c in looked if not c.of_a_node])
    remedy = f"start Ray with --resources='{{\"{NODE_RESOURCE}\": 1}}' on the hosts that shall serve"
    return status | _print("", [Check("nodes", f"{nodes:g} in the cluster", None if nodes else remedy)])


def _lost(error: NodeError) -> Check:
    return Check("host", str(error), "`ray status` and its logs say more")


def _clock(skew_s: float) -> Check:
    remedy = "synchronise it, by chrony or ntp" if abs(skew_s) > LARGEST_SKEW_S else None
    return Check("clock", f"{skew_s:+.2f} s off this host's", remedy)


def _file_checks(path: Path) -> list[Check]:
    """Whether the hosts of a cluster.yaml answer, all at once."""
    try:
        settings: dict[str, Any] = yaml.safe_load(path.read_text())
        provider, auth = settings["provider"], settings["auth"]
        hosts = [provider["head_ip"], *provider["worker_ips"]]
        user, key = str(auth["ssh_user"]), auth.get("ssh_private_key")
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--cluster-file {path}: not a cluster file with provider local: {error!r}"
        ) from error
    with ThreadPoolExecutor(len(hosts)) as threads:
        return list(threads.map(lambda host: _ssh_check(str(host), user, key), hosts))


def _ssh_check(host: str, user: str, key: str | None) -> Check:
    identity = ["-i", str(Path(key).expanduser())] if key else []
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_S}", "-o", "StrictHostKeyChecking=no"]
    command = [
        "ssh",
        *identity,
        *options,
        "-o",
        "UserKnownHostsFile=/dev/null",
        f"{user}@{host}",
        "python3 -V",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * SSH_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check(host, f"ssh gives no answer: {error}", "look at sshd there, and for ssh here")
    if done.returncode == 255:
        said = (done.stderr.strip().splitlines() or ["ssh failed"])[-1]
        refused = f"let {user} in with this key (ssh-copy-id), or correct auth in the file"
        silent = "start the host and its sshd, or correct head_ip and worker_ips"
        return Check(host, said, refused if "denied" in said else silent)
    if done.returncode != 0:
        return Check(host, f"{user} may log in, but there is no python3", "install Python 3.11 or newer")
    return Check(host, f"{user} may log in, {(done.stdout + done.stderr).strip().splitlines()[-1]}")


def _print(prefix: str, checks: Iterable[Check]) -> int:
    """A line per check; 1 if one that is needed failed."""
    failed = False
    for check in checks:
        mark = "ok  " if check.remedy is None else "FAIL" if check.needed else "note"
        failed |= mark == "FAIL"
        lines: Sequence[str] = [check.found, *([check.remedy] if check.remedy else [])]
        print(
            f"{mark}  {prefix}{check.what:<12}{': '.join(' '.join(line.split()) for line in lines)}",
            flush=True,
        )
    return int(failed)
