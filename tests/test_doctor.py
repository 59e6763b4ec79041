"""fuel-ray doctor: a line per check, and exit code 1 if something that is needed is missing."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pynvml
import pytest
import yaml

from fuel_ray import __version__
from fuel_ray.cli import main
from fuel_ray.live.cpu import CpuMeter
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.test_cpu import _domain

ROOT = Path(__file__).parent.parent
METADATA = "Metadata-Version: 2.1\nName: {}\nVersion: {}\n"


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """A `vllm` command whose environment has a vLLM of this version and a fuel_ray: there, stale, or None."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)

    def make(version="0.32.0", plugin="there", plugin_version=None):
        python, site = tmp_path / "python", tmp_path / "site"
        _installed(site, "vllm", version)
        if plugin is not None:
            info = _installed(site, "fuel_ray", plugin_version or __version__)
            entry = "[vllm.general_plugins]\nfuel_ray = fuel_ray.vllm_plugin:register\n"
            (info / "entry_points.txt").write_text(entry)
        if plugin == "there":
            (site / "fuel_ray").symlink_to(ROOT / "fuel_ray")
        python.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} -S "$@"\n')
        python.chmod(0o755)
        command = tmp_path / "vllm"
        command.write_text(f"#!{python}\n")
        command.chmod(0o755)
        return str(command)

    return make


def _installed(site, name, version):
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(METADATA.format(name, version))
    return info


def lines(capsys):
    """What was printed, by the name of the check."""
    found = {}
    for line in capsys.readouterr().out.splitlines():
        mark, rest = line[:4].strip(), line[6:]
        found[rest[:12].strip()] = (mark, rest[12:])
    return found


def test_a_host_that_has_all_it_needs(vllm, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu()))
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.holds_sys_admin", lambda proc: True)
    command = vllm()
    flags = ["--vllm", command, "--block-sizes", "16", "32", "--out", str(tmp_path / "not/yet")]
    assert main(["doctor", *flags]) == 0
    found = lines(capsys)
    assert found["GPU"] == ("ok", "1 x NVIDIA H100 80GB HBM3, driver 580.95.05")
    assert found["readings"] == ("ok", "energy counter, power, utilisation, SM clock")
    assert found["clocks"][0] == found["plug-in"][0] == found["disk"][0] == found["port"][0] == "ok"
    assert found["vLLM"] == ("ok", f"0.32.0 ({command})")
    assert found["block sizes"] == ("ok", "only multiples of 16: serves 16, 32")


def test_what_a_live_node_lacks_is_said_with_what_to_do(vllm, capsys, monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(driver=False))
    assert main(["doctor", "--vllm", vllm("0.32.0+cpu", plugin=None)]) == 1
    found = lines(capsys)
    assert found["GPU"][0] == "FAIL" and "--gpus all" in found["GPU"][1]
    mark, text = found["plug-in"]
    assert mark == "FAIL" and text.startswith(
        "fuel_ray is not installed in vLLM's environment: batch limits need it: "
    )
    assert text.endswith(f"/python {ROOT}")
    assert found["block sizes"] == (
        "note",
        "only multiples of 32: serves 32, 64; skips 8, 16",
    )


STALE = "fuel_ray is installed in vLLM's environment, but cannot be imported: ModuleNotFoundError: No module"


@pytest.mark.parametrize(
    ("made", "variable", "words"),
    [
        ({"plugin": "stale"}, None, STALE),
        ({}, "", "VLLM_PLUGINS= excludes fuel_ray"),
        ({}, "lora_resolver,other", "VLLM_PLUGINS=lora_resolver,other excludes fuel_ray"),
        ({"plugin_version": "0.0.9"}, None, "vLLM's environment has fuel_ray 0.0.9, and this is "),
    ],
)
def test_a_plug_in_that_would_not_be_loaded_fails(vllm, capsys, monkeypatch, made, variable, words):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu()))
    command = vllm(**made)
    if variable is not None:
        monkeypatch.setenv("VLLM_PLUGINS", variable)
    assert main(["doctor", "--vllm", command]) == 1
    mark, text = lines(capsys)["plug-in"]
    assert mark == "FAIL" and text.startswith(words)


