"""Profiling a node: what is measured on the twin leads calibrate back to the twin."""

import contextlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from fuel_ray.build import probing
from fuel_ray.cli import main
from fuel_ray.errors import GpuError
from fuel_ray.sim.loads import LOAD_S, TRACES, Server, chat, mixed
from fuel_ray.sim.node import SimulatedNode
from fuel_ray.sim.pack import load_pack
from fuel_ray.sim.points import Lengths, fitting
from fuel_ray.sim.recorded import read_trace
from fuel_ray.sim.replay import measured_figures, predicted_figures, relative_errors

DATA = Path(__file__).parent / "data"
CLOCKS = (1980, 1845, 1695, 1560, 1410, 1275, 1125, 990)
SMALL = ("--clocks-mhz", "1980", "--contexts", "128", "--prompts", "128", "2048")
PROGRESS = re.compile(
    r"^(\d+)/(\d+)  ([\d.]+) of about ([\d.]+) min of virtual time  (\d+) MHz$", re.MULTILINE
)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("profile"), io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["profile", "--out", str(folder)]) == 0
    (path,) = folder.glob("profile-*/profile.jsonl")
    return path, said.getvalue()


@pytest.fixture
def profile(profiled):
    return profiled[0]


def test_a_pack_calibrated_to_a_profile_of_the_twin_is_the_twin(profile, tmp_path, capsys):
    out = tmp_path / "pack.json"
    flags = ["--name", "again", "--gpu", "NVIDIA H100", "--out", str(out), "--power-cap-w", "700"]
    assert main(["calibrate", "--profile", str(profile), *flags]) == 0
    assert "outlier" not in capsys.readouterr().out
    twin, again = load_pack("h100-qwen3-8b").perf, load_pack(str(out)).perf
    for clock_mhz in CLOCKS:
        for n in (1, 8, 32, 96):
            expected_s, expected_w, _ = twin.step_cost(n, n * 700, 0, clock_mhz)
            step_s, power_w, _ = again.step_cost(n, n * 700, 0, clock_mhz)
            assert step_s == pytest.approx(expected_s, rel=0.03)
            assert power_w == pytest.approx(expected_w, rel=0.03)


