"""How far a run is: what is said, and when it will end."""

import pickle
import re
import time

import pytest

from fuel_ray import progress
from fuel_ray.progress import UNSEEN, Bar, about, left_s


def lines(capsys):
    return capsys.readouterr().out.splitlines()


def test_where_there_is_no_terminal_a_line_says_stage_share_and_end(capsys):
    with Bar({"baselines": 30.0, "training": 90.0}) as bar:
        bar.stage("baselines")
        bar.stage("training")
        bar.at(0.5, "block 16")
    first, _, last = lines(capsys)
    assert re.match(r"\[  0%\]  baselines  \(0 s, about 2 min left\)$", first)
    assert last.startswith("[ 62%]  training  block 16  (")


def test_the_end_of_the_whole_run_is_foretold_not_that_of_the_stage():
    bar = Bar({"a": 10.0, "b": 30.0})
    bar.stage("a")
    bar.at(1.0)
    assert bar.done == pytest.approx(0.25)
    assert left_s(40.0, bar.done, 10.0) == pytest.approx(30.0)


@pytest.mark.parametrize("pace", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("done", [0.02, 0.1, 0.3, 0.49])
def test_before_half_of_it_no_run_of_a_minute_or_more_is_said_to_be_nearly_done(pace, done):
    expected_s = 300.0
    true_left_s = expected_s * pace * (1 - done)
    said_s = left_s(expected_s, done, expected_s * pace * done)
    assert said_s > 0.5 * min(true_left_s, expected_s * (1 - done))
    assert "0 min" not in about(said_s) and about(said_s) != "done"


def test_a_stage_that_takes_longer_than_expected_moves_the_end():
    assert left_s(100.0, 0.2, 60.0) > left_s(100.0, 0.2, 20.0)


def test_the_shares_of_rounds_add_up_to_the_run():
    bar, seen = Bar({"a": 1.0, "b": 1.0}), []
    for start in (0.0, 0.5):
        bar.part(start, start + 0.5)
        for name in ("a", "b"):
            bar.stage(name)
            seen.append(bar.done)
    assert seen == [0.0, 0.25, 0.5, 0.75]


def test_a_silent_stage_says_that_it_is_alive(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SILENT_S", 0.02)
    with Bar({"a": 1.0}) as bar:
        bar.stage("a")
        deadline_s = time.monotonic() + 5.0
        said = []
        while len(said) < 2 and time.monotonic() < deadline_s:
            said += lines(capsys)
    assert len(said) >= 2


def test_a_terminal_has_one_bar_with_the_end_of_the_run(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with Bar({"a": 60.0, "b": 60.0}) as bar:
        bar.stage("b")
        print("said beside it")
    shown = capsys.readouterr().out
    assert "b " in shown and "left" in shown and "said beside it" in shown and "[ 50%]" not in shown


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_narrow_terminal_cuts_the_words_and_keeps_the_end_of_the_run_in_one_line(
    capsys, monkeypatch, columns
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    with Bar({"training": 6000.0}) as bar:
        bar.stage("training")
        bar.at(
            0.5, "block   8   37,800/60,000 steps  exploring: 50.1 J/request  0.977 of SLO " + "and more " * 9
        )
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out).splitlines()[-1]
    assert "training  block" in last and "0:00:00" in last and re.search(r"about \d+ min left", last)


def test_a_run_that_is_a_stage_of_another_moves_its_bar_and_has_none(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with Bar({"profile": 60.0, "train": 60.0}, lines=False) as outer:
        outer.stage("train")
        with Bar({"a": 10.0, "b": 30.0}, around=outer) as inner:
            inner.stage("b")
            assert outer.done == pytest.approx(0.5 + 0.25 / 2)
    assert "train  b" in capsys.readouterr().out


def test_without_a_terminal_a_stage_of_another_run_says_its_own_lines(capsys):
    with (
        Bar({"train": 60.0}, lines=False) as outer,
        Bar({"a": 10.0, "b": 30.0}, around=outer) as inner,
    ):
        outer.stage("train")
        inner.stage("b")
    (line,) = lines(capsys)
    assert line.startswith("[ 25%]  b  (")


@pytest.mark.parametrize("bar", [UNSEEN, Bar({"a": 1.0})])
def test_who_is_called_without_a_bar_shows_nothing(bar, capsys):
    bar.stage("a")
    bar.at(1.0, "x")
    assert capsys.readouterr().out == ""


def test_a_copy_elsewhere_shows_nothing(capsys):
    with Bar({"a": 1.0}) as bar:
        copy = pickle.loads(pickle.dumps(bar))
        copy.stage("a")
    assert capsys.readouterr().out == ""
