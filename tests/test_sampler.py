"""Steady sampling and what a window says; a fake clock wherever time matters."""

import sys
import threading
import time
from dataclasses import dataclass

import pytest

from fuel_ray.errors import ConfigError, GpuError, TelemetryError
from fuel_ray.live.sampling import Sample, Sampler, figures, held_mean, held_s, next_deadline, window_energy_j


class FakeClock:
    """Moves when it is waited for; ``wait`` is an Event's and ends after ``lasts_s``."""

    def __init__(self, lasts_s=1.0):
        self.now_s, self.lasts_s = 0.0, lasts_s

    def __call__(self):
        return self.now_s

    def wait(self, timeout_s):
        self.now_s += timeout_s
        return self.now_s > self.lasts_s


def _samples(*pairs):
    return [Sample(at_s, at_s, value) for at_s, value in pairs]


def _run(sampler, clock):
    sampler._run(clock)
    return sampler.since(0.0)


def test_samples_are_read_on_absolute_deadlines_though_reads_take_time():
    clock = FakeClock(lasts_s=0.51)

    def read():
        clock.now_s += 0.03
        return clock.now_s

    samples = _run(Sampler(read, 0.1, clock=clock), clock)
    assert [s.at_s for s in samples] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_missed_deadlines_are_skipped_and_counted_not_bunched():
    clock = FakeClock(lasts_s=1.0)
    delays_s = iter([0.0, 0.35] + [0.0] * 20)

    def read():
        clock.now_s += next(delays_s)

    sampler = Sampler(read, 0.1, clock=clock)
    assert [s.at_s for s in _run(sampler, clock)[:4]] == pytest.approx([0.0, 0.1, 0.5, 0.6])
    assert sampler.skipped == 3


def test_lateness_is_the_distance_from_the_deadline():
    clock = FakeClock(lasts_s=0.25)
    wait = clock.wait
    clock.wait = lambda timeout_s: wait(timeout_s + 0.004)
    assert [s.at_s - s.due_s for s in _run(Sampler(lambda: 1, 0.1, clock=clock), clock)] == pytest.approx(
        [0.004] * 3
    )


@pytest.mark.parametrize(
    ("now_s", "expected"), [(5.0, (5.5, 0)), (5.2, (5.5, 0)), (5.6, (6.0, 1)), (7.1, (7.5, 4))]
)
def test_the_next_deadline_stays_on_the_grid(now_s, expected):
    assert next_deadline(5.0, now_s=now_s, interval_s=0.5) == expected


def test_the_ring_keeps_the_newest():
    clock = FakeClock()
    sampler = Sampler(clock, 0.1, clock=clock, capacity=3)
    for clock.now_s in range(5):
        sampler.sample()
    assert [s.value for s in sampler.since(0)] == [2, 3, 4]
    assert [s.value for s in sampler.since(3)] == [3, 4]


def _failing_at(clock, *bad_s):
    def read():
        if clock.now_s in bad_s:
            raise GpuError(f"GPU-a is lost at {clock.now_s}")
        return 7.0

    return read


def test_a_failed_read_is_missing_not_zero():
    clock = FakeClock()
    sampler = Sampler(_failing_at(clock, 1, 2), 0.1, name="power", clock=clock)
    for clock.now_s in (0, 1, 2):
        sampler.sample()
    assert [(s.at_s, s.value) for s in sampler.since(0)] == [(0, 7.0)]
    assert sampler.failed == 2
    with pytest.raises(TelemetryError, match="power has no reading, 2 failed: GPU-a is lost at 2") as caught:
        sampler.since(1)
    assert isinstance(caught.value.__cause__, GpuError)


def test_a_gpu_that_comes_back_is_read_again():
    clock = FakeClock()
    sampler = Sampler(_failing_at(clock, 1), 0.1, clock=clock)
    for clock.now_s in (1, 2):
        sampler.sample()
    assert [s.at_s for s in sampler.since(0)] == [2]


def test_an_interval_without_any_read_is_an_error():
    sampler = Sampler(lambda: 1, 0.1, name="power")
    with pytest.raises(TelemetryError, match="power has no reading"):
        sampler.since(0)


def test_a_bug_in_read_is_not_taken_for_a_missing_sample():
    clock = FakeClock()
    sampler = Sampler(lambda: 1 / 0, 0.1, name="power", clock=clock)
    sampler._run(clock)
    with pytest.raises(TelemetryError, match="power ended: ZeroDivisionError"):
        sampler.since(0)


