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
    """A scheduler whose steps end one request each."""

    def __init__(self, path, *, running=0, waiting=0):
        self.scheduler = Scheduler(running, waiting)
        self.limit = SchedulerLimit(str(path), self.scheduler)
        self.limit.publish(self.scheduler)

    def step(self):
        self.limit.apply(self.scheduler)
        del self.scheduler.running[:1]
        self.limit.publish(self.scheduler)


@pytest.fixture
def attached(tmp_path):
    limiter = BatchLimiter(tmp_path / "limit")
    engine = Engine(limiter.path, running=6, waiting=9)
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
    engine.step()
    assert (limiter.status().wanted_limit, limiter.status().batch_limit) == (3, 3)
    limiter.set(50)
    engine.step()
    assert (limiter.status().wanted_limit, limiter.status().batch_limit) == (50, CAPACITY)
    limiter.clear()
    engine.step()
    assert (limiter.status().wanted_limit, limiter.status().batch_limit) == (None, CAPACITY)


@pytest.mark.parametrize(("limit", "used"), [(0, 1), (-3, 1), (9, CAPACITY), (10**30, CAPACITY)])
def test_a_limit_out_of_range_is_clamped_and_said(attached, caplog, limit, used):
    limiter, _ = attached
    with caplog.at_level(logging.WARNING):
        assert limiter.set(limit) == used
    assert f"batch limit {limit} is outside 1 to {CAPACITY}; using {used}" in caplog.text


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
    with pytest.raises(NodeError, match="cannot be created"):
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
        engine.step()
        assert engine.scheduler.max_num_active_reqs == 3
        with pytest.raises(NodeError, match=f"in use by pid {other.pid}; stop that process first"):
            BatchLimiter(path, leased=True)
        other.kill()
        other.wait()
        engine.step()
        assert engine.scheduler.max_num_active_reqs == CAPACITY
    with BatchLimiter(path, leased=True) as limiter:
        limiter.set(5)
        engine.step()
        assert engine.scheduler.max_num_active_reqs == 5 == limiter.status().batch_limit
    assert not path.exists()
    engine.step()
    assert engine.scheduler.max_num_active_reqs == CAPACITY


def test_a_lease_that_begins_badly_can_be_tried_again(tmp_path, monkeypatch):
    with monkeypatch.context() as spoiled, pytest.raises(NodeError, match="corrupt"):
        spoiled.setattr("fuel_ray.live.vllm.limiter.vllm_plugin.read_file", lambda path: None)
        BatchLimiter(tmp_path / "limit", leased=True)
    BatchLimiter(tmp_path / "limit", leased=True).close()
