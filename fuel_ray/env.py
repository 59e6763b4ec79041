"""A control loop as a Gymnasium environment."""

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import gymnasium
import numpy as np

from fuel_ray.codec import Codec, Encoder
from fuel_ray.control import ControlLoop
from fuel_ray.errors import NodeError, TelemetryError, UnsupportedError
from fuel_ray.metrics import window_attainment
from fuel_ray.policies.anchor import GridAnchor
from fuel_ray.types import Knobs, WindowMetrics

NODE_FAILURE = "node_failure"  # in the info of a step whose window could not be measured
UNACKNOWLEDGED = "limit_unacknowledged"  # of one whose limit was not in force: nothing is to be learned of it

logger = logging.getLogger(__name__)


class ServingEnv(gymnasium.Env[np.ndarray, np.int64]):
    """Observe a serving node, choose (batch limit, GPU clock) for the next window.

    Observations are the codec's features, actions the indices of its grid. Serving never terminates; an
    episode is truncated after ``steps`` windows. Given several loops (servers of several block sizes), each
    episode takes one.

    A window that cannot be measured, or in which the scheduler did not acknowledge the batch limit, ends the
    episode: that step has reward 0, the observation before it and the reason in ``info``, and is for no one
    to learn from (``unlearnable``). After ``failures`` windows in a row that could not be measured, failed
    resets included, NodeError is raised.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  (Gymnasium's own name and type)

    def __init__(
        self,
        loops: Sequence[ControlLoop],
        codec: Codec,
        *,
        steps: int,
        failures: int = 1,
        codecs: Sequence[Codec] = (),
        anchor: GridAnchor | None = None,
        shadows: Sequence[ControlLoop | None] = (),
        whole_windows: bool = False,
    ) -> None:
        """``codecs``, one per loop, may differ from ``codec`` in SLO and price; not in features or grid.

        With ``whole_windows`` each ``info`` has the window and its latencies, for rewards from outside.

        ``anchor`` is what the policy will be held by: ``base`` and ``penalty`` say what it says.

        On ``shadows``, one per loop, its load table serves the same arrivals, and rewards are less what it
        earns. That depends on arrivals alone, so no optimum is moved; it takes out of the rewards what
        arrivals put into them (input-dependent baselines: Mao et al., ICLR 2019).
        """
        self.codec = codec
        of_all = zip(loops, codecs or [codec] * len(loops), shadows or [None] * len(loops), strict=True)
        self._loops = [(loop, own, Encoder(own, loop.node.spec), shadow) for loop, own, shadow in of_all]
        self._loop, self._own, self._encoder, self._shadow = self._loops[0]
        self._steps, self._whole_windows = steps, whole_windows
        self._anchored = anchor
        self._table = loops[0].node.spec.max_performance  # what the load table would set next
        self.base: int | None = None  # the action that the load table would take next
        self.penalty: np.ndarray | float = 0.0  # what Q loses for leaving it: (actions,)
        self.penalties = None if anchor is None else anchor.penalties()  # by ``base``: (actions, actions)
        self._step = 0
        self._failures, self._failed = failures, 0
        self._seen = np.zeros(len(codec.low), np.float32)
        self.observation_space = gymnasium.spaces.Box(codec.low, codec.high, dtype=np.float32)
        self.action_space = gymnasium.spaces.Discrete(len(codec.grid))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode on a node drawn by chance, with requests drawn by chance."""
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(len(self._loops)))
        self._loop, self._own, self._encoder, self._shadow = self._loops[drawn]
        self._encoder.reset()
        self._step = 0
        if self._anchored is not None:
            self._anchored.reset()
        window = self._first_window()
        self._look(window)
        return self._seen, self._whole(window)

    def _look(self, window: WindowMetrics) -> None:
        self._seen = self._encoder.encode(window)
        if self._anchored is not None:
            self._table = self._anchored.decide(window)
            self.base, self.penalty = self._anchored.action(self._table), self._anchored.penalty(self._table)

    def _first_window(self) -> WindowMetrics:
        while True:
            seed = int(self.np_random.integers(2**31))
            try:
                if self._shadow is not None:
                    self._shadow.reset(seed=seed)
                return self._loop.reset(seed=seed)
            except NodeError as error:
                self._count(error)

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Apply an action for one window; ``info`` has what a trainer wants to log."""
        try:
            record = self._loop.step(self._decode(int(action)))
            if record.reward is None:
                raise TelemetryError("the window has no reward: a latency that the SLO limits is unknown")
        except NodeError as error:
            self._count(error)
            return self._seen, 0.0, False, True, {NODE_FAILURE: str(error)}
        self._failed = 0
        if record.metrics.limit_acknowledged is False:
            asked, applied = record.verdict.knobs.batch_limit, record.applied.batch_limit
            why = f"batch limit {asked} was asked for, {applied} in force"
            return self._seen, 0.0, False, True, {UNACKNOWLEDGED: why}
        self._step += 1
        window, reward = record.metrics, record.reward
        if self._shadow is not None:
            reward -= self._shadow.step(self._table).reward or 0.0
        info = {
            "energy_j": window.energy_j,
            "arrivals": window.arrivals,
            "slo_attainment": window_attainment(window, self._own.slo),
            "gpu_clock_mhz": record.applied.gpu_clock_mhz,
            **self._whole(window),
        }
        self._look(window)
        return self._seen, reward, False, self._step >= self._steps, info

    def _whole(self, window: WindowMetrics) -> dict[str, Any]:
        return {"window": window, "latencies_s": window.latencies_s} if self._whole_windows else {}

    def _decode(self, action: int) -> Knobs:
        """As the policy will, whose table may have knobs that the grid has not."""
        if self._anchored is None:
            return self.codec.grid.decode(action)
        return self._anchored.decode(action, self._table)

    def _count(self, error: NodeError) -> None:
        """Go on after a failure of the node unless it was one too many."""
        self._failed += 1
        logger.warning("failure %d of %d in a row: %s", self._failed, self._failures, error)
        if isinstance(error, UnsupportedError) or self._failures <= 1:
            raise error
        if self._failed >= self._failures:
            raise NodeError(
                f"the node failed {self._failed} times in a row, at last with: {error}"
            ) from error

    def close(self) -> None:
        """Release the nodes."""
        for loop, _, _, shadow in self._loops:
            loop.node.close()
            if shadow is not None:
                shadow.node.close()


def unlearnable(info: Mapping[str, Any]) -> bool:
    """Whether the step with this ``info`` says nothing about the action that it was given."""
    return NODE_FAILURE in info or UNACKNOWLEDGED in info


class ParallelServingEnv(gymnasium.vector.SyncVectorEnv):
    """Environments on nodes of their own, whose windows pass at the same time."""

    def __init__(self, make_envs: Sequence[Callable[[], ServingEnv]]) -> None:
        self._threads = ThreadPoolExecutor(len(make_envs))
        making = [self._threads.submit(make_env) for make_env in make_envs]
        ahead = [_Ahead(env) for env in _all_or_none(making)]
        super().__init__([partial(_Ahead.itself, env) for env in ahead])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        for i, env in enumerate(self.envs):
            env.begin(self._threads, env.env.reset, seed=None if seed is None else seed + i)
        return super().reset(seed=seed, options=options)

    def step(self, actions: Any) -> Any:
        for env, action, ended in zip(self.envs, actions, self._autoreset_envs, strict=True):
            if ended:
                env.begin(self._threads, env.env.reset)
            else:
                env.begin(self._threads, env.env.step, action)
        return super().step(actions)


class _Ahead(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Gives the result of the step or reset that was begun before."""

    _result: Future[Any]

    def itself(self) -> gymnasium.Env[Any, Any]:
        return self

    def begin(self, threads: ThreadPoolExecutor, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._result = threads.submit(call, *args, **kwargs)

    def reset(self, **_: Any) -> Any:
        return self._result.result()

    def step(self, action: Any) -> Any:
        return self._result.result()


def _all_or_none(making: Sequence[Future[ServingEnv]]) -> list[ServingEnv]:
    """The environments; if one could not be made, its error, with the others closed."""
    errors = [error for future in making if (error := future.exception()) is not None]
    if errors:
        for future in making:
            if future.exception() is None:
                future.result().close()
        raise errors[0]
    return [future.result() for future in making]


# Gymnasium has no plug-in mechanism since 1.0: it imports the module of "fuel_ray.env:fuel_ray/Serving-v0".
gymnasium.register(id="fuel_ray/Serving-v0", entry_point="fuel_ray.training.envs:serving_env")
