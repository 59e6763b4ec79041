"""Settings and the command line: what is wrong is said in one line, with exit code 2."""

import dataclasses
import json
from pathlib import Path

import pytest

from fuel_ray.cli import main
from fuel_ray.config import PRESETS, SweepConfig, from_dict, load_config, parse_sweep, to_dict
from fuel_ray.errors import ConfigError

WRONG = [
    ["nonsense"],
    ["sweep", "--nonsense", "1"],
    ["sweep", "--steps", "many"],
    ["sweep", "--steps", "0"],
    ["sweep", "--block-sizes", "7"],
    ["sweep", "--block-sizes", "512"],
    ["sweep", "--block-sizes", "16", "16"],
    ["sweep", "--slo-ttft-s", "0"],
    ["sweep", "--slo-share", "1.5"],
    ["sweep", "--slo-ttft-s", "None", "--slo-tpot-s", "None"],
    ["sweep", "--reward", "profit"],
    ["sweep", "--reward", "greendls"],
    ["sweep", "--pack", "h200"],
    ["sweep", "--pack", "nowhere/pack.json"],
    ["sweep", "--workload", "storm"],
    ["sweep", "--workload", "diurnal:low_rps=much"],
    ["sweep", "--workload", "azure:path=nowhere.csv"],
    ["sweep", "--preset", "fast"],
    ["sweep", "--config", "nowhere.json"],
    ["sweep", "--resume", "nowhere"],
    ["sweep", "--features", "mood"],
    ["report", "nowhere"],
    ["validate", "nowhere.json"],
]


@pytest.mark.parametrize("argv", WRONG, ids=" ".join)
def test_what_is_wrong_is_said_in_one_line(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.err.startswith("fuel-ray: ")
    assert list(tmp_path.iterdir()) == []


def test_an_out_folder_that_cannot_be_made_is_named(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["sweep", "--out", str(tmp_path / "file" / "results")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_run_of_another_config_is_not_resumed(capsys, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"config": to_dict(SweepConfig())}))
    assert main(["sweep", "--resume", str(tmp_path), "--steps", "77"]) == 2
    assert "steps" in capsys.readouterr().err


def test_help_explains_every_flag_of_the_contract(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    flags = "preset block-sizes steps seeds pack workload slo-ttft-s reward out resume config conditional"
    for flag in flags.split():
        assert f"--{flag}" in text


def test_validate_prints_predicted_beside_measured(capsys):
    trace = Path(__file__).parent / "data/h100_trace_16_open5.json"
    assert main(["validate", str(trace), "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert set(result) == {"trace", "predicted", "measured", "errors"}
    assert abs(result["errors"]["energy"]) < 0.05
    assert main(["validate", str(trace)]) == 0
    assert "tpot_p50" in capsys.readouterr().out


def test_flags_are_applied_on_top_of_file_and_preset(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"steps": 10, "train": {"lr": 0.1}}))
    config = parse_sweep(["--preset", "seed", "--config", str(path), "--steps", "20"], prog="x")
    assert (config.steps, config.train.lr, config.reward) == (20, 0.1, "greendls_kv_normalized")


def test_an_unknown_key_in_a_file_is_named(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"stepz": 10}))
    with pytest.raises(ConfigError, match="stepz"):
        load_config(path, base=SweepConfig())


@pytest.mark.parametrize(
    ("key", "value"), [("steps", "10"), ("steps", True), ("reward", "profit"), ("block_sizes", [8.5])]
)
def test_a_value_of_the_wrong_type_in_a_file_is_named(key, value):
    with pytest.raises(ConfigError, match=key):
        from_dict({key: value}, base=SweepConfig(), source="settings.json")


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_survive_json(preset):
    config = PRESETS[preset]
    raw = json.loads(json.dumps(to_dict(config)))
    assert from_dict(raw, base=SweepConfig(), source="x") == config


def test_the_seed_preset_is_the_original_request():
    seed = PRESETS["seed"]
    assert (seed.steps, seed.train.episode_steps) == (500 * 100, 100)
    assert (seed.train.hidden, seed.train.lr, seed.train.gamma) == ((256, 256), 1e-4, 0.99)
    assert (seed.slo_e2e_s, seed.grid, len(seed.features)) == (10.0, "seed", 10)
    assert dataclasses.is_dataclass(seed)
