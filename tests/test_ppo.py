"""PPO: a known optimum, the two parts of the network, what is not learned from, a run that goes on."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import gymnasium
import numpy as np
import pandas as pd
import pytest
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.tune.registry import register_env

from fuel_ray.cli import main
from fuel_ray.cluster.hosts import connect
from fuel_ray.config import LearnConfig, TrainConfig
from fuel_ray.env import NODE_FAILURE
from fuel_ray.errors import ConfigError
from fuel_ray.policies.catalogue import label
from fuel_ray.policies.network import q_values
from fuel_ray.report.data import Run
from fuel_ray.training.checkpoint import q_network
from fuel_ray.training.ppo import ActorCritic, ppo
from fuel_ray.training.progress import Episodes
from fuel_ray.training.trials import algorithm_of

BEST = ((0, 1), (1, 3), (2, 4))  # (limit, clock) of each load
MODEL = {"limits": 3, "clocks": 5, "hidden": (32,), "head": "additive", "start_from": None}


class Loads(gymnasium.Env):
    """Three loads in any order, each with one best pair; the reward of an action falls with its distance."""

    observation_space = gymnasium.spaces.Box(0.0, 1.0, (3,), np.float32)
    action_space = gymnasium.spaces.Discrete(15)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 50
        return self.look(), {}

    def look(self):
        self.load = int(self.np_random.integers(3))
        return np.eye(3, dtype=np.float32)[self.load]

    def step(self, action):
        limit, clock = divmod(int(action), 5)
        best_limit, best_clock = BEST[self.load]
        self.left -= 1
        return self.look(), -abs(limit - best_limit) - abs(clock - best_clock), False, self.left == 0, {}


@pytest.mark.slow
@pytest.mark.ray
def test_a_known_optimum_is_learned_and_acts_by_argmax_of_the_exported_arrays(tmp_path):
    train = TrainConfig(gamma=0.5, lr=3e-3, num_envs=8, fragment_steps=8, batch_size=64)
    register_env("three loads", lambda _: Loads())
    connect(cluster=False)
    settings = ppo(LearnConfig(steps=5120, train=train), model=MODEL)
    settings.environment("three loads").env_runners(num_env_runners=0)
    settings.learners(num_learners=0).debugging(seed=0, log_level="ERROR")
    algorithm = settings.build_algo()
    for _ in range(20):
        algorithm.train()
    algorithm.save_to_path(str(tmp_path / "checkpoint"))
    algorithm.stop()
    arrays = q_network(tmp_path / "checkpoint")
    seen = np.eye(3, dtype=np.float32)
    chosen = [int(q_values(arrays, load, head="additive").argmax()) for load in seen]
    assert [divmod(action, 5) for action in chosen] == list(BEST)


def test_advantages_are_the_actors_and_the_value_is_the_critics():
    module = ActorCritic(
        observation_space=Loads.observation_space, action_space=Loads.action_space, model_config=MODEL
    )
    batch = {Columns.OBS: torch.rand(4, 3)}
    logits = module.forward_train(batch)[Columns.ACTION_DIST_INPUTS]
    assert torch.allclose(logits.mean(-1), module.compute_values(batch), atol=1e-6)
    torch.log_softmax(logits, -1)[:, 0].sum().backward()
    assert module.q.value.weight.grad.abs().max() < 1e-6 < module.q.limit_advantage.weight.grad.abs().max()


def episode(steps, *, failed):
    infos = [{} for _ in range(steps + 1)]
    if failed:
        infos[-1] = {NODE_FAILURE: "gone"}
    seen, actions, rewards = [np.zeros(1)] * (steps + 1), [0] * steps, [1.0] * steps
    return SingleAgentEpisode(
        observations=seen,
        actions=actions,
        rewards=rewards,
        infos=infos,
        truncated=failed,
        len_lookback_buffer=0,
    )


def test_a_step_that_was_not_measured_is_not_learned_from():
    samples = [episode(3, failed=False), episode(3, failed=True), episode(1, failed=True)]
    Episodes().on_sample_end(samples=samples)
    assert [len(kept) for kept in samples] == [3, 2]
    assert not any(NODE_FAILURE in info for kept in samples for info in kept.get_infos())


def own(config, *, model):
    return ppo(config, model=model).training(num_epochs=1)


def test_an_algorithm_from_outside_is_a_function_that_the_user_names():
    train = TrainConfig(algorithm="tests.test_ppo:own")
    assert algorithm_of(LearnConfig(train=train)).__name__ == "own"
    with pytest.raises(ConfigError, match="nowhere"):
        algorithm_of(LearnConfig(train=replace(train, algorithm="nowhere:own")))
    with pytest.raises(ConfigError, match="fuel_ray calls it with settings, model"):
        algorithm_of(LearnConfig(train=replace(train, algorithm="textwrap:dedent")))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--train.algorithm", "sarsa"], "choose from dqn, rllib-dqn, ppo or"),
        (
            ["--train.algorithm", "ppo", "--train.n-step", "2"],
            "--train.n-step: --train.algorithm ppo does not use",
        ),
        (
            ["--train.algorithm", "ppo", "--train.epsilon-final", "0"],
            "--train.epsilon-final: --train.algorithm ppo",
        ),
        (["--train.algorithm", "rllib-dqn", "--train.hold-steps", "2"], "rllib-dqn does not use it"),
        (["--train.algorithm", "rllib-dqn", "--train.fragment-steps", "3"], "at least --train.n-step"),
        (["--train.algorithm", "nowhere:own"], "nowhere"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1 and not list(tmp_path.iterdir())


def training(*flags, cwd, log):
    command = [sys.executable, "-m", "fuel_ray", "train", *flags]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, cwd=cwd)


LIGHT = [
    *("--preset", "plain", "--block-sizes", "16", "--steps", "24576"),
    *("--workload", "steady:rate_rps=5", "--train.iterations", "6", "--train.episode-steps", "50"),
]
ACT = """
import sys
from pathlib import Path
from fuel_ray.policies.learned import read_policy
folder = read_policy(Path(sys.argv[1]))
assert folder.manifest.algorithm == sys.argv[2]
sys.exit(bool({"ray", "torch"} & set(sys.modules)))
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("algorithm", ["ppo", "rllib-dqn"])
def test_a_killed_training_goes_on_and_leaves_a_policy_that_needs_neither_ray_nor_torch(algorithm, tmp_path):
    light = [*LIGHT, "--train.algorithm", algorithm]
    if algorithm == "rllib-dqn":
        light += ["--train.updates-per-round", "8", "--train.batch-size", "64"]
    log = tmp_path / "log"
    with log.open("w") as out:
        process = training(*light, "--out", "results", cwd=tmp_path, log=out)
        deadline_s = time.monotonic() + 240
        while log.read_text().count("\ntrain  block") < 3 and time.monotonic() < deadline_s:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    (run_dir,) = tmp_path.glob("results/train-*")
    with log.open("w") as out:
        resumed = training("--resume", f"results/{run_dir.name}", cwd=tmp_path, log=out)
        assert resumed.wait(400) == 0, log.read_text()
    first = next(line for line in log.read_text().splitlines() if line.startswith("train  block"))
    assert int(first.split()[3].split("/")[0].replace(",", "")) >= 2 * 4096
    results = next(run_dir.glob("tune/*/result.json")).read_text().splitlines()
    clocks_mhz = [json.loads(line)["env_runners"]["fuel"]["mean_gpu_clock_mhz"] for line in results]
    assert len(clocks_mhz) == 6 and clocks_mhz[-1] < clocks_mhz[0] - 200, "a light load needs no high clock"
    folder = run_dir / "policies/block_16"
    assert subprocess.run([sys.executable, "-c", ACT, str(folder), algorithm], check=False).returncode == 0


@pytest.mark.parametrize(("name", "said"), [("ppo", "PPO"), ("rllib-dqn", "RLlib's DQN")])
def test_the_report_calls_the_learned_policy_as_its_algorithm(name, said):
    rows = pd.DataFrame({"policy": [name, "max_performance"]})
    nothing = pd.DataFrame()
    run = Run("run", {}, {"train.algorithm": name}, rows, nothing, nothing, nothing)
    assert run.policies == ["max_performance", name] and label(run.learned) == f"learned ({said})"
