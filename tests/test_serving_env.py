"""The environment as its users make it: by Gymnasium's name, with settings, with a reward of their own."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from fuel_ray.codec import FEATURES
from fuel_ray.config import PRESETS, LearnConfig, to_dict
from fuel_ray.env import ParallelServingEnv
from fuel_ray.errors import ConfigError
from fuel_ray.training.env_settings import env_settings
from fuel_ray.training.envs import learning_settings, make_env

ENV_ID = "fuel_ray.env:fuel_ray/Serving-v0"  # as a user writes it, with nothing of fuel_ray imported
PAGE = Path(__file__).parent.parent / "docs/environment.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_gymnasium_finds_the_environment_by_its_name():
    code = f"import gymnasium; gymnasium.make({ENV_ID!r}).close()"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("arguments", [{}, {"mode": "specialist", "steps": 30}, {"preset": "seed"}])
def test_gymnasium_accepts_the_environment(arguments):
    check_env(gymnasium.make(ENV_ID, **arguments).unwrapped)


@pytest.mark.parametrize(("preset", "actions"), [("default", 219), ("plain", 45), ("seed", 187)])
def test_gymnasium_makes_it_for_a_block_size_and_preset(preset, actions):
    env = gymnasium.make(ENV_ID, kv_block_size=32, preset=preset)
    assert env.action_space.n == actions
    env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(3)
    assert env.observation_space.contains(observation) and np.isfinite(reward)
    assert not terminated and not truncated
    assert {"energy_j", "arrivals", "slo_attainment", "gpu_clock_mhz", "window", "latencies_s"} == set(info)
    env.close()


def test_the_arguments_are_what_is_served():
    env = gymnasium.make(
        ENV_ID, workload="steady:rate_rps=40", steps=3, slo_tpot_s=0.02, kv_block_size=32
    ).unwrapped
    env.reset(seed=1)
    steps = [env.step(3) for _ in range(3)]
    assert [truncated for *_, truncated, _ in steps] == [False, False, True]
    assert sum(info["arrivals"] for *_, info in steps) > 60
    assert env.codec.slo.tpot_s == 0.02 and env._loop.node.spec.kv_block_size == 32


def test_several_block_sizes_are_drawn_from_episode_by_episode():
    env = gymnasium.make(ENV_ID, block_sizes=(8, 64)).unwrapped
    env.reset(seed=0)
    drawn = {env.reset() and env._loop.node.spec.kv_block_size for _ in range(12)}
    assert drawn == {8, 64}


def test_a_miss_has_one_price_unless_the_mode_says_otherwise(tmp_path):
    fixed = env_settings({"miss_price_j": 30.0})
    assert (fixed.mode, fixed.miss_price_j) == ("fixed_price", 30.0) and "miss_price" not in fixed.features
    assert env_settings({"mode": "specialist"}).features == PRESETS["default"].features
    (tmp_path / "run.json").write_text(json.dumps({"config": to_dict(PRESETS["default"])}))
    of_a_run = env_settings({"config": str(tmp_path / "run.json"), "workload": "steady"})
    assert (of_a_run.mode, of_a_run.workload) == ("specialist", "steady")
    assert of_a_run.train.episode_steps == 200 and of_a_run.block_sizes == (16,)


def test_an_environment_takes_the_settings_of_a_training_whatever_that_learned_by(tmp_path):
    branched = replace(PRESETS["default"], train=replace(PRESETS["default"].train, branch_every=2))
    (tmp_path / "run.json").write_text(json.dumps({"config": to_dict(branched)}))
    own = env_settings({"config": str(tmp_path / "run.json"), "steps": 30})
    assert (own.train.branch_every, own.train.episode_steps) == (2, 30)


@pytest.mark.parametrize("name", to_dict(LearnConfig()))
def test_every_setting_of_the_tree_is_accepted(name):
    assert env_settings({name: to_dict(env_settings({}))[name]}) is not None


WRONG = [
    ({"worklod": "steady"}, "unknown 'worklod', did you mean 'workload'"),
    ({"block_size": 32}, "unknown 'block_size'"),
    ({"seeds": 3}, "unknown 'seeds'"),
    ({"workload": "nobody"}, "unknown workload 'nobody'"),
    ({"steps": 0}, "--train.episode-steps 0"),
    ({"steps": "5"}, "episode_steps is '5'"),
    ({"steps": 5, "train": {"episode_steps": 7}}, "give one of them"),
    ({"kv_block_size": 17}, "--block-sizes 17: must be a power of two"),
    ({"kv_block_size": 8, "block_sizes": (8,)}, "give one of them"),
    ({"slo_tpot_s": -1.0}, "--slo-tpot-s -1.0: must be above 0"),
    ({"train": {"learning_rate": 1}}, "train: unknown key 'learning_rate'"),
    ({"preset": "mine"}, "preset is 'mine'"),
    ({"config": "nowhere.json"}, "nowhere.json"),
    ({"resume": "results"}, "resume is not an argument"),
    ({"features": ("miss_price",)}, "trains at one price"),
    ({"node": "live", "live": {"model": "m"}}, "a live node needs a running server"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_said_by_gymnasium_and_by_rllibs_env_config_alike(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        gymnasium.make(ENV_ID, **arguments)
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_env(arguments)


def test_an_env_config_has_a_runs_own_keys_or_the_arguments_and_nothing_beside():
    assert make_env({"workload": "steady", "steps": 7})._steps == 7
    own = {"config": learning_settings(PRESETS["plain"]), "block_sizes": [16]}
    assert make_env(own).reset(seed=1)[1] == {}, "a training keeps no windows"
    with pytest.raises(ConfigError, match="unknown key workload beside config"):
        make_env({**own, "workload": "steady"})
    several = make_env({"steps": 7, "num_envs": 2})
    assert isinstance(several, ParallelServingEnv) and several.num_envs == 2
    several.close()


def test_code_from_outside_is_loaded_where_the_arguments_name_it(tmp_path, monkeypatch):
    monkeypatch.chdir(PAGE.parent.parent)
    reward = "examples.outside.rewards:EnergyDelay"
    assert env_settings({"reward": reward}).reward == reward
    (tmp_path / "run.json").write_text(json.dumps({"mode": "fixed_price", "reward": reward}))
    with pytest.raises(ConfigError, match="your own code"):
        env_settings({"config": str(tmp_path / "run.json")})


def test_a_render_mode_is_refused_as_stable_baselines_expects_it():
    with pytest.raises(TypeError, match="render_mode"):
        gymnasium.make(ENV_ID, render_mode="rgb_array")


class MissesOnly(gymnasium.Wrapper):
    """A reward from outside: no energy, only late first tokens."""

    def step(self, action):
        observation, _, terminated, truncated, info = self.env.step(action)
        assert info["window"].ttfts_s == info["latencies_s"]["ttft"]
        late = sum(ttft_s > 0.05 for ttft_s in info["latencies_s"]["ttft"])
        return observation, -float(late) / max(1, info["window"].arrivals), terminated, truncated, info


def test_a_reward_wrapper_can_be_written_outside():
    env = MissesOnly(gymnasium.make(ENV_ID, workload="steady:rate_rps=6", steps=60))
    grid = env.unwrapped.codec.grid

    def episode(action):
        env.reset(seed=3)
        return sum(env.step(action)[1] for _ in range(60))

    fastest, slowest = episode(len(grid) - 1), episode(0)
    assert slowest < fastest <= 0.0


def test_vectors_have_the_latencies_of_each():
    envs = gymnasium.make_vec(ENV_ID, num_envs=2, workload="steady:rate_rps=9")
    _, info = envs.reset(seed=1)
    assert len(info["latencies_s"]["ttft"]) == 2 and info["window"][0] != info["window"][1]
    envs.close()


def test_the_page_shows_what_runs(capsys):
    shown = {}
    for block in BLOCKS:
        if "ray.rllib" not in block:
            exec(block, shown)
    assert shown["reward"] < 0 and "did you mean 'workload'" in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.slow
def test_rllib_trains_on_it_as_the_page_shows():
    (block,) = (block for block in BLOCKS if "ray.rllib" in block)
    shown = {}
    exec(block, shown)
    assert shown["result"]["env_runners"]["num_env_steps_sampled"] >= 100


@pytest.mark.ray
@pytest.mark.slow
def test_its_node_may_be_a_clusters():
    code = f"""
import gymnasium
env = gymnasium.make({ENV_ID!r}, node="ray", workload="steady", steps=3)
env.reset(seed=1)
print([env.step(3)[3] for _ in range(3)])
env.close()
"""
    own = os.environ | {"RAY_ADDRESS": "local"}
    done = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True, check=True)
    assert "[False, False, True]" in done.stdout


def test_the_pages_tables_are_the_default_environments():
    env = gymnasium.make(ENV_ID).unwrapped
    text = PAGE.read_text()
    assert f"Discrete({env.action_space.n})" in text and f"({env.observation_space.shape[0]},)" in text
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|.*\| ([\d,]+) \| (\d+) \|$", text, re.MULTILINE)
    assert tuple(name for _, name, *_ in rows) == env.codec.features
    for _, name, scale, high in rows:
        # the trend is shifted and scaled within its value
        assert name == "arrival_rate_trend" or FEATURES[name].scale == float(scale.replace(",", ""))
        assert FEATURES[name].high == float(high)
