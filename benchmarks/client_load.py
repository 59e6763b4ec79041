"""How many tokens per second keep the load generator's thread half busy, against a stub in another process.

Run from the repository's root: ``python benchmarks/client_load.py``.
"""

import subprocess
import sys

import numpy as np

from fuel_ray.live.load.loadgen import LoadGenerator
from fuel_ray.live.load.prompts import TokenPrompts
from fuel_ray.types import Requests

STUB = """
import sys, time
sys.path.insert(0, "")
from tests.serving_stub import ServingStub
from tests.stub_vllm import serving
with serving(ServingStub(token_delay_s=0.02)) as stub:
    print(stub.url, flush=True)
    sys.stdin.read()
"""
TOKENS, ROUNDS = 300, 5


def client_s(url: str, streams: int) -> float:
    """CPU time of the client per token of so many streams, each token a chunk."""
    none = np.full(streams, -1)
    outputs = np.full(streams, TOKENS)
    work = Requests(np.zeros(streams), np.full(streams, 100), outputs, none, np.zeros_like(none))
    prompts = TokenPrompts(work, vocab_size=500, rng=np.random.default_rng(0))
    load = LoadGenerator(url, work, prompts=prompts, model="tiny")
    load.start()
    if not load.wait(120.0) or any(load.result().errors):
        raise SystemExit("the stub did not answer")
    return load.busy_s / (streams * TOKENS)


def main() -> None:
    """Print one line per number of streams."""
    with subprocess.Popen(
        [sys.executable, "-c", STUB], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as stub:
        assert stub.stdout is not None
        url = stub.stdout.readline().strip()
        for streams in (8, 32, 128):
            costs_us = sorted(1e6 * client_s(url, streams) for _ in range(ROUNDS))
            middle = costs_us[ROUNDS // 2]
            print(
                f"{streams} streams: {middle:.0f} us per token ({costs_us[0]:.0f}..{costs_us[-1]:.0f}, "
                f"n = {ROUNDS}), half busy at {0.5e6 / middle:,.0f} tokens/s"
            )
        stub.communicate("")


if __name__ == "__main__":
    main()
