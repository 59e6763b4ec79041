"""A node that is watched and never set."""

from fuel_ray.types import Knobs, Node, NodeSpec, RequestRecords, WindowMetrics


class ShadowNode:
    """Shows a policy a node as if it could be set, and leaves it as it is."""

    def __init__(self, node: Node, spec: NodeSpec) -> None:
        """Watch ``node``, which may not set anything itself; ``spec`` is what could be set."""
        self._node, self._spec = node, spec

    @property
    def spec(self) -> NodeSpec:
        return self._spec

    def reset(self, *, seed: int) -> None:
        self._node.reset(seed=seed)

    def apply(self, knobs: Knobs) -> Knobs:
        return self._node.apply(self._node.spec.max_performance)

    def measure(self, duration_s: float) -> WindowMetrics:
        return self._node.measure(duration_s)

    def take_records(self) -> RequestRecords:
        return self._node.take_records()

    def close(self) -> None:
        self._node.close()
