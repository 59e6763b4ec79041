"""Nodes on a Ray cluster: an actor owns each, next to its GPUs; the calls of a RemoteNode go to it."""

import logging
import math
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.metrics import Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fuel_ray.errors import ConfigError, FuelRayError, NodeError
from fuel_ray.types import Knobs, Node, NodeSpec, RequestRecords, WindowMetrics

NODE_RESOURCE = "fuel_node"  # one per machine, or per group of GPUs, that may serve as a node
GAUGE_INTERVAL_S = 1.0
CALL_S = 30.0  # a live node reads its server and its GPUs in one call
CLOSE_S = 45.0  # a vLLM server is given 20 s to end, and its clocks are given back

NodeBuilder = Callable[[tuple[str, ...]], Node]  # from the ids of the GPUs that Ray gave to the actor
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


def connect(*, cluster: bool) -> None:
    """Join the cluster that RAY_ADDRESS names or that runs on this machine; without one, start a local Ray.

    Without ``cluster`` only RAY_ADDRESS is looked at.

    Raises:
        ConfigError: RAY_ADDRESS names no cluster that answers.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    if address == "auto" or (cluster and not address):
        address = _running_here()
    if not address:
        resources = {NODE_RESOURCE: float(os.cpu_count() or 1)} if cluster else {}
        ray.init(
            "local", include_dashboard=False, object_store_memory=200 * 2**20, resources=resources, **quiet
        )
        return
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        socket.create_connection((host, int(port)), timeout=5).close()  # ray.init would try for a minute
        ray.init(address, **quiet)
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise ConfigError(
            f"no Ray cluster lets this process in at {address}: {_first_line(error)}. Is it up (ray up "
            "cluster.yaml), is RAY_ADDRESS right, and RAY_AUTH_MODE=token set if it asks for a token?"
        ) from error


def _running_here() -> str | None:
    """Address of the cluster that `ray start` started on this machine."""
    try:
        path = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
        return path.read_text().strip() or None
    except OSError:
        return None


def driver_resource() -> dict[str, float]:
    """What binds a task or a trial to this machine, whose disk has the run's files."""
    return {f"node:{ray.util.get_node_ip_address()}": 0.001}


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
                f"the run needs {lack}, the cluster has {there}. Start more (`ray status` lists them), "
                f"start Ray there with --resources='{{\"{NODE_RESOURCE}\": 1}}', or lower --nodes-per-trial "
                "or the number of --live.gpu-ids"
            )
        if not said:
            logger.warning("waiting up to %g s for %s; the cluster has %d", wait_s, lack, there)
            said = True
        time.sleep(min(1.0, max(0.0, deadline_s - time.monotonic())))


def on_node(function: Callable[[tuple[str, ...]], Result], *, gpus: int, timeout_s: float) -> Result:
    """Call a function with the ids of its GPUs on a free node's machine, as if it were that node.

    Raises:
        NodeError: no answer within ``timeout_s``, or the machine was lost.
        FuelRayError: what the function raised.
    """
    connect(cluster=True)
    task = ray.remote(_with_gpus).options(num_cpus=0, num_gpus=gpus, resources={NODE_RESOURCE: 1})
    reference = task.remote(function)
    try:
        answer: Result = _answer(reference, "a node", timeout_s)
    except NodeError:
        ray.cancel(reference, force=True)
        raise
    return answer


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
            answer = _answer(task, "the host", max(0.1, deadline_s - time.monotonic()))
            skew_s = _skew_s(host)
        except NodeError as error:
            answer, skew_s = error, None
        answers.append(HostAnswer(name, dict(host["Resources"]), answer, skew_s))
    return answers


def _skew_s(host: dict[str, Any]) -> float:
    asked_s = time.time()
    host_s: float = _answer(_ask(host, time.time), "the host's clock", CALL_S)
    return host_s - (asked_s + time.time()) / 2


def _ask(host: dict[str, Any], function: Callable[..., Any], *args: Any) -> Any:
    there = NodeAffinitySchedulingStrategy(host["NodeID"], soft=False)
    return ray.remote(_called).options(num_cpus=0, scheduling_strategy=there).remote(function, *args)


def _called(function: Callable[..., Result], *args: Any) -> Result:
    return function(*args)


def _with_gpus(function: Callable[[tuple[str, ...]], Result]) -> Result:
    return function(tuple(str(gpu_id) for gpu_id in ray.get_gpu_ids()))


class NodeActor:
    """Owns one node on the machine that Ray put it on; a restarted one has none until it is opened."""

    def __init__(self, build: NodeBuilder) -> None:
        self._build = build
        self._node: Node | None = None
        self._gauges: NodeGauges | None = None

    @ray.method(max_task_retries=-1)
    def open(self) -> NodeSpec:
        """Build the node unless there is one; Ray repeats the call if the actor is restarted meanwhile."""
        if self._node is None:
            self._node = _with_gpus(self._build)
            self._gauges = NodeGauges(self._node.spec)
        return self._node.spec

    def reset(self, seed: int) -> None:
        """As Node's."""
        self._opened().reset(seed=seed)

    def apply(self, knobs: Knobs) -> Knobs:
        """As Node's."""
        return self._opened().apply(knobs)

    def measure(self, duration_s: float) -> WindowMetrics:
        """As Node's; shows the window in the node's gauges."""
        window = self._opened().measure(duration_s)
        if self._gauges is not None:
            self._gauges.show(window)
        return window

    def take_records(self) -> RequestRecords:
        """As Node's."""
        return self._opened().take_records()

    def close(self) -> None:
        """As Node's."""
        if self._node is not None:
            self._node.close()

    def _opened(self) -> Node:
        if self._node is None:
            raise NodeError(f"the node on {socket.gethostname()} was restarted; reset it first")
        return self._node


