"""A ``vllm serve`` process: started with a block size, watched, and ended with all of its children."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fuel_ray.address import VLLM_KEY, flag_name, flag_value, key_of_flags
from fuel_ray.errors import ConfigError, NodeError, UnsupportedError
from fuel_ray.live.processes import MarkedProcesses
from fuel_ray.live.vllm.endpoint import Endpoint, PageError, ask
from fuel_ray.vllm_plugin import LIMIT_FILE_VARIABLE

BLOCK_SIZE_VARIABLE = "VLLM_CACHE_BLOCK_SIZE"
DRAIN_FLAGS = ("--shutdown-timeout", "10")  # vLLM's default, 0 s, leaves requests unanswered on SIGTERM
POLL_S = 0.1

_OWNER_VARIABLE = "FUEL_RAY_SERVER"
_OUR_FLAGS = ("--block-size", "--host", "--port", "--uds")
_LOG_TAIL_BYTES = 2**18
_PREFIX = re.compile(r"^(\([^)]* pid=\d+\)\s*)?([A-Z]+ \d\d-\d\d [\d:]+ \[[^]]*\]\s*)?")  # vLLM's own
_ERROR = re.compile(r"^([\w.]*(Error|Exception|Exit|Interrupt)\b.*|.*\berror: .*)", re.IGNORECASE)
_REFUSED = (  # the words of vLLM 0.20 to 0.33 for a block size that no backend takes
    r"No common block size for .*",
    r"share no supported KV cache block size.*",
    r"No valid attention backend found .*\[block_size not supported\].*",
    r"Unsupported block size.*",
    r"argument --block-size: invalid .*",
    r"block[_ ]size \d+ is not supported.*",
)
_FALLBACK = re.compile(r"--block-size \d+ precluded higher-priority backend.*")
_COMPILER = re.compile(r"CompilationError|InductorError|LoweringException|tl\.dot")  # vllm issue 41339

logger = logging.getLogger(__name__)


class VllmServer:
    """A vLLM server on 127.0.0.1 for the length of a ``with`` block.

    Args:
        model: folder or name.
        log_path: what the server prints is appended here and kept.
        kv_block_size: tokens; by default what the variable VLLM_CACHE_BLOCK_SIZE says, else vLLM's choice.
        port: a free one by default.
        executable: the ``vllm`` command, or several words such as ("python", "-m", "vllm....main").
        flags: more flags of ``vllm serve``; --disable-prefix-caching is passed under today's name, the key of
            --api-key as VLLM_API_KEY, so that it is not among the arguments that every user can see.
        env: variables on top of this process's own.
        limit_file: the control file of a BatchLimiter.
        start_timeout_s: how long it may take until it answers.
        stop_timeout_s: how long it may take to end by itself; its requests are given 10 s of it.

    Raises:
        ConfigError: a block size or a flag is wrong.
    """

    def __init__(
        self,
        model: str,
        *,
        log_path: Path,
        kv_block_size: int | None = None,
        port: int | None = None,
        executable: str | Sequence[str] = "vllm",
        flags: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        limit_file: Path | None = None,
        start_timeout_s: float = 600.0,
        stop_timeout_s: float = 20.0,
    ):
        self._env = os.environ | dict(env or {})
        self.kv_block_size = _block_size(kv_block_size, self._env.pop(BLOCK_SIZE_VARIABLE, None))
        self.port = port if port is not None else free_port()
        self.log_path = Path(log_path)
        words = (executable,) if isinstance(executable, str) else tuple(executable)
        self._serve = (*words, "serve", model)
        block = () if self.kv_block_size is None else ("--block-size", str(self.kv_block_size))
        kept, key = key_of_flags(flags)
        self._env |= {} if key is None else {VLLM_KEY: key}
        self._flags = ("--host", "127.0.0.1", "--port", str(self.port), *block, *_todays_flags(kept))
        self.endpoint = _endpoint(self.port, flag_value(flags, "--ssl-certfile"))
        mark = uuid.uuid4().hex
        self._env |= {_OWNER_VARIABLE: mark, "SPT_NOENV": "1"}
        self._family = MarkedProcesses(f"{_OWNER_VARIABLE}={mark}")
        if limit_file is not None:
            self._env[LIMIT_FILE_VARIABLE] = str(limit_file)
        self._start_timeout_s, self._stop_timeout_s = start_timeout_s, stop_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def url(self) -> str:
        return self.endpoint.url

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and return once it is healthy; does nothing if it was started.

        Raises:
            UnsupportedError: this vLLM and its backend cannot serve with this block size.
            NodeError: it did not start; the message has its own last error.
        """
        if self._process is not None:
            return
        _check_free(self.port)
        try:
            if not self._became_healthy((*self._serve, *DRAIN_FLAGS, *self._flags)):
                self._became_healthy((*self._serve, *self._flags))
        except BaseException:  # Ctrl-C too: nothing may stay behind
            self.stop()
            raise

    def check(self) -> None:
        """Raises NodeError where the process does not live; the message has its own last error."""
        if self._process is None:
            raise NodeError(f"no vLLM server was started on port {self.port}")
        code = self._process.poll()
        if code is not None:
            raise NodeError(f"{self._ended(code)}: {last_error(self._log())} (log: {self.log_path})")

    def pids(self) -> tuple[int, ...]:
        """The live processes of this server, its own first; empty if it is not started."""
        if self._process is None:
            return ()
        own = self._process.pid
        return tuple(sorted(self._family.pids(), key=lambda pid: pid != own))

    def printed(self, words: re.Pattern[str]) -> bool:
        """Whether there are such words in what its last run has printed."""
        return self.log_path.exists() and words.search(self._log()) is not None

    def stop(self) -> None:
        """End the server and all its children: SIGTERM, after a deadline SIGKILL; safe to call twice."""
        process, self._process = self._process, None
        if process is None:
            return
        self._family.pids()  # seen now, its children are followed when they are orphans
        try:
            if process.poll() is None:
                process.terminate()
                process.wait(self._stop_timeout_s)
        except subprocess.TimeoutExpired:
            logger.warning("vLLM did not exit within %g s of SIGTERM; killing it", self._stop_timeout_s)
            process.kill()
        finally:
            self._family.end(grace_s=1.0 if process.poll() is not None else 0.0)
            process.wait(10.0)

    def _became_healthy(self, command: Sequence[str]) -> bool:
        """Whether it did; False if this vLLM does not know the flags of DRAIN_FLAGS."""
        self._process = self._popen(command)
        deadline_s = time.monotonic() + self._start_timeout_s
        while not _is_healthy(self.endpoint):
            code = self._process.poll()
            if code is not None:
                if f"unrecognized arguments: {DRAIN_FLAGS[0]}" in self._log():
                    return False
                raise self._failure(code)
            if time.monotonic() >= deadline_s:
                raise NodeError(
                    f"vLLM did not answer on {self.url}/health within {self._start_timeout_s:g} s; "
                    f"the last line of its log is: {_last_line(self._log())} (log: {self.log_path})"
                )
            time.sleep(POLL_S)
        self.check()  # the answer was not another server's
        return True

    def _popen(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        # It stays in our session and process group, so that Ray ends it with the actor that owns it. stop()
        # finds its children, orphans too, by a variable that they inherit; SPT_NOENV keeps setproctitle,
        # which vLLM uses, from overwriting what /proc shows of it.
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.log_path.open("ab") as log:
                self._log_start = log.tell()
                return subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=self._env
                )
        except OSError as error:
            raise NodeError(f"{command[0]} cannot be started: {error}") from error

    def _failure(self, code: int) -> NodeError:
        log = self._log()
        reason = refused_block_size(log)
        if reason is not None:
            return UnsupportedError(f"block size {self.kv_block_size}: {reason} (log: {self.log_path})")
        return NodeError(f"{self._ended(code)} while starting: {last_error(log)} (log: {self.log_path})")

    def _ended(self, code: int) -> str:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        return f"vLLM on port {self.port} {how}"

    def _log(self) -> str:
        """The end of what this run has printed."""
        with self.log_path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - _LOG_TAIL_BYTES))
            return log.read().decode(errors="replace")