def test_plug_ins_that_are_named_may_have_it_among_them(vllm, capsys, monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu()))
    command = vllm()
    monkeypatch.setenv("VLLM_PLUGINS", "other,fuel_ray")
    assert main(["doctor", "--vllm", command]) == 0
    assert lines(capsys)["plug-in"] == ("ok", "fuel_ray is installed in vLLM's environment")


def test_block_sizes_that_no_node_can_serve_fail(vllm, capsys, monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu()))
    assert main(["doctor", "--vllm", vllm(), "--block-sizes", "8"]) == 1
    assert lines(capsys)["block sizes"][0] == "FAIL"


def test_clocks_that_may_not_be_set_are_a_note(vllm, capsys, monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu(), privileged=False))
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.holds_sys_admin", lambda proc: False)
    assert main(["doctor", "--vllm", vllm()]) == 0
    mark, text = lines(capsys)["clocks"]
    assert mark == "note" and "SYS_ADMIN" in text


@pytest.mark.parametrize(
    ("server", "here", "mark", "text"),
    [
        (None, None, "note", "CUDA_DISABLE_PERF_BOOST is not set here: consider starting servers with"),
        (
            None,
            "1",
            "ok",
            "CUDA_DISABLE_PERF_BOOST=1 is set here, and servers that are started here inherit it",
        ),
        ("1", None, "ok", "CUDA_DISABLE_PERF_BOOST=1 is set for the processes on the GPU"),
        ("0", "1", "note", "CUDA_DISABLE_PERF_BOOST is not set for pid {} on the GPU: start the server with"),
    ],
)
def test_a_hopper_server_that_could_rest_deeper_is_a_note(
    vllm, capsys, monkeypatch, server, here, mark, text
):
    monkeypatch.delenv("CUDA_DISABLE_PERF_BOOST", raising=False)
    if here is not None:
        monkeypatch.setenv("CUDA_DISABLE_PERF_BOOST", here)
    environ = os.environ | {"CUDA_DISABLE_PERF_BOOST": server or ""}
    with subprocess.Popen(["sleep", "60"], env=environ) as running:
        pids = (running.pid,) if server else ()
        monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu(pids=pids)))
        try:
            assert main(["doctor", "--vllm", vllm()]) == 0
        finally:
            running.kill()
    found, said = lines(capsys)["idle power"]
    assert found == mark and said.startswith(text.format(running.pid))
    assert (mark == "ok") or "73 to 75 W with it and 121 to 130 W without" in said


def test_a_process_whose_environment_cannot_be_read_is_said(vllm, capsys, monkeypatch):
    monkeypatch.delenv("CUDA_DISABLE_PERF_BOOST", raising=False)
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu(pids=(2**22 + 1,))))
    assert main(["doctor", "--vllm", vllm()]) == 0
    assert lines(capsys)["idle power"][1].startswith(
        "the environment of the processes on the GPU cannot be read, "
    )


def test_nothing_is_said_of_idle_power_on_another_architecture(vllm, capsys, monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu(name="NVIDIA A100-SXM4-40GB")))
    assert main(["doctor", "--vllm", vllm()]) == 0
    assert "idle power" not in lines(capsys)


@pytest.mark.parametrize(
    ("lacks", "mark", "text"),
    [
        (
            {"nvmlDeviceGetUtilizationRates"},
            "note",
            "energy counter, power, SM clock; no utilisation on GPU GPU-1",
        ),
        ({"nvmlDeviceGetTotalEnergyConsumption"}, "note", "energy is integrated from power"),
        (
            {"nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"},
            "FAIL",
            "no power on GPU GPU-1: energy cannot be measured",
        ),
    ],
)
def test_the_readings_that_a_card_gives_are_listed(vllm, capsys, monkeypatch, lacks, mark, text):
    card = FakeGpu("GPU-1", faults=dict.fromkeys(lacks, pynvml.NVML_ERROR_UNKNOWN))
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu(), card))
    assert main(["doctor", "--vllm", vllm(), "--gpu-ids", "0", "1"]) == (mark == "FAIL")
    found = lines(capsys)["readings"]
    assert found[0] == mark and text in found[1]


