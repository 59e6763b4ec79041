"""Settings and the command line: what is wrong is said in one line, with exit code 2."""

import dataclasses
import json
import re
import runpy
import socket
import subprocess
import sys
from importlib import resources
from itertools import pairwise
from pathlib import Path

import pytest

from fuel_ray import __version__, cli
from fuel_ray.cli import VERBS, main
from fuel_ray.commands import sweep
from fuel_ray.config import PRESETS, LiveConfig, SweepConfig, from_dict, load_config, to_dict
from fuel_ray.errors import ConfigError
from fuel_ray.flags import parse_serving
from fuel_ray.policies.shipped import SHIPPED
from fuel_ray.workload.spec import parse_workload
from tests.fake_nvml import FakeNvml

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
    ["sweep", "--features", "running", "running"],
    ["sweep", "stray"],
    ["sweep", "--steps"],
    ["sweep", "--block-sizes"],
    ["sweep", "--block-sizes", "-8"],
    ["sweep", "--block-sizes", "16.5"],
    ["sweep", "--slo-e2e-s", "-1"],
    ["sweep", "--slo-tpot-s", "nan"],
    ["sweep", "--slo-share", "0"],
    ["sweep", "--tune-share", "2"],
    ["sweep", "--slo-share", "0.99"],
    ["arena", "--workload", "steady"],
    ["arena", "--guard.latency"],
    ["sweep", "--seeds", "0"],
    ["sweep", "--seed", "-1"],
    ["sweep", "--kv-tokens", "0"],
    ["sweep", "--miss-price-j", "-1"],
    ["sweep", "--miss-price-j", "nan"],
    ["sweep", "--grid", "huge"],
    ["sweep", "--grid-batch-limits", "0"],
    ["sweep", "--grid-clock-step-mhz", "0"],
    ["sweep", "--grid-lowest-clock-share", "1.5"],
    ["sweep", "--guard.max-wait-s", "-1"],
    ["sweep", "--control-workload", "storm"],
    ["sweep", "--axis-seeds", "-1"],
    ["sweep", "--clock-axis", "nope"],
    ["evaluate", "--clock-axis", "nope"],
    ["arena", "--clock-axis", "nope"],
    ["recommend", "--policies", "clipper", "--clock-axis", ""],
    ["sweep", "--nodes-per-trial", "0"],
    ["sweep", "--nodes-per-trial", "2"],
    ["sweep", "--node", "ray", "--conditional"],
    ["sweep", "--node", "ray", "--backend", "live"],
    ["sweep", "--node", "ray", "--backend", "gpu"],
    ["sweep", "--backend", "live"],
    ["sweep", "--node-failures", "0"],
    ["sweep", "--node-wait-s", "-1"],
    ["sweep", "--storage", "results"],
    ["doctor", "--backend", "gpu"],
    ["doctor", "--cluster-file", "nowhere.yaml"],
    ["doctor", "--vllm", ""],
    ["sweep", "--train.episode-steps", "0"],
    ["sweep", "--train.num-envs", "0"],
    ["sweep", "--train.batch-size", "0"],
    ["sweep", "--train.iterations", "0"],
    ["sweep", "--train.hidden", "128", "0"],
    ["sweep", "--train.lr", "0"],
    ["sweep", "--train.gamma", "1.1"],
    ["sweep", "--train.epsilon-final", "-0.1"],
    ["sweep", "--train.epsilon-share", "0"],
    ["sweep", "--train.n-step", "0"],
    ["sweep", "--train.n-step", "17"],
    ["sweep", "--train.head", "deep"],
    ["train", "--episodes", "0"],
    ["train", "--steps-per-episode", "0"],
    ["train", "--start-from", "nowhere", "--steps", "20"],
    ["train", "--generalist"],
    ["train", "--no-specialist"],
    ["train", "--mode", "fixed_price"],
    ["train", "--mode", "conditional"],
    ["train", "--preset", "plain", "--mode", "generalist"],
    ["train", "--reward", "greendls", "--slo-e2e-s", "10"],
    ["train", "--features", "kv_usage"],
    ["train", "--preset", "specialist"],
    ["profile", "--block-sizes", "8", "16"],
    ["profile", "--clocks-mhz", "1001"],
    ["profile", "--batches", "0"],
    ["report", "nowhere"],
    ["validate", "nowhere.json"],
    ["benchmark", "--model", "m", "--num-prompts", "0"],
    ["watch", "--urls", "http://127.0.0.1:1", "--interval-s", "0"],
]