def test_the_pack_of_a_simulated_server_says_so_and_has_its_limits(tmp_path, capsys):
    raw = json.loads(Path("fuel_ray/sim/packs/h100-qwen3-8b.json").read_text()) | {"max_model_len": 2048}
    (tmp_path / "short.json").write_text(json.dumps(raw))
    flags = ["--pack", str(tmp_path / "short.json"), "--max-num-seqs", "32", "--kv-tokens", "26000"]
    words = ["--clocks-mhz", "1980", "--no-traces", *flags, "--out", str(tmp_path)]
    assert main(["profile", *words]) == 0
    (path,) = tmp_path.glob("profile-*/profile.jsonl")
    words = ["--profile", str(path), "--name", "mine", "--gpu", "NVIDIA H100"]
    assert main(["calibrate", *words, "--out", str(tmp_path / "mine.json")]) == 0
    assert "measured: nothing; simulated: 11 decode and 2 prefill rows; tr" in capsys.readouterr().out
    pack = load_pack(str(tmp_path / "mine.json"))
    found = (pack.max_num_seqs, pack.max_model_len, pack.max_num_batched_tokens, pack.kv_tokens)
    assert found == (32, 2048, 8192, 26000)
    facts = json.loads((path.parent / "run.json").read_text()) | {"origin": "measured"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text(json.dumps(facts))
    (tmp_path / "other" / "profile.jsonl").write_text(path.read_text())
    words[2:2] = [str(tmp_path / "other" / "profile.jsonl")]
    assert main(["calibrate", *words, "--out", str(tmp_path / "mixed.json")]) == 2
    assert "--profile: some are measured, others simulated" in capsys.readouterr().err


def test_a_profile_says_where_it_was_taken(profile):
    rows = [json.loads(line) for line in profile.read_text().splitlines()]
    run = json.loads((profile.parent / "run.json").read_text())
    assert run["origin"] == "modelled, pack h100-qwen3-8b"
    assert {row["clock_mhz"] for row in rows} == set(CLOCKS)
    assert {row["phase"] for row in rows} == {"idle", "decode", "prefill", "prefill_sustained"}
    lower, higher = ([r for r in rows if r["phase"] == "decode" and r["clock_mhz"] == c] for c in (990, 1980))
    assert all(
        a["itl"] > b["itl"] and a["power_w"] < b["power_w"] for a, b in zip(lower, higher, strict=True)
    )


def test_a_batch_that_does_not_fit_the_kv_pool_is_skipped_and_said(tmp_path, capsys):
    flags = ["--kv-tokens", "8000", "--batches", "4", "64", "--contexts", "1024", "--no-traces"]
    flags += ["--clocks-mhz", "1980", "990"]
    assert main(["profile", "--out", str(tmp_path), "--prompts", "128", *flags]) == 0
    said = capsys.readouterr().out
    assert said.count("64 requests with 1024 prompt tokens that decode together") == 1
    assert "not measured (the lines above say why): decode-64x1024 at 2 clocks" in said
    (path,) = tmp_path.glob("profile-*/profile.jsonl")
    decode = [row for row in map(json.loads, path.read_text().splitlines()) if row["phase"] == "decode"]
    assert [row["b"] for row in decode] == [4, 4]


def _decoded(tmp_path, *flags):
    words = ["--clocks-mhz", "1980", "--contexts", "128", "--prompts", "128", "--no-traces"]
    assert main(["profile", "--out", str(tmp_path), *words, *flags]) == 0
    (path,) = tmp_path.glob("profile-*/profile.jsonl")
    return [row for row in map(json.loads, path.read_text().splitlines()) if row["phase"] == "decode"]


def test_requests_that_ended_before_a_window_are_sent_again_with_more_tokens(tmp_path):
    long, short = tmp_path / "long", tmp_path / "short"
    rows = _decoded(short, "--output-tokens", "64", "--batches", "1", "4")
    assert rows == _decoded(long, "--batches", "1", "4")


def test_where_the_server_takes_too_few_tokens_for_a_window_it_is_shorter(tmp_path):
    raw = json.loads(Path("fuel_ray/sim/packs/h100-qwen3-8b.json").read_text()) | {"max_model_len": 384}
    (tmp_path / "short.json").write_text(json.dumps(raw))
    few = _decoded(tmp_path, "--pack", str(tmp_path / "short.json"), "--batches", "1", "4")
    usual = _decoded(tmp_path / "usual", "--batches", "1", "4")
    assert [(row["windows"], row["window_s"]) for row in few] == [(2, 0.5)] * 2
    assert [row["itl"] for row in few] == pytest.approx([row["itl"] for row in usual], rel=0.03)


def test_a_profile_that_is_too_small_to_be_fitted_says_so_at_its_end(tmp_path, capsys):
    _decoded(tmp_path, "--batches", "1", "4")
    assert (
        "not enough for `fuel-ray calibrate`: decode rows with 2 different pairs" in capsys.readouterr().out
    )


def test_the_twin_tells_what_another_h100_was_measured_to_do():
    """`fuel-ray profile --node live` on a card that the pack was not fitted to; see docs/live.md."""
    perf = load_pack("h100-qwen3-8b").perf
    rows = map(json.loads, (DATA / "h100_profile_20261125.jsonl").read_text().splitlines())
    decode = [row for row in rows if row["phase"] == "decode"]
    errors = []
    for row in decode:
        step_s, power_w, _ = perf.step_cost(row["b"], row["b"] * row["ctx_mid"], 0, row["clock_mhz"])
        errors.append(step_s * power_w / (row["itl"] * row["power_w"]) - 1)
    assert len(errors) == 16
    assert max(map(abs, errors)) < 0.05 and sum(map(abs, errors)) / len(errors) < 0.02


def test_points_that_were_measured_before_a_fault_are_kept_and_said(monkeypatch, tmp_path, capsys):
    build, built = probing.build_loop, []

    def failing(*arguments, **named):
        built.append(named["workload"])
        if len(built) == 5:
            raise GpuError("cannot read the power of GPU GPU-0: the GPU is lost")
        return build(*arguments, **named)

    monkeypatch.setattr(probing, "build_loop", failing)
    assert main(["profile", "--clocks-mhz", "1980", "--out", str(tmp_path)]) == 2
    (path,) = tmp_path.glob("profile-*/profile.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["phase"] for row in rows] == ["idle", "decode", "decode"]
    assert json.loads((path.parent / "run.json").read_text())["partial"]
    found = capsys.readouterr()
    assert f"stopped early; 3 points were saved in {path}" in found.out and "the GPU is lost" in found.err


@pytest.mark.parametrize("rows", ["[1]\n", '{"phase": "idle"}\n', "null\n", "x\n", None])
def test_a_profile_that_is_none_cannot_be_gone_on_with(rows, profile, tmp_path, capsys):
    (tmp_path / "run.json").write_text((profile.parent / "run.json").read_text())
    if rows is None:
        (tmp_path / "profile.jsonl").mkdir()
    else:
        (tmp_path / "profile.jsonl").write_text(rows)
    assert main(["profile", "--resume", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_batches_beyond_the_servers_capacity_are_left_out_and_one_is_measured():
    lengths = Lengths(batches=(256,), contexts=(128,), prompts=(128,), output_tokens=512, windows=3)
    found, left_out = fitting(lengths, SERVER)
    assert found.batches == (128,) and left_out == ("256 requests at once (the server runs 128 at most)",)


def test_a_profile_says_how_long_it_takes_and_keeps_to_it(profiled):
    """Virtual seconds, and what lies between two points on a real server: 6 min a clock, 30 for eight."""
    said = profiled[1]
    first, second = said.splitlines()[:2]
    assert first == "a simulated node, modelled by pack h100-qwen3-8b; no server is measured"
    told = r"(\d+) points on the twin, at 8 clocks: ([\d.]+) min of virtual time, a few seconds here"
    n, about = re.fullmatch(told, second).groups()
    lines = [[float(word) for word in found] for found in PROGRESS.findall(said)]
    assert [line[4] for line in lines] == list(CLOCKS) and lines[-1][:2] == [float(n)] * 2
    assert lines[-1][2] == lines[-1][3] == pytest.approx(float(about), rel=0.15) and lines[-1][2] < 30
    assert lines[0][2] < 6 and len(said.splitlines()) < 20


def test_the_twin_replays_the_traces_of_a_profile_of_itself(profile):
    traces = {path.stem: path for path in (profile.parent / "traces").iterdir()}
    lower = {f"{name}-{mhz}" for name in ("mixed-few", "mixed-many", "load-high") for mhz in (1410, 990)}
    assert set(traces) == {f"{name}-1980" for name in TRACES} | lower
    pack = load_pack("h100-qwen3-8b")
    for name, path in traces.items():
        run, info = read_trace(str(path)), json.loads(path.read_text())["info"]
        assert info["origin"] == "modelled, pack h100-qwen3-8b" and {"workload", "seed", "date"} <= set(info)
        assert run.clock_schedule[-1][1] == info["clock_mhz"] and info["horizon_s"] < LOAD_S + 2
        errors = relative_errors(predicted_figures(run, pack), measured_figures(run))
        assert abs(errors["energy"]) < 0.03 and abs(errors["tpot_mean"]) < 0.05, (name, errors)


def _changed(monkeypatch, **changes):
    """All windows with these changes, which are functions of the window."""
    measure = SimulatedNode.measure

    def other(node, duration_s):
        window = measure(node, duration_s)
        return replace(window, **{name: of(window) for name, of in changes.items()})

    monkeypatch.setattr(SimulatedNode, "measure", other)


def test_a_profile_that_was_stopped_goes_on_with_what_is_missing(monkeypatch, tmp_path, capsys):
    build, built = probing.build_loop, []

    def stopped(*arguments, **named):
        built.append(named["workload"])
        if len(built) == 5:
            raise KeyboardInterrupt
        return build(*arguments, **named)

    monkeypatch.setattr(probing, "build_loop", stopped)
    flags = [*SMALL, "--batches", "1", "4", "--out", str(tmp_path)]
    assert main(["profile", *flags]) == 130
    (folder,) = tmp_path.glob("profile-*")
    assert f"to continue: fuel-ray profile --resume {folder}" in capsys.readouterr().out
    with (folder / "profile.jsonl").open("a") as file:
        file.write('{"phase": "pre')
    assert main(["profile", "--resume", str(folder), "--batches", "1", "8"]) == 2
    assert "this one has batches = (1, 4)" in capsys.readouterr().err
    assert main(["profile", "--resume", str(folder), "--batches", "1", "4"]) == 0
    said = capsys.readouterr().out
    assert "11 points on the twin (3 are measured already), at 1 clock: " in said
    names = [json.loads(line)["point"] for line in (folder / "profile.jsonl").read_text().splitlines()]
    assert names == [
        "idle",
        "decode-1x128",
        "decode-4x128",
        "prefill-128",
        "prefill-2048",
        "prefill_sustained-2048",
    ]
    assert len(built) == 5 + 11 and not json.loads((folder / "run.json").read_text())["partial"]
    assert len(list((folder / "traces").iterdir())) == len(TRACES)


def test_another_load_on_the_server_ends_a_profile_and_is_said(monkeypatch, tmp_path, capsys):
    _changed(monkeypatch, running=lambda w: w.running + 3, output_tokens=lambda w: w.output_tokens + 9)
    assert main(["profile", *SMALL, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert "another client uses the server: at least 3 requests are not from this profile" in said.err


def test_prompts_of_somebody_else_are_noticed_though_they_never_wait(monkeypatch, tmp_path, capsys):
    _changed(monkeypatch, prompt_tokens=lambda w: w.prompt_tokens + 70 * (w.completed > 0))
    assert main(["profile", *SMALL, "--batches", "1", "--out", str(tmp_path)]) == 2
    assert "70 prompt tokens are not from this profile; stop it" in capsys.readouterr().err


def test_rows_with_hits_in_the_prefix_cache_are_refused(monkeypatch, tmp_path, capsys):
    _changed(monkeypatch, prefix_hit_rate=lambda w: 0.4 if w.running else None)
    flags = ["--batches", "1", "--no-traces", "--out", str(tmp_path)]
    assert main(["profile", *SMALL, *flags]) == 2
    said = capsys.readouterr()
    assert "skipped: prompts were found in the prefix cache" in said.out
    assert "no decode point could be measured" in said.err


def test_what_the_server_cannot_take_is_left_out_and_said(tmp_path, capsys):
    flags = ["--kv-tokens", "2000", "--clocks-mhz", "1980", "--batches", "1", "--out", str(tmp_path)]
    assert main(["profile", *flags]) == 0
    said = capsys.readouterr().out
    assert "skipped: prompts of 4096 tokens (the server accepts" in said
    assert list(tmp_path.glob("profile-*/traces/load-high-1980.json"))
    assert main(["profile", *flags, "--kv-tokens", "200"]) == 2
    assert "a profile needs at least 256 tokens of each" in capsys.readouterr().err


SERVER = Server((1980,), max_num_seqs=128, max_model_len=8192, kv_tokens=400_000)


def test_a_load_is_no_faster_than_the_client_bears():
    rows = [
        {"phase": "decode", "b": n, "itl": 0.002 + n * 2e-5, "client_s": 80e-6}
        for n in (1, 8, 16, 32, 64, 128)
    ]
    rows.append({"phase": "prefill", "n_in": 2048, "ttft_p50": 0.03})
    load = chat(rows, begin_s=0.1, server=SERVER, share=0.65)
    (rate_rps,) = re.findall(r"\+([\d.]+)@", load.workload)
    assert (
        float(rate_rps) * 220 == pytest.approx(6_250, rel=0.01)
        and "the client would be the bottleneck" in load.note
    )
    assert not chat(rows, begin_s=0.1, server=SERVER, share=0.05).note
    assert "*8+" in mixed(rows, begin_s=0.1, server=SERVER, most=48).workload  # 16 / 2.3 ms are too many
