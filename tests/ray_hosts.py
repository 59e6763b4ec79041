"""Several Ray hosts on this machine, that tests may kill."""

import time

import ray
from ray.cluster_utils import Cluster
from ray.experimental import internal_kv

from fuel_ray.cluster.hosts import NODE_RESOURCE

SMALL = {"object_store_memory": 100 * 2**20, "include_dashboard": False}


class Hosts:
    """A head with CPUs for trials, and ``count`` hosts with one node each."""

    def __init__(self, count: int, *, cpus: int = 2):
        self._joined = internal_kv.internal_kv_get_gcs_client()  # of the cluster that this process is in
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, **SMALL})
        self.head = self._cluster.head_node
        self.hosts = [self.add() for _ in range(count)]

    @property
    def address(self) -> str:
        return self._cluster.address

    def add(self, *, nodes: int = 1, gpus: int = 0):
        """One more host."""
        settings = {"object_store_memory": SMALL["object_store_memory"]}
        return self._cluster.add_node(num_cpus=0, num_gpus=gpus, resources={NODE_RESOURCE: nodes}, **settings)

    def lose(self, host) -> None:
        """Kill a host with all that runs on it."""
        self._cluster.remove_node(host, allow_graceful=False)

    def remove(self, host) -> None:
        """Stop a host and return when the cluster, which this process has joined, knows it."""
        self._cluster.remove_node(host, allow_graceful=True)
        deadline_s = time.monotonic() + 60
        while any(other["Alive"] and other["NodeID"] == host.node_id for other in ray.nodes()):
            assert time.monotonic() < deadline_s
            time.sleep(0.1)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._cluster.shutdown()  # and with it, in Ray 2.60, what this process knows of any cluster
        if self._joined is not None and ray.is_initialized():
            internal_kv._initialize_internal_kv(self._joined)
