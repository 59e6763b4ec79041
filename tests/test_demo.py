"""The first minute: a demo with a shipped policy, and the quick preset."""

import subprocess
import sys

import pytest

from fuel_ray.algorithms import branches
from fuel_ray.build.nodes import build_spec
from fuel_ray.cli import main
from fuel_ray.commands import evaluate, recommend
from fuel_ray.config import PRESETS, SweepConfig, TrainVerbConfig
from fuel_ray.flags import parse_serving
from fuel_ray.policies.learned import load_policy, read_policy
from fuel_ray.policies.packs import pack_mismatch
from fuel_ray.policies.shipped import SHIPPED, folder_of
from fuel_ray.sim.pack import load_pack
from fuel_ray.training.run import expected_s
from fuel_ray.workload.spec import parse_workload

DEMO = """
import sys
from fuel_ray.cli import main
code = main(["demo", "--seeds", "1", "--seconds", "200"])
sys.exit(code or bool({"ray", "torch", "matplotlib", "gymnasium"} & set(sys.modules)))
"""


def test_the_demo_compares_without_ray_or_torch_and_writes_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", DEMO], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for word in ("maximum performance", "tuned static", "best simple rule", "learned (DQN)", "modelled"):
        assert word in done.stdout
    assert "J/request" in done.stdout and "SLO attainment" in done.stdout and list(tmp_path.iterdir()) == []


def test_the_example_is_a_policy_of_the_default_preset_for_the_pack_that_is_shipped():
    default, folder = PRESETS["default"], read_policy(SHIPPED["example"])
    manifest, pack = folder.manifest, load_pack(default.pack)
    assert pack_mismatch(manifest, pack) is None and manifest.pack == pack.name
    assert manifest.workload_digest == parse_workload(default.workload).digest()
    assert folder.slo == default.slo and folder.codec.features == default.features
    assert manifest.tuned_static is not None and manifest.anchor is not None
    load_policy(folder.path, build_spec(default, 16))


@pytest.mark.parametrize("parse", [evaluate.parse, recommend.parse])
def test_the_example_is_known_by_its_name(parse):
    config = parse(["--policies", "example", "--block-sizes", "16"], prog="x")
    assert config.policies == ("example",)  # so that a run.json is of use on another machine


def test_a_shipped_name_is_no_other_folder():
    assert folder_of("example") == SHIPPED["example"]
    assert str(folder_of("results/example")) == "results/example"


def test_the_example_plays_by_its_name(tmp_path, capsys):
    words = "evaluate --block-sizes 16 --seeds 1 --seconds 60 --policies example --out"
    assert main([*words.split(), str(tmp_path)]) == 0
    assert "example" in capsys.readouterr().out


def test_the_example_is_for_one_block_size(capsys):
    assert main(["evaluate", "--block-sizes", "8", "--policies", "example"]) == 2
    assert "--policies example: not trained for block size 8" in capsys.readouterr().err


def test_quick_is_the_default_preset_made_small():
    quick, default = PRESETS["quick"], PRESETS["default"]
    assert branches(quick) and quick.train.hidden == default.train.hidden and quick.anchor
    assert len(quick.block_sizes) == 1 and quick.control_workload is None and quick.axis_seeds == 0
    own, whole = expected_s(quick), expected_s(default)
    assert all(own[stage] <= whole[stage] for stage in own)
    assert sum(own.values()) < 0.4 * sum(whole.values())


@pytest.mark.parametrize("kind", [SweepConfig, TrainVerbConfig])
def test_quick_is_a_preset_of_every_verb_that_trains(kind):
    assert parse_serving(kind, ["--preset", "quick"], prog="x").tuning_seeds == PRESETS["quick"].tuning_seeds


def test_a_preset_changes_only_what_it_says_of_other_verbs():
    assert recommend.parse(["--policies", "example"], prog="x").tuning_seeds == 6
    quick = recommend.parse(["--policies", "example", "--preset", "quick"], prog="x")
    assert (quick.tuning_seeds, quick.block_sizes) == (PRESETS["quick"].tuning_seeds, (16,))


def test_no_more_is_tuned_on_than_was_asked(monkeypatch):
    from fuel_ray.tuning import tuned

    seen = []
    monkeypatch.setattr(tuned, "tune_on", lambda runs, *_, **__: seen.append(len(runs.seeds)))
    tuned.tune_baselines(PRESETS["quick"], 16, "diurnal")
    tuned.tune_baselines(PRESETS["default"], 16, "diurnal")
    assert seen == [PRESETS["quick"].tuning_seeds, 8]
