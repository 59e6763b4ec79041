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


def _running(tmp_path, *, packages=1, range_uj=262_143_328_850):
    """A machine whose packages are at 7 J, and a meter on it."""
    machine = FakeMachine()
    for number in range(packages):
        _domain(
            tmp_path, f"intel-rapl:{number}", name=f"package-{number}", energy_uj=7_000_000, range_uj=range_uj
        )
    return machine, machine.meter(tmp_path)


def test_a_counter_that_never_moves_is_no_measured_zero(tmp_path):
    machine, meter = _running(tmp_path)
    for second in range(1, 6):
        machine.run(1.0, util=0.5)
        assert meter.read().energy_j == pytest.approx(second * (IDLE_W + SPAN_W / 2))
        assert meter.modelled and "energy_uj has not moved" in meter.reason
    assert not meter.waits


def test_one_of_two_packages_that_stands_still_makes_the_whole_modelled(tmp_path):
    machine, meter = _running(tmp_path, packages=2)
    for second in range(1, 6):
        machine.run(1.0, util=0.0)
        _set(tmp_path, "intel-rapl:0", 7_000_000 + second * 30_000_000)
        meter.read()
    assert meter.modelled and "intel-rapl:1/energy_uj has not moved" in meter.reason
    assert meter.read().energy_j == pytest.approx(5 * IDLE_W)


def test_a_counter_that_stops_later_is_modelled_from_there(tmp_path):
    machine, meter = _running(tmp_path)
    _set(tmp_path, "intel-rapl:0", 107_000_000)
    machine.run(1.0, util=0.0)
    assert meter.read().energy_j == pytest.approx(100) and not meter.modelled
    readings_j = []
    for _ in range(4):
        machine.run(1.0, util=0.0)
        readings_j.append(meter.read().energy_j)
    assert meter.modelled and readings_j[-1] == pytest.approx(100 + 4 * IDLE_W)
    assert readings_j == sorted(readings_j)


def test_a_counter_that_moves_once_a_second_is_measured(tmp_path):
    """QEMU's virtual RAPL does."""
    machine, meter = _running(tmp_path)
    for tick in range(1, 101):
        machine.run(0.05, util=0.3)
        _set(tmp_path, "intel-rapl:0", 7_000_000 + tick // 20 * 90_000_000)
        reading = meter.read()
    assert not meter.modelled and reading.energy_j == pytest.approx(450)


@pytest.mark.parametrize(
    ("energy_uj", "range_uj", "said"),
    [
        (7_000_000 + 3_000_000_000, 262_143_328_850, "jumped by 3000 J in 1 s"),  # 3 kW
        (6_000_000, 262_143_328_850, "jumped by 2.621e+05 J"),  # a reset, which no wrap is
        (6_000_000, 0, "fell from 7000000 to 6000000 and does not say its range"),
        (6_000_000, 5_000_000, "does not say its range"),  # a range below the counter
        ("", 262_143_328_850, "not a number"),
        (-1, 262_143_328_850, "not a number"),
    ],
)
def test_a_counter_that_cannot_be_right_is_modelled_with_the_reason(tmp_path, energy_uj, range_uj, said):
    machine, meter = _running(tmp_path, range_uj=range_uj)
    machine.run(1.0, util=1.0)
    _set(tmp_path, "intel-rapl:0", energy_uj)
    assert meter.read().energy_j == pytest.approx(IDLE_W + SPAN_W)
    assert meter.modelled and said in meter.reason


@pytest.mark.parametrize("range_uj", [0, "", "none"])
def test_without_a_range_a_counter_is_believed_until_it_falls(tmp_path, range_uj):
    machine, meter = _running(tmp_path, range_uj=range_uj)
    machine.run(1.0, util=1.0)
    _set(tmp_path, "intel-rapl:0", 107_000_000)
    assert meter.read().energy_j == pytest.approx(100) and not meter.modelled


def test_a_counter_that_is_refused_later_is_modelled_with_the_reason(tmp_path, monkeypatch):
    machine, meter = _running(tmp_path)
    machine.run(1.0, util=0.0)
    _set(tmp_path, "intel-rapl:0", 107_000_000)
    meter.read()
    monkeypatch.setattr("pathlib.Path.read_text", _refuse)
    machine.run(1.0, util=0.0)
    assert meter.read().energy_j == pytest.approx(100 + IDLE_W)
    assert meter.modelled and "sudo chmod a+r" in meter.reason


def test_dies_of_a_package_and_other_makers_names_count(tmp_path):
    for domain, name in (("intel-rapl:0", "package-0-die-0"), ("amd-rapl:0", "package-0")):
        _domain(tmp_path, domain, name=name, energy_uj=0)
    meter = CpuMeter(root=tmp_path)
    for domain in ("intel-rapl:0", "amd-rapl:0"):
        _set(tmp_path, domain, 100_000)
    assert meter.read().energy_j == pytest.approx(0.2) and not meter.modelled
