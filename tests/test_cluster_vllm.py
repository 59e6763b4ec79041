"""A real vLLM (CPU build) that an actor owns, with a stand-in for NVML; FUEL_RAY_VLLM is its bin folder."""

import os
import signal
from functools import partial

import psutil
import pytest

from fuel_ray.build.live import LiveServer
from fuel_ray.build.nodes import build_node
from fuel_ray.config import LiveConfig, ServingConfig
from fuel_ray.errors import UnsupportedError
from fuel_ray.types import Knobs
from tests.real_vllm import BIN, FLAGS, pytestmark  # noqa: F401  (the marks)
from tests.test_cluster import actors_of, remote_node


def start(config, kv_block_size, gpu_ids):
    """In the actor, which has no GPU: its server."""
    import fuel_ray.live.gpu.nvml
    from tests.fake_nvml import FakeGpu, FakeNvml

    fuel_ray.live.gpu.nvml.pynvml = FakeNvml(FakeGpu(uuid="GPU-0"))
    return LiveServer(config, kv_block_size)


def node_of(config, kv_block_size):
    return remote_node(
        lambda server: build_node(server.config, kv_block_size, horizon_s=60.0),
        serve=partial(start, config, kv_block_size),
        start_s=400.0,
    )


@pytest.fixture
def config(model, tmp_path):
    flags = [flag for flag in FLAGS if flag not in ("--max-num-seqs", "32")]
    return ServingConfig(
        node="live",
        live=LiveConfig(
            model=str(model),
            vllm=f"{BIN}/vllm",
            flags=" ".join(flags),
            gpu_ids=("GPU-0",),
            clock_control="off",
            vocab_size=500,
        ),
        max_num_seqs=32,
        kv_tokens=65_536,
        workload="steady:rate_rps=4,lengths=fixed,prompt_mean=32,output_mean=16",
        out=tmp_path,
    )


def test_a_server_behind_an_actor_is_measured_and_dies_with_it(config, two_hosts):
    node = node_of(config, 32)
    node.reset(seed=1)
    windows = []
    for limit in (32, 4, 4, 4):
        node.apply(Knobs(limit, 1980))
        windows.append(node.measure(1.0))
        assert windows[-1].limit_acknowledged is not False
    assert windows[-1].knobs == Knobs(4, 1980)
    assert sum(window.arrivals for window in windows) > 0
    assert sum(window.output_tokens for window in windows) > 0
    (pid,) = [pid for host in two_hosts.hosts for pid in actors_of(host)]
    servers = psutil.Process(pid).children(recursive=True)
    assert servers
    os.kill(pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(servers, timeout=30)
    assert not alive
    node.close()


@pytest.mark.slow
def test_a_block_size_that_its_server_refuses_is_unsupported_there_too(config, two_hosts):
    with pytest.raises(UnsupportedError, match="block size 8"):
        node_of(config, 8)
