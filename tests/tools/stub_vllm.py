"""``vllm serve MODEL --port N --block-size B`` in a second: the stub; a line per start in $STUB_STARTS.

It has the plug-in unless $VLLM_PLUGINS leaves it out.
With $STUB_OLD it is a vLLM that takes no UUIDs; what it was told of GPUs is in $STUB_GPUS.
"""

import argparse
import os
import re
import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from aiohttp import web

from tests.gateways import demands, shows
from tests.stub_vllm import serving
from tests.test_live_node import CountingStub

parser = argparse.ArgumentParser()
parser.add_argument("serve")
parser.add_argument("model")
parser.add_argument("--port", type=int)
parser.add_argument("--block-size", type=int)
parser.add_argument("--ssl-certfile")
parser.add_argument("--ssl-keyfile")
parser.add_argument("--max-num-seqs", type=int, default=32)
asked, _ = parser.parse_known_args()
with open(os.environ.get("STUB_STARTS", os.devnull), "a") as log:
    log.write(f"{asked.block_size} {os.getpid()}\n")
if "STUB_GPUS" in os.environ:
    with open(os.environ["STUB_GPUS"], "a") as log:
        log.write(f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {os.environ.get('CUDA_DEVICE_ORDER')}\n")
if "STUB_OLD" in os.environ and not os.environ["CUDA_VISIBLE_DEVICES"][0].isdecimal():
    name = os.environ["CUDA_VISIBLE_DEVICES"].split(",")[0]
    sys.exit(f"ValueError: invalid literal for int() with base 10: {name!r}\npydantic ValidationError")
if asked.block_size % 16:
    sys.exit(f"RuntimeError: No common block size for {asked.block_size} (CPU_ATTN: [MultipleOf(16)]).")


class Healthy(CountingStub):
    async def version_page(self, request):
        return web.json_response({"version": self.version})


stub = Healthy(capacity=asked.max_num_seqs)
if key := os.environ.get("VLLM_API_KEY"):
    stub.middlewares = [demands(f"Bearer {key}", prefixes=("/v1",))]  # as vLLM does
if asked.ssl_certfile:
    stub.tls = shows(asked.ssl_certfile, asked.ssl_keyfile)
if "STUB_ARGUMENTS" in os.environ:
    Path(os.environ["STUB_ARGUMENTS"]).write_bytes(
        Path("/proc/self/cmdline").read_bytes() + (b"asks for a key" if key else b"")
    )
if "fuel_ray" in os.environ.get("VLLM_PLUGINS", "fuel_ray").split(","):
    stub.limit_file = os.environ.get("FUEL_RAY_LIMIT_FILE")
stub.page = re.sub(r'block_size="\d+"', f'block_size="{asked.block_size}"', stub.page)
ended = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: ended.set())
with serving(stub, port=asked.port):
    ended.wait()