@pytest.fixture(autouse=True)
def no_sweep(monkeypatch):
    """A wrong setting that is accepted fails here rather than in a sweep."""

    def stages(config, run_dir, bar):
        raise AssertionError("a sweep was started")

    monkeypatch.setattr("fuel_ray.commands.sweep._stages", stages)


@pytest.mark.parametrize("argv", WRONG, ids=" ".join)
def test_what_is_wrong_is_said_in_one_line(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.err.startswith("fuel-ray: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"{}", b'{"gpu_clocks_mhz": 3}',
        b"\xff\x00",
    ],
)  # fmt: skip
def test_a_malformed_pack_is_named(content, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pack.json").write_bytes(content)
    assert main(["sweep", "--pack", "pack.json"]) == 2
    assert "pack.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["pack.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low": 3}, "clock_axis_variants, low: "),
        ({"low": {"clock_axis": {"streaming": [1.0]}}}, "clock_axis_variants, low: clock_axis: its tables"),
        ({"low": {"clock_axis": {"streams": [1.0]}}}, "low: it has no such entry: streams"),
        ({"low": {"perf": {"idle": 3.0}}}, "low: it has no such entry: idle"),
        ({"low": {"perf": {"idle_w": "a"}}}, "clock_axis_variants, low: "),
        ({"nominal": {}}, "clock_axis_variants, nominal: that is the name"),
        ([1], "not a calibration pack"),
    ],
    ids=str,
)
def test_a_broken_variant_of_the_clock_axis_is_named(changes, message, capsys, tmp_path):
    shipped = resources.files("fuel_ray.sim") / "packs" / "h100-qwen3-8b.json"
    path = tmp_path / "pack.json"
    path.write_text(json.dumps({**json.loads(shipped.read_text()), "clock_axis_variants": changes}))
    assert main(["evaluate", "--pack", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{path} is not a calibration pack" in error and message in error


def test_a_pack_of_the_older_format_is_refused_with_the_reason(capsys, tmp_path):
    path = tmp_path / "pack.json"
    path.write_text(json.dumps({"name": "h100-qwen3-8b", "gpu_clocks_mhz": {}}))
    assert main(["sweep", "--pack", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert (
        f"{path} is not a calibration pack that this version can read: it has no format" in error
        and "calibrate" in error
    )


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\x00", b'{"train": 3}', b'{"steps": 0}'])
@pytest.mark.parametrize("flag", ["--config", "--resume"])
def test_malformed_settings_are_named(flag, content, capsys, tmp_path):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    assert main(["sweep", flag, str(path if flag == "--config" else tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_an_empty_workload_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "--workload", ""]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tokens", ["10", "2000"])
def test_a_pool_too_small_for_the_workload_is_said_before_anything_is_written(tokens, capsys, tmp_path):
    assert main(["sweep", "--kv-tokens", tokens, "--out", str(tmp_path / "results")]) == 2
    assert "does not fit" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_resumed_with_another_pack(capsys, tmp_path):
    facts = {"config": to_dict(SweepConfig()), "pack": {"sha256": "0"}}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    assert main(["sweep", "--resume", str(tmp_path)]) == 2
    assert "pack" in capsys.readouterr().err


def test_an_empty_control_workload_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "--control-workload", ""]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("program", [["fuel-ray", "sweep"], ["sweep_block_size.py"]])
def test_a_run_records_the_command_as_it_was_given(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [*program, "--out", "sweep"])
    monkeypatch.setattr(sweep, "_stages", lambda *_: None)
    monkeypatch.setattr(sweep, "write_report", lambda _: None)
    monkeypatch.setattr(sweep, "summary_table", lambda _: "")
    assert main(["sweep", "--out", "sweep"]) == 0
    (path,) = tmp_path.glob("sweep/*/run.json")
    assert json.loads(path.read_text())["command"] == "fuel-ray sweep --out sweep"


def test_an_out_folder_that_cannot_be_made_is_named(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["sweep", "--out", str(tmp_path / "file" / "results")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--clock-axis", "low"],
        ["--block-sizes", "8"],
        ["--preset", "seed"],
        ["--train.lr", "0.1"],
        ["--slo-ttft-s", "2"],
    ],
    ids=" ".join,
)
def test_a_run_is_not_resumed_with_other_settings(flags, capsys, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"config": to_dict(SweepConfig())}))
    assert main(["sweep", "--resume", str(tmp_path), *flags]) == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize("preset", PRESETS)
def test_a_resumed_run_has_the_recorded_settings(preset, tmp_path):
    recorded = dataclasses.replace(PRESETS[preset], steps=123)
    (tmp_path / "run.json").write_text(json.dumps({"config": to_dict(recorded)}))
    for flags in ([], ["--steps", "123"]):
        config = sweep.parse(["--resume", str(tmp_path), *flags], prog="x")
        assert config == dataclasses.replace(recorded, resume=tmp_path)
    config = sweep.parse(["--resume", str(tmp_path), "--node-wait-s", "600"], prog="x")
    assert config == dataclasses.replace(recorded, resume=tmp_path, node_wait_s=600.0)


def test_flags_that_a_resumed_run_repeats_need_not_be_whole_without_it(tmp_path):
    recorded = dataclasses.replace(SweepConfig(), node="live", live=LiveConfig(model="m"))
    (tmp_path / "run.json").write_text(json.dumps({"config": to_dict(recorded)}))
    config = sweep.parse(["--node", "live", "--resume", str(tmp_path)], prog="x")
    assert config == dataclasses.replace(recorded, resume=tmp_path)


def test_a_run_of_another_config_is_not_resumed(capsys, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"config": to_dict(SweepConfig())}))
    assert main(["sweep", "--resume", str(tmp_path), "--steps", "77"]) == 2
    assert "steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "made_by", "file"),
    [("onboard", "sweep", "run.json"), ("sweep", "onboard", "onboard.json"), ("train", "sweep", "run.json")],
)
def test_the_folder_of_another_verb_is_not_resumed(verb, made_by, file, capsys, tmp_path):
    facts = {"command": f"fuel-ray {made_by} --steps 1", "config": to_dict(SweepConfig())}
    (tmp_path / file).write_text(json.dumps(facts))
    assert main([verb, "--resume", str(tmp_path)]) == 2
    such = f"that is a folder of fuel-ray {made_by}; give one such as results/{verb}-2"
    assert f"--resume {tmp_path}: {such}" in capsys.readouterr().err