def free_port() -> int:
    """A TCP port on 127.0.0.1 that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def last_error(log: str) -> str:
    """The last line of a vLLM log that names a cause; its last line if none does."""
    lines = [_PREFIX.sub("", line).strip() for line in log.splitlines()]
    errors = [line for line in lines if _ERROR.match(line) and "See root cause above" not in line]
    return errors[-1] if errors else _last_line(log)


def refused_block_size(log: str) -> str | None:
    """Why no backend takes the block size, in vLLM's words; None if that is not why it ended."""
    for pattern in _REFUSED:
        found = re.search(pattern, log)
        if found:
            return found.group().strip("\"' ")
    fallback = _FALLBACK.search(log)
    if fallback and _COMPILER.search(log):
        return f"{fallback.group()} (and that one does not compile: {last_error(log)})"
    return None


def _last_line(log: str) -> str:
    return next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "(empty)")


def _block_size(asked: int | None, variable: str | None) -> int | None:
    if asked is None and variable is None:
        return None
    try:
        size = int(variable or "") if asked is None else asked
    except ValueError:
        raise ConfigError(f"{BLOCK_SIZE_VARIABLE}={variable}: must be a number of tokens") from None
    if size < 1:
        raise ConfigError(f"KV block size {size}: must be at least 1 token")
    return size


