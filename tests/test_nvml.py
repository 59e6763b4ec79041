"""The GPU boundary on a fake NVML: everything but the ctypes call."""

import pickle

import pynvml
import pytest

from fuel_ray.errors import ConfigError, GpuError, PrivilegeError
from fuel_ray.live.gpu.nvml import Gpus
from tests.fake_nvml import FakeGpu, FakeNvml


@pytest.fixture
def nvml(monkeypatch):
    def install(*gpus, **flags):
        fake = FakeNvml(*gpus, **flags)
        monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", fake)
        monkeypatch.setattr("fuel_ray.live.gpu.nvml._SAID", set())
        return fake

    return install


def _proc(tmp_path, *, capabilities, uid_map="0 0 4294967295"):
    (tmp_path / "status").write_text(f"Name:\tpython\nCapEff:\t{capabilities}\n")
    (tmp_path / "uid_map").write_text(f"         {uid_map}\n")
    return tmp_path


def test_all_gpus_are_taken_by_default_and_a_subset_by_uuid_or_index(nvml):
    nvml(FakeGpu("GPU-a"), FakeGpu("GPU-b"))
    for which, uuids in (((), ("GPU-a", "GPU-b")), (["GPU-b"], ("GPU-b",)), ([1, "0"], ("GPU-b", "GPU-a"))):
        with Gpus(which) as gpus:
            assert gpus.uuids == uuids


def test_power_and_energy_are_summed_and_shares_are_means(nvml):
    nvml(
        FakeGpu("GPU-a", power_mw=300_000, energy_mj=1500, gpu_percent=100),
        FakeGpu("GPU-b", power_mw=200_500, energy_mj=500, gpu_percent=50, sm_clock_mhz=1000),
    )
    with Gpus() as gpus:
        reading = gpus.read()
        assert (reading.power_w, gpus.energy_j(), gpus.power_limit_w()) == (500.5, 2.0, 1400.0)
        assert (reading.gpu_util, reading.mem_util, reading.sm_clock_mhz) == (0.75, 0.4, 1490)


def test_names_and_driver_version_are_told(nvml):
    nvml(FakeGpu("GPU-a"), FakeGpu("GPU-b"), FakeGpu("GPU-c", name="NVIDIA L4"))
    with Gpus() as gpus:
        assert (gpus.name, gpus.driver_version) == ("NVIDIA H100 80GB HBM3 + NVIDIA L4", "580.95.05")
    with Gpus([0, 1]) as gpus:
        assert gpus.name == "NVIDIA H100 80GB HBM3"


def test_supported_clocks_ascend_and_are_those_that_all_gpus_have(nvml):
    nvml(FakeGpu("GPU-a"), FakeGpu("GPU-b", clocks_mhz=(1980, 1410, 1400)))
    with Gpus([0]) as gpus:
        assert gpus.supported_clocks_mhz == tuple(range(345, 1981, 15))
    with Gpus() as gpus:
        assert gpus.supported_clocks_mhz == (1410, 1980)


@pytest.mark.parametrize(
    ("asked_mhz", "set_mhz"), [(1200, 1200), (1206, 1200), (1208, 1215), (1, 345), (9999, 1980)]
)
def test_pin_snaps_to_the_nearest_supported_clock_on_every_gpu(nvml, asked_mhz, set_mhz):
    fake = nvml(FakeGpu("GPU-a"), FakeGpu("GPU-b"))
    with Gpus() as gpus:
        assert gpus.pin(asked_mhz) == set_mhz
        assert [gpu.locked_mhz for gpu in fake.gpus] == [(set_mhz, set_mhz)] * 2


def test_close_gives_pinned_clocks_back_once(nvml):
    fake = nvml(FakeGpu())
    gpus = Gpus()
    gpus.pin(1200)
    gpus.close()
    gpus.close()
    assert (fake.gpus[0].locked_mhz, fake.gpus[0].calls, fake.inits) == (None, ["reset"], 0)


def test_an_exception_gives_pinned_clocks_back(nvml):
    fake = nvml(FakeGpu())
    with pytest.raises(KeyboardInterrupt), Gpus() as gpus:
        gpus.pin(1200)
        raise KeyboardInterrupt
    assert fake.gpus[0].locked_mhz is None


def test_clocks_that_somebody_else_locked_are_left_alone(nvml):
    fake = nvml(FakeGpu(locked_mhz=(900, 900)))
    with Gpus() as gpus:
        gpus.read()
    assert fake.gpus[0].locked_mhz == (900, 900)


def test_a_refusal_by_one_gpu_gives_back_the_clocks_of_the_others(nvml):
    fake = nvml(FakeGpu("GPU-a"), FakeGpu("GPU-b", lockable=False))
    with pytest.raises(GpuError, match=r"lock the clock at 1200 MHz on GPU GPU-b: .*not support"):
        Gpus().pin(1200)
    assert fake.gpus[0].locked_mhz is None


