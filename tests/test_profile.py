"""Profiling a node: what is measured on the twin leads calibrate back to the twin."""

import json
from pathlib import Path

import pytest

from fuel_ray.cli import main
from fuel_ray.commands import profile as verb
from fuel_ray.errors import GpuError
from fuel_ray.sim.pack import load_pack

DATA = Path(__file__).parent / "data"
CLOCKS = ("1980", "1740", "1500", "1245", "990")


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    assert main(["profile", "--out", str(folder), "--clocks-mhz", *CLOCKS]) == 0
    (path,) = folder.glob("profile-*/profile.jsonl")
    return path


def test_a_pack_calibrated_to_a_profile_of_the_twin_is_the_twin(profile, tmp_path, capsys):
    out = tmp_path / "pack.json"
    flags = ["--name", "again", "--gpu", "NVIDIA H100", "--out", str(out), "--power-cap-w", "700"]
    assert main(["calibrate", "--profile", str(profile), *flags]) == 0
    assert "dropped" not in capsys.readouterr().out
    twin, again = load_pack("h100-qwen3-8b").perf, load_pack(str(out)).perf
    for clock_mhz in map(int, CLOCKS):
        for n in (1, 8, 32, 96):
            expected_s, expected_w, _ = twin.step_cost(n, n * 700, 0, clock_mhz)
            step_s, power_w, _ = again.step_cost(n, n * 700, 0, clock_mhz)
            assert step_s == pytest.approx(expected_s, rel=0.03)
            assert power_w == pytest.approx(expected_w, rel=0.03)


def test_a_profile_says_where_it_was_taken(profile):
    rows = [json.loads(line) for line in profile.read_text().splitlines()]
    run = json.loads((profile.parent / "run.json").read_text())
    assert run["origin"] == "modelled, pack h100-qwen3-8b"
    assert {row["clock_mhz"] for row in rows} == set(map(int, CLOCKS))
    assert {row["phase"] for row in rows} == {"idle", "decode", "prefill", "prefill_sustained"}
    lower, higher = ([r for r in rows if r["phase"] == "decode" and r["clock_mhz"] == c] for c in (990, 1980))
    assert all(
        a["itl"] > b["itl"] and a["power_w"] < b["power_w"] for a, b in zip(lower, higher, strict=True)
    )


def test_a_batch_that_does_not_fit_the_kv_pool_is_skipped_and_said(tmp_path, capsys):
    flags = ["--kv-tokens", "8000", "--clocks-mhz", "1980", "--batches", "4", "64", "--contexts", "1024"]
    assert main(["profile", "--out", str(tmp_path), "--prompts", "128", *flags]) == 0
    assert "64 requests of 1024 tokens that decode together" in capsys.readouterr().out
    (path,) = tmp_path.glob("profile-*/profile.jsonl")
    decode = [row for row in map(json.loads, path.read_text().splitlines()) if row["phase"] == "decode"]
    assert [row["b"] for row in decode] == [4]


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
    build, built = verb.build_loop, []

    def failing(*arguments, **named):
        built.append(named["workload"])
        if len(built) == 4:
            raise GpuError("cannot read the power of GPU GPU-0: the GPU is lost")
        return build(*arguments, **named)

    monkeypatch.setattr(verb, "build_loop", failing)
    assert main(["profile", "--clocks-mhz", "1980", "--out", str(tmp_path)]) == 2
    (path,) = tmp_path.glob("profile-*/profile.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["phase"] for row in rows] == ["idle", "decode", "decode"]
    assert json.loads((path.parent / "run.json").read_text())["partial"]
    found = capsys.readouterr()
    assert f"ended early, 3 points are kept in {path}" in found.out and "the GPU is lost" in found.err
