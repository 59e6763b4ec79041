"""The report of a synthetic run folder: invented numbers, realistic shapes."""

import csv
import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest

from fuel_ray.errors import ConfigError
from fuel_ray.policies.catalogue import JUDGED_BY, label
from fuel_ray.report.data import (
    ENERGY,
    Run,
    energy_against,
    energy_over_axes,
    load_run,
    mean_over_axes,
    where,
)
from fuel_ray.report.sections import summary_table, write_report
from fuel_ray.report.text import origin

BLOCK_SIZES = (8, 16, 32, 64)
POLICIES = ("max_performance", "tuned_static", "load_table", "dqn")
WORKLOADS = ("diurnal", "steady")
CLOCKS = np.array([705, 810, 900, 1005, 1110, 1200, 1290, 1350, 1410, 1605, 1800, 1980])
LIMITS = np.array([4, 8, 16, 24, 32, 48, 64, 96, 128, 256])
ENERGY_J = {
    "diurnal": {"max_performance": 73.0, "tuned_static": 51.9, "load_table": 48.3, "dqn": 50.1},
    "steady": {"max_performance": 78.0, "tuned_static": 56.0, "load_table": 56.1, "dqn": 56.2},
}
ATTAINMENT = {"max_performance": 0.998, "tuned_static": 0.962, "load_table": 0.957, "dqn": 0.958}
CLOCK_MHZ = {"max_performance": 1980, "tuned_static": 1350, "load_table": 1280, "dqn": 1300}
AXES = (("high", 1.1), ("nominal", 1.0), ("low", 0.8))
AXIS_HEADS = [
    *(f"vs {label(name)}" for name in JUDGED_BY),
    "SLO attainment",
    "GPU clock (MHz)",
]
AXIS_NOTES = "Comparisons with maximum performance depend on 1830 to 1980 MHz."
LIMIT = {"max_performance": 256, "tuned_static": 48, "load_table": 52, "dqn": 58}


@dataclass(frozen=True)
class Synthetic:
    """What a test varies in the synthetic run."""

    block_sizes: tuple[int, ...] = BLOCK_SIZES
    policies: tuple[str, ...] = POLICIES
    workloads: tuple[str, ...] = WORKLOADS
    seeds: int = 10
    windows: int = 60
    block_effect: float = 0.0  # extra energy at the largest block size, as a fraction
    learned_energy: float = 1.0  # factor on the learned policy's energy
    learned_attainment: float = 0.958
    pack: str = "synthetic-pack"
    command: str = "python experiments/sweep_block_size.py"
    unsupported: tuple[tuple[str, str], ...] = ()
    axes: tuple[tuple[str, float], ...] = ()  # clock axes and how much more maximum performance uses there
    axis_seeds: int = 2
    notes: str = "Synthetic: invented for a test, not a GPU."
    axis_notes: str = ""


def write_run(folder, shape=Synthetic()):
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    _write_csv(folder / "summary.csv", _summary_rows(shape, rng))
    _write_csv(folder / "learning.csv", _learning_rows(shape, rng))
    if shape.axes:
        _write_csv(folder / "clock_axes.csv", _axis_rows(shape))
    with (folder / "steps.jsonl").open("w") as file:
        for step in _steps(shape, rng):
            file.write(json.dumps(step) + "\n")
    (folder / "run.json").write_text(json.dumps(_run_info(shape)))
    return folder


def _write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _summary_rows(shape, rng):
    seed_effects = rng.normal(1.0, 0.02, size=shape.seeds)  # a heavy day is heavy for every policy
    return [
        _summary_row(shape, size, policy, workload, seed, effect * rng.normal(1.0, 0.003))
        for size in shape.block_sizes
        for policy in shape.policies
        for workload in shape.workloads
        for seed, effect in enumerate(seed_effects, start=1000)
    ]


def _axis_rows(shape):
    return [
        {"clock_axis": axis, **row, **({ENERGY: row[ENERGY] * factor} if fastest(row) else {})}
        for axis, factor in shape.axes
        for row in _summary_rows(replace(shape, seeds=shape.axis_seeds), np.random.default_rng(0))
        if row["workload"] == WORKLOADS[0]
    ]


def fastest(row):
    return row["policy"] == "max_performance"