def test_a_lost_gpu_does_not_keep_the_others_pinned(nvml):
    fake = nvml(FakeGpu("GPU-a"), FakeGpu("GPU-b"))
    gpus = Gpus()
    gpus.pin(1200)
    fake.gpus[0].lost = True
    with pytest.raises(GpuError, match="reset the clocks of GPU GPU-a: the GPU is lost"):
        gpus.close()
    assert (fake.gpus[1].locked_mhz, fake.inits) == (None, 0)
    gpus.close()


def test_without_the_privilege_the_error_says_which_command_has_it(nvml):
    nvml(FakeGpu(), privileged=False)
    with Gpus() as gpus:
        with pytest.raises(PrivilegeError, match=r"(?s)root.*CAP_SYS_ADMIN.*sudo nvidia-smi -lgc"):
            gpus.pin(1200)
        assert gpus.read().power_w == 400


def test_errors_survive_pickling(nvml):
    nvml(driver=False)
    with pytest.raises(GpuError) as caught:
        Gpus()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_can_set_clocks_follows_the_capability_and_writes_nothing(nvml, tmp_path):
    fake = nvml(FakeGpu(locked_mhz=(900, 900)))
    with Gpus() as gpus:
        for capabilities, uid_map, expected in (
            ("000001ffffffffff", "0 0 4294967295", True),
            ("00000000a80425fb", "0 0 4294967295", False),  # docker's default set
            ("000001ffffffffff", "0 1000 1", False),  # root in a user namespace only
        ):
            proc = _proc(tmp_path, capabilities=capabilities, uid_map=uid_map)
            assert gpus.can_set_clocks(proc=proc) is expected
        assert gpus.can_set_clocks(proc=tmp_path / "absent") is False
    assert (fake.gpus[0].locked_mhz, fake.gpus[0].calls) == ((900, 900), [])


@pytest.mark.parametrize("clocks_mhz", [None, ()])
def test_a_gpu_that_lists_no_clocks_is_observed_only(nvml, clocks_mhz):
    nvml(FakeGpu(clocks_mhz=clocks_mhz))
    with Gpus() as gpus:
        assert gpus.supported_clocks_mhz == ()
        assert not gpus.can_set_clocks()
        with pytest.raises(GpuError, match="no supported clock in common"):
            gpus.pin(1200)


def test_what_a_gpu_lacks_is_none(nvml):
    nvml(FakeGpu("GPU-a"), FakeGpu("GPU-b", energy_mj=None))
    with Gpus() as gpus:
        assert gpus.energy_j() is None


def test_only_energy_j_reads_the_slow_counter(nvml):
    fake = nvml(FakeGpu())
    with Gpus() as gpus:
        gpus.read()
        assert fake.gpus[0].calls == []
        gpus.energy_j()
        assert fake.gpus[0].calls == ["energy"]


def test_a_lost_gpu_is_an_error_that_names_it(nvml):
    fake = nvml(FakeGpu("GPU-a"), FakeGpu("GPU-b"))
    with Gpus() as gpus:
        fake.gpus[1].lost = True
        for read in (gpus.read, gpus.energy_j, lambda: gpus.pin(1200)):
            with pytest.raises(GpuError, match="GPU GPU-b: the GPU is lost"):
                read()


def test_a_lost_gpu_of_another_node_does_not_matter(nvml):
    nvml(FakeGpu("GPU-a", lost=True), FakeGpu("GPU-b"))
    with Gpus(["GPU-b"]) as gpus:
        assert gpus.read().power_w == 400


def test_without_a_driver_the_error_says_so(nvml):
    nvml(driver=False)
    with pytest.raises(GpuError, match="no NVIDIA driver"):
        Gpus()


@pytest.mark.parametrize("key", ["GPU-x", 2, "7", -1])
def test_an_unknown_gpu_is_answered_with_those_that_there_are(nvml, key):
    fake = nvml(FakeGpu("GPU-a"), FakeGpu("GPU-b", lost=True))
    with pytest.raises(GpuError, match=rf"no GPU {key} on this host; it has 0 = GPU-a, 1 = \(GPU is lost\)"):
        Gpus([key])
    assert fake.inits == 0


def test_a_machine_without_gpus_and_a_gpu_named_twice_are_refused(nvml):
    nvml()
    with pytest.raises(GpuError, match="finds no GPU"):
        Gpus()
    nvml(FakeGpu("GPU-a"))
    with pytest.raises(ConfigError, match="twice"):
        Gpus([0, "GPU-a"])


def test_reading_after_close_says_that_nvml_is_closed(nvml):
    nvml(FakeGpu())
    gpus = Gpus()
    gpus.close()
    with pytest.raises(GpuError, match="NVML is closed"):
        gpus.read()


