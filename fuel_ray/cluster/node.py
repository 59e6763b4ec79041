"""An actor owns a server and a node on it, next to its GPUs; a RemoteNode is a Node whose calls go to it."""

import logging
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError

from fuel_ray.cluster.gauges import NodeGauges
from fuel_ray.cluster.hosts import NODE_RESOURCE, answer_of
from fuel_ray.errors import FuelRayError, NodeError, UnsupportedError
from fuel_ray.types import Knobs, Node, NodeSpec, RequestRecords, WindowMetrics

CALL_S = 30.0  # a live node reads its server and its GPUs in one call
SAY_S = 15.0  # between two lines while servers start
CLOSE_S = 45.0  # a vLLM server is given 20 s to end, and its clocks are given back

logger = logging.getLogger(__name__)


class Server(Protocol):
    """What an actor keeps while nodes on it come and go."""

    def facts(self) -> Any:
        """What its nodes will be."""

    def revive(self) -> None:
        """Start what has died."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class NoServer:
    """Nothing to keep: a node is built from the ids of the GPUs that Ray gave to the actor."""

    gpu_ids: tuple[str, ...]

    def facts(self) -> None: ...

    def revive(self) -> None: ...

    def close(self) -> None: ...


Serve = Callable[[tuple[str, ...]], Server]  # from the ids of the GPUs that Ray gave to the actor
NodeBuilder = Callable[[Any], Node]  # from the actor's server


class NodeActor:
    """Owns a server and one node at a time on the machine that Ray put it on; restarted, it has neither.

    Ray repeats ``facts`` and ``open`` if the actor is restarted meanwhile.
    """

    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        self._server: Server | None = None
        self._node: Node | None = None
        self._opened_by = ""
        self._gauges: NodeGauges | None = None

    @ray.method(max_task_retries=-1)
    def facts(self) -> Any:
        """What the server says of itself; starts it unless it runs."""
        return self._running().facts()

    @ray.method(max_task_retries=-1)
    def open(self, caller: str, build: NodeBuilder) -> NodeSpec:
        """Build the caller's node, in place of another's, unless it is there."""
        server = self._running()
        if caller != self._opened_by:
            self.close()
        if self._node is None:
            self._node, self._opened_by = build(server), caller
            self._gauges = NodeGauges(self._node.spec)
        return self._node.spec

    def reset(self, seed: int) -> None:
        self._opened().reset(seed=seed)

    def apply(self, knobs: Knobs) -> Knobs:
        return self._opened().apply(knobs)

    def measure(self, duration_s: float) -> WindowMetrics:
        """As Node's; shows the window in the node's gauges."""
        window = self._opened().measure(duration_s)
        if self._gauges is not None:
            self._gauges.show(window)
        return window

    def take_records(self) -> RequestRecords:
        return self._opened().take_records()

    def close(self) -> None:
        """As Node's; the server stays."""
        node, self._node = self._node, None
        if node is not None:
            node.close()

    def end(self) -> None:
        """Close the node and the server."""
        try:
            self.close()
        finally:
            if self._server is not None:
                self._server.close()

    def _running(self) -> Server:
        if self._server is None:
            self._server = self._serve(tuple(map(str, ray.get_gpu_ids())))
        else:
            self._server.revive()
        return self._server

    def _opened(self) -> Node:
        if self._node is None:
            raise NodeError(f"the node on {socket.gethostname()} was restarted; reset it first")
        return self._node


def node_actor(
    serve: Serve, *, gpus: int, name: str | None = None, resources: dict[str, float] | None = None
) -> Any:
    """An actor that ends with this process; Ray restarts it if it dies, on another machine if need be."""
    options = {"num_cpus": 0, "num_gpus": gpus, "max_restarts": -1, "name": name}
    return ray.remote(NodeActor).options(resources=resources or {NODE_RESOURCE: 1}, **options).remote(serve)


def end_actors(actors: Iterable[Any]) -> None:
    """Let them close what they have, all at once, then kill them; what goes wrong is logged."""
    if not ray.is_initialized():
        return
    deadline_s = time.monotonic() + CLOSE_S
    for actor, end in [(actor, actor.end.remote()) for actor in actors]:
        _closed(end, max(0.1, deadline_s - time.monotonic()))
        ray.kill(actor)


