"""Evaluation on nodes that may be lost."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fuel_ray.arena import evaluation as evaluate
from fuel_ray.build.nodes import build_loop
from fuel_ray.build.objective import build_objective
from fuel_ray.cli import main
from fuel_ray.config import LiveConfig, SweepConfig
from fuel_ray.control import ControlLoop
from fuel_ray.errors import GpuError, NodeError, UnsupportedError
from fuel_ray.policies.learned import distinct_names
from fuel_ray.policies.static import LoadTable, Static
from fuel_ray.record import read_csv, read_json
from fuel_ray.types import Knobs
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.test_env import Failing

CONFIG = SweepConfig(node="ray", node_failures=2)


def evaluated(monkeypatch, config, errors):
    node = Failing()
    node.errors = [None] * 10 + errors
    loop = ControlLoop(node, build_objective(config))
    monkeypatch.setattr(evaluate, "build_loop", lambda *_, **__: loop)
    found = evaluate.Evaluation([], [])
    evaluate.evaluate_policies(
        config,
        16,
        "steady:rate_rps=6",
        lambda spec: {"max": Static(spec.max_performance)},
        seeds=1,
        seconds=20.0,
        into=found,
    )
    return found


def test_an_episode_whose_node_was_lost_is_begun_again(monkeypatch):
    undisturbed = evaluated(monkeypatch, CONFIG, [])
    assert evaluated(monkeypatch, CONFIG, [NodeError("host lost")]) == undisturbed
    assert len(undisturbed.lines) > 20


@pytest.mark.parametrize(
    ("config", "errors"),
    [
        (CONFIG, [NodeError("lost"), NodeError("lost")]),
        (CONFIG, [UnsupportedError("block size 8")]),
        (replace(CONFIG, node="live", live=LiveConfig(server="http://127.0.0.1:1")), [NodeError("lost")]),
    ],
    ids=["in a row", "unsupported", "not on a cluster"],
)
def test_what_repetition_cannot_help_ends_the_evaluation(monkeypatch, config, errors):
    with pytest.raises(type(errors[0]), match=str(errors[0])):
        evaluated(monkeypatch, config, errors)


def test_a_recorded_trace_is_judged_on_what_nothing_was_tuned_on():
    def requests(part):
        loop = build_loop(config, 16, horizon_s=2000.0, workload="azure-code", part=part)
        loop.node.reset(seed=1)
        loop.node.measure(3000.0)
        records = loop.node.take_records()
        return {*zip(records.prompt_tokens.tolist(), records.output_tokens.tolist(), strict=True)}

    config = replace(SweepConfig(), kv_tokens=None)
    first, second = (requests(part) for part in ("first half", "second half"))
    assert len(first) > 2000 and len(second) > 2000
    assert len(first & second) < 0.1 * len(second), "lengths that two requests have by chance"


def test_an_episode_played_without_its_windows_has_the_same_row():
    table = LoadTable([3.0, 8.0], [Knobs(32, 990), Knobs(48, 1305), Knobs(64, 1980)])
    rows = []
    for traces in (True, False):  # a trace needs the windows
        evaluate.evaluate_policies(
            replace(SweepConfig(), kv_tokens=6_000),
            16,
            "steady:rate_rps=9",
            lambda spec: {"max": Static(spec.max_performance), "table": table},
            seeds=2,
            seconds=90,
            into=(found := evaluate.Evaluation([], [])),
            traces=traces,
        )
        rows.append(found.rows)
    assert rows[0] == rows[1] and len(rows[0]) == 4
    assert min(row["preemptions"] for row in rows[0]) > 0


def test_policies_of_two_sweeps_are_told_apart():
    folders = [Path("a/block_16"), Path("b/block_16"), Path("b/block_32")]
    assert distinct_names(folders) == ["a/block_16", "b/block_16", "block_32"]


def test_seeds_of_a_recorded_trace_are_different_episodes():
    """Else n = 10 of them is n = 1, and the interval has no width."""
    found = evaluate.Evaluation([], [])
    static = {"max": Static(Knobs(64, 1980))}
    config = replace(SweepConfig(), kv_tokens=None)
    evaluate.evaluate_policies(config, 16, "azure-conv", lambda _: static, seeds=3, seconds=60.0, into=found)
    assert len({row["energy_j"] for row in found.rows}) == 3
    again = evaluate.Evaluation([], [])
    evaluate.evaluate_policies(config, 16, "azure-conv", lambda _: static, seeds=3, seconds=60.0, into=again)
    assert again.rows == found.rows


def test_episodes_that_were_measured_before_a_fault_are_kept_and_said(monkeypatch, tmp_path, capsys):
    episode, done = evaluate.run_episode, []

    def failing(*arguments, **named):
        if len(done) == 3:
            raise GpuError("cannot read the power of GPU GPU-0: the GPU is lost")
        done.append(named["seed"])
        return episode(*arguments, **named)

    monkeypatch.setattr(evaluate, "run_episode", failing)
    short = [
        "--seconds",
        "20",
        "--seeds",
        "3",
        "--workload",
        "steady:rate_rps=2",
        "--static",
        "max",
        "16",
        "--save-traces",
    ]
    assert main(["evaluate", *short, "--out", str(tmp_path)]) == 2
    (run_dir,) = tmp_path.iterdir()
    facts = read_json(run_dir / "run.json")
    assert facts["partial"] and "the GPU is lost" in facts["ended"]
    assert len(read_csv(run_dir / "summary.csv")) == 3
    found = capsys.readouterr()
    assert "stopped early (cannot read the power" in found.out and "partial" in found.out
    assert found.err.endswith("the GPU is lost\n")


STUB = f"{sys.executable} {Path(__file__).parent / 'tools/stub_vllm.py'}"


@pytest.mark.parametrize("plugins", ["fuel_ray", pytest.param("none", marks=pytest.mark.slow)])
def test_a_live_evaluation_says_what_limit_was_in_force(plugins, monkeypatch, tmp_path, capsys, caplog):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu(energy_mj=None)))
    monkeypatch.setattr("fuel_ray.live.vllm.in_force.PATIENCE_S", 2.0)
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    load = "steady:rate_rps=20,lengths=fixed,prompt_mean=32,output_mean=16"
    flags = [
        "--live.model",
        "tiny",
        "--live.vllm",
        STUB,
        "--live.clock-control",
        "off",
        "--block-sizes",
        "16",
    ]
    flags += ["--workload", load, "--max-num-seqs", "32", "--seconds", "4", "--seeds", "1"]
    code = main(["evaluate", "--node", "live", *flags, "--static", "max", "4", "--out", str(tmp_path)])
    (folder,) = tmp_path.glob("evaluate-*")
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["policy"] == "static 4"]
    if plugins == "fuel_ray":
        assert code == 0 and {line["applied"]["batch_limit"] for line in last} == {4}
        assert any(line["limit_acknowledged"] for line in last)
        assert not any(line["limit_acknowledged"] is False for line in lines)
        return
    assert code == 2 and not last and {line["applied"]["batch_limit"] for line in lines} == {32}
    assert json.loads((folder / "run.json").read_text())["partial"]
    assert "VLLM_PLUGINS=none excludes fuel_ray" in caplog.text
    assert "fuel-ray: batch limit 4 is not in force: no vLLM scheduler has" in capsys.readouterr().err
