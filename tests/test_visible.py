"""Which GPU is meant by what users, schedulers and Ray say, and what a server is told."""

import pytest

from fuel_ray.errors import ConfigError, GpuError
from fuel_ray.live.gpu.nvml import Gpus
from fuel_ray.live.gpu.visible import server_environment
from tests.fake_nvml import FakeGpu, FakeNvml

MIG = (FakeGpu("MIG-1a", "H100 MIG 3g.40gb"), FakeGpu("MIG-2b", "H100 MIG 4g.40gb"))


@pytest.fixture
def nvml(monkeypatch):
    def install(*gpus, **environ):
        for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        fake = FakeNvml(*(gpus or (FakeGpu("GPU-aa1"), FakeGpu("GPU-ab2"), FakeGpu("GPU-c3"))))
        monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", fake)
        return fake

    return install


def chosen(*which, **options):
    with Gpus(which, **options) as gpus:
        return tuple(device.uuid for device in gpus.devices)


@pytest.mark.parametrize(
    ("which", "uuids"),
    [
        (["2", "0"], ("GPU-c3", "GPU-aa1")),
        (["2,0"], ("GPU-c3", "GPU-aa1")),
        ([" 1 "], ("GPU-ab2",)),
        (["GPU-c"], ("GPU-c3",)),
        (["gpu-AB2"], ("GPU-ab2",)),
        ([], ("GPU-aa1",)),
    ],
)
def test_a_gpu_is_named_by_index_or_by_the_beginning_of_its_uuid_and_the_order_stays(nvml, which, uuids):
    nvml()
    assert chosen(*which, default=1) == uuids


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (["GPU-a"], "GPU GPU-a is ambiguous: 0 = GPU-aa1, 1 = GPU-ab2"),
        (["GPU-"], "is ambiguous"),
        (["0", "GPU-aa1"], "GPU 0 is given twice"),
        (["0,0"], "GPU 0 is given twice"),
        (["cuda:0"], "there is no GPU cuda:0"),
        ([""], "there is no GPU  on this host; it has"),
        (["0000:17:00.0"], "there is no GPU"),
    ],
)
def test_a_name_that_means_no_card_or_two_is_refused(nvml, which, message):
    nvml()
    with pytest.raises((ConfigError, GpuError), match=message):
        chosen(*which)