def _summary_row(shape, size, policy, workload, seed, effect):
    learned = policy == "dqn"
    block = 1.0 + shape.block_effect * (size == max(shape.block_sizes))
    energy = (
        ENERGY_J[workload].get(policy, 60.0) * effect * block * (shape.learned_energy if learned else 1.0)
    )
    attained = shape.learned_attainment if learned else ATTAINMENT.get(policy, 0.97)
    slack = 1.98 - CLOCK_MHZ.get(policy, 1300) / 1000
    return {
        "block_size": size,
        "policy": policy,
        "workload": workload,
        "seed": seed,
        "energy_j": energy * 7800,
        "energy_j_per_request": energy,
        "energy_j_per_output_token": energy / 220,
        "slo_attainment": min(1.0, attained + 0.1 * (effect - 1)),
        **{
            f"{name}_{part}_s": base * factor * (1 + slack)
            for name, base in (("ttft", 0.09), ("tpot", 0.016), ("e2e", 3.6))
            for part, factor in (("mean", 1.0), ("p50", 0.8), ("p99", 3.0 if name != "ttft" else 9.0))
        },
        "requests": 7800,
        "preemptions": 12,
        "mean_gpu_clock_mhz": CLOCK_MHZ.get(policy, 1300),
        "mean_batch_limit": LIMIT.get(policy, 40),
        "clock_switches": {"load_table": 61, "dqn": 143}.get(policy, 0),
        "workload_digest": f"{workload}{seed:04d}" * 4,
    }


def _learning_rows(shape, rng):
    return [
        {
            "block_size": size,
            "env_steps": 2048 * (row + 1),
            "reward": "" if row == 0 else -1.2 + 0.8 * (1 - np.exp(-row / 12)) + rng.normal(0, 0.03),
            "energy_j_per_request": "" if row == 0 else 50 + 25 * np.exp(-row / 12) + rng.normal(0, 0.7),
            "slo_attainment": "" if row == 0 else 0.95 + rng.normal(0, 0.01),
        }
        for size in shape.block_sizes
        for row in range(60)
    ]


def _steps(shape, rng):
    for size in shape.block_sizes:
        for workload in shape.workloads:
            time_s = np.arange(shape.windows, dtype=float)
            phase = 2 * np.pi * time_s / max(shape.windows, 2)
            rate = 5.0 + 0 * phase if workload == "steady" else 6.5 - 5.5 * np.cos(phase)
            arrivals = rng.poisson(rate)
            for policy in shape.policies:
                yield from _policy_steps(size, policy, workload, time_s, rate, arrivals, rng)


def _policy_steps(size, policy, workload, time_s, rate, arrivals, rng):
    clock, limit = _knobs(policy, rate, rng)
    running = np.minimum(limit, rng.poisson(rate * 2.2 * (1.98 / (clock / 1000)) ** 0.7))
    waiting = rng.poisson(np.where(rate > 11, 6.0, 0.2))
    for i in range(len(time_s)):
        knobs = {"batch_limit": int(limit[i]), "gpu_clock_mhz": int(clock[i])}
        yield {
            "block_size": size,
            "policy": policy,
            "workload": workload,
            "seed": 1000,
            "step": i,
            "time_s": float(time_s[i]),
            "chosen": knobs,
            "applied": knobs,
            "reward": -0.5,
            "arrivals": int(arrivals[i]),
            "completed": int(arrivals[i]),
            "running": int(running[i]),
            "waiting": int(waiting[i]),
            "kv_usage": 0.5,
            "power_w": 300.0,
            "oldest_wait_s": 0.1,
        }


def _knobs(policy, rate, rng):
    if policy in ("max_performance", "tuned_static"):
        return np.full(len(rate), CLOCK_MHZ[policy]), np.full(len(rate), LIMIT[policy])
    noise = 0 if policy == "load_table" else rng.integers(-1, 2, size=len(rate))
    level = np.clip(np.round(rate / 1.5) + noise, 0, len(CLOCKS) - 2).astype(int)
    return CLOCKS[level], LIMITS[np.clip(level + 1, 0, len(LIMITS) - 1)]