def _todays_flags(flags: Sequence[str]) -> tuple[str, ...]:
    for flag in flags:
        if flag_name(flag) in _OUR_FLAGS:
            raise ConfigError(
                f"--live.flags: {flag_name(flag)} is not allowed here; fuel_ray sets port and block size "
                "itself"
            )
    renamed = {"--disable-prefix-caching": "--no-enable-prefix-caching"}
    return tuple(renamed.get(flag, flag) for flag in flags)


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise NodeError(f"port {port} cannot be used: {error.strerror or error}") from error


@dataclass(frozen=True, slots=True)
class ServedModel:
    """An entry of /v1/models."""

    name: str  # by which requests ask for it
    root: str  # what it was started from
    is_adapter: bool
    max_model_len: int | None = None  # tokens of a prompt and its output; None: it does not say

    def fits(self, model: str) -> bool:
        """Whether it is known as that, folders and owners aside."""
        return plain_name(model) in (plain_name(self.name), plain_name(self.root))


def served_models(server: str | Endpoint) -> list[ServedModel]:
    """All that a server serves, adapters too; NodeError without an answer or a model."""
    endpoint = Endpoint.of(server)

    def read(answer: Any) -> list[ServedModel]:
        return [
            ServedModel(
                str(entry["id"]),
                str(entry.get("root") or entry["id"]),
                bool(entry.get("parent")),
                int(entry["max_model_len"]) if entry.get("max_model_len") else None,
            )
            for entry in answer["data"]
        ]

    found: list[ServedModel] = _answer(endpoint, "/v1/models", read)
    if not found:
        raise NodeError(f"{endpoint.url}/v1/models lists no model")
    return found


def served_model(server: str | Endpoint, *, name: str | None = None, like: str | None = None) -> ServedModel:
    """The model of a server: the one of that ``name`` if it is given, else the one that fits ``like``.

    ``like`` is a name or what a server was started from; without a match it is the server's only model, of
    which adapters and its second names are no others.

    Raises:
        NodeError: no answer, ``name`` is not there, or there are several models and none fits.
    """
    endpoint = Endpoint.of(server)
    found = served_models(endpoint)
    names = ", ".join(model.name for model in found)
    models = [model for model in found if not model.is_adapter] or found
    if name is not None:
        models = [model for model in found if model.name == name]
        if not models:
            raise NodeError(
                f"{endpoint.setting('served-model')} {name}: not on {endpoint.url}, which serves {names}"
            )
    elif like and (fitting := [model for model in models if model.fits(like)]):
        models = [model for model in fitting if like in (model.name, model.root)] or fitting
    elif len({model.root for model in models}) > 1:
        raise NodeError(
            f"{endpoint.url} serves several models ({names}): choose one with "
            f"{endpoint.setting('served-model')}"
        )
    return models[0]


def plain_name(model: str) -> str:
    """A model's name without the folder or owner that it is served from."""
    return model.rstrip("/").rpartition("/")[2].casefold()


def server_version(server: str | Endpoint) -> str | None:
    """The version of vLLM there; None where a gateway has no such page, NodeError without an answer."""
    try:
        return str(_answer(Endpoint.of(server), "/version", lambda answer: answer["version"]))
    except PageError as error:
        logger.warning("the version of vLLM is unknown: %s", error)
        return None


def _endpoint(port: int, certificate: str | None) -> Endpoint:
    if certificate is None:
        return Endpoint.of(f"http://127.0.0.1:{port}")
    return Endpoint.of(f"https://127.0.0.1:{port}").showing(Path(certificate))


def _answer(endpoint: Endpoint, path: str, part: Callable[[Any], Any]) -> Any:
    """A part of the JSON that the server answers."""
    body = ask(endpoint, path, timeout_s=10.0)
    try:
        return part(json.loads(body))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise NodeError(f"{endpoint.url}{path} does not answer like a vLLM server: {error!r}") from error


def _is_healthy(endpoint: Endpoint) -> bool:
    try:
        ask(endpoint, "/health", timeout_s=2.0)
    except NodeError:  # refused, reset, timed out, 503; not HTTP
        return False
    return True
