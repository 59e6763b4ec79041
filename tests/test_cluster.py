"""Nodes on a cluster: the windows that they have in process, typed errors, deadlines, and recovery."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from fuel_ray.errors import ConfigError, NodeError, UnsupportedError
from fuel_ray.types import Knobs
from tests.simulated import simulated
from tests.test_lease import FAKE_PYNVML

pytestmark = pytest.mark.ray


def remote_node(build=lambda server: simulated(), **settings):
    from fuel_ray.cluster.node import RemoteNode

    return RemoteNode(build, **settings)


@pytest.fixture
def node(two_hosts, request):
    made = remote_node()
    yield made
    made.close()


def served(node, windows=20):
    """Windows under changing knobs, and the records of the requests that finished in them."""
    node.reset(seed=3)
    seen = []
    for step in range(windows):
        node.apply(Knobs(8 + step, 1000 + 40 * step))
        seen.append(node.measure(1.0))
    return seen, node.take_records()


def actors_of(host, title="ray::NodeActor"):
    """Process ids of a host's actors."""
    psutil = pytest.importorskip("psutil")
    raylet = psutil.Process(host.all_processes["raylet"][0].process.pid)
    found = []
    for process in raylet.children():
        try:
            if "".join(process.cmdline()).startswith(title):
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def test_windows_and_records_equal_those_in_process(node):
    windows, records = served(node)
    own_windows, own_records = served(simulated())
    assert windows == own_windows
    for field in dataclasses.fields(records):
        np.testing.assert_array_equal(getattr(records, field.name), getattr(own_records, field.name))


def test_another_cluster_leaves_the_one_that_this_process_has_joined(two_hosts):
    """A trial finds there what was registered after it."""
    from ray.tune.registry import ENV_CREATOR, _global_registry, register_env

    from tests.ray_hosts import Hosts

    with Hosts(0):
        pass
    register_env("fuel_ray_another", dict)
    assert not _global_registry._to_flush and _global_registry.contains(ENV_CREATOR, "fuel_ray_another")


@pytest.mark.parametrize("kind", [UnsupportedError, ConfigError, NodeError])
def test_an_error_on_the_node_arrives_as_what_it_is(two_hosts, kind):
    def build(server):
        raise kind("block size 8: no backend takes it")

    with pytest.raises(kind, match="block size 8: no backend takes it") as caught:
        remote_node(build)
    assert type(caught.value) is kind


def test_a_foreign_error_on_the_node_is_a_node_error(two_hosts):
    def build(server):
        raise ZeroDivisionError("by zero")

    with pytest.raises(NodeError, match="by zero"):
        remote_node(build)


def test_two_nodes_are_on_two_hosts_and_a_third_waits_with_a_deadline(two_hosts):
    nodes = [remote_node(), remote_node()]
    assert [len(actors_of(host)) for host in two_hosts.hosts] == [1, 1]
    began_s = time.monotonic()
    with pytest.raises(NodeError, match="did not answer within 2 s"):
        remote_node(start_s=2.0)
    assert time.monotonic() - began_s < 10
    for node in nodes:
        node.close()
    remote_node().close()


def test_a_killed_actor_is_a_node_error_and_a_reset_brings_the_node_back(node, two_hosts):
    node.reset(seed=1)
    node.measure(1.0)
    (pid,) = [pid for host in two_hosts.hosts for pid in actors_of(host)]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(NodeError):
        for _ in range(100):
            node.measure(1.0)
    began_s = time.monotonic()
    assert served(node)[0] == served(simulated())[0]
    assert time.monotonic() - began_s < 60


class Hanging:
    """A node whose windows do not end."""

    def __init__(self):
        self._node = simulated()

    def __getattr__(self, name):
        return getattr(self._node, name)

    def measure(self, duration_s):
        time.sleep(3600)


def test_a_node_that_hangs_is_a_node_error_within_its_deadline_and_is_restarted(two_hosts, monkeypatch):
    monkeypatch.setattr("fuel_ray.cluster.node.CALL_S", 1.0)
    node = remote_node(lambda server: Hanging())
    node.reset(seed=1)
    with pytest.raises(NodeError, match="did not answer within 2 s"):
        node.measure(1.0)
    monkeypatch.setattr("fuel_ray.cluster.node.CALL_S", 30.0)
    node.reset(seed=1)
    assert node.apply(Knobs(8, 1500)) == Knobs(8, 1500)
    node.close()


@pytest.mark.slow
def test_a_lost_host_is_a_node_error_and_the_node_comes_back_on_another(two_hosts):
    lost = two_hosts.add()
    others = [remote_node(), remote_node()]  # they may take any host
    node = remote_node()
    holders = {host: actors_of(host) for host in (*two_hosts.hosts, lost)}
    assert all(len(pids) == 1 for pids in holders.values())
    for one in (*others, node):
        one.reset(seed=1)
    two_hosts.lose(lost)
    spare = two_hosts.add()
    failed = []
    for one in (*others, node):
        try:
            one.measure(1.0)
        except NodeError:
            failed.append(one)
    assert len(failed) == 1
    assert served(failed[0])[0] == served(simulated())[0]
    assert len(actors_of(spare)) == 1
    for one in (*others, node):
        one.close()
    two_hosts.lose(spare)


def test_too_few_nodes_or_gpus_are_said_in_seconds(two_hosts):
    from fuel_ray.cluster.hosts import require_nodes

    require_nodes(2, gpus=0, wait_s=0.0)
    for count, gpus in ((50, 0), (1, 8)):
        began_s = time.monotonic()
        with pytest.raises(ConfigError, match=f"the run needs {count} node"):
            require_nodes(count, gpus=gpus, wait_s=1.0)
        assert time.monotonic() - began_s < 5