@pytest.mark.parametrize(
    ("visible", "shown"),
    [
        ("2", ["GPU-c3"]),
        ("2,0", ["GPU-c3", "GPU-aa1"]),
        (" 2 , 0 ", ["GPU-c3", "GPU-aa1"]),
        ("GPU-c3,GPU-ab", ["GPU-c3", "GPU-ab2"]),
        ("1,-1,2", ["GPU-ab2"]),
        ("1,7,2", ["GPU-ab2"]),
        ("1,,2", ["GPU-ab2"]),
        ("1,GPU-C3", ["GPU-ab2"]),  # as torch on an H200 has it
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(nvml, visible, shown):
    nvml(CUDA_VISIBLE_DEVICES=visible)
    assert chosen() == tuple(shown)
    assert chosen(default=1) == (shown[0],)  # not NVML's 0
    hidden = {"0": "GPU-aa1", "1": "GPU-ab2", "2": "GPU-c3"}
    for index, uuid in hidden.items():
        if uuid in shown:
            assert chosen(index) == chosen(uuid) == (uuid,)  # an index is nvidia-smi's, not one of the list
        else:
            with pytest.raises(
                ConfigError, match=rf"GPU {index} \({uuid}\) is excluded.*may use .*{shown[0]}"
            ):
                chosen(index)
            assert chosen(index, hidden=True) == (uuid,)  # clocks are given back whatever it says


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles", "none", "void", "0,0", "9"])
def test_where_cuda_sees_no_gpu_there_is_none(nvml, visible):
    nvml(CUDA_VISIBLE_DEVICES=visible)
    with pytest.raises(GpuError, match=f"CUDA_VISIBLE_DEVICES='{visible}' gives this process no GPU"):
        chosen(default=1)
    with pytest.raises(ConfigError, match=r"GPU 1 .* is excluded by .* may use none"):
        chosen("1")


def test_too_few_visible_gpus_are_said(nvml):
    nvml(CUDA_VISIBLE_DEVICES="1")
    with pytest.raises(GpuError, match="gives this process 1 GPU, and it needs 2"):
        chosen(default=2)


def test_fastest_first_is_refused_where_it_matters(nvml):
    cards = FakeGpu("GPU-a", "NVIDIA L4"), FakeGpu("GPU-b", "NVIDIA H100")
    nvml(*cards, CUDA_VISIBLE_DEVICES="0")
    for which in ([], ["0"]):
        with pytest.raises(ConfigError, match=r"counts the fastest card first.*CUDA_DEVICE_ORDER=PCI_BUS_ID"):
            chosen(*which)
    nvml(*cards, CUDA_VISIBLE_DEVICES="0", CUDA_DEVICE_ORDER="PCI_BUS_ID")
    assert chosen() == ("GPU-a",)
    nvml(*cards, CUDA_VISIBLE_DEVICES="0,1")
    assert chosen("1") == ("GPU-b",)  # both are visible, in whatever order
    nvml(*cards, CUDA_VISIBLE_DEVICES="GPU-b")
    assert chosen() == ("GPU-b",)
    nvml(FakeGpu("GPU-a"), FakeGpu("GPU-b"), CUDA_VISIBLE_DEVICES="1", CUDA_DEVICE_ORDER="FASTEST_FIRST")
    assert chosen() == ("GPU-b",)  # equal cards are counted in PCI order either way


def test_a_container_without_gpus_is_said_as_such(nvml, monkeypatch):
    nvml(NVIDIA_VISIBLE_DEVICES="void")
    assert chosen(default=1) == ("GPU-aa1",)  # Kubernetes sets it where CDI brings the GPUs
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml())
    with pytest.raises(GpuError, match=r"no GPU \(NVIDIA_VISIBLE_DEVICES=void\)"):
        chosen(default=1)


def test_a_mig_instance_serves_and_its_card_is_measured(nvml, caplog, monkeypatch):
    card = FakeGpu("GPU-a", instances=MIG)
    nvml(card, FakeGpu("GPU-b"))
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.holds_sys_admin", lambda proc: True)
    with Gpus(["MIG-2"]) as gpus:
        assert gpus.uuids == ("GPU-a",) and gpus.name == "H100 MIG 4g.40gb"
        assert server_environment(gpus.devices)["CUDA_VISIBLE_DEVICES"] == "MIG-2b"
        assert gpus.settable_clocks_mhz(wanted=True)[-1] == 1980
    assert "setting the clock affects the other instances too" in caplog.text
    with pytest.raises(ConfigError, match="GPU 0 is given twice"):
        chosen("MIG-1a", "MIG-2b")
    with Gpus(["0"]) as gpus, pytest.raises(ConfigError, match="give the one to serve on: MIG-1a, MIG-2b"):
        server_environment(gpus.devices)
    with Gpus(["MIG-1a"]) as gpus, pytest.raises(ConfigError, match=r"accepts no UUIDs.*MIG-1a"):
        server_environment(gpus.devices, by_index=True)


def test_a_card_of_which_one_instance_is_visible_means_that_one(nvml):
    nvml(FakeGpu("GPU-a", instances=MIG), CUDA_VISIBLE_DEVICES="MIG-2b")
    assert chosen() == chosen("0") == chosen("MIG-2b") == ("MIG-2b",)
    with pytest.raises(ConfigError, match=r"GPU MIG-1a .*is excluded by .*MIG-2b \(MIG, of 0\)"):
        chosen("MIG-1a")
    nvml(FakeGpu("GPU-a", instances=MIG[:1]))
    with Gpus([0]) as gpus:
        assert server_environment(gpus.devices)["CUDA_VISIBLE_DEVICES"] == "MIG-1a"


def test_a_server_is_told_uuids_in_order_or_numbers_in_pci_order(nvml):
    nvml()
    with Gpus(["2", "0"]) as gpus:
        assert server_environment(gpus.devices) == {
            "CUDA_VISIBLE_DEVICES": "GPU-c3,GPU-aa1",
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        }
        assert server_environment(gpus.devices, by_index=True)["CUDA_VISIBLE_DEVICES"] == "2,0"


def test_names_and_uuids_in_bytes_are_text(nvml):
    nvml(FakeGpu("GPU-a", as_bytes=True))
    with Gpus(["GPU-a"]) as gpus:
        assert (gpus.uuids, gpus.name) == (("GPU-a",), "NVIDIA H100 80GB HBM3")
