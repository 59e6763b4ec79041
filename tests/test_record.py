"""What a run leaves on disk appears whole or not at all."""

import csv
import json
import os
import subprocess
import sys

import pytest

from fuel_ray.control import StepRecord
from fuel_ray.errors import ConfigError
from fuel_ray.guard import Verdict
from fuel_ray.metrics import EpisodeTotals
from fuel_ray.record import (
    fetch,
    make_folder,
    new_folder,
    publish,
    read_csv,
    read_json,
    step_line,
    summary_fields,
    versions,
    write_csv,
    write_json,
    write_lines,
)
from fuel_ray.types import Knobs, Slo
from tests.test_codec import WINDOW
from tests.test_metrics import FOUR


def test_json_survives_and_leaves_no_partial_file(tmp_path):
    write_json(tmp_path / "run.json", {"steps": 10, "seeds": [1, 2]})
    write_json(tmp_path / "run.json", {"steps": 20})
    assert read_json(tmp_path / "run.json") == {"steps": 20}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    write_lines(tmp_path / "steps.jsonl", ["old"])

    def lines():
        yield "new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_lines(tmp_path / "steps.jsonl", lines())
    assert (tmp_path / "steps.jsonl").read_text() == "old\n"


@pytest.mark.parametrize("text", [None, "{", "\x00"])
def test_json_that_is_not_there_or_is_cut_short_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.json"):
        read_json(tmp_path / "run.json")


def test_what_is_unknown_is_an_empty_field(tmp_path):
    write_csv(
        tmp_path / "summary.csv", [{"policy": "a, b", "ttft_mean_s": None}, {"policy": "c", "ttft_mean_s": 1}]
    )
    with (tmp_path / "summary.csv").open() as file:
        assert list(csv.reader(file)) == [["policy", "ttft_mean_s"], ["a, b", ""], ["c", "1"]]


def test_rows_that_cannot_be_written_leave_the_old_table(tmp_path):
    path = tmp_path / "summary.csv"
    write_csv(path, [{"seed": 1}])
    assert [file.name for file in tmp_path.iterdir()] == ["summary.csv"]
    with pytest.raises(ValueError, match="policy"):
        write_csv(path, [{"seed": 2}, {"seed": 3, "policy": "dqn"}])
    assert path.read_text().split() == ["seed", "1"]


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(tmp_path):
    assert len({new_folder(tmp_path, "deploy") for _ in range(5)}) == 5


def test_a_folder_below_a_file_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/below"):
        make_folder(tmp_path / "file" / "below")


def test_the_summary_has_the_columns_of_the_contract():
    totals = EpisodeTotals()
    totals.add(WINDOW)
    fields = summary_fields(totals.summary(FOUR, Slo(1.0)))
    figures = {
        f"{name}_{figure}" for name in ("ttft", "tpot", "e2e") for figure in ("mean_s", "p50_s", "p99_s")
    }
    counts = {"energy_j", "energy_j_per_request", "energy_j_per_output_token", "slo_attainment", "requests",
              "preemptions", "mean_gpu_clock_mhz", "mean_batch_limit"}  # fmt: skip
    assert figures | counts <= set(fields)
    assert all(not isinstance(value, dict) for value in fields.values())


def test_a_step_line_says_what_was_chosen_and_what_was_in_force():
    record = StepRecord(3, Knobs(8, 1000), Knobs(8, 990), WINDOW, -0.25, Verdict(Knobs(8, 1000)))
    line = json.loads(step_line(record, time_s=3.0, labels={"policy": "dqn", "seed": 1}))
    assert (line["policy"], line["step"], line["reward"]) == ("dqn", 3, -0.25)
    assert line["chosen"] == {"batch_limit": 8, "gpu_clock_mhz": 1000}
    assert line["applied"] == {"batch_limit": 8, "gpu_clock_mhz": 990}
    assert line["power_w"] == 450.0  # 900 J in 2 s


def test_versions_name_what_makes_the_numbers():
    assert {"python", "fuel_ray", "ray", "torch", "numpy", "numba"} <= set(versions())


def test_a_runs_files_go_to_storage_and_come_back_without_tunes(tmp_path):
    run_dir = tmp_path / "here/sweep-1"
    for name in ("run.json", "policies/block_16/manifest.json", "tune/trial/checkpoint"):
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text(name)
    storage = f"file://{tmp_path}/shared"
    publish(run_dir, storage)
    assert not (tmp_path / "shared/sweep-1/tune").exists()
    (tmp_path / "shared/sweep-1/tune").mkdir()
    (tmp_path / "shared/sweep-1/tune/experiment").write_text("Tune's")
    elsewhere = tmp_path / "there/sweep-1"
    fetch(elsewhere, storage)
    found = {str(path.relative_to(elsewhere)) for path in elsewhere.rglob("*") if path.is_file()}
    assert found == {"run.json", "policies/block_16/manifest.json"}
    assert (elsewhere / "run.json").read_text() == "run.json"


@pytest.mark.parametrize("storage", ["gopher://nowhere/x", "file:///proc/nowhere"])
def test_storage_that_cannot_be_used_is_named(storage, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"--storage {storage}"):
        publish(tmp_path, storage)


def test_tables_are_the_same_text_whatever_the_locale(tmp_path):
    code = (
        "import sys; from pathlib import Path; from fuel_ray.record import update_csv\n"
        "rows = [{'block_size': size, 'workload': chr(252)} for size in (8, 16)]\n"
        "for row in rows: update_csv(Path(sys.argv[1]), [row])"
    )
    plain = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "t.csv")], env=plain, check=True)
    assert [row["workload"] for row in read_csv(tmp_path / "t.csv")] == ["ü", "ü"]
