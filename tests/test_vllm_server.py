"""The server's life, with a small script in place of vLLM."""

import json
import os
import signal
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from fuel_ray.errors import ConfigError, NodeError, UnsupportedError
from fuel_ray.live.vllm.server import VllmServer, free_port, last_error, refused_block_size

SCRIPT = """#!{python}
import http.server, json, os, signal, subprocess, sys, time

behaviour = os.environ["BEHAVIOUR"]
port = int(sys.argv[sys.argv.index("--port") + 1])
print("INFO starting", flush=True)
if behaviour == "old" and "--shutdown-timeout" in sys.argv:
    sys.exit("vllm: error: unrecognized arguments: --shutdown-timeout 10")
if behaviour == "dies":
    print("(EngineCore pid=7) ERROR 11-23 13:27:43 [core.py:1510] torch.OutOfMemoryError: CUDA out of memory")
    print("    frame")
    print("RuntimeError: Engine core initialization failed. See root cause above. Failed: {{}}")
    sys.exit(1)
if behaviour == "block":
    print("RuntimeError: Worker failed with error 'No common block size for 8 (CPU_ATTN: [MultipleOf(32)]).'")
    sys.exit(1)
if behaviour == "hangs":
    time.sleep(60)
if behaviour == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if behaviour in ("children", "stubborn"):
    sleeper = [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"]
    for own_session in (False, True):
        subprocess.Popen(sleeper, start_new_session=own_session)
    subprocess.run(["sh", "-c", "sleep 60 & exit 0"])  # its parent is gone


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        names = ("FUEL_RAY_LIMIT_FILE", "VLLM_CACHE_BLOCK_SIZE", "EXTRA")
        seen = [sys.argv[1:], {{name: os.environ.get(name) for name in names}}]
        self.wfile.write(json.dumps(seen).encode())

    def log_message(self, *args):
        pass


http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False  # an init reaps in its own time, hence the zombies


@pytest.fixture
def server(tmp_path):
    made = []

    def make(behaviour="healthy", *, env=None, **options):
        script = tmp_path / "vllm"
        script.write_text(SCRIPT.format(python=sys.executable))
        script.chmod(0o700)
        options = {"start_timeout_s": 20.0, "stop_timeout_s": 5.0} | options
        variables = {"BEHAVIOUR": behaviour} | (env or {})
        server = VllmServer(
            "model", log_path=tmp_path / "log" / "v", executable=str(script), env=variables, **options
        )
        made.append(server)
        return server

    yield make
    for server in made:
        server.stop()


def _seen(server):
    with urllib.request.urlopen(server.url, timeout=5) as answer:
        return json.load(answer)


def test_a_healthy_server_gets_our_flags_and_ends_with_the_block(server, tmp_path):
    flags = ("--max-num-seqs", "32", "--disable-prefix-caching")
    with server(kv_block_size=32, flags=flags, limit_file=tmp_path / "limit", env={"EXTRA": "1"}) as running:
        arguments, variables = _seen(running)
        running.check()
        pid = running.pids()[0]
        running.start()  # is up: nothing happens
        assert running.pids() == (pid,)
    assert arguments == [
        *("serve", "model", "--shutdown-timeout", "10", "--host", "127.0.0.1", "--port", str(running.port)),
        *("--block-size", "32", "--max-num-seqs", "32", "--no-enable-prefix-caching"),
    ]
    assert variables == {
        "FUEL_RAY_LIMIT_FILE": str(tmp_path / "limit"),
        "VLLM_CACHE_BLOCK_SIZE": None,
        "EXTRA": "1",
    }
    assert not Path(f"/proc/{pid}").exists()
    running.stop()
    with pytest.raises(NodeError, match="no vLLM server was started"):
        running.check()
    assert "INFO starting" in running.log_path.read_text()


def test_the_block_size_comes_from_the_argument_then_the_variable_then_vllm(server, monkeypatch):
    monkeypatch.delenv("VLLM_CACHE_BLOCK_SIZE", raising=False)
    assert server().kv_block_size is None
    monkeypatch.setenv("VLLM_CACHE_BLOCK_SIZE", "64")
    assert server().kv_block_size == 64
    assert server(kv_block_size=16).kv_block_size == 16
    with server(env={"VLLM_CACHE_BLOCK_SIZE": "128"}) as running:
        assert "128" in _seen(running)[0]


def test_wrong_arguments_are_named(server):
    with pytest.raises(ConfigError, match="VLLM_CACHE_BLOCK_SIZE=many: must be"):
        server(env={"VLLM_CACHE_BLOCK_SIZE": "many"})
    with pytest.raises(ConfigError, match="KV block size 0: must be at least 1"):
        server(kv_block_size=0)
    for flag in ("--port", "--port=8000", "--block-size=16"):
        with pytest.raises(ConfigError, match=flag.split("=")[0]):
            server(flags=(flag,))


def test_a_vllm_without_the_shutdown_flag_is_started_without_it(server):
    with server("old") as running:
        assert "--shutdown-timeout" not in _seen(running)[0]


def test_a_server_that_dies_while_starting_says_why_in_its_own_words(server):
    with pytest.raises(
        NodeError, match=r"status 1 while starting: torch.OutOfMemoryError: CUDA out"
    ) as caught:
        server("dies").start()
    assert not isinstance(caught.value, UnsupportedError)


def test_an_earlier_run_in_the_same_log_is_not_taken_for_the_reason(server):
    with pytest.raises(UnsupportedError):
        server("block", kv_block_size=8).start()
    with pytest.raises(NodeError, match="OutOfMemoryError") as caught:
        server("dies").start()
    assert not isinstance(caught.value, UnsupportedError)
    assert "No common block size" in server().log_path.read_text()


def test_an_unsupported_block_size_is_an_error_of_its_own(server):
    with pytest.raises(UnsupportedError, match=r"^block size 8: No common block size for 8 \(CPU_ATTN"):
        server("block", kv_block_size=8).start()


def test_a_server_that_hangs_is_ended_at_the_deadline(server):
    hanging = server("hangs", start_timeout_s=0.5)
    with pytest.raises(
        NodeError, match=r"did not answer on .*/health within 0.5 s; the last line of its log is: INFO start"
    ):
        hanging.start()
    assert hanging.pids() == ()


@pytest.mark.parametrize("behaviour", ["children", "stubborn"])
def test_children_are_gone_after_stop(server, behaviour):
    running = server(behaviour, stop_timeout_s=0.3)
    with running:
        pids = running.pids()
        assert len(pids) == 4  # one of them in a session of its own, one an orphan
    assert not any(map(lives, pids))


def test_a_server_killed_later_is_noticed_and_can_be_started_again(server):
    with server("children") as running:
        children = running.pids()[1:]
        os.kill(running.pids()[0], signal.SIGKILL)
        deadline_s = time.monotonic() + 5
        with pytest.raises(NodeError, match=r"was killed by SIGKILL: INFO starting"):
            while time.monotonic() < deadline_s:
                running.check()
        running.stop()
        assert not any(map(lives, children))
        running.start()
        running.check()


def test_a_taken_port_and_a_missing_command_are_errors_of_the_node(server, tmp_path):
    with server() as running, pytest.raises(NodeError, match=f"port {running.port} cannot be used"):
        server(port=running.port).start()
    with pytest.raises(NodeError, match="/no/vllm cannot be started"):
        VllmServer("model", log_path=tmp_path / "log", executable=("/no/vllm",)).start()


def test_a_free_port_is_free():
    assert 1024 <= free_port() < 2**16


CUDA_33 = (
    "(EngineCore pid=9) ERROR 04-30 07:05:40 [core.py:1] ValueError: No valid attention backend found for "
    "cuda with AttentionSelectorConfig(block_size=8). Reasons: {FLASH_ATTN: [block_size not supported]}"
)
CUDA_20 = (
    "WARNING 04-30 07:05:40 [cuda.py:324] --block-size 8 precluded higher-priority backend(s) FLASH_ATTN. "
    "Using FLEX_ATTENTION instead, which may result in reduced performance.\n"
    "triton.compiler.errors.CompilationError: at 140:10:\nAssertionError: Input shapes should have K >= 16"
)
FALLBACK_ONLY = CUDA_20.splitlines()[0] + "\ntorch.OutOfMemoryError: CUDA out of memory"


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (CUDA_33, "No valid attention backend found for cuda"),
        (CUDA_20, "precluded higher-priority backend"),
        ("vllm serve: error: argument --block-size: invalid choice: 8 (choose from 16)", "invalid choice: 8"),
        ("RuntimeError: Unsupported block size: 128", "Unsupported block size: 128"),
        (FALLBACK_ONLY, None),
        ("CPU backend prefers block_size is multiples of 32\nOSError: no such model", None),
        ("", None),
    ],
)
def test_every_way_in_which_vllm_refuses_a_block_size_is_recognised(log, reason):
    found = refused_block_size(log)
    assert found is None if reason is None else reason in found


def test_the_last_error_is_the_cause_and_not_its_consequence():
    assert (
        last_error("ValueError: a\nKeyError: b\nRuntimeError: x. See root cause above.\nbye") == "KeyError: b"
    )
    assert last_error("usage: vllm\nvllm: error: unrecognized arguments: --x") == (
        "vllm: error: unrecognized arguments: --x"
    )
    assert (last_error("all well\n\n"), last_error("")) == ("all well", "(empty)")
