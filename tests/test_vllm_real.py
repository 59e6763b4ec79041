"""A real vLLM on the CPU; FUEL_RAY_VLLM names its environment's bin folder, with fuel_ray installed."""

import os
import signal
import time

import pytest

from fuel_ray.errors import NodeError, UnsupportedError
from fuel_ray.live.vllm.limiter import BatchLimiter
from tests.real_vllm import BIN, CLIENTS, Load, pytestmark, vllm_server  # noqa: F401  (the marks)
from tests.test_vllm_server import lives


def _drive(limiter, limit):
    """Seconds until the limit was applied, until no more ran, and until the batch was full again."""
    start_s = time.monotonic()
    limiter.set(limit)

    def until(holds):
        while not holds(limiter.status()):
            assert time.monotonic() < start_s + 60
            time.sleep(0.002)
        return time.monotonic() - start_s

    applied_s = until(lambda status: status.batch_limit == limit)
    reached_s = until(lambda status: status.running <= limit)
    return applied_s, reached_s, until(lambda status: status.running >= limit)


def _never_exceeds(limiter, limit, duration_s):
    end_s = time.monotonic() + duration_s
    while time.monotonic() < end_s:
        assert limiter.status().running <= limit
        time.sleep(0.005)


def test_the_running_count_follows_the_limit_and_no_request_fails(real_server):
    status = real_server.status
    assert (status.capacity, status.batch_limit, status.wanted_limit) == (32, 32, None)
    with (
        Load(real_server.url, clients=CLIENTS) as load,
        BatchLimiter(real_server.limit_file) as limiter,
    ):
        start_s = time.monotonic()
        while limiter.in_force != 32:  # it attaches at its next step
            assert time.monotonic() < start_s + 60
        for limit in (32, 4, 16, 1):
            applied_s, reached_s, filled_s = _drive(limiter, limit)
            print(f"limit {limit}: applied {applied_s:.3f} reached {reached_s:.3f} filled {filled_s:.3f} s")
            _never_exceeds(limiter, limit, 1.0)
        start_s = time.monotonic()
        limiter.clear()
        while limiter.status().running < 32:
            assert time.monotonic() < start_s + 60
        print(f"limit none: filled {time.monotonic() - start_s:.3f} s")
        assert limiter.set(1000) == 32
        assert limiter.status().wanted_limit == 1000
        real_server.server.check()
        while "batch limit 1000 is not in 1..32; 32 is used" not in real_server.log.read_text():
            assert time.monotonic() < start_s + 60
    assert load.failures == []
    assert load.completed > CLIENTS


def test_an_unsupported_block_size_is_reported_as_such(model, tmp_path):
    with pytest.raises(UnsupportedError, match=r"block size 8: No common block size for 8 \(CPU_ATTN"):
        vllm_server(model, tmp_path, kv_block_size=8).start()


def test_a_server_killed_mid_way_is_noticed_and_leaves_nothing(model, tmp_path):
    server = vllm_server(model, tmp_path, kv_block_size=32)
    with server:
        pids = server.pids()
        assert len(pids) > 1
        with Load(server.url, clients=4) as load:
            os.kill(server.pids()[0], signal.SIGKILL)
            start_s = time.monotonic()
            with pytest.raises(NodeError, match="was killed by SIGKILL"):
                while time.monotonic() < start_s + 10:
                    server.check()
        assert load.failures
    assert not any(map(lives, pids))
