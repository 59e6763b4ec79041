"""The hosts of a Ray cluster: joining them, counting nodes, calling functions there, with deadlines."""

import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fuel_ray.cluster.local import start_local, temp_folder
from fuel_ray.disk import NO_ROOM
from fuel_ray.disk import reason as disk_reason
from fuel_ray.errors import ConfigError, DiskError, FuelRayError, NodeError

NODE_RESOURCE = "fuel_node"  # one per machine, or per group of GPUs, that may serve as a node
CLOCK_S = 30.0

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


def connect(*, cluster: bool) -> None:
    """Join the cluster that RAY_ADDRESS names or that runs on this machine; without one, start a local Ray.

    Without ``cluster`` only RAY_ADDRESS is looked at.

    Raises:
        ConfigError: RAY_ADDRESS names no cluster that answers, or Ray cannot start here.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # the first of several servers' errors is told
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    with _own_sigterm():
        if address := _address(cluster=cluster):
            _join(address, **quiet)
        else:
            start_local({NODE_RESOURCE: float(os.cpu_count() or 1)} if cluster else {}, **quiet)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray answers SIGTERM with a stack and an exit code of its own; what there was before is set again."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def left(*, within_s: float) -> bool:
    """Whether Ray could be left in this time; it looks a minute for processes of its own that are gone."""
    ending = threading.Thread(target=ray.shutdown, daemon=True)
    ending.start()
    ending.join(within_s)
    return not ending.is_alive()


def _address(*, cluster: bool) -> str | None:
    """Where the cluster is that is to be joined; None for a local Ray."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    if address == "local":
        return None
    if address == "auto" and _running_here() is None:
        raise ConfigError(
            "RAY_ADDRESS=auto, but no Ray cluster runs on this machine: start one with `ray start --head`, "
            "or unset RAY_ADDRESS to use a local Ray"
        )
    if address == "auto" or (cluster and not address):
        return _running_here()
    return address or None


def _running_here() -> str | None:
    """Address of the cluster that `ray start` started on this machine."""
    try:
        return (temp_folder() / "ray" / "ray_current_cluster").read_text().strip() or None
    except OSError:
        return None


def _join(address: str, **quiet: Any) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"RAY_ADDRESS={address}: not HOST:PORT; correct it, or unset it to use a local Ray")
    try:
        socket.create_connection(
            (host.strip("[]"), int(port)), timeout=5
        ).close()  # ray.init tries for a minute
        ray.init(address, **quiet)
    except (OSError, ValueError, OverflowError, RuntimeError, RayError) as error:
        raise ConfigError(
            f"cannot connect to a Ray cluster at {address}: {_reason(error)}. Check that it is up (`ray up "
            "cluster.yaml`), that RAY_ADDRESS is right, and that RAY_AUTH_MODE=token is set if it needs a "
            "token"
        ) from error


def _reason(error: BaseException) -> str:
    """What keeps a process out; another version of Ray is told in several lines."""
    said = " ".join(str(error).split())
    return said if said.startswith("Version mismatch") else first_line(error)


def driver_resource() -> dict[str, float]:
    """What binds a task or a trial to this machine, whose disk has the run's files.

    The head is named as such: a run may be resumed when it has another address.

    Raises:
        ConfigError: Ray has no core on this machine to run them.
    """
    own_id = ray.get_runtime_context().get_node_id()
    own = next(host["Resources"] for host in ray.nodes() if host["NodeID"] == own_id)
    if own.get("CPU", 0) < 1:
        raise ConfigError("Ray has no CPU for trials on this machine: start it with --num-cpus=2")
    head = "node:__internal_head__"
    return {head if head in own else f"node:{ray.util.get_node_ip_address()}": 0.001}


