"""What fuel-ray train makes of finished trials; trials and parallel jobs are stand-ins."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from fuel_ray.build.codec import build_codec
from fuel_ray.build.nodes import build_spec
from fuel_ray.build.resolve import resolve
from fuel_ray.config import PRESETS, SweepConfig
from fuel_ray.errors import ConfigError, FuelRayError
from fuel_ray.policies.anchor import Anchor
from fuel_ray.policies.learned import read_policy, save_policy
from fuel_ray.policies.static import LoadTable
from fuel_ray.record import write_json
from fuel_ray.training import policies as train
from fuel_ray.training import run
from fuel_ray.training.run import check_start
from fuel_ray.training.trials import Checkpointed, Trained, _finished
from fuel_ray.tuning.runs import Score
from fuel_ray.tuning.tuned import Tuned
from fuel_ray.types import Knobs
from tests.policy_folders import write_policy

BASE = Knobs(48, 1500)
TUNED = Tuned(BASE, LoadTable([], [BASE]), share=0.93)  # all that can be had of this load


def finished(monkeypatch, tmp_path, scores, *, block_sizes=(16,), **settings):
    """Two checkpoints per trial and their scores; returns the scoring jobs and the saved policies."""
    config = replace(
        SweepConfig(), block_sizes=block_sizes, train=replace(SweepConfig().train, head="joint"), **settings
    )
    codec = build_codec(config, build_spec(config, block_sizes[0]))
    made = write_policy(tmp_path / "weights", grid=codec.grid, features=codec.features)
    arrays = read_policy(made).arrays
    results = tuple(Checkpointed(steps, 0.0, arrays) for steps in (1, 2))
    trials = [block_sizes] if config.conditional else [(size,) for size in block_sizes]
    jobs = {}

    def in_parallel(what, function, asked, **_):
        jobs[what] = asked
        if what == "tune anchors":
            return [(Anchor(TUNED.table, 0.1), 7.0) for _ in asked]
        return [scores[k % 2] for k in range(len(asked))]

    monkeypatch.setattr(train, "run_trials", lambda *_: [Trained(sizes, results) for sizes in trials])
    monkeypatch.setattr(train, "in_parallel", in_parallel)
    write_json(tmp_path / "run.json", {"engine": "e"})
    tuned = {size: replace(TUNED, static=Knobs(48, 1500 - size)) for size in block_sizes}
    baselines = {str(size): {config.workload: own.to_dict()} for size, own in tuned.items()}
    write_json(tmp_path / "baselines.json", baselines)
    with resolve(config, run="r") as resolved:
        train.train_policies(resolved, tmp_path, [config.workload])
    return jobs["score checkpoints"], [read_policy(f) for f in sorted((tmp_path / "policies").iterdir())]


def test_checkpoints_are_ranked_by_what_can_be_had_of_the_load(monkeypatch, tmp_path):
    """At the 97 % that nobody reaches the one of highest attainment would win, whatever its energy."""
    scores = [(Score(40.0, 0.935), 11.0), (Score(60.0, 0.95), 22.0)]
    jobs, (policy,) = finished(monkeypatch, tmp_path, scores, anchor=False)
    assert [job[-1] for job in jobs] == [0.93, 0.93]
    assert policy.codec.miss_price_j == 11.0


@pytest.mark.parametrize("anchor", [True, False])
def test_checkpoints_are_ranked_as_they_will_be_used(monkeypatch, tmp_path, anchor):
    scores = [(Score(40.0, 0.98), 11.0), (Score(60.0, 0.98), 22.0)]
    jobs, (policy,) = finished(monkeypatch, tmp_path, scores, anchor=anchor)
    assert all((job[3] is not None) == anchor for job in jobs)
    assert (policy.manifest.anchor is not None) == anchor


def test_a_conditional_policy_falls_back_to_the_fastest_of_its_static_pairs(monkeypatch, tmp_path):
    scores = [(Score(40.0, 0.98), 11.0)] * 2
    settings = {"conditional": True, "mode": "fixed_price", "features": ("running", "kv_block_size")}
    _, (policy,) = finished(monkeypatch, tmp_path, scores, block_sizes=(64, 8), **settings)
    assert policy.manifest.tuned_static == Knobs(48, 1492)


def refuse(*_, **__):
    pytest.fail("nothing is left to tune")


@pytest.fixture
def given(tmp_path):
    """A baselines.json of another run, of block size 16 and the default load."""
    path = tmp_path / "other.json"
    write_json(path, {"16": {SweepConfig().workload: TUNED.to_dict()}})
    return replace(SweepConfig(), block_sizes=(16,), baselines=path)


def test_baselines_of_another_run_are_taken_as_they_are(given, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "in_parallel", refuse)
    for _ in range(2):
        taken = train.tuned_baselines(given, tmp_path, [given.workload])
        assert taken[16][given.workload].to_dict() == TUNED.to_dict()
        given.baselines.unlink(missing_ok=True)  # the run has its own from there on


def test_given_baselines_that_are_not_those_that_are_needed_are_refused(given, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "in_parallel", refuse)
    size, load, gone = replace(given, block_sizes=(8, 16)), "mmpp", replace(given, baselines=tmp_path / "no")
    for config, loads, said in (
        (size, [given.workload], "has no baselines for diurnal at block size 8"),
        (given, [given.workload, load], "has no baselines for mmpp at block size 16"),
        (gone, [given.workload], "No such file"),
    ):
        with pytest.raises(ConfigError, match=said):
            train.tuned_baselines(config, tmp_path, loads)
        with pytest.raises(ConfigError, match=said), run.running(config, "sweep", loads, held_out=()):
            pass
    assert not (tmp_path / "baselines.json").exists()


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"16": []}',
        '{"16": {"diurnal": {}}}',
        '{"16": {"diurnal": {"load_table": 5, "share": 1}}}',
    ],
)
def test_malformed_baselines_are_named(content, given, tmp_path):
    given.baselines.write_text(content)
    with pytest.raises(ConfigError, match=r"other\.json"):
        train.tuned_baselines(given, tmp_path, [given.workload])


def test_a_policy_of_one_price_is_saved_with_it():
    config = replace(PRESETS["plain"], miss_price_j=70.0)
    assert build_codec(config, build_spec(config, 16)).miss_price_j == 70.0
    assert "miss_price" not in config.features


@pytest.mark.parametrize("wrong", [["typo"], ["diurnal:nobody=1"]])
def test_a_workload_is_looked_at_before_servers_start(wrong, monkeypatch):
    monkeypatch.setattr(run, "start_ray", lambda config: pytest.fail("Ray was started"))
    config = replace(SweepConfig(), node="ray", backend="live")
    with (
        pytest.raises(ConfigError, match=r"typo|nobody"),
        run.running(config, "sweep", wrong, held_out=()),
    ):
        pass


@pytest.mark.parametrize(("is_stage", "said"), [(False, "to continue: fuel-ray train --resume"), (True, "")])
def test_only_a_run_that_is_no_stage_says_how_to_continue_it(is_stage, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "_check", lambda *given: None)
    config = replace(SweepConfig(), out=tmp_path)
    with (
        pytest.raises(KeyboardInterrupt),
        run.running(config, "train", [config.workload], held_out=(), is_stage=is_stage),
    ):
        raise KeyboardInterrupt
    printed = capsys.readouterr().out
    assert said in printed and bool(printed) is not is_stage


def test_training_may_start_from_a_policy_whose_price_was_tuned(tmp_path):
    config = replace(PRESETS["default"], train=replace(PRESETS["default"].train, head="joint"))
    codec = build_codec(config, build_spec(config, 16))
    folder = write_policy(tmp_path / "p", grid=codec.grid, features=codec.features)
    made = read_policy(folder)
    save_policy(folder, made.arrays, replace(codec, miss_price_j=150.0), made.manifest)
    check_start(replace(config, start_from=folder), codec)


IN_CREATION = """The actor died because of an error raised in its creation task, ray::BranchedDqn.__init__()
  File "algorithm.py", line 806, in setup
