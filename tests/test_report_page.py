"""The report in a browser: on a phone, in print, and the words of its sentences."""

import asyncio
import re

import pandas as pd
import pytest

from fuel_ray.policies.catalogue import JUDGED_BY, label
from fuel_ray.report import clocks, tables
from fuel_ray.report.data import load_run
from fuel_ray.report.page import Cell, page, table
from fuel_ray.report.text import headline, misses
from fuel_ray.report.wording import change, setting
from fuel_ray.sim.pack import load_pack
from tests.browser import CHROMIUM, opened
from tests.test_report import AXES, POLICIES, Synthetic, report_of, write_run

WIDER_THAN_PAGE = """
[...document.querySelectorAll('main *')].filter(e => {
  if (e.closest('.card, .scroll, pre') && !e.matches('.card, .scroll, pre')) return false;
  const box = e.getBoundingClientRect();
  return box.width && (box.right > document.documentElement.clientWidth + 1 || box.left < -1);
}).map(e => e.tagName + '.' + e.className)
"""
COLUMNS_OFF_PAGE = """
[...document.querySelectorAll('th, td')]
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .map(e => e.textContent)
"""
SCROLLED = """
(() => { const card = document.querySelector('.card'); card.scrollLeft = 400;
  const [first, second] = card.querySelectorAll('tr:not(.title) td');
  return [card.scrollLeft, first.getBoundingClientRect().left - card.getBoundingClientRect().left,
          second.getBoundingClientRect().left] })()
"""
A4_LANDSCAPE_PX = round((297 - 2 * 11) / 25.4 * 96)  # between its margins


async def _measured(file, profile):
    async with opened(file, profile) as shown:
        await shown.look(width=390)
        found = {"phone": await shown.value(WIDER_THAN_PAGE), "scrolled": await shown.value(SCROLLED)}
        await shown.look(width=A4_LANDSCAPE_PX, media="print")
        found["print"] = await shown.value(COLUMNS_OFF_PAGE)
        found["folded"] = await shown.value(
            "document.querySelector('details table').getBoundingClientRect().height"
        )
        return found | {"pdf": await shown.print()}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    policies = (*POLICIES[:3], "best_rule", "dqn")
    shape = Synthetic(block_sizes=(16,), policies=policies, windows=12, seeds=3, axes=AXES)
    folder = tmp_path_factory.mktemp("page")
    report_of(folder / "run", **{name: getattr(shape, name) for name in shape.__dataclass_fields__})
    return asyncio.run(_measured(folder / "run" / "report.html", folder / "profile"))


def test_nothing_is_wider_than_a_phone_but_what_scrolls(measured):
    assert measured["phone"] == []


def test_the_first_column_of_a_table_stays_when_the_table_is_scrolled(measured):
    scrolled, first, second = measured["scrolled"]
    assert scrolled > 100
    assert abs(first) <= 2 and second < 0


def test_print_has_every_column_and_what_is_folded_on_the_screen(measured):
    assert measured["print"] == []
    assert measured["folded"] > 0


def test_the_pdf_is_landscape(measured):
    width, height = map(float, re.search(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", measured["pdf"]).groups())
    assert width > height


def test_dark_is_for_screens_only():
    css = page("", [])
    assert "@media screen and (prefers-color-scheme: dark)" in css and "@media print" in css
    assert css.count("prefers-color-scheme") == 1


def test_a_target_inside_an_interval_is_not_said_to_be_met_for_sure(tmp_path):
    run = load_run(write_run(tmp_path / "run", Synthetic(block_sizes=(16,))))
    rows = run.summary
    rows.slo_attainment = rows.slo_attainment.mask((rows.policy == "dqn") & (rows.seed % 2 == 0), 0.945)
    said = misses(run, workload="diurnal")
    assert said.startswith("Every policy meets the SLO attainment target of 95.0 % on average.")
    assert re.search(r"95 % interval begins below it for .*learned \(DQN\) at block size 16", said)
    assert "on average, but the 95 % interval (94." in headline(run)


def test_every_comparison_has_one_name_and_nothing_is_without_a_sign(tmp_path):
    run = load_run(write_run(tmp_path / "run", Synthetic(block_sizes=(16,))))
    shown = tables.results(run, workload="diurnal")
    assert all(f">vs {label(name)}</th>" in shown for name in JUDGED_BY)
    assert "+0.0" not in shown and "-0.0" not in shown
    assert [change(ratio) for ratio in (0.9, 1.0002, 0.9997, 1.1)] == ["−10.0 %", "0.0 %", "0.0 %", "+10.0 %"]


def test_rates_are_rounded_and_rates_of_one_pair_are_one(tmp_path):
    folder = write_run(tmp_path / "run", Synthetic(block_sizes=(16,)))
    run = load_run(folder)
    table_of = {"rates_rps": [1.43633, 2.87265, 9.04], "knobs": [[40, 900], [40, 900], [40, 990], [40, 1515]]}
    run.info["tuned"]["16"]["load_table"] = table_of
    shown = tables.chosen_pairs(run)
    assert "up to 2.9 requests/s: 900 MHz; up to 9.0 requests/s: 990 MHz; above: 1515 MHz" in shown
    assert "; batch limit 40" in shown


@pytest.mark.parametrize(
    ("value", "text"),
    [([7, 8, 9], "7 to 9"), ([8, 16, 32], "8, 16, 32"), ([], "–"), (None, "–"), ("x", "x"), ([1, 2], "1, 2")],
)
def test_a_setting_is_written_as_people_would(value, text):
    assert setting(value) == text


def test_the_cells_of_a_heat_map_are_few_enough_for_numbers_and_hold_every_clock():
    clocks_mhz = pd.Series(range(900, 1981, 15))
    cells = clocks._clock_cells(clocks_mhz)
    assert len(cells.lows) <= 16 and not cells.single
    found = cells.of(clocks_mhz)
    assert found.min() == 0 and found.max() == len(cells.lows) - 1
    assert len(set(pd.Series(found).value_counts().iloc[1:-1])) == 1  # of one width
    few = clocks._clock_cells(pd.Series([900, 1350, 1980]))
    assert few.single and list(few.lows) == [900, 1350, 1980]


def test_the_clock_axis_has_a_band_with_the_clocks_that_each_policy_chose(tmp_path):
    run = load_run(write_run(tmp_path / "run", Synthetic(block_sizes=(16,), windows=12)))
    pack = load_pack("h100-qwen3-8b")
    band = clocks.band(run, pack, workload="diurnal")
    assert band.uri.startswith("data:image/svg+xml")
    assert f"lowest to highest of {len(pack.clock_axes)} axes" in band.caption


def test_print_keeps_a_short_table_on_one_page():
    rows = [[Cell("1"), Cell("2")]] * 8
    assert 'class="card short"' in table([Cell("a"), Cell("b")], [rows])
    assert 'class="card"' in table([Cell("a"), Cell("b")], [rows, rows])
    assert re.search(r"@media print \{.*\.short[^}]*\{ break-inside: avoid \}", page("", []), re.DOTALL)


def test_groups_of_a_table_have_a_title_each():
    shown = table([Cell("a"), Cell("b")], [[[Cell("1"), Cell("2")]], []], titles=["x", "y"])
    assert shown.count('<th colspan="2">') == 2
