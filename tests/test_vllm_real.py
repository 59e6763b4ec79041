"""A real vLLM on the CPU; FUEL_RAY_VLLM names its environment's bin folder, with fuel_ray installed."""

import json
import os
import signal
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from fuel_ray.errors import NodeError, UnsupportedError
from fuel_ray.live.vllm.limiter import BatchLimiter
from fuel_ray.live.vllm.server import VllmServer
from tests.test_vllm_server import lives

BIN = os.environ.get("FUEL_RAY_VLLM", "")
FLAGS = (
    *("--served-model-name", "tiny", "--max-model-len", "2048", "--max-num-seqs", "32"),
    *("--kv-cache-memory-bytes", "256M", "--enforce-eager", "--disable-prefix-caching"),
)
CLIENTS = 64

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not BIN, reason="FUEL_RAY_VLLM is not set")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tool = Path(__file__).parent / "tools" / "make_tiny_model.py"
    subprocess.run([f"{BIN}/python", str(tool), str(folder)], check=True, timeout=300)
    return folder


def vllm_server(model, tmp_path, *, env=None, **options):
    return VllmServer(
        str(model),
        log_path=tmp_path / "vllm.log",
        executable=f"{BIN}/vllm",
        flags=FLAGS,
        env={"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"} | (env or {}),
        start_timeout_s=300.0,
        **options,
    )


class Load:
    """Clients that send one request after the other until stopped."""

    def __init__(self, url, *, clients, output_tokens=48):
        body = {
            "model": "tiny",
            "prompt": [5] * 32,
            "max_tokens": output_tokens,
            "min_tokens": output_tokens,
            "ignore_eos": True,
        }
        self._request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        self._tokens, self._over = output_tokens, threading.Event()
        self.completed, self.failures = 0, []
        self._threads = [threading.Thread(target=self._client) for _ in range(clients)]

    def _client(self):
        while not self._over.is_set():
            try:
                with urllib.request.urlopen(self._request, timeout=120) as answer:
                    usage = json.load(answer)["usage"]
                assert usage["completion_tokens"] == self._tokens
                self.completed += 1
            except Exception as error:
                self.failures.append(error)
                return

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        for thread in self._threads:
            thread.join(180)


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


def test_the_running_count_follows_the_limit_and_no_request_fails(model, tmp_path):
    with (
        BatchLimiter(tmp_path / "limit") as limiter,
        vllm_server(model, tmp_path, kv_block_size=32, limit_file=limiter.path) as server,
    ):
        status = limiter.status()
        assert (status.capacity, status.batch_limit, status.wanted_limit) == (32, 32, None)
        with Load(server.url, clients=CLIENTS) as load:
            for limit in (32, 4, 16, 1):
                applied_s, reached_s, filled_s = _drive(limiter, limit)
                print(
                    f"limit {limit}: applied {applied_s:.3f} reached {reached_s:.3f} filled {filled_s:.3f} s"
                )
                _never_exceeds(limiter, limit, 1.0)
            start_s = time.monotonic()
            limiter.clear()
            while limiter.status().running < 32:
                assert time.monotonic() < start_s + 60
            print(f"limit none: filled {time.monotonic() - start_s:.3f} s")
            assert limiter.set(1000) == 32
            assert limiter.status().wanted_limit == 1000
            server.check()
        assert load.failures == []
        assert load.completed > CLIENTS
    assert "batch limit 1000 is not in 1..32; 32 is used" in (tmp_path / "vllm.log").read_text()


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