def help_page(capsys, verb):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_explains_every_flag_of_the_contract(capsys):
    text = help_page(capsys, "sweep")
    flags = "preset block-sizes steps seeds pack workload slo-ttft-s slo-tpot-s slo-e2e-s reward"
    for flag in f"{flags} out resume config conditional".split():
        assert f"--{flag}" in text
    words = " ".join(text.split())
    for default in (SweepConfig().steps, SweepConfig().kv_tokens, "8 16 32 64", SweepConfig().pack):
        assert f"default: {default})" in words
    assert "in s" in text and "tokens" in text and "MHz" in text


MOST = "preset block-sizes workload slo-ttft-s slo-tpot-s slo-share steps node policies seeds out resume"


def test_the_first_screen_of_help_has_what_most_people_need(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = help_page(capsys, "sweep")
    screen = "\n".join(text.splitlines()[:24])
    assert "example: fuel-ray sweep --preset quick" in screen
    for flag in MOST.split():
        assert re.search(rf"^  --{flag} +\w.*\w", screen, re.MULTILINE), flag
    assert "KV block sizes in tokens: powers of two up to 256 (8 16 32 64)" in screen
    for flag in ["node-wait-s", "grid-batch-limits", "train.lr", "guard.drift"]:
        assert f"--{flag} " not in screen and f"\n  --{flag}" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_first_screen_of_onboards_help_has_the_flags_of_a_server(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = help_page(capsys, "onboard").splitlines()
    most = lines[lines.index(" used most") + 2 :][:12]
    names = [re.match(r"  --(\S+) +\w.*\w", line)[1] for line in most]
    assert names[:5] == ["server", "model", "gpu-ids", "limit-file", "observe-minutes"]
    assert "--live.server" in "".join(lines[24:]) and max(map(len, lines)) <= 80


@pytest.mark.parametrize(("verb", "flag"), [("deploy", "policy"), ("benchmark", "model"), ("arena", "slos")])
def test_help_tells_a_flag_in_a_line_of_its_own_width(verb, flag, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = help_page(capsys, verb).splitlines()
    full = next(k for k, line in enumerate(lines) if re.match(rf"  (--\S+ \S+, )?--{flag} [A-Z[]", line))
    assert lines[full + 1].startswith("        ") and lines[full + 1].strip()
    assert max(map(len, [*lines[:1], *lines[2:]])) <= 80  # an example is to be copied, and stays in one line


@pytest.mark.parametrize("name", ["sweep", "train", "evaluate", "deploy"])
def test_grouping_loses_no_flag(name, capsys):
    page, (kind,) = help_page(capsys, name), [cli._settings(name)]
    for f in dataclasses.fields(kind):
        if not dataclasses.is_dataclass(f.type):
            assert f"--{f.name.replace('_', '-')} " in page or f"--no-{f.name.replace('_', '-')}" in page, (
                f.name
            )


HELP = """
import contextlib, io, sys
from fuel_ray.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main(sys.argv[1:])
sys.exit(" ".join({"ray", "torch", "matplotlib", "gymnasium"} & set(sys.modules)) or 0)
"""


@pytest.mark.parametrize("line", ["--help", "sweep --help", "train -h", "demo --help", "help evaluate"])
def test_help_waits_for_neither_ray_nor_torch(line):
    done = subprocess.run(
        [sys.executable, "-c", HELP, *line.split()], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_shell_completes_verbs_flags_and_values(tmp_path, capsys):
    assert main(["--print-completion", "bash"]) == 0
    (tmp_path / "fuel-ray.sh").write_text(capsys.readouterr().out)

    def completed(*words):
        line = f"COMP_WORDS=({' '.join(words)} ); COMP_CWORD={len(words) - 1}; _tyro_fuel_ray"
        script = f'source {tmp_path}/fuel-ray.sh; {line}; echo "${{COMPREPLY[@]}}"'
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completed("fuel-ray", "swe") == ["sweep"]
    assert completed("fuel-ray", "sweep", "--slo-t") == ["--slo-ttft-s", "--slo-tpot-s"]
    assert "quick" in completed("fuel-ray", "sweep", "--preset", "''")


def test_completion_names_the_shells_that_it_is_for(capsys):
    assert main(["--print-completion", "cmd"]) == 2
    assert "one of bash, zsh, fish" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_of_a_verb_has_flags_that_there_are(verb, capsys):
    words = VERBS[verb].example.split()
    known = help_page(capsys, verb)
    assert f"\nexample: fuel-ray {verb} {VERBS[verb].example}".rstrip() in known
    assert all(word in known for word in words if word.startswith("--"))
    for flag, value in pairwise(words):
        if flag == "--workload":
            parse_workload(value)


def test_the_example_of_calibrate_gives_the_traces_which_name_the_gpu():
    flags = [word for word in VERBS["calibrate"].example.split() if word.startswith("--")]
    assert flags == ["--profile", "--traces", "--name", "--out"]


@pytest.mark.parametrize(
    ("argv", "new"),
    [("sweep --also clipper", "--policies"), ("export --to x", "--out"), ("deploy --policies x", "--policy")],
)
def test_another_name_of_a_flag_is_told(argv, new, capsys):
    assert main(argv.split()) == 2
    assert f"did you mean {new}?" in capsys.readouterr().err


def test_a_file_of_0_1_is_read(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"config": {"also": ["clipper"]}}))
    assert load_config(path, base=SweepConfig()).policies == ("clipper",)


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_the_verbs_are_listed(argv, capsys):
    assert main(argv) == 0
    assert "sweep" in capsys.readouterr().out


def test_an_interruption_is_said_and_exits_with_130(capsys, monkeypatch):
    def run(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("fuel_ray.commands.sweep.run", run)
    assert main(["sweep"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_the_experiment_is_the_verb(tmp_path, monkeypatch, capsys):
    script = Path(__file__).parent.parent / "experiments/sweep_block_size.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), "--block-sizes", "7"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and "--block-sizes 7" in said.err
    assert list(tmp_path.iterdir()) == []


def test_validate_prints_predicted_beside_measured(capsys):
    trace = Path(__file__).parent / "data/h100_trace_16_open5.json"
    assert main(["validate", str(trace), "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert set(result) == {"trace", "source", "predicted", "measured", "errors", "beyond", "warnings"}
    assert abs(result["errors"]["energy"]) < 0.05
    assert main(["validate", str(trace)]) == 0
    assert "tpot_p50" in capsys.readouterr().out


def test_flags_are_applied_on_top_of_file_and_preset(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"steps": 10, "train": {"lr": 0.1}}))
    config = parse_serving(
        SweepConfig, ["--preset", "seed", "--config", str(path), "--steps", "20"], prog="x"
    )
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


@pytest.mark.parametrize("verb", ["sweep", "train", "evaluate", "profile"])
def test_a_live_node_without_a_driver_is_said_and_nothing_is_written(verb, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(driver=False))
    assert main([verb, "--node", "live", "--live.model", "m", "--out", str(tmp_path)]) == 2
    assert "no NVIDIA driver on this host" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_sigterm_ends_a_verb_in_an_orderly_way(tmp_path):
    code = (
        "import os, signal, sys, time\n"
        "from fuel_ray.commands import unlock\n"
        "from fuel_ray import cli\n"
        "def run(config: unlock.UnlockConfig):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(30)\n"
        "    finally:\n"
        "        print('given back')\n"
        "unlock.run = run\n"
        "sys.exit(cli.main(['unlock']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 143
    assert done.stdout == "given back\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("swep", "did you mean sweep?"),
        ("Sweep", "did you mean sweep?"),
        ("clock_helper", "did you mean clock-helper?"),
        ("help swep", "did you mean sweep?"),
        ("--out x sweep", "--out must come after the verb: fuel-ray sweep --out"),
        ("sweep --stpes 5", "unknown flag --stpes: did you mean --steps?"),
        ("sweep --lr 5", "did you mean --train.lr?"),
        ("deploy --poli x", "unknown flag --poli: did you mean --policy?"),
        ("sweep --xyzzy", "unknown flag --xyzzy; --help lists all flags"),
        ("sweep --steps=5x", "--steps 5x: must be a whole number"),
        ("sweep --train.lr x", "--train.lr x: must be a number"),
        ("sweep --slo-share x", "--slo-share x: must be a number or None"),
        ("sweep --conditional true", "unexpected 'true'"),
        ("sweep --preset seed --preset fast", "--preset fast: unknown; choose from"),
        ("sweep --block-sizes 8 --block_sizes 16", "--block-sizes is given twice"),
    ],
)
def test_what_was_meant_is_said(argv, words, capsys):
    assert main(argv.split()) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1


PLAIN = [
    ("evaluate --seeds three", "--seeds three: must be a whole number"),
    ("evaluate --node simm", "--node simm: must be one of sim, live, ray"),
    ("evaluate --seeds", "--seeds needs a value"),
    ("deploy", "--policy is required; `fuel-ray deploy --help` has an example"),
    ("calibrate", "--profile, --name and --out are required; `fuel-ray calibrate --help` has an example"),
    (
        "calibrate --name x --out x.json --profile x --clocks-mhz 1 2",
        "--clocks-mhz 1 2: must be 3 whole numbers or None",
    ),
    ("validate nowhere.json", "trace nowhere.json: there is no such file"),
    ("evaluate --config nowhere.json", "--config nowhere.json: No such file or directory; give a JSON file"),
    ("evaluate --config wrong.json", "wrong.json: unknown key 'workloads': did you mean 'workload'?"),
    ("evaluate --config typed.json", "typed.json: seeds is 'ten'; it must be a whole number"),
    ("report empty", "empty: not the folder of a run (no run.json in it); give one such as results/sweep-"),
    ("evaluate --pack wrong.json", "wrong.json is not a calibration pack that this version can read"),
    (
        "evaluate --static 48@0",
        "--static 48@0: 0 MHz is not a supported clock; supported are 900 to 1980 MHz",
    ),
    ("evaluate --gpu-clocks-mhz 0", "--gpu-clocks-mhz 0: must be at least 1"),
    ("evaluate --out wrong.json", "cannot make folder wrong.json: File exists; --out names another folder"),
    ("sweep --block-sizes 17", "--block-sizes 17: must be a power of two from 1 to 256, such as 16"),
    ("sweep --slo-ttft-s -1", "--slo-ttft-s -1.0: must be above 0 s, or None for no limit"),
    ("sweep --slo-tpot-s 50", "--slo-tpot-s 50: this is in seconds; for 50 ms give 0.05"),
    ("sweep --block-sizes 8,16", "--block-sizes: separate the values by spaces: --block-sizes 8 16"),
    ("sweep --block-sizes a", "--block-sizes a: not what this flag takes; --help shows what is"),
    ("sweep --workload t.csv", "--workload t.csv: name the trace's format too, as in azure:path=t.csv"),
    (
        "evaluate --policies example --block-sizes 32",
        "example: not trained for block size 32 (--block-sizes), but for 16",
    ),
    ("evaluate --workload diurnl", "unknown workload 'diurnl': did you mean diurnal?"),
    ("evaluate --workload diurnal:high_rsp=3", "unknown key high_rsp: did you mean high_rps?"),
    ("deploy --policy empty", "empty is not a policy folder: it has no manifest.json; give a folder such as"),
    (
        "evaluate --policies empty",
        "empty is not a policy folder: it has no manifest.json; give a folder such as",
    ),
    (
        "deploy --policy clipper",
        "--policy clipper: a rule can only be watched; add --shadow, or give a policy",
    ),
    (
        "benchmark --model m --port 1",
        "http://127.0.0.1:1/metrics: Connection refused: is the server running?",
    ),
]


@pytest.mark.parametrize(("argv", "words"), PLAIN)
def test_a_wrong_word_gets_one_plain_line(argv, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "wrong.json").write_text(json.dumps({"workloads": "mmpp"}))
    (tmp_path / "typed.json").write_text(json.dumps({"seeds": "ten"}))
    monkeypatch.chdir(tmp_path)
    assert main(argv.split()) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1 and said.startswith("fuel-ray: ")


def test_a_port_in_use_gets_one_plain_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = ["--policy", str(SHIPPED["example"]), "--metrics-port", str(port)]
        assert main(["deploy", *words]) == 2
    said = capsys.readouterr().err
    assert said == (
        f"fuel-ray: --metrics-port {port}: cannot listen on 127.0.0.1: Address already in use; "
        "choose another port\n"
    )


@pytest.mark.parametrize("word", ["version", "--version", "-V"])
def test_the_version_is_said(word, capsys):
    assert main([word]) == 0
    assert capsys.readouterr().out == f"fuel-ray {__version__}\n"


def test_of_a_flag_that_is_given_twice_the_last_one_counts():
    words = ["--steps", "5", "--preset", "seed", "--steps=6", "--preset=plain"]
    config = parse_serving(SweepConfig, words, prog="x")
    assert config == dataclasses.replace(PRESETS["plain"], steps=6)