def _run_info(shape):
    tuned = {
        "tuned_static": {"batch_limit": 48, "gpu_clock_mhz": 1350},
        "load_table": {
            "rates_rps": [3.0, 6.0, 9.0],
            "knobs": [[24, 900], [48, 1110], [48, 1290], [64, 1500]],
        },
    }
    return {
        "config": {
            "preset": "default",
            "pack": shape.pack,
            "workload": "diurnal",
            "control_workload": "steady",
            "slo_ttft_s": 1.0,
            "slo_tpot_s": 0.05,
            "slo_e2e_s": None,
            "slo_share": 0.95,
            "kv_tokens": 26000,
            "block_sizes": list(shape.block_sizes),
            "reward": {"name": "energy", "slo_penalty": 5.0},
        },
        "versions": {"python": "3.11.9", "ray": "2.60.0", "torch": "2.13.0", "numpy": "2.4.6"},
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "seeds": {
            "training": 0,
            "tuning": [100, 101, 102],
            "evaluation": list(range(1000, 1000 + shape.seeds)),
        },
        "wall_time_s": 512.4,
        "started": "2026-11-30T10:12:00+00:00",
        "command": shape.command,
        "pack": {
            "name": shape.pack,
            "sha256": "ab" * 32,
            "notes": shape.notes,
            "clock_axis_notes": shape.axis_notes,
        },
        "tuned": {str(size): tuned for size in shape.block_sizes},
        "unsupported": dict(shape.unsupported),
    }


def report_of(folder, **shape):
    return write_report(write_run(folder, Synthetic(**shape))).read_text()


def table_of(folder, **shape):
    return summary_table(write_run(folder, Synthetic(**shape)))


@pytest.fixture(scope="module")
def full_report(tmp_path_factory):
    path = write_report(write_run(tmp_path_factory.mktemp("full") / "run"))
    return path, path.read_text()


def prose(page):
    return page.replace("\u00a0", " ")


def test_the_report_is_one_small_file_that_loads_nothing(full_report):
    path, page = full_report
    assert path.name == "report.html"
    assert path.stat().st_size < 3_000_000
    assert re.search(r"https?://", page) is None
    assert "<script" not in page and "<link" not in page and "@import" not in page and "url(" not in page
    sources = re.findall(r'\ssrc="([^"]{5})', page)
    assert sources == ["data:"] * 7  # learning, scatter, four time plots, heat maps
    assert page.count("<figcaption>") == 7


def test_the_headline_gives_savings_attainment_interval_and_n(full_report):
    page = prose(full_report[1])
    headline = re.search(r'<p class="headline">(.*?)</p>', page)[1]
    uses = (
        r"The learned policy uses 3\.\d % less energy per request than tuned static and \d\.\d % more than "
    )
    assert re.match(f"{uses}the load table", headline)
    assert headline.endswith("Its SLO attainment is 95.8 %; the target is 95.0 %.")
    first = page.split("<h2>")[0]
    assert (
        "Modelled, not measured" in first and "synthetic-pack" in first and "n = 10 held-out seeds" in first
    )
    against = re.search(
        r"<b>([^<]*)</b><strong>J/request vs maximum performance</strong><span>(.*?)</span>", first
    )
    assert re.fullmatch(r"−3\d\.\d %", against[1])
    assert re.fullmatch(r"95 % interval: −3\d\.\d to −3\d\.\d %", against[2])


def test_the_parts_come_in_order(full_report):
    headings = re.findall(r"<h2>(.*?)</h2>", full_report[1])
    assert headings == [
        "How to read this",
        "Results on the diurnal workload",
        "How much depends on the model?",
        "Do the block sizes differ?",
        "Learning",
        "Energy against SLO attainment",
        "What each policy chose over time",
        "What the learned policy chose",
        "Negative control: the steady workload",
        "How this run was made",
    ]


def test_equal_block_sizes_are_said_not_to_differ(full_report):
    assert "The block sizes do not differ for the learned policy" in full_report[1]


def test_unequal_block_sizes_are_said_to_differ(tmp_path):
    page = table_of(tmp_path / "run", block_effect=0.04, workloads=("diurnal",))
    assert "The block sizes differ for the learned policy: block size 64 uses" in page
    assert "3 of 6 pairs differ" in page


def test_a_missed_attainment_target_is_bad_news(tmp_path):
    page = prose(report_of(tmp_path / "run", learned_attainment=0.92, block_sizes=(8,)))
    assert 'class="headline bad">Bad news: the SLO is missed. ' in page
    assert re.search(r'<td class="bad">9[12]', page)
    assert "miss the SLO attainment target of 95.0 %: learned (DQN) at block size 8 (92" in page


def test_a_policy_that_loses_to_a_fixed_pair_is_bad_news(tmp_path):
    page = table_of(tmp_path / "run", learned_energy=1.08, block_sizes=(8, 16))
    assert "Bad news: tuned static uses less energy. The learned policy uses" in page
    assert "more energy without a reason" in page


def test_a_policy_that_saves_nothing_is_bad_news(tmp_path):
    assert "Bad news: nothing is saved" in table_of(tmp_path / "run", learned_energy=1.6, block_sizes=(8, 16))


