"""A real vLLM (CPU build) for tests; FUEL_RAY_VLLM is its bin folder, with fuel_ray in its environment."""

import json
import os
import subprocess
import threading
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from fuel_ray.live.vllm.limiter import BatchLimiter, LimiterStatus
from fuel_ray.live.vllm.server import VllmServer

ROOT = Path(__file__).parent.parent
BIN = os.environ.get("FUEL_RAY_VLLM", "")
FLAGS = (
    *("--served-model-name", "tiny", "--max-model-len", "2048", "--max-num-seqs", "32"),
    *("--kv-cache-memory-bytes", "256M", "--enforce-eager", "--disable-prefix-caching"),
)
CLIENTS = 64

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not BIN, reason="FUEL_RAY_VLLM is not set")]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A folder with a model of a few layers."""
    folder = tmp_path_factory.mktemp("model")
    tool = Path(__file__).parent / "tools" / "make_tiny_model.py"
    subprocess.run([f"{BIN}/python", str(tool), str(folder)], check=True, timeout=300)
    return folder


@dataclass(frozen=True)
class RealServer:
    """What tests share."""

    server: VllmServer
    limit_file: Path
    log: Path
    status: LimiterStatus  # right after the start

    @property
    def url(self):
        return self.server.url


@pytest.fixture(scope="session")
def real_server(model, tmp_path_factory):
    """A server that tests may load and limit, but not stop."""
    folder = tmp_path_factory.mktemp("server")
    path, env = folder / "limit", {"PYTHONPATH": str(ROOT)}
    with BatchLimiter(path) as limiter:
        started = vllm_server(model, folder, env=env, kv_block_size=32, limit_file=path)
        started.start()
        status = limiter.status()
    with started:
        yield RealServer(started, path, folder / "vllm.log", status)


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
