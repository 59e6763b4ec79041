"""The plug-in inside a fake vLLM of both kinds: with max_num_active_reqs, and with only the assertion."""

import logging
import os
import subprocess
import sys
from types import ModuleType

import pytest

from fuel_ray import vllm_plugin
from fuel_ray.vllm_plugin import LIMIT_FILE_VARIABLE, create_file, read_file, write_limit

CAPACITY = 8


def _scheduler_class(*, active_reqs):
    class Scheduler:
        def __init__(self, waiting=0, *, own=CAPACITY):
            self.max_num_running_reqs = CAPACITY
            if active_reqs:
                self.max_num_active_reqs = own
            self.running, self.waiting = [], list(range(waiting))

        def schedule(self, throttle_prefills=False):
            gate = self.max_num_active_reqs if active_reqs else self.max_num_running_reqs
            while self.waiting and len(self.running) < gate:
                self.running.append(self.waiting.pop(0))
            assert len(self.running) <= self.max_num_running_reqs  # as in vLLM: this kills the engine
            return tuple(self.running)

        def finish(self, count):
            del self.running[:count]

        def get_request_counts(self):
            return len(self.running), len(self.waiting)

    return Scheduler


def _install(monkeypatch, scheduler_class):
    names = ("vllm", "vllm.v1", "vllm.v1.core", "vllm.v1.core.sched", "vllm.v1.core.sched.scheduler")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[-1]].Scheduler = scheduler_class
    return scheduler_class


@pytest.fixture
def path(tmp_path, monkeypatch):
    path = str(tmp_path / "limit")
    create_file(path)
    monkeypatch.setenv(LIMIT_FILE_VARIABLE, path)
    return path


@pytest.fixture(params=[True, False], ids=["max_num_active_reqs", "older"])
def scheduler_class(request, monkeypatch, path):
    installed = _install(monkeypatch, _scheduler_class(active_reqs=request.param))
    vllm_plugin.register()
    return installed


def _report(path):
    return read_file(path)[1]


def test_lowering_the_limit_drains_and_admits_nothing_until_it_is_reached(scheduler_class, path):
    scheduler = scheduler_class(waiting=100)
    assert len(scheduler.schedule()) == CAPACITY
    write_limit(path, 3)
    before = scheduler.running[:]
    assert list(scheduler.schedule()) == before  # nothing is preempted, and the assertion holds
    assert (_report(path).batch_limit, _report(path).running) == (3, CAPACITY)
    for running in (6, 4, 3, 3):
        scheduler.finish(2 if running > 3 else 1)
        assert len(scheduler.schedule()) == running


def test_raising_the_limit_admits_at_the_next_step(scheduler_class, path):
    write_limit(path, 2)
    scheduler = scheduler_class(waiting=100)
    assert len(scheduler.schedule()) == 2
    write_limit(path, 5)
    assert len(scheduler.schedule()) == 5
    write_limit(path, None)
    assert len(scheduler.schedule()) == CAPACITY


@pytest.mark.parametrize(
    ("wanted", "used"), [(0, 1), (-7, 1), (9, CAPACITY), (2**70, CAPACITY), (-(2**70), 1)]
)
def test_a_value_out_of_range_is_clamped_and_said_once(scheduler_class, path, caplog, wanted, used):
    write_limit(path, wanted)
    scheduler = scheduler_class(waiting=100)
    for _ in range(3):
        assert len(scheduler.schedule()) == used
    assert _report(path).batch_limit == used
    said = [record.getMessage() for record in caplog.records]
    held = min(max(wanted, 1 - 2**63), 2**63 - 2)  # what fits in the file
    assert said == [f"fuel_ray: batch limit {held} is not in 1..{CAPACITY}; {used} is used"]


def test_each_step_is_reported(scheduler_class, path):
    scheduler = scheduler_class(waiting=20)
    assert _report(path)[:5] == (0, 0, 20, CAPACITY, CAPACITY)  # before the first step
    first_ns = _report(path).monotonic_ns
    scheduler.schedule()
    scheduler.schedule()
    assert _report(path)[:5] == (2, CAPACITY, 12, CAPACITY, CAPACITY)
    assert _report(path).monotonic_ns >= first_ns > 0


def test_without_a_limit_the_servers_own_is_kept(monkeypatch, path):
    _install(monkeypatch, _scheduler_class(active_reqs=True))
    vllm_plugin.register()
    scheduler = sys.modules["vllm.v1.core.sched.scheduler"].Scheduler(waiting=20, own=5)
    assert len(scheduler.schedule()) == 5
    write_limit(path, 7)
    assert len(scheduler.schedule()) == 7