def test_a_gain_under_the_negative_control_is_distrusted(tmp_path):
    assert "distrust the comparison" in table_of(tmp_path / "run", learned_energy=0.9, block_sizes=(16,))


def test_a_run_of_one_block_size_without_control_or_baseline(tmp_path):
    page = report_of(
        tmp_path / "run",
        block_sizes=(32,),
        policies=("max_performance", "dqn"),
        workloads=("diurnal",),
        unsupported=(("8", "no attention backend takes it"),),
    )
    assert "block sizes cannot be compared" in page
    assert "Negative control" not in page and "than tuned static" not in page
    assert "Block size 8 was not evaluated: no attention backend takes it" in page


def test_a_run_without_a_learned_policy_and_one_with_a_further_baseline(tmp_path):
    page = report_of(
        tmp_path / "run", block_sizes=(16,), policies=("max_performance", "clipper", "pack.age:Rule")
    )
    assert "no learned policy" in page
    assert "Clipper" in page and "pack.age:Rule" in page and "a further baseline" in page


def test_one_seed_claims_no_interval(tmp_path):
    page = report_of(tmp_path / "run", seeds=1, block_sizes=(16, 32), policies=("max_performance", "dqn"))
    assert "One seed gives no interval" in page
    assert "nan" not in re.sub(r"data:[^\"]*", "", page)


def test_seeds_that_all_agree_can_be_drawn(tmp_path):
    folder = write_run(tmp_path / "run", Synthetic(block_sizes=(16,), workloads=("diurnal",)))
    rows = list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))
    _write_csv(folder / "summary.csv", [{**row, "slo_attainment": 0.1, ENERGY: 50.1} for row in rows])
    assert "as much energy per request as tuned static" in prose(write_report(folder).read_text())


def test_a_run_without_windows_learning_or_optional_keys_still_has_its_tables(tmp_path):
    folder = write_run(tmp_path / "run", Synthetic(block_sizes=(8, 16)))
    (folder / "steps.jsonl").unlink()
    (folder / "learning.csv").write_text("")
    (folder / "run.json").write_text("{}")
    page = write_report(folder).read_text()
    assert "Results on the diurnal workload" in page
    assert "Learning</h2>" not in page and "chose over time" not in page


def test_strings_from_files_are_escaped(tmp_path):
    evil = "<img src=x onerror=alert(1)>$\\frac"
    page = report_of(tmp_path / "run", pack=evil, command=evil, policies=(*POLICIES, evil), block_sizes=(16,))
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page


def test_policies_that_faced_different_requests_are_called_out(tmp_path):
    folder = write_run(tmp_path / "run", Synthetic(block_sizes=(16,)))
    summary = (folder / "summary.csv").read_text()
    (folder / "summary.csv").write_text(summary.replace("diurnal1000" * 4, "other", 1))
    assert "policies served different requests" in summary_table(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.csv", None, "summary.csv"),
        ("summary.csv", "block_size,policy\n8,dqn\n", "has no column workload"),
        ("run.json", "{", "run.json"),
        ("steps.jsonl", '{"block_size": 8}\n', "steps.jsonl"),
    ],
)
def test_a_folder_that_is_not_a_finished_run_is_named(tmp_path, name, content, message):
    folder = write_run(tmp_path / "run", Synthetic(block_sizes=(16,)))
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_the_terminal_table_has_a_row_per_policy_and_the_answer(full_report):
    text = summary_table(full_report[0].parent)
    lines = text.splitlines()
    assert sum("learned (DQN)" in line for line in lines) == 2 * len(BLOCK_SIZES)
    assert max(len(line) for line in lines if "tuned static  " in line) <= 140
    assert "The learned policy uses 3." in text and "do not differ" in text
    assert text.isascii()


# The clock axes


@pytest.fixture(scope="module")
def axes_run(tmp_path_factory):
    shape = Synthetic(block_sizes=(16, 32), seeds=5, axes=AXES, axis_notes=AXIS_NOTES)
    return write_run(tmp_path_factory.mktemp("axes") / "run", shape)


def test_the_report_gives_the_band_over_the_clock_axes_beside_each_number_and_in_a_sentence(axes_run):
    page = prose(write_report(axes_run).read_text())
    headline = re.search(r'<p class="headline">(.*?)</p>', page)[1]
    assert "clock ax" not in headline
    assert re.search(r"<span>3 clock axes: −3\d\.\d to −1\d\.\d %</span>", page.split("<h2>")[0])
    (bands,) = re.findall(r"Under the 3 clock axes .*?\.</p>", page)
    assert re.search(r"−3\d\.\d to −1\d\.\d % vs maximum performance", bands)
    assert re.search(r"Its SLO attainment is 9\d\.\d to 9\d\.\d %", bands)
    assert "evaluated on 2 of the 5 held-out seeds" in page


