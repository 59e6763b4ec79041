"""What is used of Ray beyond its public API is there, and has one home: read a failure after an upgrade."""

import ast
import inspect
import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from ray import tune
from ray.rllib.algorithms.dqn import DQN
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_LEARNER_GROUP, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.train.constants import RAY_CHDIR_TO_TRIAL_DIR
from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experimental.output import get_air_verbosity
from ray.tune.registry import register_env

from fuel_ray.config import LearnConfig, TrainConfig
from fuel_ray.training import ray_private
from fuel_ray.training.checkpoint import MODULE_STATE
from fuel_ray.training.dqn import FastDqn
from fuel_ray.training.rl_module import DuelingDqnModule
from fuel_ray.training.rllib_dqn import rllib_dqn
from tests.test_ppo import MODEL, Loads

ROOT = Path(__file__).parent.parent / "fuel_ray"
OURS = {"_target_q", "_foreach_lerp_"}  # of our module, and torch's
HOMES = {"training/ray_private.py", "cluster/local.py"}  # the second starts Ray, in a folder of its choice


@contextmanager
def relied_on(what):
    """Fails with the name of what an upgrade took away."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, AssertionError) as error:
        pytest.fail(
            f"Ray {ray.__version__} has no {what} as fuel_ray/training/ray_private.py uses it: {error!r}"
        )


@pytest.fixture
def settings():
    register_env("three loads", lambda _: Loads())
    found = rllib_dqn(LearnConfig(seed=3, train=TrainConfig(num_envs=2)), model=MODEL)
    found.environment("three loads").env_runners(num_env_runners=0)
    return found.learners(num_learners=0).debugging(seed=3, log_level="ERROR")


def test_the_module_and_the_optimiser_of_the_local_learner_are_found(settings):
    spaces = {DEFAULT_MODULE_ID: (Loads.observation_space, Loads.action_space)}
    with relied_on("learner_group._learner, its module's unwrapped() and get_optimizers_for_module()"):
        algorithm = SimpleNamespace(learner_group=settings.build_learner_group(spaces=spaces))
        module = ray_private.local_module(algorithm)
        optimizer = ray_private.local_optimizer(algorithm)
        assert isinstance(module, DuelingDqnModule) and isinstance(optimizer, torch.optim.Adam)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in module.q.parameters()}


def test_episodes_and_metrics_are_sampled_as_rllibs_dqn_does_it(settings, monkeypatch):
    with relied_on("synchronous_parallel_sample(_uses_new_env_runners=, _return_metrics=)"):
        known = inspect.signature(ray_private.synchronous_parallel_sample).parameters
        asked = {}

        def fake(**kwargs):
            asked.update(kwargs)
            return ["episode"], ["metrics"]

        monkeypatch.setattr(ray_private, "synchronous_parallel_sample", fake)
        algorithm = SimpleNamespace(env_runner_group="group", config=settings)
        assert ray_private.sampled(algorithm) == (["episode"], ["metrics"])
        assert asked.keys() <= known.keys()
        for name in ("_uses_new_env_runners=True", "_return_metrics=True"):
            assert name in inspect.getsource(DQN._training_step_new_api_stack)


def test_a_runner_that_is_reseeded_begins_with_other_arrivals(settings, monkeypatch):
    seeds = []
    monkeypatch.setattr(Loads, "reset", _noting(seeds, Loads.reset))
    with relied_on("SingleAgentEnvRunner._seed, taken at the first reset"):
        for steps in (0, 5000):
            runner = SingleAgentEnvRunner(config=settings, worker_index=0)
            ray_private.reseed(runner, steps=steps)
            runner.sample(num_timesteps=2, random_actions=True)
            runner.stop()
        assert [seed for seed in seeds if seed is not None] == [3, 4, 5003, 5004]


def _noting(seeds, reset):
    def noted(self, *, seed=None, options=None):
        seeds.append(seed)
        return reset(self, seed=seed, options=options)

    return noted


def test_a_restored_tuner_gets_our_callbacks(tmp_path):
    with relied_on("Tuner._local_tuner._run_config.callbacks"):
        tuner = tune.Tuner(DQN, run_config=tune.RunConfig(storage_path=str(tmp_path)))
        assert tuner._local_tuner._run_config.callbacks is None
        own = tune.Callback()
        ray_private.replace_callbacks(tuner, [own])
        assert tuner._local_tuner.get_run_config().callbacks == [own]


def test_an_algorithm_with_other_resources_keeps_its_name():
    with relied_on("tune.with_resources, which makes a subclass"):
        request = tune.PlacementGroupFactory([{"CPU": 1.0}, {"fuel_node": 1.0}])
        found = ray_private.with_resources(FastDqn, lambda _: request)
        assert issubclass(found, FastDqn) and found.__qualname__ == found.__name__ == "FastDqn"
        assert found.default_resource_request({}) == request


def test_tune_reads_what_is_put_into_its_environment(monkeypatch):
    for name in ("TUNE_GLOBAL_CHECKPOINT_S", "RAY_AIR_NEW_OUTPUT", RAY_CHDIR_TO_TRIAL_DIR):
        monkeypatch.delenv(name, raising=False)
    ray_private.before_tune()
    with relied_on("RAY_AIR_NEW_OUTPUT=0 for tables with columns of ours"):
        assert get_air_verbosity(1) is None
    with relied_on("TUNE_GLOBAL_CHECKPOINT_S"):
        assert os.environ["TUNE_GLOBAL_CHECKPOINT_S"] == "1"
        assert '"TUNE_GLOBAL_CHECKPOINT_S"' in inspect.getsource(TuneController)
    with relied_on("RAY_CHDIR_TO_TRIAL_DIR=0, so that a trial finds the files that flags name"):
        assert os.environ[RAY_CHDIR_TO_TRIAL_DIR] == "0"
        assert RAY_CHDIR_TO_TRIAL_DIR in ENV_VARS_TO_PROPAGATE
        assert "RAY_CHDIR_TO_TRIAL_DIR" in inspect.getsource(tune.Trainable)


def test_tunes_state_has_the_trials_that_it_wanted_to_stop():
    with relied_on("TuneController._cached_trial_decisions in experiment_state-*.json"):
        source = inspect.getsource(TuneController)
        assert f"self.{ray_private.DECISIONS} = " in source and '"runner_data"' in source
        assert TuneController.CKPT_FILE_TMPL == "experiment_state-{}.json"


def test_the_weights_are_where_a_checkpoint_is_read():
    with relied_on("learner_group/learner/rl_module/default_policy/module_state.pkl"):
        folders = (COMPONENT_LEARNER_GROUP, COMPONENT_LEARNER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID)
        assert Path(*folders, f"{RLModule.STATE_FILE_NAME}.pkl") == MODULE_STATE


@pytest.mark.parametrize("room", ["training", "cluster"])
def test_private_api_has_one_home(room):
    for path in sorted((ROOT / room).glob("*.py")):
        if (own := str(path.relative_to(ROOT))) not in HOMES:
            assert not _private(ast.parse(path.read_text())) - OURS, (
                f"{own}: see fuel_ray/training/ray_private.py"
            )


def _private(tree):
    """Names with an underscore that are asked of what is not a method's own object, or passed by keyword."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not (
            isinstance(node.value, ast.Name) and node.value.id == "self"
        ):
            names.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            names.add(node.arg)
    return {name for name in names if name.startswith("_") and not name.startswith("__")}