def test_a_subclass_and_arguments_of_schedule_are_kept(scheduler_class, path):
    class AsyncScheduler(scheduler_class):
        pass

    write_limit(path, 2)
    assert len(AsyncScheduler(waiting=9).schedule(throttle_prefills=True)) == 2


def test_a_class_with_a_schedule_of_its_own_is_limited_where_it_heeds_what_is_set(scheduler_class, path):
    class OwnScheduler(scheduler_class):
        def schedule(self):
            gate = getattr(self, "max_num_active_reqs", self.max_num_running_reqs)
            while self.waiting and len(self.running) < gate:
                self.running.append(self.waiting.pop(0))

    write_limit(path, 2)
    scheduler = OwnScheduler(waiting=9)
    scheduler.schedule()
    assert len(scheduler.running) == 2 == _report(path).batch_limit


def test_a_class_that_admits_as_it_likes_has_its_capacity_in_force_until_a_limit_binds(
    scheduler_class, path, caplog
):
    class Greedy(scheduler_class):
        most = 5

        def schedule(self):
            while self.waiting and len(self.running) < self.most:
                self.running.append(self.waiting.pop(0))

    scheduler = Greedy(waiting=100)
    write_limit(path, 2)
    for _ in range(2):  # the second step admits nothing
        scheduler.schedule()
        assert (_report(path).running, _report(path).batch_limit) == (5, CAPACITY)
    assert [record.getMessage() for record in caplog.records] == [
        "fuel_ray: no batch limit: this scheduler's schedule() admits more than is set"
    ]
    scheduler.most = 2
    scheduler.finish(3)
    scheduler.schedule()
    assert (_report(path).running, _report(path).batch_limit) == (2, 2)


def test_registering_twice_wraps_once(scheduler_class):
    wrapped = scheduler_class.schedule, scheduler_class.__init__
    vllm_plugin.register()
    assert (scheduler_class.schedule, scheduler_class.__init__) == wrapped


def _truncate(path):
    os.truncate(path, 3)


def _fill(path):
    with open(path, "wb") as file:
        file.write(b"\xff" * 64)


def _make_folder(path):
    os.unlink(path)
    os.mkdir(path)


def _make_fifo(path):
    os.unlink(path)
    os.mkfifo(path)


@pytest.mark.parametrize("spoil", [_truncate, _fill, os.unlink, _make_folder, _make_fifo])
def test_a_spoilt_file_means_no_limit_and_is_said_once(scheduler_class, path, caplog, spoil):
    write_limit(path, 2)
    scheduler = scheduler_class(waiting=100)
    assert len(scheduler.schedule()) == 2
    spoil(path)
    for _ in range(3):
        assert len(scheduler.schedule()) == CAPACITY
    assert 1 <= len(caplog.records) <= 2
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_a_foreign_file_is_not_written(scheduler_class, path):
    _fill(path)
    scheduler_class(waiting=1).schedule()
    with open(path, "rb") as file:
        assert file.read() == b"\xff" * 64


def test_a_file_that_comes_late_is_found(scheduler_class, path, caplog):
    os.unlink(path)
    scheduler = scheduler_class(waiting=100)
    scheduler.schedule()
    assert caplog.messages == [
        f"fuel_ray: {path} does not exist yet; no batch limit until `fuel-ray deploy --limit-file {path}` "
        "creates it"
    ]
    scheduler.finish(CAPACITY)
    create_file(path)
    write_limit(path, 2)
    assert len(scheduler.schedule()) == 2


@pytest.mark.parametrize("value", [None, ""])
def test_nothing_happens_without_the_variable(monkeypatch, value):
    fake = _install(monkeypatch, _scheduler_class(active_reqs=True))
    monkeypatch.delenv(LIMIT_FILE_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(LIMIT_FILE_VARIABLE, value)
    schedule = fake.schedule
    vllm_plugin.register()
    assert fake.schedule is schedule


def test_a_vllm_without_this_scheduler_is_left_alone(monkeypatch, path, caplog):
    monkeypatch.setitem(sys.modules, "vllm", None)
    vllm_plugin.register()
    assert "no batch limit in this vLLM" in caplog.text


def test_a_scheduler_without_the_known_fields_is_left_alone(monkeypatch, path, caplog):
    class Scheduler:
        def schedule(self):
            return "scheduled"

    _install(monkeypatch, Scheduler)
    vllm_plugin.register()
    assert Scheduler().schedule() == "scheduled"
    assert "lacks ['get_request_counts', 'max_num_running_reqs', 'running']" in caplog.text


def test_importing_it_needs_nothing_but_the_standard_library():
    code = (
        "import sys; import fuel_ray; before = set(sys.modules); import fuel_ray.vllm_plugin; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "sys.exit(bool(new - set(sys.stdlib_module_names) - {'fuel_ray'}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
