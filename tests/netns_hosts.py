"""Throw-away hosts on this machine: namespaces for network, processes and mounts, an sshd each.

Each has an address, process ids (`ray stop` sees no others), /tmp/ray, /dev/shm and a home of its own; the
rest of the file system is this machine's. Needs root, iproute2, openssh-server and rsync.
A lock that the kernel drops with its holder says whose they are: what a killed run left, the next one clears.
"""

import contextlib
import fcntl
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

TOOLS = ("ip", "unshare", "ssh", "ssh-keygen", "rsync", "/usr/sbin/sshd")

HOST = """
hostname {name}
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp/ray
mount --bind {home}/passwd /etc/passwd
exec /usr/sbin/sshd -D -e -f {home}/sshd_config
"""
SSHD = """
Port 22
ListenAddress {ip}
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
"""
OPERATOR = """
mount --make-rprivate /
mount -t proc proc /proc
mount --bind {folder}/operator /tmp/ray
exec "$@"
"""


def missing() -> list[str]:
    """What this machine lacks for such hosts."""
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if importlib.util.find_spec("aiohttp_cors") is None:
        lacking.append("ray[default], for the dashboard")
    return lacking if os.geteuid() == 0 else ["root", *lacking]


class NetnsHosts:
    """``count`` hosts for the length of a ``with`` block; their names begin with ``prefix``, for it alone."""

    def __init__(self, folder: Path, count: int, *, prefix: str = "fuelt", net: str = "10.77.31"):
        self.folder, self._prefix, self._net = folder, prefix, net
        self.ips = [f"{net}.{i + 1}" for i in range(count)]
        self._names = [f"{prefix}{i + 1}" for i in range(count)]
        self._processes: list[subprocess.Popen] = []
        self.key = folder / "key"

    def __enter__(self):
        self._lock = open(f"/run/{self._prefix}.lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise RuntimeError(f"another run has the hosts {self._prefix}*: wait for its end") from None
        try:
            self._clear()
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        for folder in (self.folder / "bin", self.folder / "operator", Path("/tmp/ray"), Path("/run/sshd")):
            folder.mkdir(parents=True, exist_ok=True)
        for key in (self.key, self.folder / "host_key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
        for name, module in (("ray", "ray.scripts.scripts"), ("fuel-ray", "fuel_ray")):
            script = self.folder / "bin" / name
            script.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
            script.chmod(0o755)
        bridge = self._prefix + "br"
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "addr", "add", f"{self._net}.254/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        for name, ip in zip(self._names, self.ips, strict=True):
            self._start_host(name, ip, bridge)
        for ip in self.ips:
            _wait_for_port(ip, 22)

    def _start_host(self, name: str, ip: str, bridge: str) -> None:
        inside = ("ip", "netns", "exec", name, "ip")
        _run("ip", "netns", "add", name)
        _run("ip", "link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
        _run("ip", "link", "set", f"v{name}", "master", bridge, "up")
        _run(*inside, "addr", "add", f"{ip}/24", "dev", "eth0")
        _run(*inside, "link", "set", "eth0", "up")
        _run(*inside, "link", "set", "lo", "up")
        _run(*inside, "route", "add", "default", "via", f"{self._net}.254")  # Ray asks for a route to 8.8.8.8
        home = self.home(name)
        home.mkdir()
        path = f"export PATH={self.folder}/bin:{Path(sys.executable).parent}:$PATH OMP_NUM_THREADS=1\n"
        (home / ".bashrc").write_text(path)
        (home / ".bash_profile").write_text(path)
        accounts = Path("/etc/passwd").read_text().splitlines()
        ours = [f"root:x:0:0:root:{home}:/bin/bash" if a.startswith("root:") else a for a in accounts]
        (home / "passwd").write_text("\n".join(ours) + "\n")
        (home / "sshd_config").write_text(SSHD.format(ip=ip, folder=self.folder))
        spaces = ["--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc"]
        script = HOST.format(name=name, home=home)
        with (home / "sshd.log").open("w") as log:
            self._processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, "unshare", *spaces, "sh", "-ec", script],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            )

    def home(self, name: str) -> Path:
        return self.folder / name

    def operate(self, *command: str, timeout_s: float, env: dict[str, str]) -> subprocess.CompletedProcess:
        """Run a command as the cluster's operator, with process ids and a /tmp/ray of its own."""
        spaces = ["unshare", "--pid", "--fork", "--kill-child", "--mount"]
        script = OPERATOR.format(folder=self.folder)
        return subprocess.run(
            [*spaces, "sh", "-ec", script, "sh", *command],
            env=os.environ | {"HOME": str(self.folder / "operator")} | env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def __exit__(self, *exc) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGKILL)  # --kill-child: everything on that host ends with it
            process.wait(20)
        self._clear()
        self._lock.close()

    def _clear(self) -> None:
        """Remove what has this prefix's names: the hosts' processes, namespaces, cables and the bridge."""
        listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
        there = [line.split()[0] for line in listed.splitlines() if line.strip()]
        for name in [name for name in there if re.fullmatch(rf"{self._prefix}\d+", name)]:
            pids = subprocess.run(["ip", "netns", "pids", name], check=False, capture_output=True, text=True)
            for pid in map(int, pids.stdout.split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
            subprocess.run(["ip", "link", "del", f"v{name}"], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", self._prefix + "br"], check=False, capture_output=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def _wait_for_port(ip: str, port: int) -> None:
    deadline_s = time.monotonic() + 10
    while True:
        try:
            socket.create_connection((ip, port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline_s, f"no sshd on {ip}"
            time.sleep(0.1)
