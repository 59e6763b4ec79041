"""Whether the hosts of a cluster.yaml answer by ssh, before `ray up` waits for them."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from fuel_ray.errors import ConfigError
from fuel_ray.live.checks import Check

SSH_S = 8


def file_checks(path: Path) -> list[Check]:
    """A check per host of a cluster.yaml; all are asked at once.

    Raises:
        ConfigError: it is not a cluster file with named hosts.
    """
    try:
        settings: dict[str, Any] = yaml.safe_load(path.read_text())
        provider, auth = settings["provider"], settings["auth"]
        hosts = [provider["head_ip"], *provider["worker_ips"]]
        user, key = str(auth["ssh_user"]), auth.get("ssh_private_key")
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        why = (
            getattr(error, "strerror", None)
            or f"not a Ray cluster file with `provider: type: local`: {error!r}"
        )
        raise ConfigError(f"--cluster-file {path}: {why}") from error
    with ThreadPoolExecutor(len(hosts)) as threads:
        return list(threads.map(lambda host: _ssh_check(str(host), user, key), hosts))


def _ssh_check(host: str, user: str, key: str | None) -> Check:
    identity = ["-i", os.path.expanduser(key)] if key else []
    options = (
        *("BatchMode=yes", f"ConnectTimeout={SSH_S}"),
        *("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null"),
    )
    flags = [word for option in options for word in ("-o", option)]
    command = ["ssh", *identity, *flags, f"{user}@{host}", "python3 -V"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * SSH_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check(host, f"ssh did not answer: {error}", "check sshd on that host, and ssh on this one")
    if done.returncode == 255:
        said = (done.stderr.strip().splitlines() or ["ssh failed"])[-1]
        refused = f"allow {user} to log in with this key (ssh-copy-id), or correct `auth` in the file"
        silent = "start the host and its sshd, or correct head_ip and worker_ips in the file"
        return Check(host, said, refused if "denied" in said else silent)
    if done.returncode != 0:
        return Check(host, f"{user} can log in, but there is no python3", "install Python 3.11 or newer")
    return Check(host, f"{user} can log in, {(done.stdout + done.stderr).strip().splitlines()[-1]}")