def num_nodes(gpus: int = 0) -> int:
    """How many nodes with ``gpus`` GPUs each the cluster has at this moment, busy ones included."""
    machines = [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]
    return int(
        sum(min(m.get(NODE_RESOURCE, 0), m.get("GPU", 0) // gpus if gpus else math.inf) for m in machines)
    )


def require_nodes(count: int, *, gpus: int, wait_s: float) -> None:
    """Return once the cluster has ``count`` nodes with ``gpus`` GPUs each, busy or not.

    Raises:
        ConfigError: it has not within ``wait_s``.
    """
    connect(cluster=True)
    deadline_s = time.monotonic() + wait_s
    said = False
    while (there := num_nodes(gpus)) < count:
        lack = f"{count} node(s) with the resource {NODE_RESOURCE}" + (f" and {gpus} GPU(s)" if gpus else "")
        if time.monotonic() >= deadline_s:
            raise ConfigError(
                f"the run needs {lack}, and the cluster has {there}. Start more hosts, each with `ray start "
                f"--resources='{{\"{NODE_RESOURCE}\": 1}}'` (`ray status` lists them), or lower "
                "--nodes-per-trial or the number of --live.gpu-ids"
            )
        if not said:
            logger.warning("waiting up to %g s for %s; the cluster has %d", wait_s, lack, there)
            said = True
        time.sleep(min(1.0, max(0.0, deadline_s - time.monotonic())))


@dataclass(frozen=True, slots=True)
class HostAnswer(Generic[Result]):
    """What a host of the cluster said."""

    host: str
    resources: dict[str, float]
    answer: Result | NodeError
    skew_s: float | None  # its clock less this machine's; None if it gave no answer


def on_hosts(function: Callable[..., Result], *args: Any, timeout_s: float) -> list[HostAnswer[Result]]:
    """Call a function on every host of the cluster, with nodes or without; it needs no free resources."""
    answers: list[HostAnswer[Result]] = []
    hosts = [host for host in ray.nodes() if host["Alive"]]
    tasks = [_ask(host, function, *args) for host in hosts]
    deadline_s = time.monotonic() + timeout_s
    for host, task in zip(hosts, tasks, strict=True):
        name = f"{host['NodeManagerHostname']} ({host['NodeManagerAddress']})"
        try:
            answer = answer_of(task, "the host", max(0.1, deadline_s - time.monotonic()))
            skew_s = _skew_s(host)
        except (NodeError, DiskError) as error:
            answer, skew_s = NodeError(str(error)), None
        answers.append(HostAnswer(name, dict(host["Resources"]), answer, skew_s))
    return answers


def _skew_s(host: dict[str, Any]) -> float:
    asked_s = time.time()
    host_s: float = answer_of(_ask(host, time.time), "the host's clock", CLOCK_S)
    return host_s - (asked_s + time.time()) / 2


def _ask(host: dict[str, Any], function: Callable[..., Any], *args: Any) -> Any:
    there = NodeAffinitySchedulingStrategy(host["NodeID"], soft=False)
    return ray.remote(_called).options(num_cpus=0, scheduling_strategy=there).remote(function, *args)


def _called(function: Callable[..., Result], *args: Any) -> Result:
    return function(*args)


def answer_of(reference: Any, what: str, timeout_s: float) -> Any:
    """The result of a remote call, or our own error.

    Raises:
        NodeError: it was lost or late.
        FuelRayError: it raised that, or a disk took no more there.
    """
    try:
        return ray.get(reference, timeout=timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, FuelRayError):
            raise error.cause from None
        if isinstance(error.cause, OSError) and error.cause.errno in NO_ROOM:
            raise DiskError(f"{what} failed: {disk_reason(error.cause)}") from error
        raise NodeError(f"{what} failed: {error.cause!r}") from error
    except GetTimeoutError as error:
        raise NodeError(f"{what} did not answer within {timeout_s:g} s") from error
    except RayActorError as error:
        raise NodeError(f"{what} was lost: {first_line(error)}") from error
    except RayError as error:
        raise NodeError(f"{what} failed: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error says, without the traceback that Ray adds."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
