"""An actor owns a node, next to its GPUs; a RemoteNode is a Node whose calls go to it."""

import logging
import socket
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError

from fuel_ray.cluster.gauges import NodeGauges
from fuel_ray.cluster.hosts import NODE_RESOURCE, answer_of, with_gpus
from fuel_ray.errors import FuelRayError, NodeError
from fuel_ray.types import Knobs, Node, NodeSpec, RequestRecords, WindowMetrics

CALL_S = 30.0  # a live node reads its server and its GPUs in one call
CLOSE_S = 45.0  # a vLLM server is given 20 s to end, and its clocks are given back

NodeBuilder = Callable[[tuple[str, ...]], Node]  # from the ids of the GPUs that Ray gave to the actor

logger = logging.getLogger(__name__)


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
            self._node = with_gpus(self._build)
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
        self._call("reset", seed, timeout_s=self._start_s)  # a live node may have to start its server again

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
                answer_of(actor.close.remote(), "the node", CLOSE_S)
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
            return answer_of(getattr(self._actor, method).remote(*args), f"the node's {method}", timeout_s)
        except NodeError as error:
            if isinstance(error.__cause__, ActorDiedError):
                self._actor = None  # for good: Ray does not restart it
            elif isinstance(error.__cause__, GetTimeoutError):
                ray.kill(self._actor, no_restart=False)
            raise