def test_the_section_on_the_clock_axis_says_what_rests_on_it_and_has_the_band_of_each_policy(axes_run):
    page = prose(write_report(axes_run).read_text())
    section = page.split("How much depends on the model?")[1].split("<h2>")[0]
    assert f"so is every saving. {AXIS_NOTES}" in section
    assert "under 3 axes (nominal, high, low)" in section
    heads = re.findall(r"<th [^>]*>(.*?)</th>", section)
    assert heads == ["policy", *AXIS_HEADS]
    row = re.search(r"</i>tuned static</td>(.*?)</tr>", section)[1]
    assert re.search(r"−2\d\.\d %<small>−3\d\.\d to −1\d\.\d</small>", row)
    assert "1350</td>" in row  # the pair's clock, which no axis changes


def test_the_terminals_table_of_the_clock_axes_has_columns_apart(axes_run):
    shown = summary_table(axes_run)
    lines = shown.split("clock axes\n")[1].splitlines()
    last = next(i for i, line in enumerate(lines) if line.lstrip().startswith("policy"))
    assert sorted(" ".join(lines[: last + 1]).split()) == sorted(" ".join(["policy", *AXIS_HEADS]).split())
    rows = lines[last + 1 : last + 5]
    assert [len(re.split(r"  +", line.strip())) for line in rows] == [7] * 4
    assert len({len(line) for line in rows}) == 1 and len(rows[0]) <= 165
    assert shown.isascii()


def test_no_band_over_the_clock_axes_leaves_out_the_figure_of_all_seeds(tmp_path):
    """The seeds on which every axis was played are few, and may be hard ones."""
    folder = write_run(tmp_path / "run", Synthetic(block_sizes=(16,), seeds=5, axes=AXES))
    for name in ("summary.csv", "clock_axes.csv"):
        rows = pd.read_csv(folder / name)
        hard = rows.seed < 1002
        rows.slo_attainment = rows.slo_attainment.mask(hard, 0.90).mask(~hard, 0.999)
        rows.energy_j_per_request *= 1 + 0.1 * (hard & (rows.policy == "dqn"))
        rows.to_csv(folder / name, index=False)
    run = load_run(folder)
    against = ("dqn", "max_performance")
    ratios = energy_over_axes(run, *against)
    assert ratios[0] == pytest.approx(energy_against(run, *against, workload=WORKLOADS[0]).mean)
    under_high = energy_against(replace(run, summary=where(run.axes, clock_axis="high")), *against,
                                workload=WORKLOADS[0]).mean  # fmt: skip
    under_nominal = energy_against(replace(run, summary=where(run.axes, clock_axis="nominal")), *against,
                                   workload=WORKLOADS[0]).mean  # fmt: skip
    assert ratios[1] - ratios[0] == pytest.approx(under_high - under_nominal)
    shares = mean_over_axes(run, "slo_attainment", "dqn")
    assert shares == pytest.approx([(2 * 0.90 + 3 * 0.999) / 5] * 3)
    assert "evaluated on 2 of the 5 held-out seeds" in prose(write_report(folder).read_text())


def test_a_run_without_other_axes_still_says_what_its_savings_rest_on(tmp_path):
    page = report_of(tmp_path / "run", block_sizes=(16,), axis_notes=AXIS_NOTES)
    assert AXIS_NOTES in page and "Under the" not in page


def test_a_band_on_both_sides_of_nothing_is_said_as_such(tmp_path):
    axes = (("nominal", 1.0), ("low", 0.6))
    page = prose(report_of(tmp_path / "run", block_sizes=(16,), axes=axes, seeds=2))
    assert "evaluated on all 2 held-out seeds" in page
    assert re.search(r"−31\.\d to \+1\d\.\d % vs maximum performance", page)


def test_importing_fuel_ray_does_not_import_matplotlib():
    code = "import sys, fuel_ray, fuel_ray.commands, fuel_ray.stats; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(("info", "config"), [({"origin": "measured"}, {}), ({}, {"backend": "live"})])
def test_what_was_measured_is_not_called_modelled(info, config):
    rows = pd.DataFrame()
    assert origin(Run("run", info, config, rows, rows, rows, rows)) == "Measured on hardware."
