"""A training environment whose node fails, and environments whose windows pass at the same time."""

import threading
from dataclasses import replace

import gymnasium
import numpy as np
import pytest

from fuel_ray.build.codec import build_codec
from fuel_ray.build.objective import build_objective
from fuel_ray.config import SweepConfig
from fuel_ray.control import ControlLoop
from fuel_ray.env import NODE_FAILURE, UNACKNOWLEDGED, ParallelServingEnv, ServingEnv, unlearnable
from fuel_ray.errors import NodeError, UnsupportedError
from fuel_ray.training.envs import build_env
from fuel_ray.training.rollout import Exploration, Sampler
from tests.simulated import simulated

CONFIG = SweepConfig()


class Failing:
    """A simulated node that fails when it is told to."""

    def __init__(self):
        self._node = simulated()
        self.errors = []  # of the next calls; None: no error

    def __getattr__(self, name):
        return getattr(self._node, name)

    def _maybe_fail(self):
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error

    def reset(self, *, seed):
        self._maybe_fail()
        self._node.reset(seed=seed)

    def measure(self, duration_s):
        self._maybe_fail()
        return self._node.measure(duration_s)


class Unheeded(Failing):
    """A node that at times has another limit in force than was asked for."""

    def __init__(self):
        super().__init__()
        self.heeds = True

    def measure(self, duration_s):
        window = super().measure(duration_s)
        if self.heeds:
            return window
        own = replace(window.knobs, batch_limit=self.spec.batch_limits[-1])
        return replace(window, knobs=own, limit_acknowledged=False)


def env_on(node, *, failures=3):
    loop = ControlLoop(node, build_objective(CONFIG))
    return ServingEnv([loop], build_codec(CONFIG, node.spec), steps=20, failures=failures)


def test_a_window_that_cannot_be_measured_ends_the_episode_and_the_next_one_begins():
    node = Failing()
    env = env_on(node)
    env.reset(seed=1)
    seen, *_ = env.step(np.int64(3))
    node.errors = [NodeError("host lost"), NodeError("not back yet"), None]
    observation, reward, terminated, truncated, info = env.step(np.int64(3))
    assert (reward, terminated, truncated, info) == (0.0, False, True, {NODE_FAILURE: "host lost"})
    np.testing.assert_array_equal(observation, seen)
    env.reset()
    assert not env.step(np.int64(3))[3] and node.errors == []


def test_a_window_whose_slo_cannot_be_judged_is_for_no_one_to_learn_from():
    node = Failing()
    env = env_on(node)
    env.reset(seed=1)
    measure = node.measure
    node.measure = lambda duration_s: replace(measure(duration_s), histograms={}, tpots_s=(), ttfts_s=())
    _, reward, _, truncated, info = env.step(np.int64(3))
    assert (reward, truncated) == (0.0, True) and "has no reward" in info[NODE_FAILURE]


def test_a_window_whose_limit_was_not_in_force_is_not_learned_from_and_ends_the_episode():
    node = Unheeded()
    env = env_on(node, failures=1)
    env.reset(seed=1)
    seen, *_ = env.step(np.int64(3))
    node.heeds = False
    limit, capacity = env.codec.grid.decode(3).batch_limit, node.spec.batch_limits[-1]
    for _ in range(5):  # it is no failure of the node
        observation, reward, terminated, truncated, info = env.step(np.int64(3))
        assert (reward, terminated, truncated) == (0.0, False, True)
        assert info == {UNACKNOWLEDGED: f"batch limit {limit} was asked for, {capacity} in force"}
        assert unlearnable(info)
        np.testing.assert_array_equal(observation, seen)
        seen, _ = env.reset()
    node.heeds = True
    assert not unlearnable(env.step(np.int64(3))[4])


def test_the_sampler_keeps_no_step_that_is_not_to_be_learned_from():
    node = Unheeded()
    env = env_on(node)
    exploration = Exploration(1, len(env.codec.grid), hold_steps=3, rng=np.random.default_rng(1))
    sampler = Sampler([env], exploration, seed=1)

    def sample(steps):
        found = sampler.sample(lambda seen, _: np.zeros(len(seen), np.int64), steps=steps, epsilon=0.5)
        assert all(len(f.observations) == len(f.actions) + 1 == len(f.infos) + 1 for f in found)
        return sum(len(fragment.actions) for fragment in found)

    assert sample(5) == 5
    node.heeds = False
    assert sample(5) == 0


def test_failures_in_a_row_are_given_up_with_the_reason():
    node = Failing()
    env = env_on(node)
    env.reset(seed=1)
    node.errors = [NodeError("lost"), NodeError("still lost"), NodeError("gone")]
    env.step(np.int64(3))
    with pytest.raises(NodeError, match="the node failed 3 times in a row, at last with: gone"):
        env.reset()


def test_a_node_that_starts_but_never_serves_is_given_up_too():
    node = Failing()
    env = env_on(node)
    with pytest.raises(NodeError, match="the node failed 3 times"):
        for _ in range(9):
            env.reset(seed=1)
            node.errors = [NodeError("each first window")]
            env.step(np.int64(3))


def test_a_window_between_failures_starts_the_count_again():
    node = Failing()
    env = env_on(node)
    for _ in range(5):
        env.reset(seed=1)
        env.step(np.int64(3))
        node.errors = [NodeError("now and then")]
        assert env.step(np.int64(3))[3]


@pytest.mark.parametrize(
    ("error", "failures"), [(UnsupportedError("block size 8"), 3), (NodeError("lost"), 1)]
)
def test_what_repetition_cannot_help_is_raised_at_once(error, failures):
    node = Failing()
    env = env_on(node, failures=failures)
    node.errors = [error]
    with pytest.raises(type(error), match=str(error)):
        env.reset(seed=1)


def trajectory(env, steps=45):
    observation, _ = env.reset(seed=5)
    seen = [observation]
    for step in range(steps):
        observation, reward, _, truncated, _ = env.step(np.array([step % 7, step % 5]))
        seen += [observation, reward, truncated]
    return seen


def test_parallel_environments_do_what_they_do_one_after_the_other():
    def make():
        return build_env(SweepConfig(train=CONFIG.train), [16])

    parallel = trajectory(ParallelServingEnv([make, make]))
    for ours, own in zip(parallel, trajectory(gymnasium.vector.SyncVectorEnv([make, make])), strict=True):
        np.testing.assert_array_equal(ours, own)


class Meeting(Failing):
    """A node whose windows end only when another's have begun."""

    together = threading.Barrier(2, timeout=10)

    def measure(self, duration_s):
        self.together.wait()
        return super().measure(duration_s)


def test_windows_of_parallel_environments_pass_at_the_same_time():
    env = ParallelServingEnv([lambda: env_on(Meeting())] * 2)
    trajectory(env, steps=25)  # an episode ends and another begins in it
    env.close()


def test_if_one_environment_cannot_be_made_the_others_are_closed():
    made = []

    def make():
        if made:
            raise NodeError("no second node")
        made.append(Failing())
        return env_on(made[0])

    lock = threading.Lock()

    def one_by_one():
        with lock:
            return make()

    with pytest.raises(NodeError, match="no second node"):
        ParallelServingEnv([one_by_one] * 2)
    with pytest.raises(NodeError, match="not reset"):
        made[0].measure(1.0)
