"""The server that is started or attached to is on the cards that are measured, as far as the driver tells."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pynvml
import pytest

from fuel_ray.build.cluster import _serve, gpus_per_node
from fuel_ray.build.live import LiveServer, num_gpus
from fuel_ray.config import PRESETS, LiveConfig
from fuel_ray.errors import ConfigError, GpuError
from fuel_ray.live.gpu.nvml import Gpus
from fuel_ray.live.gpu.placement import placement, placement_of
from fuel_ray.live.vllm.parallel import gpus_used
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.stub_vllm import Stub, serving

STUB = f"{sys.executable} {Path(__file__).parent / 'tools/stub_vllm.py'}"
GONE = 2**22 + 7  # above the highest pid


@pytest.fixture
def cards(monkeypatch, tmp_path):
    """Three cards, and what a server that is started is told of them."""
    fakes = tuple(FakeGpu(f"GPU-{name}") for name in "abc")
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(*fakes))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("STUB_STARTS", str(tmp_path / "starts"))
    monkeypatch.setenv("STUB_GPUS", str(tmp_path / "gpus"))
    return fakes


def config(tmp_path, *gpu_ids, flags=""):
    live = LiveConfig(model="tiny", vllm=STUB, gpu_ids=gpu_ids, flags=flags)
    return replace(PRESETS["default"], node="live", live=live, out=tmp_path)


def told(tmp_path):
    return (tmp_path / "gpus").read_text().splitlines()


def test_a_server_that_is_started_gets_the_gpu_that_is_measured(cards, tmp_path):
    server = LiveServer(config(tmp_path, "2"), 16)
    try:
        spec, _, _ = server.facts()
        assert told(tmp_path) == ["GPU-c PCI_BUS_ID"] and spec.gpu_uuids == server.config.live.gpu_ids
    finally:
        server.close()


@pytest.mark.parametrize(("visible", "given"), [("1", ("1",)), ("GPU-b", ("GPU-b",))])
def test_an_actor_serves_on_the_gpu_that_ray_gave_to_it(cards, tmp_path, monkeypatch, visible, given):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)  # as Ray does for its actor
    server = _serve(config(tmp_path, "0"), 16, given)
    server.close()
    assert told(tmp_path) == ["GPU-b PCI_BUS_ID"] and server.config.live.gpu_ids == ("GPU-b",)


def test_without_ids_it_gets_the_first_visible_ones_that_its_flags_need(cards, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1,0")
    server = LiveServer(config(tmp_path, flags="-tp 2"), 16)
    server.close()
    assert told(tmp_path) == ["GPU-c,GPU-b PCI_BUS_ID"]
    assert server.config.live.gpu_ids == ("GPU-c", "GPU-b")


def test_a_vllm_that_takes_no_uuids_gets_numbers(cards, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("STUB_OLD", "1")
    LiveServer(config(tmp_path, "1"), 16).close()
    assert told(tmp_path) == ["GPU-b PCI_BUS_ID", "1 PCI_BUS_ID"] and "accepts no UUIDs" in caplog.text


def test_a_server_on_another_card_than_it_was_given_is_ended_and_said(cards, tmp_path, monkeypatch):
    def running(nvml, gpu):
        on_a = psutil.Process().children(recursive=True) if gpu is cards[0] else ()
        return [SimpleNamespace(pid=process.pid) for process in on_a]

    monkeypatch.setattr(FakeNvml, "nvmlDeviceGetComputeRunningProcesses", running)
    with pytest.raises(GpuError, match="the server runs on GPU GPU-a, but GPU GPU-b would be measured"):
        LiveServer(config(tmp_path, "1"), 16)
    left = psutil.Process().children(recursive=True)
    assert not [process for process in left if "stub_vllm" in " ".join(process.cmdline())]


@pytest.mark.parametrize(
    ("pids", "found", "words"),
    [
        ({"a": [1], "b": [7]}, "right", "runs on GPU GPU-b"),
        (
            {"a": [7], "b": []},
            "wrong",
            "runs on GPU GPU-a, but GPU GPU-b would be measured: give --gpu-ids GPU-a",
        ),
        ({"a": [7], "b": [7]}, "wrong", "runs on GPU GPU-a, GPU-b, but GPU GPU-b would be measured"),
        ({"b": [1]}, "wrong", "no process of the server runs on GPU GPU-b, only others (pid 1)"),
        (
            {},
            "unknown",
            "cannot check whether the server runs on GPU GPU-b: the driver reports no process on it",
        ),
        (
            {"a": [1]},
            "unknown",
            "cannot check whether the server runs on GPU GPU-b: the driver reports no process on it",
        ),
    ],
)
def test_the_driver_is_asked_which_processes_are_where(cards, pids, found, words):
    for card in cards:
        card.pids = tuple(pids.get(card.uuid[-1], ()))
    with Gpus(["1"]) as gpus:
        seen = placement(gpus, {7, 8})
    assert seen.found == found and words in seen.text


def test_pids_of_another_namespace_cannot_be_checked(cards, monkeypatch, tmp_path):
    cards[1].pids = (GONE,)
    monkeypatch.setattr("fuel_ray.live.processes._FIRST_PID_NAMESPACE", 0)
    with Gpus(["1"]) as gpus:
        assert placement(gpus, {7}).text.endswith("the driver reports processes outside this container only")
        cards[1].pids = (os.getpid(),)
        assert placement(gpus, {7}).found == "wrong"


def test_a_driver_that_tells_no_pids_cannot_be_checked(cards):
    cards[1].pids = (7,)
    cards[1].faults = {"nvmlDeviceGetComputeRunningProcesses": pynvml.NVML_ERROR_NO_PERMISSION}
    with Gpus(["1"]) as gpus:
        assert placement(gpus, {7}).found == "unknown"


def test_a_server_is_found_by_its_port(cards):
    with serving(Stub()) as stub, Gpus(["1"]) as gpus:
        cards[1].pids = (os.getpid(),)
        assert placement_of(gpus, stub.url).found == "right"
        cards[1].pids, cards[2].pids = (1,), (os.getpid(),)
        assert "runs on GPU GPU-c" in placement_of(gpus, stub.url).text
        assert placement_of(gpus, stub.url.replace("127.0.0.1", "localhost")).found == "wrong"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://192.0.2.7:8000", "192.0.2.7 is another host"),
        ("http://nowhere.invalid:8000", "nowhere.invalid is another host"),
        ("http://127.0.0.1:9", "no process that this user can see listens on port 9"),
        ("https://127.0.0.1/v1", "listens on port 443"),
        ("http://127.0.0.1:99999", "is not a URL"),
    ],
)
def test_a_server_elsewhere_cannot_be_checked(cards, url, words):
    cards[0].pids = (1,)
    with Gpus(["0"]) as gpus:
        seen = placement_of(gpus, url)
    assert seen.found == "unknown" and words in seen.text


def test_a_port_that_docker_publishes_cannot_be_checked(cards, tmp_path):
    proxy = tmp_path / "docker-proxy"
    proxy.symlink_to(sys.executable)
    script = (
        "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)"
    )
    with subprocess.Popen(
        [proxy, "-c", f"{script}; s.accept()"], stdout=subprocess.PIPE, text=True
    ) as process:
        port = int(process.stdout.readline())
        cards[0].pids = (1,)
        with Gpus(["0"]) as gpus:
            seen = placement_of(gpus, f"http://127.0.0.1:{port}")
        process.kill()
    assert seen.found == "unknown" and "docker-proxy on port" in seen.text


@pytest.mark.parametrize(
    ("flags", "gpus"),
    [
        ("", 1),
        ("-tp 2", 2),
        ("-tp=2 --pipeline-parallel-size 2", 4),
        ("--tensor_parallel_size 4 --data-parallel-size=2", 8),
        ("-dp 8 -dpl 2 -tp 2", 4),
        ("--tensor-parallel-size 2 --tensor-parallel-size 1", 1),
        ("-pcp 2 -dcp 2", 2),
        ("--config file.yaml", None),
        ("--nnodes 2 -tp 8", None),
        ("-tp two", None),
        ("-tp", None),
    ],
)
def test_parallel_sizes_say_how_many_gpus_a_server_uses(flags, gpus):
    assert gpus_used(flags.split()) == gpus


def test_ids_that_are_more_or_fewer_than_the_server_uses_are_refused(cards, tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"gives 1 GPU\(s\), but --live.flags make the server use 2, so the server would not",
    ):
        LiveServer(config(tmp_path, "0", flags="-tp 2"), 16)
    with pytest.raises(ConfigError, match="use 1, so idle GPUs would be measured"):
        LiveServer(config(tmp_path, "0", "1"), 16)
    with pytest.raises(ConfigError, match=r"--device-ids is not allowed here"):
        LiveServer(config(tmp_path, "0", flags="--device-ids 1"), 16)
    assert num_gpus(config(tmp_path, "0,1", flags="-tp 2")) == 2
    on_ray = replace(config(tmp_path, flags="-tp 2"), node="ray", backend="live")
    assert gpus_per_node(on_ray) == 2