gymnasium.error.NameNotFound: Environment `fuel_ray_serving` doesn't exist."""
IN_PICKLE = """The actor died unexpectedly before finishing this task.
\tclass_name: FastDqn
ray.exceptions.RaySystemError: System error: cannot import name
traceback: Traceback (most recent call last):
ImportError: cannot import name 'RequestMeans' from 'fuel_ray.averages' (averages.py)

An unexpected internal error occurred while the worker was executing a task."""
OWN = """ray::BranchedDqn.train() (pid=1)
fuel_ray.errors.NodeError: the server does not answer
RuntimeError: a trial failed"""
KILLED = """The actor died unexpectedly before finishing this task.
\tpid: 864
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (IN_CREATION, "gymnasium.error.NameNotFound: Environment `fuel_ray_serving` doesn't exist."),
        (IN_PICKLE, "ImportError: cannot import name 'RequestMeans' from 'fuel_ray.averages' (averages.py)"),
        (OWN, "the server does not answer"),
        (KILLED, "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"),
        ("", "RuntimeError"),
    ],
)
def test_a_failed_trial_is_one_line_with_its_own_error(error, said):
    with pytest.raises(FuelRayError) as raised:
        _finished(SweepConfig(), SimpleNamespace(errors=[RuntimeError(error)]))
    assert str(raised.value) == f"training failed: {said}"
