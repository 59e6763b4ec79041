"""No clock axis was measured, so no saving over the clock is called so, except on a live node."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

from fuel_ray.arena.advice import recommendation
from fuel_ray.arena.comparison import summarise
from fuel_ray.arena.config import EvaluateConfig
from fuel_ray.arena.evaluation import comparison
from fuel_ray.arena.tables import headline, markdown, text
from fuel_ray.config import LiveConfig
from fuel_ray.deploy.recorder import Recorder
from fuel_ray.report.sections import summary_table, write_report
from fuel_ray.sim.pack import load_pack, pack_names
from fuel_ray.types import Slo
from tests.test_arena import CELL, pair
from tests.test_exporter import record
from tests.test_report import AXES, Synthetic, write_run

ROOT = Path(__file__).parent.parent
MEASURED = re.compile(r"\bmeasured\b", re.IGNORECASE)
SAVING = re.compile(
    r"\bsav(ed|es|ings?)\b|% (less|more)\b|\b(less|more) than under\b|\bvs\b|[+−-]\d+(\.\d+)? ?%",
    re.IGNORECASE,
)


def beside_each_other(shown):
    """Lines and paragraphs that have both a saving and the word."""
    return [line for line in shown.splitlines() if SAVING.search(line) and MEASURED.search(line)]


def as_lines(page):
    """What a page shows, a line for each block of it."""
    page = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    page = re.sub(r'<img [^>]*alt="([^"]*)"[^>]*>', r"\n\1\n", page).replace("\u00a0", " ")
    page = re.sub(r"</?(p|h\d|div|tr|dt|dd|figcaption|summary|li|thead|tbody)\b[^>]*>", "\n", page)
    return re.sub(r"<[^>]+>", " ", page)


@pytest.mark.parametrize(
    "line",
    [
        "12.0 % less than under the load table, measured",
        "Measured: it saved 40 J",
        "| measured vs max | -3.1 |",
    ],
)
def test_the_search_finds_what_it_is_for(line):
    assert beside_each_other(line) and not beside_each_other(line.replace("easured", "odelled"))


def test_a_sweeps_report_and_table_never_call_a_saving_measured(tmp_path):
    """With the notes of all packs, by which alone their reports differ here."""
    packs = [load_pack(name) for name in pack_names()]
    notes = " ".join(f"Measured: {pack.measured}. Transferred: {pack.transferred}." for pack in packs)
    axis_notes = " ".join(dict.fromkeys(pack.clock_axis_notes for pack in packs))
    shape = Synthetic(block_sizes=(8, 16), axes=AXES, notes=notes, axis_notes=axis_notes)
    run = write_run(tmp_path / "run", shape)
    page, table = as_lines(write_report(run).read_text()), summary_table(run)
    assert all(pack.measured in page and pack.clock_axis_notes in page for pack in packs)
    assert not re.search(r"launch_spread|prefill_clock", page)
    assert "\nassumed\n600 output tokens" in re.sub(r"\s*\n\s*", "\n", page)
    for shown in (page, table):
        assert len(SAVING.findall(shown)) > 10 and "Modelled, not measured" in shown
        assert beside_each_other(shown) == []


@pytest.mark.parametrize("axis", ["nominal", "low"])
def test_an_evaluations_table_calls_savings_measured_on_a_live_node_only(axis):
    rows = [
        {"policy": name, "block_size": 16, "seed": seed, "slo_attainment": 1.0, "ttft_p50_s": 0.1,
         "tpot_p50_s": 0.02, "e2e_mean_s": 2.0, "energy_j_per_request": energy_j}
        for name, energy_j in (("max_performance", 70.0), ("dqn", 40.0)) for seed in (1, 2)
    ]  # fmt: skip
    twin = replace(EvaluateConfig(), clock_axis=axis)
    shown = comparison(rows, twin, partial=False)
    assert "modelled, pack" in shown and not MEASURED.search(shown)
    live = comparison(rows, replace(twin, node="live", live=LiveConfig(model="m")), partial=False)
    assert "measured on a live node" in live and "modelled" not in live


def test_an_arenas_tables_and_a_recommendation_never_say_measured():
    cell = {**CELL, "rows": [*CELL["rows"], *_as("load_table", CELL["rows"])]}
    summaries = summarise(cell)
    pairs = [pair("tuned_static", 16, (100.0, 101.0)), pair("dqn", 16, (80.0, 81.0))]
    said = recommendation(pairs, share=0.95)[1]
    assert SAVING.search(said)
    for shown in (text(summaries), markdown(summaries), headline(summaries, "dqn"), said):
        assert not MEASURED.search(shown)


def _as(name, rows):
    return [{**row, "policy": name} for row in rows if row["policy"] == "tuned_static"]


@pytest.mark.parametrize("shadow", [False, True])
def test_a_deployments_estimate_is_called_modelled(shadow, tmp_path):
    recorder = Recorder(tmp_path, {"config": {"shadow": shadow}}, Slo(1.0))
    recorder.measured(record(), decision_s=0.001, saved_j=50.0)
    lines = [line for line in recorder.summary_text().splitlines() if "saved" in line]
    assert len(lines) == 1 and "modelled" in lines[0]
    recorder.close()
    for written in ("run.json", "steps.jsonl"):
        keys = re.findall(r'"(\w*saved\w*)"', (tmp_path / written).read_text())
        assert set(keys) == {"saved_j_modelled"}


def test_no_text_of_the_program_has_a_saving_beside_the_word():
    """Export, watch and the exporter's page among them."""
    for path in (ROOT / "fuel_ray").rglob("*.py"):
        for said in _texts(ast.parse(path.read_text())):
            if re.search(r"\bsav(ed|ings?)", said, re.IGNORECASE):
                assert not MEASURED.search(said), f"{path}: {said}"
                if "deploy" in path.parts and " " in said:
                    assert "odelled" in said or "would have" in said, f"{path}: {said}"


def _texts(tree):
    """Its texts, each f-string as one, without docstrings."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value for part in node.values if isinstance(part, ast.Constant))
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and not {id(node)} & (inside | docs)
        ):
            yield node.value
