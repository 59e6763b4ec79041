"""A local Ray starts where its sockets fit, or says in one line what this machine lacks."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fuel_ray.cluster import hosts, local
from fuel_ray.errors import ConfigError, DiskError, NodeError

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def never_started(monkeypatch):
    """What is wrong is found before Ray is asked."""

    def init(*_, **__):
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray.init", init)
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_too_long_for_a_socket_gives_way_to_a_short_one(variable, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv(variable, str(tmp_path / ("x" * 90)))
    assert str(local._ray_folder()) in ("/tmp/ray", f"/tmp/ray-{os.geteuid()}")
    assert "too long for a socket" in caplog.text


def test_a_full_folder_gives_way_and_none_at_all_is_told(monkeypatch):
    monkeypatch.setattr(local, "_LEAST_FREE", 2**60)
    with pytest.raises(ConfigError, match=r"/tmp.* is full, and .* cannot be used either. Set RAY_TMPDIR"):
        local.start_local({})


def test_a_folder_that_is_a_file_gives_way(monkeypatch, tmp_path):
    assert local._unfit(Path("/proc/1/status/ray")) is not None


def test_too_few_open_files_are_told(monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda _: (64, 64))
    with pytest.raises(ConfigError, match="it needs 512 open files and 64 are allowed"):
        local.start_local({})


def test_a_loopback_that_is_down_is_told(monkeypatch):
    def down(*_, **__):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("socket.create_connection", down)
    with pytest.raises(ConfigError, match="ip link set lo up"):
        local.start_local({})


@pytest.mark.parametrize(
    "error", [Exception("timed out during startup.\nMore"), OSError(24, "Too many open files")]
)
def test_what_ray_says_is_one_line(error, monkeypatch):
    def init(*_, **__):
        raise error

    monkeypatch.setattr("ray.init", init)
    with pytest.raises(ConfigError, match="Ray cannot start on this machine") as told:
        local.start_local({})
    assert "\n" not in str(told.value)


def test_ray_address_local_starts_a_local_ray(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert hosts._address(cluster=True) is None


def test_ray_address_auto_without_a_cluster_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(ConfigError, match="ray start --head"):
        hosts.connect(cluster=False)


@pytest.mark.parametrize("address", ["foo", "127.0.0.1", ":6379", "127.0.0.1:x"])
def test_ray_address_that_is_none_is_told(address, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS={address}: not HOST:PORT"):
        hosts.connect(cluster=False)


def test_a_cluster_of_another_version_is_told_with_both(monkeypatch):
    def init(*_, **__):
        raise RuntimeError(
            "Version mismatch: The cluster was started with:\n    Ray: 2.9.0\nThis process:\n    Ray: 2.60.0"
        )

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("socket.create_connection", lambda *_, **__: socket.socket())
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with pytest.raises(ConfigError, match=r"Ray: 2\.9\.0 This process: Ray: 2\.60\.0"):
        hosts.connect(cluster=False)


def test_a_host_whose_disk_fails_does_not_keep_the_others_from_being_heard(monkeypatch):
    names = ("NodeID", "NodeManagerHostname", "NodeManagerAddress")
    there = [dict.fromkeys(names, host) | {"Alive": True, "Resources": {}} for host in ("bad", "good")]
    monkeypatch.setattr("ray.nodes", lambda: there)
    monkeypatch.setattr(hosts, "_ask", lambda host, *_: host["NodeID"])
    monkeypatch.setattr(hosts, "_skew_s", lambda host: 0.0)

    def answer_of(task, *_):
        if task == "bad":
            raise DiskError("Permission denied")
        return task

    monkeypatch.setattr(hosts, "answer_of", answer_of)
    bad, good = hosts.on_hosts(print, timeout_s=1.0)
    assert good.answer == "good"
    assert isinstance(bad.answer, NodeError) and str(bad.answer) == "Permission denied"


@pytest.mark.ray
def test_a_local_ray_starts_beside_a_temp_folder_too_long_for_sockets_and_leaves_sigterm_to_us(tmp_path):
    long = tmp_path / ("x" * 90)
    long.mkdir()
    script = """
import os, signal, sys, threading, time, ray
from fuel_ray import cli
from fuel_ray.cluster.hosts import connect
from fuel_ray.commands import unlock
def run(config: unlock.UnlockConfig):
    connect(cluster=False)
    waits = ray.remote(lambda: time.sleep(60)).remote()
    threading.Timer(1.0, os.killpg, (0, signal.SIGTERM)).start()  # Ray's processes get it too
    ray.wait([waits])
unlock.run = run
sys.exit(cli.main(["unlock"]))
"""
    env = {**os.environ, "TMPDIR": str(long), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(  # Ray would look 60 s for its processes
        command, env=env, capture_output=True, text=True, check=False, timeout=50, start_new_session=True
    )
    assert done.returncode == 143, done.stderr
    (line,) = done.stderr.splitlines()  # Ray's own handler would print a stack
    assert "too long for a socket" in line
