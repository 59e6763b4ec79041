"""The control loop and the environment around it."""

from dataclasses import replace

import gymnasium
import numpy as np
import pytest

from fuel_ray.build.nodes import build_loop
from fuel_ray.config import PRESETS, GuardConfig
from fuel_ray.control import ControlLoop, run_policy
from fuel_ray.errors import NodeError
from fuel_ray.guard import Guard, Rules
from fuel_ray.objective import Energy
from fuel_ray.training.envs import build_env
from fuel_ray.types import Knobs, Slo
from tests.test_codec import SPEC, WINDOW


class ScriptedNode:
    """Writes down what it is asked; applies a lower clock than chosen."""

    spec = SPEC

    def __init__(self, oldest_wait_s=0.0):
        self.calls, self.oldest_wait_s = [], oldest_wait_s

    def reset(self, *, seed):
        self.calls.append(("reset", seed))

    def apply(self, knobs):
        self.calls.append(("apply", knobs))
        return Knobs(knobs.batch_limit, min(knobs.gpu_clock_mhz, 1800))

    def measure(self, duration_s):
        self.calls.append(("measure", duration_s))
        fields = {name: getattr(WINDOW, name) for name in WINDOW.__slots__}
        return type(WINDOW)(**{**fields, "oldest_wait_s": self.oldest_wait_s})

    def close(self):
        self.calls.append(("close",))


OBJECTIVE = Energy(Slo(1.0), 0.2, 200.0, 400.0)


def test_a_step_applies_then_measures_then_scores():
    node = ScriptedNode()
    loop = ControlLoop(node, OBJECTIVE, interval_s=2.0)
    loop.reset(seed=5)
    record = loop.step(Knobs(8, 1980))
    assert node.calls[0] == ("reset", 5)
    assert node.calls[-2:] == [("apply", Knobs(8, 1980)), ("measure", 2.0)]
    assert record.chosen == Knobs(8, 1980) and record.applied == Knobs(8, 1800)
    assert record.reward == OBJECTIVE.reward(WINDOW)
    assert record.step == 1  # the window of the reset was the first


@pytest.mark.parametrize(("wait_s", "expected"), [(0.4, Knobs(8, 990)), (0.6, SPEC.max_performance)])
def test_the_guard_overrides_when_a_request_waited_too_long(wait_s, expected):
    node = ScriptedNode(oldest_wait_s=wait_s)
    loop = ControlLoop(node, OBJECTIVE, guard=Guard(Rules(max_wait_s=0.5)))
    loop.reset(seed=0)
    record = loop.step(Knobs(8, 990))
    assert node.calls[-2] == ("apply", expected)
    assert record.chosen == Knobs(8, 990)


def test_steps_are_numbered_from_the_reset_on():
    loop = ControlLoop(ScriptedNode(), OBJECTIVE)
    for seed in (0, 1):
        loop.reset(seed=seed)
        assert [loop.step(Knobs(8, 990)).step for _ in range(3)] == [1, 2, 3]


def test_the_guard_forgets_the_last_episode():
    node = ScriptedNode(oldest_wait_s=9.0)
    loop = ControlLoop(node, OBJECTIVE, guard=Guard(Rules(max_wait_s=0.5)))
    loop.reset(seed=0)
    node.oldest_wait_s = 0.0
    loop.reset(seed=1)
    loop.step(Knobs(8, 990))
    assert node.calls[-2] == ("apply", Knobs(8, 990))


def test_a_policy_sees_each_window_and_its_choice_rules_the_next():
    class Counting:
        def __init__(self):
            self.seen = []

        def reset(self):
            self.seen.clear()

        def decide(self, window):
            self.seen.append(window)
            return Knobs(len(self.seen), 990)

    policy = Counting()
    loop = build_loop(PRESETS["default"], 16, horizon_s=30.0)
    records = run_policy(loop, policy, seed=0, steps=5)
    assert [record.chosen.batch_limit for record in records] == [1, 2, 3, 4, 5]
    assert [record.metrics for record in records[:-1]] == policy.seen[1:]
    assert policy.seen[0].knobs == loop.node.spec.max_performance


def test_an_error_of_the_node_is_not_hidden():
    class Dead(ScriptedNode):
        def measure(self, duration_s):
            raise NodeError("gone")

    with pytest.raises(NodeError, match="gone"):
        ControlLoop(Dead(), OBJECTIVE).reset(seed=0)


def test_serving_never_terminates_and_is_truncated_at_the_horizon():
    env = build_env(PRESETS["default"], [16])
    env.reset(seed=0)
    ends = [env.step(env.action_space.sample())[2:4] for _ in range(200)]
    assert not any(terminated for terminated, _ in ends)
    assert [truncated for _, truncated in ends] == [False] * 199 + [True]


def test_the_same_seed_gives_the_same_trajectory():
    def trajectory():
        env = build_env(PRESETS["default"], [8, 64])
        first, _ = env.reset(seed=11)
        return [first] + [env.step(np.int64(7))[0] for _ in range(30)]

    np.testing.assert_array_equal(trajectory(), trajectory())


def test_other_seeds_give_other_requests():
    env = build_env(PRESETS["default"], [16])
    first = [env.reset(seed=seed) and env.step(0)[4]["energy_j"] for seed in range(5)]
    assert len(set(first)) == 5


def test_a_conditional_policy_sees_every_block_size():
    config = replace(PRESETS["default"], conditional=True)
    env = build_env(config, [8, 16, 64])
    seen = {round(float(env.reset(seed=seed)[0][-1]) * 64) for seed in range(30)}
    assert seen == {8, 16, 64}


def test_the_vectorised_form_steps_many_nodes():
    envs = gymnasium.vector.SyncVectorEnv([lambda: build_env(PRESETS["default"], [16])] * 3)
    observations, _ = envs.reset(seed=0)
    assert observations.shape == (3, len(PRESETS["default"].features))
    assert not (observations[0] == observations[1]).all()
    assert envs.step(np.zeros(3, int))[1].shape == (3,)
    envs.close()


def test_the_seed_preset_has_ten_features_and_187_actions():
    env = build_env(PRESETS["seed"], [16])
    assert env.observation_space.shape == (10,) and env.action_space.n == 187


def test_the_loop_drives_a_simulated_node():
    loop = build_loop(PRESETS["default"], 32, horizon_s=30.0)
    loop.reset(seed=0)
    record = loop.step(Knobs(500, 1234))  # neither is supported as it is
    assert record.applied == Knobs(128, 1230) == record.metrics.knobs


def test_training_has_the_guard_of_a_deployment_in_its_plant():
    guard = GuardConfig(floor_mhz=1500, max_wait_s=1e-9, release_s=0.0)
    env = build_env(replace(PRESETS["default"], guard=guard), [16])
    env.reset(seed=0)
    lowest = env.codec.grid.encode(Knobs(128, env.codec.grid.gpu_clocks_mhz[0]))
    clocks = {env.step(np.int64(lowest))[4]["gpu_clock_mhz"] for _ in range(100)}
    assert clocks == {1500, 1980}, "the floor, and the shield while a request waits"
