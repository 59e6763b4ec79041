"""CPU energy from a made-up powercap tree, and from the model where there is none."""

import pytest

from fuel_ray.errors import TelemetryError
from fuel_ray.live.cpu import IDLE_W, SPAN_W, CpuMeter, cpu_times


def _domain(root, domain, *, name, energy_uj, range_uj=1_000_000):
    folder = root / domain
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
    _set(root, domain, energy_uj)


def _set(root, domain, energy_uj):
    (root / domain / "energy_uj").write_text(f"{energy_uj}\n")


class FakeMachine:
    """A clock and cumulative core times that move together."""

    def __init__(self, cores=4):
        self.cores, self.now_s, self.busy_s, self.all_s = cores, 100.0, 50.0, 400.0

    def run(self, seconds, *, util):
        self.now_s += seconds
        self.busy_s += seconds * self.cores * util
        self.all_s += seconds * self.cores

    def meter(self, root):
        return CpuMeter(root=root, clock=lambda: self.now_s, times=lambda: (self.busy_s, self.all_s))


def test_packages_are_summed_and_their_parts_and_psys_are_not(tmp_path):
    _domain(tmp_path, "intel-rapl:0", name="package-0", energy_uj=100)
    _domain(tmp_path, "intel-rapl:1", name="package-1", energy_uj=500)
    _domain(tmp_path, "intel-rapl:0:0", name="core", energy_uj=0)
    _domain(tmp_path, "intel-rapl:2", name="psys", energy_uj=0)
    _domain(tmp_path, "intel-rapl-mmio:0", name="package-0", energy_uj=0)
    meter = CpuMeter(root=tmp_path)
    for domain in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0"):
        _set(tmp_path, domain, 250_500)
    assert not meter.modelled
    assert meter.reason is None
    assert meter.read().energy_j == pytest.approx(0.2504 + 0.25)


def test_a_counter_that_wraps_goes_on_counting(tmp_path):
    _domain(tmp_path, "intel-rapl:0", name="package-0", energy_uj=900_000)
    meter = CpuMeter(root=tmp_path)
    readings_j = []
    for energy_uj in (100_000, 800_000, 0):
        _set(tmp_path, "intel-rapl:0", energy_uj)
        readings_j.append(meter.read().energy_j)
    assert readings_j == pytest.approx([0.2, 0.9, 1.1])


def test_without_rapl_the_energy_is_the_stated_model_and_marked(tmp_path):
    machine = FakeMachine()
    meter = machine.meter(tmp_path / "absent")
    machine.run(2.0, util=0.5)
    assert meter.read().energy_j == pytest.approx(2 * IDLE_W + SPAN_W)
    machine.run(1.0, util=0.0)
    reading = meter.read()
    assert (meter.modelled, reading.util, reading.energy_j) == (True, 0.0, pytest.approx(3 * IDLE_W + SPAN_W))
    assert "no RAPL package" in meter.reason


@pytest.mark.parametrize("fault", ["permission", "text", "gone"])
def test_rapl_that_cannot_be_read_counts_as_absent_with_the_reason(tmp_path, fault, monkeypatch):
    _domain(tmp_path, "intel-rapl:0", name="package-0", energy_uj="" if fault == "text" else 7)
    if fault == "gone":
        (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    if fault == "permission":  # chmod does not stop root
        monkeypatch.setattr("pathlib.Path.read_text", _refuse)
    meter = CpuMeter(root=tmp_path)
    said = {"permission": "sudo chmod a+r", "text": "not a number", "gone": "No such file"}[fault]
    assert meter.modelled
    assert said in meter.reason


def _refuse(path):
    raise PermissionError(13, "Permission denied", str(path))


def test_rapl_that_disappears_later_is_an_error_not_a_zero(tmp_path):
    _domain(tmp_path, "intel-rapl:0", name="package-0", energy_uj=7)
    meter = CpuMeter(root=tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    with pytest.raises(TelemetryError, match="energy_uj"):
        meter.read()


def test_utilisation_is_that_since_the_last_reading(tmp_path):
    machine = FakeMachine()
    meter = machine.meter(tmp_path)
    machine.run(1.0, util=0.25)
    assert meter.read().util == pytest.approx(0.25)
    machine.run(3.0, util=1.0)
    assert meter.read().util == pytest.approx(1.0)


def test_a_reading_within_one_tick_has_no_utilisation_and_loses_no_energy(tmp_path):
    machine = FakeMachine()
    meter = machine.meter(tmp_path)
    machine.now_s += 0.004
    assert meter.read().util is None
    machine.run(0.996, util=1.0)
    assert meter.read().energy_j == pytest.approx(IDLE_W + SPAN_W)


def test_this_machine_has_times():
    busy_s, all_s = cpu_times()
    assert 0 <= busy_s <= all_s