class NodeGauges:
    """A node's last window as Ray metrics, which Prometheus and the dashboard read."""

    def __init__(self, spec: NodeSpec) -> None:
        tags = {
            "host": socket.gethostname(),
            "gpu": spec.gpu_uuids[0],
            "kv_block_size": str(spec.kv_block_size),
        }
        self._gauges = {
            name: Gauge(f"fuel_ray_{name}", description=what, tag_keys=tuple(tags))
            for name, what in _GAUGES.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags(tags)
        self._shown_s = -math.inf

    def show(self, window: WindowMetrics) -> None:
        """Set them, at most once in GAUGE_INTERVAL_S: a simulated node has windows every millisecond."""
        now_s = time.monotonic()
        if now_s - self._shown_s < GAUGE_INTERVAL_S:
            return
        self._shown_s = now_s
        values = {
            "power_w": window.energy_j / window.duration_s,
            "gpu_clock_mhz": window.knobs.gpu_clock_mhz,
            "batch_limit": window.knobs.batch_limit,
            "running": window.running,
            "waiting": window.waiting,
            "kv_usage": window.kv_usage,
        }
        for name, value in values.items():
            self._gauges[name].set(value)


_GAUGES = {
    "power_w": "Mean power of the node's GPUs over the last control window in W",
    "gpu_clock_mhz": "SM clock in force in MHz",
    "batch_limit": "Requests that may run at once",
    "running": "Requests that run",
    "waiting": "Requests that wait",
    "kv_usage": "Share of the KV blocks in use, 0..1",
}


class RemoteNode:
    """A node that an actor owns. Every call has a deadline; a node that misses one is restarted.

    The actor belongs to the process that makes this object and ends with it. Ray restarts it, on another
    machine if need be; after that, or after any NodeError, ``reset`` makes the node usable again.
    """

    def __init__(self, build: NodeBuilder, *, gpus: int = 0, start_s: float = 120.0) -> None:
        """Start an actor and the node in it.

        Args:
            build: makes the node, in the actor.
            gpus: that the node needs; 0 if it is simulated.
            start_s: how long a free machine and then the node may take.

        Raises:
            NodeError: it did not start in time.
            FuelRayError: what ``build`` raised.
        """
        self._build, self._gpus, self._start_s = build, gpus, start_s
        self._opened = self._closed = False
        self._actor: Any = None
        try:
            self._spec = self._open()
        except BaseException:
            self.close()
            raise

    @property
    def spec(self) -> NodeSpec:
        """The node as it was last started."""
        return self._spec

    def reset(self, *, seed: int) -> None:
        """Start afresh, the actor too if it was lost."""
        self._spec = self._open()
        self._call("reset", seed, timeout_s=CALL_S)

    def apply(self, knobs: Knobs) -> Knobs:
        """Set the knobs and return what is in force."""
        applied: Knobs = self._call("apply", knobs, timeout_s=CALL_S)
        return applied

    def measure(self, duration_s: float) -> WindowMetrics:
        """Let ``duration_s`` seconds pass on the node and return what was measured in them."""
        window: WindowMetrics = self._call("measure", duration_s, timeout_s=duration_s + CALL_S)
        return window

    def take_records(self) -> RequestRecords:
        """Records of what has finished or was given up since the last call."""
        records: RequestRecords = self._call("take_records", timeout_s=CALL_S)
        return records

    def close(self) -> None:
        """End the node and its actor; safe to call twice."""
        self._closed = True
        actor, self._actor = self._actor, None
        if actor is None or not ray.is_initialized():
            return
        if self._opened:
            try:
                _answer(actor.close.remote(), "the node", CLOSE_S)
            except FuelRayError as error:
                logger.warning("a node did not close by itself: %s", error)
        ray.kill(actor)

    def _open(self) -> NodeSpec:
        if self._closed:
            raise NodeError("the node was closed")
        if self._actor is None:
            actor = ray.remote(NodeActor).options(
                num_cpus=0, num_gpus=self._gpus, resources={NODE_RESOURCE: 1}, max_restarts=-1
            )
            self._actor = actor.remote(self._build)
        self._opened = False
        spec: NodeSpec = self._call("open", timeout_s=self._start_s)
        self._opened = True
        return spec

    def _call(self, method: str, *args: Any, timeout_s: float) -> Any:
        if self._actor is None:
            raise NodeError("the node was closed" if self._closed else "the node was lost; reset it first")
        try:
            return _answer(getattr(self._actor, method).remote(*args), f"the node's {method}", timeout_s)
        except NodeError as error:
            if isinstance(error.__cause__, ActorDiedError):
                self._actor = None  # for good: Ray does not restart it
            elif isinstance(error.__cause__, GetTimeoutError):
                ray.kill(self._actor, no_restart=False)
            raise


def _answer(reference: Any, what: str, timeout_s: float) -> Any:
    """The result of a remote call, or our own error.

    Raises:
        NodeError: it was lost or late.
        FuelRayError: it raised that.
    """
    try:
        return ray.get(reference, timeout=timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, FuelRayError):
            raise error.cause from None
        raise NodeError(f"{what} failed: {error.cause!r}") from error
    except GetTimeoutError as error:
        raise NodeError(f"{what} gave no answer within {timeout_s:g} s") from error
    except RayActorError as error:
        raise NodeError(f"{what} was lost: {_first_line(error)}") from error
    except RayError as error:
        raise NodeError(f"{what} failed: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