def _closed(answer: Any, timeout_s: float) -> None:
    try:
        answer_of(answer, "the node", timeout_s)
    except FuelRayError as error:
        logger.warning("a node did not close in time: %s", error)


def facts_of(actors: Mapping[tuple[int, int], Any], *, timeout_s: float) -> dict[tuple[int, int], Any]:
    """What the server of each (block size, number) says of itself, with a line now and then till it does.

    An UnsupportedError is an answer too.

    Raises:
        NodeError: one did not start, or not within ``timeout_s``.
    """
    began_s = time.monotonic()
    pending = {actor.facts.remote(): key for key, actor in actors.items()}
    answers: dict[tuple[int, int], Any] = {}
    while pending:
        sizes = ", ".join(dict.fromkeys(str(size) for size, _ in pending.values()))
        waited_s = time.monotonic() - began_s
        if waited_s > timeout_s:
            raise NodeError(f"no server of block size {sizes} started within {timeout_s:g} s")
        print(f"serve  block {sizes}: starting, {waited_s:.0f} s", flush=True)
        for reference in ray.wait(list(pending), timeout=SAY_S)[0]:
            size, number = pending.pop(reference)
            try:
                answers[size, number] = answer_of(reference, f"the server of block size {size}", timeout_s)
            except UnsupportedError as error:
                answers[size, number] = error
                print(f"unsupported  {error}", flush=True)
    print(f"serve  servers are up after {time.monotonic() - began_s:.0f} s", flush=True)
    return answers


class RemoteNode:
    """A node that an actor owns. Every call has a deadline; a node that misses one is restarted.

    After any NodeError ``reset`` makes the node usable again. The actor is this object's own, or one by name
    that outlives it.
    """

    def __init__(
        self,
        build: NodeBuilder,
        *,
        serve: Serve = NoServer,
        gpus: int = 0,  # that the node needs
        start_s: float = 120.0,  # how long a free machine, the server and then the node may take
        name: str | None = None,  # of an actor that this process or its parent has made
    ) -> None:
        """Start the node, and its actor unless there is one of this ``name``.

        Raises:
            NodeError: it did not start in time, or there is no such actor.
            FuelRayError: what ``build`` or ``serve`` raised, in the actor.
        """
        self._build, self._serve, self._gpus, self._start_s = build, serve, gpus, start_s
        self._name, self._id = name, uuid.uuid4().hex
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
        self._call("reset", seed, timeout_s=self._start_s)

    def apply(self, knobs: Knobs) -> Knobs:
        return self._call("apply", knobs, timeout_s=CALL_S)

    def measure(self, duration_s: float) -> WindowMetrics:
        return self._call("measure", duration_s, timeout_s=duration_s + CALL_S)

    def take_records(self) -> RequestRecords:
        return self._call("take_records", timeout_s=CALL_S)

    def close(self) -> None:
        """End the node and, if it is its own, the actor; safe to call twice."""
        self._closed = True
        actor, self._actor = self._actor, None
        if actor is None or not ray.is_initialized():
            return
        if self._name is not None:
            _closed(actor.close.remote(), CLOSE_S)
        elif self._opened:
            end_actors([actor])
        else:
            ray.kill(actor)

    def _open(self) -> NodeSpec:
        if self._closed:
            raise NodeError("the node was closed")
        if self._actor is None:
            self._actor = self._found()
        self._opened = False
        spec: NodeSpec = self._call("open", self._id, self._build, timeout_s=self._start_s)
        self._opened = True
        return spec

    def _found(self) -> Any:
        if self._name is None:
            return node_actor(self._serve, gpus=self._gpus)
        try:
            return ray.get_actor(self._name)
        except ValueError as error:
            raise NodeError(f"the Ray actor {self._name}, which owns the node's server, has died") from error

    def _call(self, method: str, *args: Any, timeout_s: float) -> Any:
        if self._actor is None:
            raise NodeError("the node was closed" if self._closed else "the node was lost; reset it first")
        try:
            return answer_of(getattr(self._actor, method).remote(*args), f"the node's {method}", timeout_s)
        except NodeError as error:
            if isinstance(error.__cause__, ActorDiedError):
                self._actor = None  # for good: Ray does not restart it
            elif isinstance(error.__cause__, GetTimeoutError):
                ray.kill(self._actor, no_restart=False)
            raise