@pytest.mark.parametrize("interval_s", [0, -1, float("nan"), float("inf")])
def test_an_interval_that_is_not_positive_is_refused(interval_s):
    with pytest.raises(ConfigError, match="interval of power"):
        Sampler(lambda: 1, interval_s, name="power")


def test_the_thread_samples_until_it_is_stopped():
    enough = threading.Event()
    counts = []

    def read():
        counts.append(1)
        if len(counts) >= 5:
            enough.set()

    begun_s = time.monotonic()
    sampler = Sampler(read, 0.001)
    with sampler:
        sampler.start()
        assert enough.wait(2.0)
    taken = len(counts)
    sampler.stop()
    assert len(sampler.since(begun_s)) == taken == len(counts)


def test_it_can_be_started_again():
    sampler = Sampler(lambda: 1, 0.001)
    for _ in range(2):
        begun_s = time.monotonic()
        with sampler:
            assert _soon(lambda since_s=begun_s: sampler.since(since_s))


def _soon(question):
    deadline_s = time.monotonic() + 2.0
    while time.monotonic() < deadline_s:
        try:
            if question():
                return True
        except TelemetryError:
            pass
        time.sleep(0.001)
    return False


def test_a_mean_does_not_depend_on_how_often_a_value_was_repeated():
    once = _samples((0.0, 100.0), (0.3, 500.0))
    repeated = _samples((0.0, 100.0), (0.3, 500.0), (0.31, 500.0), (0.32, 500.0), (0.33, 500.0))
    window = {"begin_s": 0.0, "end_s": 0.4}
    assert held_mean(once, **window) == pytest.approx(200.0)
    assert held_mean(repeated, **window) == pytest.approx(200.0)


def test_samples_outside_the_window_count_only_for_what_they_hold_of_it():
    samples = _samples((-0.1, 100.0), (0.1, 300.0), (0.5, 900.0))
    weights_s = held_s(samples, begin_s=0.0, end_s=0.2, gap_s=0.5)
    assert list(weights_s) == pytest.approx([0.1, 0.1, 0.0])
    assert held_mean(samples[1:], begin_s=0.0, end_s=0.2) == pytest.approx(300.0)


def test_a_gap_is_left_out_of_the_mean_not_filled():
    samples = _samples((0.0, 100.0), (9.5, 300.0))
    assert held_mean(samples, begin_s=0.0, end_s=10.0, gap_s=0.5) == pytest.approx(200.0)
    assert held_mean(samples, begin_s=20.0, end_s=30.0) is None
    assert held_mean([], begin_s=0.0, end_s=1.0) is None


def test_window_energy_is_the_counters_difference_where_there_is_one():
    power_w = _samples((0.0, 999.0))
    assert window_energy_j(power_w, begin_s=0.0, end_s=1.0, counter_j=(1000.0, 1400.5)) == 400.5
    with pytest.raises(TelemetryError, match=r"fell from 5\.0 to 1\.0 J"):
        window_energy_j(power_w, begin_s=0.0, end_s=1.0, counter_j=(5.0, 1.0))


def test_window_energy_is_integrated_power_without_a_counter():
    power_w = _samples(*((0.05 * i, 400.0 if i < 10 else 200.0) for i in range(20)))
    assert window_energy_j(power_w, begin_s=0.0, end_s=1.0) == pytest.approx(300.0)


def test_a_window_that_was_hardly_seen_has_no_energy():
    with pytest.raises(TelemetryError, match=r"power is known for 0\.50 s of the window's 10\.00 s"):
        window_energy_j(_samples((0.0, 400.0)), begin_s=0.0, end_s=10.0)
    with pytest.raises(TelemetryError):
        window_energy_j([], begin_s=0.0, end_s=10.0)


def test_a_busy_thread_holds_a_sample_up_for_a_millisecond_at_most():
    before_s = sys.getswitchinterval()
    try:
        sys.setswitchinterval(0.005)
        with Sampler(lambda: 1, 0.05):
            assert sys.getswitchinterval() == pytest.approx(0.001)
    finally:
        sys.setswitchinterval(before_s)


def test_a_figure_has_the_samples_that_have_it():
    readings = [Sample(0.1 * i, 0.1 * i, Reading(power_w)) for i, power_w in enumerate([100.0, None, 300.0])]
    found = figures(readings, "power_w")
    assert [(sample.at_s, sample.value) for sample in found] == [(0.0, 100.0), (0.2, 300.0)]
    assert held_mean(found, begin_s=0.0, end_s=0.3) == pytest.approx((2 * 100 + 300) / 3)
    assert held_mean(figures(readings[1:2], "power_w"), begin_s=0.0, end_s=0.3) is None


@dataclass(frozen=True)
class Reading:
    power_w: float | None
