"""Our side of the control file, with the plug-in's own class as the other side."""

import logging
import subprocess
import sys

import pytest

from fuel_ray.errors import NodeError
from fuel_ray.live.vllm.limiter import BatchLimiter
from fuel_ray.vllm_plugin import SchedulerLimit

CAPACITY = 8


class Scheduler:
    max_num_running_reqs = CAPACITY
    max_num_active_reqs = CAPACITY

    def __init__(self, running=0, waiting=0):
        self.running, self.waiting = [None] * running, [None] * waiting

    def get_request_counts(self):
        return len(self.running), len(self.waiting)


class Engine:
    """A scheduler that makes one step, and ends one request, whenever we wait."""

    def __init__(self, path, *, running=0, waiting=0):
        self.scheduler = Scheduler(running, waiting)
        self.limit = SchedulerLimit(str(path), self.scheduler)
        self.limit.publish(self.scheduler)
        self.now_s, self.hangs = 0.0, False

    def clock(self):
        return self.now_s

    def sleep(self, duration_s):
        self.now_s += duration_s
        if not self.hangs:
            self.limit.apply(self.scheduler)
            del self.scheduler.running[:1]
            self.limit.publish(self.scheduler)


@pytest.fixture
def attached(tmp_path):
    limiter = BatchLimiter(tmp_path / "limit")
    engine = Engine(limiter.path, running=6, waiting=9)
    limiter._clock, limiter._sleep = engine.clock, engine.sleep
    with limiter:
        yield limiter, engine


def test_before_a_scheduler_attached_the_status_says_what_to_do(tmp_path):
    with BatchLimiter(tmp_path / "limit") as limiter:
        with pytest.raises(
            NodeError, match=r"no vLLM scheduler has attached to .*FUEL_RAY_LIMIT_FILE=.*limit"
        ):
            limiter.status()
        assert (limiter.set(5), limiter.set(0), limiter.set(10**6)) == (5, 1, 10**6)


def test_the_status_tells_wanted_and_applied_apart(attached):
    limiter, engine = attached
    status = limiter.status()
    assert (status.step, status.running, status.waiting) == (0, 6, 9)
    assert (status.wanted_limit, status.batch_limit, status.capacity) == (None, CAPACITY, CAPACITY)
    assert limiter.set(3) == 3
    assert (limiter.status().wanted_limit, limiter.status().batch_limit) == (3, CAPACITY)
    engine.sleep(0.1)
    assert (limiter.status().batch_limit, limiter.status().in_force) == (3, 3)
    limiter.clear()
    engine.sleep(0.1)
    assert (limiter.status().wanted_limit, limiter.status().batch_limit) == (None, CAPACITY)


@pytest.mark.parametrize(("limit", "used"), [(0, 1), (-3, 1), (9, CAPACITY), (10**30, CAPACITY)])
def test_a_limit_out_of_range_is_clamped_and_said(attached, caplog, limit, used):
    limiter, _ = attached
    with caplog.at_level(logging.WARNING):
        assert limiter.set(limit) == used
    assert f"batch limit {limit} is outside 1..{CAPACITY}; {used} is used" in caplog.text


def test_a_clamped_limit_shows_in_the_status(attached):
    limiter, _ = attached
    limiter.set(50)
    assert (limiter.status().wanted_limit, limiter.status().in_force) == (50, CAPACITY)
    assert limiter.wait_applied(50, 1.0).batch_limit == CAPACITY


def test_applied_comes_at_the_next_step_and_reached_when_enough_have_finished(attached):
    limiter, engine = attached
    limiter.set(2)
    assert limiter.wait_applied(2, 1.0).step == 1
    assert engine.now_s == pytest.approx(0.002)
    status = limiter.wait_reached(2, 1.0)
    assert (status.step, status.running) == (4, 2)


def test_a_wait_ends_at_its_deadline_and_says_what_is(attached):
    limiter, engine = attached
    engine.hangs = True
    limiter.set(2)
    with pytest.raises(NodeError, match=r"batch limit 2 not applied after 0.5 s: .*running=6"):
        limiter.wait_applied(2, 0.5)
    assert engine.now_s == pytest.approx(0.5, abs=0.01)
    with pytest.raises(NodeError, match="not reached"):
        limiter.wait_reached(2, 0.5)


def test_an_idle_server_has_applied_what_it_will_read_first(tmp_path):
    with BatchLimiter(tmp_path / "limit") as limiter:
        Engine(limiter.path)
        limiter.set(2)
        assert limiter.wait_applied(2, 0.0).batch_limit == CAPACITY
        assert limiter.wait_reached(2, 0.0).is_idle


def test_the_age_is_that_of_the_last_step(attached):
    limiter, engine = attached
    engine.now_s = limiter.status().age_s * -1 + 2.0
    assert limiter.status().age_s == pytest.approx(2.0, abs=1e-6)


def test_closing_gives_the_limit_back_and_removes_the_file_and_may_be_repeated(tmp_path):
    limiter = BatchLimiter(tmp_path / "limit")
    engine = Engine(limiter.path)
    limiter.set(2)
    engine.limit.apply(engine.scheduler)
    assert engine.scheduler.max_num_active_reqs == 2
    limiter.close()
    limiter.close()
    assert not limiter.path.exists()
    engine.limit.apply(engine.scheduler)
    assert engine.scheduler.max_num_active_reqs == CAPACITY


def test_a_missing_or_corrupt_file_is_an_error_of_the_node(tmp_path):
    limiter = BatchLimiter(tmp_path / "limit")
    limiter.path.write_bytes(b"x" * 64)
    with pytest.raises(NodeError, match="corrupt"):
        limiter.status()
    limiter.path.unlink()
    for use in (limiter.status, lambda: limiter.set(3), limiter.clear):
        with pytest.raises(NodeError, match=r"cannot be (read|written)"):
            use()
    with pytest.raises(NodeError, match="cannot be made"):
        BatchLimiter(tmp_path / "no" / "limit")


def test_a_stale_file_is_replaced(tmp_path):
    (tmp_path / "limit").write_bytes(b"stale")
    with BatchLimiter(tmp_path / "limit") as limiter:
        assert Engine(limiter.path).scheduler.running == []
        assert limiter.status().wanted_limit is None


LEASING = """
import sys, time
from pathlib import Path
from fuel_ray.live.vllm.limiter import BatchLimiter
BatchLimiter(Path(sys.argv[1]), leased=True).set(3)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_leased_limit_is_one_controllers_and_ends_when_it_is_killed(tmp_path):
    path = tmp_path / "limit"
    with subprocess.Popen([sys.executable, "-c", LEASING, str(path)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"ready\n"
        engine = Engine(path, running=6)
        engine.sleep(1.0)
        assert engine.scheduler.max_num_active_reqs == 3
        with pytest.raises(NodeError, match=f"is in use by pid {other.pid}; end that first"):
            BatchLimiter(path, leased=True)
        other.kill()
        other.wait()
        engine.sleep(1.0)
        assert engine.scheduler.max_num_active_reqs == CAPACITY
    with BatchLimiter(path, leased=True) as limiter:
        limiter.set(5)
        engine.sleep(1.0)
        assert engine.scheduler.max_num_active_reqs == 5 == limiter.status().batch_limit
    assert not path.exists()
    engine.sleep(1.0)
    assert engine.scheduler.max_num_active_reqs == CAPACITY
