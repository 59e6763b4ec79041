"""Files that fuel_ray writes are what docs/files.schema.json says."""

import json
import re
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from fuel_ray.cli import main
from fuel_ray.config import SweepConfig
from fuel_ray.errors import ConfigError
from fuel_ray.live.gpu.lease_state import record_owner, state_path
from fuel_ray.onboarding.config import OnboardConfig
from fuel_ray.onboarding.journal import Journal
from fuel_ray.policies.anchor import Anchor
from fuel_ray.policies.static import LoadTable
from fuel_ray.record import write_csv, write_json
from fuel_ray.sim.pack import load_pack
from fuel_ray.training.policies import _curve
from fuel_ray.training.run import running
from fuel_ray.training.trials import Checkpointed, Trained
from fuel_ray.tuning.runs import Score
from fuel_ray.tuning.tuned import Tuned
from fuel_ray.types import Knobs
from tests.policy_folders import SLO, write_policy
from tests.schemas import DEFS, check, check_json, check_lines, check_policy, check_rows
from tests.test_deploy import deploy, gpu, policy, stub  # noqa: F401  (fixtures)
from tests.test_rules import KINDS

ROOT = Path(__file__).parent.parent
PACKS = ROOT / "fuel_ray/sim/packs"
TABLE = LoadTable([2.0], [Knobs(32, 990), Knobs(48, 1500)])


def test_an_evaluation(tmp_path):
    flags = ["--block-sizes", "16", "--seeds", "1", "--seconds", "10"]
    assert main(["evaluate", *flags, "--static", "max", "48@1350", "--out", str(tmp_path)]) == 0
    (run_dir,) = tmp_path.iterdir()
    check_json("run_evaluate", run_dir / "run.json")
    check_rows("summary_row", run_dir / "summary.csv")
    check_lines("step", run_dir / "steps.jsonl")


def test_a_sweep_that_begins(tmp_path):
    config = replace(SweepConfig(), block_sizes=(16,), out=tmp_path)
    with running(config, "sweep", [config.workload], held_out=range(3)) as run_dir:
        pass
    check_json("run_sweep", run_dir / "run.json")


def test_a_learning_curve(tmp_path):
    results = tuple(Checkpointed(steps, reward, {}) for steps, reward in ((10, None), (20, -0.5)))
    trials = [Trained((8,), results), Trained((8, 16), results)]
    rows = [row for trial in trials for row in _curve(trial, [(Score(45.0, 0.96), 200.0)] * 2)]
    write_csv(tmp_path / "learning.csv", rows)
    check_rows("learning_row", tmp_path / "learning.csv")


@pytest.mark.parametrize("kind", KINDS)
def test_baselines_and_what_holds_a_policy(kind, tmp_path):
    tuned = Tuned(Knobs(48, 1500), TABLE, share=0.97, rules={kind: KINDS[kind]}, best_rule=kind).to_dict()
    write_json(tmp_path / "baselines.json", {"16": {"diurnal": tuned}})
    check_json("baselines", tmp_path / "baselines.json")
    check("tuned_with_weight", {**tuned, "anchor_weight": None})
    check_policy(write_policy(tmp_path / "p", anchor=Anchor(KINDS[kind], 0.1, 60.0), slo=SLO))


def test_policy_folders(tmp_path):
    check_policy(write_policy(tmp_path / "plain"))
    facts = {"tuned_static": Knobs(48, 1500), "feature_ranges": {"running": (0.0, 3.5)}}
    check_policy(write_policy(tmp_path / "full", sizes=(8, 16), anchor=Anchor(TABLE, 0.1), **facts))


@pytest.mark.parametrize("flags", [["--shadow"], ["--canary", "0.5"]], ids=" ".join)
def test_a_deployment(flags, stub, gpu, policy, tmp_path):  # noqa: F811
    _, lines, run = deploy(stub, policy, tmp_path, *flags)
    check("run_deploy", run)
    check("run_deploy", {name: run[name] for name in run if name not in ("spec", "summary")})  # at its start
    assert lines and {"spec", "summary"} <= run.keys()
    for line in lines:
        check("deploy_step", line)


def test_a_window_that_is_lost():
    knobs = {"batch_limit": 4, "gpu_clock_mhz": 990}
    check("deploy_step", {"step": 3, "time_s": 1.5, "chosen": knobs, "error": "no answer"})


def test_the_state_of_a_gpu(tmp_path):
    record_owner(tmp_path, "GPU-0")
    check_json("gpu_state", state_path(tmp_path, "GPU-0"))


def test_an_onboarding(tmp_path):
    journal = Journal(tmp_path, OnboardConfig())
    journal.began("server")
    journal.ended("server", {"model": "m"}, seconds=1.0)
    journal.began("load")
    journal.stopped("load", "no traffic", {})
    check_json("onboard", tmp_path / "onboard.json")


@pytest.mark.parametrize("path", sorted(PACKS.glob("*.json")), ids=lambda path: path.stem)
def test_a_pack(path):
    check_json("pack", path)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests/data").glob("h100_trace_*.json")), ids=lambda path: path.stem
)
def test_a_trace(path):
    check_json("trace", path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("pack", {"format": 1}),
        ("pack", {"gpu_clocks_mhz": [990, 1005]}),
        ("manifest", {"heed": "joint"}),
        ("manifest", {"kv_block_sizes": []}),
        ("manifest", {"tuned_static": {"batch_limit": 8}}),
        ("codec", {"slo": {"ttft_s": -1, "tpot_s": None, "e2e_s": None, "share": 0.95}}),
    ],
)
def test_the_schemas_find_mistakes(name, change, tmp_path):
    folder = write_policy(tmp_path / "p")
    path = PACKS / "h100-qwen3-8b.json" if name == "pack" else folder / f"{name}.json"
    with pytest.raises(jsonschema.ValidationError):
        check(name, json.loads(path.read_text()) | change)


def test_the_package_asks_for_what_the_schema_of_a_pack_asks_for(tmp_path):
    raw = json.loads((PACKS / "h100-qwen3-8b.json").read_text())
    path = tmp_path / "pack.json"
    for key in DEFS["pack"]["required"]:
        path.write_text(json.dumps({name: value for name, value in raw.items() if name != key}))
        with pytest.raises(ConfigError):
            load_pack(str(path))


def test_the_page_names_every_definition_of_a_file():
    named = set(re.findall(r"`#/\$defs/(\w+)`", (ROOT / "docs/files.md").read_text()))
    parts = set(re.findall(r'"#/\$defs/(\w+)"', json.dumps(DEFS)))
    assert set(DEFS) - parts <= named <= set(DEFS)
    assert parts <= set(DEFS)