POWER, ENERGY = "nvmlDeviceGetPowerUsage", "nvmlDeviceGetTotalEnergyConsumption"
RATES, CLOCK = "nvmlDeviceGetUtilizationRates", "nvmlDeviceGetClockInfo"
REFUSALS = [
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_UNKNOWN,
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_TIMEOUT,
    pynvml.NVML_ERROR_NO_DATA,
]


@pytest.mark.parametrize("error", REFUSALS)
@pytest.mark.parametrize(
    ("function", "unknown"),
    [
        (POWER, {"power_w"}),
        (RATES, {"gpu_util", "mem_util"}),
        (CLOCK, {"sm_clock_mhz"}),
        ("nvmlDeviceGetName", set()),
        ("nvmlDeviceGetSupportedGraphicsClocks", set()),
        ("nvmlDeviceGetSupportedMemoryClocks", set()),
        (ENERGY, set()),
    ],
)
def test_a_reading_that_is_not_given_is_none_and_takes_no_other_with_it(
    nvml, caplog, function, unknown, error
):
    nvml(FakeGpu("GPU-a", faults={function: error}))
    with Gpus() as gpus:
        for _ in range(2):
            reading, energy_j = gpus.read(), gpus.energy_j()
        gpus.require_energy()
        assert gpus.settable_clocks_mhz(wanted=False) == (1980,)
    assert {name for name in reading.__slots__ if getattr(reading, name) is None} == unknown
    assert (energy_j is None) == (function == ENERGY)
    with Gpus() as again:
        again.read(), again.energy_j()
    assert len([line for line in caplog.messages if "GPU GPU-a does not report its" in line]) <= 1


@pytest.mark.parametrize(
    "error",
    [pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED, pynvml.NVML_ERROR_UNINITIALIZED],
)
@pytest.mark.parametrize("function", [POWER, RATES, CLOCK, ENERGY])
def test_a_gpu_that_is_gone_is_no_missing_reading(nvml, function, error):
    fake = nvml(FakeGpu("GPU-a"))
    with Gpus() as gpus:
        fake.gpus[0].faults[function] = error
        with pytest.raises(GpuError, match="of GPU GPU-a"):
            (gpus.energy_j if function == ENERGY else gpus.read)()


def test_a_sum_never_leaves_one_card_out_and_it_is_said_which_lacks_it(nvml, caplog):
    nvml(FakeGpu("GPU-a"), FakeGpu("GPU-b", faults={POWER: pynvml.NVML_ERROR_NOT_SUPPORTED}))
    with Gpus() as gpus:
        assert gpus.read().power_w is None and gpus.energy_j() == 10_000
        assert gpus.lacking() == {"power": ("GPU-b",)}
        gpus.require_energy()
    assert "GPU GPU-b does not report its power" in caplog.text


def test_without_a_way_to_the_energy_of_all_cards_it_is_said_at_once(nvml):
    nvml(FakeGpu("GPU-a", energy_mj=None), FakeGpu("GPU-b", faults={POWER: pynvml.NVML_ERROR_UNKNOWN}))
    with Gpus(["GPU-a"]) as gpus:
        gpus.require_energy()
    with Gpus() as gpus, pytest.raises(GpuError, match=r"no energy counter on GPU GPU-a, no power .* GPU-b"):
        gpus.require_energy()


@pytest.mark.parametrize("energy_mj", [0, 2**64 - 1])
def test_a_counter_that_has_not_counted_is_none(nvml, energy_mj):
    nvml(FakeGpu(energy_mj=energy_mj, power_mw=2**32 - 1))
    with Gpus() as gpus:
        assert gpus.energy_j() is None and gpus.read().power_w is None


def test_an_old_pynvml_without_a_function_is_a_missing_reading(nvml, monkeypatch):
    nvml(FakeGpu())
    monkeypatch.delattr(FakeNvml, ENERGY)
    monkeypatch.delattr(FakeNvml, "nvmlDeviceGetMaxMigDeviceCount")
    with Gpus() as gpus:
        assert gpus.energy_j() is None and gpus.read().power_w == 400


def test_a_card_that_says_no_clock_at_all_has_its_highest_from_elsewhere(nvml):
    faults = {CLOCK: pynvml.NVML_ERROR_UNKNOWN}
    nvml(FakeGpu(clocks_mhz=(), faults=faults, highest_clock_mhz=2520))
    with Gpus() as gpus:
        assert gpus.settable_clocks_mhz(wanted=True) == (2520,)
    nvml(FakeGpu(clocks_mhz=(), faults=faults))
    with Gpus() as gpus, pytest.raises(GpuError, match="neither its supported clocks"):
        gpus.settable_clocks_mhz(wanted=True)