def test_the_visible_gpu_is_looked_at_and_others_are_said_to_be_hidden(vllm, capsys, monkeypatch):
    cards = FakeGpu(name="NVIDIA L4"), FakeGpu("GPU-1", instances=(FakeGpu("MIG-1"), FakeGpu("MIG-2")))
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(*cards))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1")
    command = vllm()
    assert main(["doctor", "--vllm", command]) == 0
    found = lines(capsys)
    assert "1 x NVIDIA H100" in found["GPU"][1] and "one of 2 MIG instances" in found["MIG"][1]
    assert main(["doctor", "--vllm", command, "--gpu-ids", "0"]) == 1
    assert "is excluded by CUDA_VISIBLE_DEVICES=GPU-1" in lines(capsys)["GPU"][1]


def test_rapl_that_stands_still_is_modelled(vllm, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu()))
    monkeypatch.setattr("fuel_ray.live.checks.CpuMeter", partial(CpuMeter, root=tmp_path / "powercap"))
    _domain(tmp_path / "powercap", "intel-rapl:0", name="package-0", energy_uj=7)
    assert main(["doctor", "--vllm", vllm()]) == 0
    mark, text = lines(capsys)["RAPL"]
    assert mark == "note" and "energy_uj has not moved for" in text and "modelled from utilisation" in text


def test_a_simulated_node_needs_neither_gpu_nor_vllm(capsys):
    assert main(["doctor", "--backend", "sim", "--vllm", "nowhere/vllm"]) == 0
    assert set(lines(capsys)) == {"disk", "port"}


def test_on_a_laptop_simulation_is_said_to_be_fine(capsys, monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(driver=False))
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "Simulated nodes need none" in said and "FAIL" not in said and "vLLM" not in said
    assert main(["doctor", "--backend", "live", "--vllm", "nowhere/vllm"]) == 1


def test_vllm_that_is_not_there_is_said(capsys, monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu()))
    assert main(["doctor", "--vllm", "nowhere/vllm"]) == 1
    assert lines(capsys)["vLLM"][0] == "FAIL"


@pytest.mark.parametrize(
    ("said", "status", "words"),
    [
        ("ssh: connect to host h port 22: Connection timed out", 255, "head_ip"),
        ("root@h: Permission denied (publickey).", 255, "ssh-copy-id"),
        ("Python 3.11.7", 0, "Python 3.11.7"),
        ("sh: python3: not found", 127, "install Python"),
    ],
)
def test_the_hosts_of_a_cluster_file_are_asked_by_ssh(said, status, words, capsys, monkeypatch, tmp_path):
    asked = []

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, status, "", said)

    monkeypatch.setattr("fuel_ray.cluster.ssh.subprocess.run", run)
    provider = {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2"]}
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump({"provider": provider, "auth": {"ssh_user": "root"}}))
    assert main(["doctor", "--cluster-file", str(path)]) == (1 if status else 0)
    found = lines(capsys)
    assert set(found) == {"10.0.0.1", "10.0.0.2"} and words in found["10.0.0.2"][1]
    assert all("BatchMode=yes" in command for command in asked)


@pytest.mark.parametrize("content", ["", "[]", "provider: {}", "{", "provider: {type: aws}"])
def test_a_file_that_is_no_cluster_file_is_named(content, capsys, tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(content)
    assert main(["doctor", "--cluster-file", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.ray
def test_every_host_of_a_cluster_is_looked_at(two_hosts, capsys):
    assert main(["doctor", "--cluster", "--backend", "sim"]) == 0
    out = capsys.readouterr().out
    assert out.count("  disk  ") == 3 and out.count("  clock  ") == 3
    assert f"{len(two_hosts.hosts)} in the cluster" in out
    assert main(["doctor", "--cluster", "--vllm", "nowhere/vllm"]) == 1
    out = capsys.readouterr().out
    assert out.count("  vLLM  ") == len(two_hosts.hosts)  # the head serves nothing
