"""RLlib's own DQN beside ours: the same loss, who does what, where a resumed training begins."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from ray.rllib.algorithms.dqn import DQN, DQNConfig
from ray.rllib.algorithms.dqn.torch.dqn_torch_learner import DQNTorchLearner
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.utils.replay_buffers import PrioritizedEpisodeReplayBuffer
from ray.tune.registry import register_env

from fuel_ray.build.codec import build_codec
from fuel_ray.build.nodes import build_spec
from fuel_ray.cluster.hosts import connect
from fuel_ray.config import LearnConfig, TrainConfig
from fuel_ray.env import ServingEnv
from fuel_ray.policies.anchor import Anchor
from fuel_ray.policies.static import LoadTable
from fuel_ray.sim.node import SimulatedNode
from fuel_ray.training.branching import BranchedDqn
from fuel_ray.training.dqn import _loss
from fuel_ray.training.envs import make_env
from fuel_ray.training.replay import Batch
from fuel_ray.training.rl_module import DuelingDqnModule
from fuel_ray.training.rllib_dqn import rllib_dqn
from fuel_ray.training.trials import _ENV_NAME, _settings
from fuel_ray.types import Knobs

GAMMA = 0.9
MODEL = {"limits": 3, "clocks": 5, "hidden": (16,), "head": "additive", "start_from": None}
TINY = TrainConfig(
    num_envs=2, episode_steps=12, fragment_steps=8, updates_per_round=2, batch_size=16, learning_starts=16
)
HIGH, LOW = Knobs(40, 1980), Knobs(40, 1500)
BY_DIFFERENCES = {"branch_tries": 0}  # temporal ones, of what a node did


def test_our_loss_targets_and_gradients_are_those_of_rllibs_learner():
    """The same transitions: returns of one to three steps, importance weights, errors on both sides of 1."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    module = DuelingDqnModule(
        observation_space=gymnasium.spaces.Box(0.0, 1.0, (4,), np.float32),
        action_space=gymnasium.spaces.Discrete(15),
        model_config={**MODEL, "epsilon": 0.0},
    )
    module.make_target_networks()
    module._target_q.load_state_dict({name: 2 * w for name, w in module.q.state_dict().items()})
    steps = rng.integers(1, 4, 64)
    batch = Batch(
        observations=rng.random((64, 4), np.float32),
        actions=rng.integers(15, size=64),
        returns=rng.normal(0, 2, 64).astype(np.float32),
        discounts=(GAMMA**steps).astype(np.float32),
        next_observations=rng.random((64, 4), np.float32),
        weights=rng.random(64, np.float32),
        index=np.arange(64),
        next_penalties=np.zeros((64, 1), np.float32),
    )
    errors, loss = _loss(module, batch)
    loss.backward()
    gradients = [p.grad.clone() for p in module.q.parameters()]
    module.q.zero_grad()
    theirs, their_errors = _rllibs_loss(module, batch, steps)
    theirs.backward()
    assert theirs.item() == pytest.approx(loss.item(), rel=1e-6)
    np.testing.assert_allclose(their_errors.detach().numpy(), np.abs(errors), rtol=1e-5, atol=1e-6)
    assert (np.abs(errors) < 1).any() and (np.abs(errors) > 1).any()
    for parameter, gradient in zip(module.q.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def _rllibs_loss(module, batch, steps):
    columns = {
        Columns.OBS: batch.observations,
        Columns.NEXT_OBS: batch.next_observations,
        Columns.ACTIONS: batch.actions,
        Columns.REWARDS: batch.returns,
        Columns.TERMINATEDS: np.zeros(len(steps), bool),
        "weights": batch.weights,
        "n_step": steps,
    }
    tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
    settings = rllib_dqn(LearnConfig(train=TrainConfig(gamma=GAMMA)), model=MODEL)
    logged = {}
    metrics = SimpleNamespace(
        log_value=lambda key, value, **_: logged.update({key[-1]: value}), log_dict=lambda *_, **__: None
    )
    learner = SimpleNamespace(config=settings, metrics=metrics)
    said = {"module_id": "m", "config": settings, "batch": tensors, "fwd_out": module.forward_train(tensors)}
    return DQNTorchLearner.compute_loss_for_module(learner, **said), logged["td_error"]


def test_what_has_a_meaning_for_rllibs_dqn_is_taken_from_the_settings():
    train = TrainConfig(num_envs=4, fragment_steps=8, updates_per_round=6, batch_size=64, priority=0.3)
    found = rllib_dqn(LearnConfig(steps=1000, train=train), model=MODEL)
    assert type(found) is DQNConfig and found.algo_class is DQN
    assert (found.lr, found.gamma, found.n_step) == ([[0, 5e-4], [1000, 2.5e-5]], 0.93, 5)
    assert found.training_intensity * 4 * 8 == 6 * 64  # transitions in updates per round
    assert (found.tau, found.target_network_update_freq) == (1 / 200, 0)
    assert found.replay_buffer_config["alpha"] == 0.3
    assert found.rl_module_spec.model_config["epsilon"] == [[0, 0.6], [500, 0.15]]


def anchored(algorithm, **settings):
    """RLlib's settings of a tiny training near a load table, as Tune gets them."""
    register_env(_ENV_NAME, make_env)
    config = LearnConfig(steps=64, train=replace(TINY, algorithm=algorithm, **settings), block_sizes=(16,))
    grid = build_codec(config, build_spec(config, 16)).grid
    return _settings(config, [16], grid, {16: Anchor(LoadTable([4.0], [HIGH, LOW]), 0.03)})


def counted(monkeypatch):
    """How often those parts of RLlib's are called."""
    calls = Counter()

    def count(cls, name):
        real = getattr(cls, name)

        def call(self, *args, **kwargs):
            calls[f"{cls.__name__}.{name}"] += 1
            return real(self, *args, **kwargs)

        monkeypatch.setattr(cls, name, call)

    count(DQN, "training_step")
    count(DQNTorchLearner, "compute_loss_for_module")
    count(PrioritizedEpisodeReplayBuffer, "add")
    count(PrioritizedEpisodeReplayBuffer, "sample")
    count(SingleAgentEnvRunner, "sample")
    return calls


@pytest.mark.ray
@pytest.mark.slow
def test_who_does_what_in_a_training(monkeypatch):
    connect(cluster=False)
    calls = counted(monkeypatch)
    for settings in ({}, BY_DIFFERENCES):
        algorithm = anchored("dqn", **settings).build_algo()
        result = algorithm.train()
        algorithm.stop()
        assert result["learners"]["default_policy"]["loss"] > 0 and not calls
    algorithm = anchored("rllib-dqn").build_algo()
    result = algorithm.train()
    algorithm.stop()
    assert len(calls) == 5, "each of them"
    rounds = calls["DQN.training_step"]
    assert calls["DQNTorchLearner.compute_loss_for_module"] == 2 * rounds, "updates per round"
    assert calls["SingleAgentEnvRunner.sample"] == rounds
    assert result["num_env_steps_sampled_lifetime"] >= rounds * 16


def begun(monkeypatch, settings, *, checkpoint=None, results=1):
    """Seeds of the first resets, after a number of training results; with a folder, restored from it."""
    seeds = []
    real, real_node = ServingEnv.reset, SimulatedNode.reset

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            seeds.append(seed)
        return real(self, seed=seed, options=options)

    def branch(self, *, seed):
        seeds.append(seed)
        return real_node(self, seed=seed)

    algorithm = settings.build_algo()
    if isinstance(algorithm, BranchedDqn):
        monkeypatch.setattr(SimulatedNode, "reset", branch)
    monkeypatch.setattr(ServingEnv, "reset", reset)
    if checkpoint is not None and checkpoint.exists():
        algorithm.load_checkpoint(str(checkpoint))
    for _ in range(results):
        algorithm.train()
    if checkpoint is not None and not checkpoint.exists():
        algorithm.save_checkpoint(str(checkpoint))
    algorithm.stop()
    monkeypatch.undo()
    return seeds


@pytest.mark.ray
@pytest.mark.slow
def test_a_resumed_training_branches_new_arrivals(monkeypatch, tmp_path):
    connect(cluster=False)
    settings = anchored("dqn")
    first, resumed, again = (begun(monkeypatch, settings, checkpoint=tmp_path / "c") for _ in range(3))
    assert len(first) == len(resumed) == 1 and first != resumed == again


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["dqn", "rllib-dqn", "ppo"])
def test_a_resumed_training_does_not_begin_with_the_arrivals_of_the_start(algorithm, monkeypatch, tmp_path):
    connect(cluster=False)
    settings = anchored(algorithm, **BY_DIFFERENCES)
    first = begun(monkeypatch, settings, checkpoint=tmp_path / "c")
    resumed = begun(monkeypatch, settings, checkpoint=tmp_path / "c")
    again = begun(monkeypatch, settings, checkpoint=tmp_path / "c")
    assert len(first) == len(resumed) == 2 and not {*first} & {*resumed}
    assert resumed == again == [resumed[0] + i for i in range(2)]
    if algorithm == "dqn":  # as without any resuming, which is as ever
        rng = np.random.default_rng(settings.seed)
        assert first[0] == int(rng.integers(2**31))