def test_unlock_asks_every_host_and_goes_on_where_one_fails(two_hosts, tmp_path, capsys):
    from fuel_ray.cli import main

    assert main(["unlock", "--cluster"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("no clocks are recorded as locked" in line for line in lines)
    assert main(["unlock", "--cluster", "--gpu-ids", "0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all("no NVIDIA driver on this host" in line for line in lines)


def test_each_node_has_gpus_of_its_own(two_hosts):
    host = two_hosts.add(nodes=2, gpus=2)

    def build(server):
        node = simulated()
        node._spec = dataclasses.replace(node.spec, gpu_uuids=server.gpu_ids)
        return node

    nodes = [remote_node(build, gpus=1) for _ in range(2)]
    seen = sorted(node.spec.gpu_uuids for node in nodes)
    assert seen == [("0",), ("1",)] and len(actors_of(host)) == 2
    for node in nodes:
        node.close()
    two_hosts.remove(host)


def test_what_a_node_has_started_ends_with_its_killed_actor(two_hosts, tmp_path):
    psutil = pytest.importorskip("psutil")

    def build(server):
        server = subprocess.Popen(["sleep", "600"])
        (tmp_path / "pid").write_text(str(server.pid))
        return simulated()

    node = remote_node(build)
    server = psutil.Process(int((tmp_path / "pid").read_text()))
    (pid,) = [pid for host in two_hosts.hosts for pid in actors_of(host)]
    os.kill(pid, signal.SIGKILL)
    assert server.wait(20) is None or not server.is_running()
    node.close()


def test_clocks_are_given_back_when_the_actor_that_pinned_them_is_killed(two_hosts, tmp_path):
    (tmp_path / "pynvml.py").write_text(FAKE_PYNVML)
    log = tmp_path / "nvml.log"

    def build(server):
        os.environ.update(FAKE_NVML_LOG=str(log), FUEL_RAY_STATE_DIR=str(tmp_path / "state"))
        sys.path.insert(0, str(tmp_path))
        from fuel_ray.live.gpu.lease import ClockLease
        from fuel_ray.live.gpu.nvml import Gpus

        node = simulated()
        node.gpus = Gpus(["GPU-0"])
        node.lease = ClockLease(node.gpus.uuids)
        node.lease.renew()
        node.gpus.pin(1200)
        return node

    node = remote_node(build)
    assert "set GPU-0" in log.read_text() and "reset GPU-0" not in log.read_text()
    (pid,) = [pid for host in two_hosts.hosts for pid in actors_of(host)]
    os.kill(pid, signal.SIGKILL)
    deadline_s = time.monotonic() + 30
    while "reset GPU-0" not in log.read_text():
        assert time.monotonic() < deadline_s, "the clock stays pinned"
        time.sleep(0.1)
    node.close()


@pytest.mark.slow
def test_a_nodes_figures_are_on_the_metrics_page_of_its_host(node, two_hosts):
    pytest.importorskip("opentelemetry.sdk", reason="ray[default] exports metrics")
    import ray

    node.reset(seed=1)
    for _ in range(3):
        node.apply(Knobs(8, 1500))
        window = node.measure(1.0)
        time.sleep(1.1)  # a figure a second
    ports = [host["MetricsExportPort"] for host in ray.nodes() if host["Alive"]]
    deadline_s = time.monotonic() + 60
    page = ""
    while "ray_fuel_ray_kv_usage" not in page and time.monotonic() < deadline_s:
        time.sleep(1)
        page = ""
        for port in ports:
            url = f"http://127.0.0.1:{port}/metrics"
            with (
                contextlib.suppress(urllib.error.URLError),
                urllib.request.urlopen(url, timeout=10) as answer,
            ):
                page += answer.read().decode()  # that of a host that was lost just now is closed
    lines = [line for line in page.splitlines() if line.startswith("ray_fuel_ray_")]

    def figure(name, label=""):
        (line,) = {line for line in lines if line.startswith(f"ray_fuel_ray_{name}{{") and label in line}
        return float(line.rpartition(" ")[2])

    assert figure("batch_limit", 'kind="applied"') == 8
    assert figure("gpu_clock_mhz", 'kind="applied"') == 1500
    assert figure("power_watts") == pytest.approx(window.energy_j)
    states = [figure("requests", f'state="{state}"') for state in ("running", "waiting")]
    assert states == [window.running, window.waiting]
    assert figure("kv_usage") == pytest.approx(window.kv_usage)


def test_a_server_outlives_the_nodes_on_it_and_is_started_once(two_hosts, tmp_path):
    from fuel_ray.cluster.node import NoServer, end_actors, node_actor

    def serve(gpu_ids):
        with (tmp_path / "starts").open("a") as log:
            log.write("start\n")
        return NoServer(gpu_ids)

    actor = node_actor(serve, gpus=0, name="kept")
    for _ in range(2):
        node = remote_node(name="kept")
        assert served(node)[0] == served(simulated())[0]
        node.close()
    assert (tmp_path / "starts").read_text().count("start") == 1
    (pid,) = [pid for host in two_hosts.hosts for pid in actors_of(host)]
    node = remote_node(name="kept")
    os.kill(pid, signal.SIGKILL)
    assert served(node)[0] == served(simulated())[0]  # Ray starts the actor again, and it its server
    assert (tmp_path / "starts").read_text().count("start") == 2
    node.close()
    end_actors([actor])
    with pytest.raises(NodeError, match="kept, which owns the node's server, has died"):
        remote_node(name="kept")
