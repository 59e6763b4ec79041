"""What counts as an acknowledgement of a batch limit, and what does not."""

from pathlib import Path

import pytest

from fuel_ray.errors import ConfigError
from fuel_ray.live.vllm.in_force import Acknowledgement, InForce
from fuel_ray.vllm_plugin import Report

CAPACITY = 32
NOTHING = Report(0, 0, 0, 0, 0, 0)
STARTED = Report(0, 0, 0, CAPACITY, CAPACITY, 5)  # before the first step
PATH = Path("/run/limit")


def step(number, batch_limit, *, running=1, at_ns=None):
    return Report(number, running, 0, batch_limit, CAPACITY, at_ns or 10 * number)


def asked(wanted=2, report=NOTHING, *, capacity=None):
    made = Acknowledgement(PATH, NOTHING, capacity=capacity)
    made.ask(wanted, report)
    return made


def busy(made, report, *, duration_s=1.0):
    return made.window(report, worked=True, duration_s=duration_s)


def idle(made, report):
    return made.window(report, worked=False, duration_s=1.0)


def test_a_step_after_the_request_acknowledges_it():
    made = asked(2, step(7, CAPACITY))
    assert made.now(step(7, CAPACITY)) == CAPACITY
    assert busy(made, step(8, 2)) == InForce(2, True)
    assert made.now(step(8, 2)) == 2


@pytest.mark.parametrize("began", [NOTHING, STARTED])
def test_traffic_without_a_step_is_not_in_force_and_the_capacity_is(began):
    made = asked(2, capacity=CAPACITY)
    assert busy(made, began) == InForce(CAPACITY, False)


def test_what_an_engine_begins_with_acknowledges_nothing():
    made = asked(CAPACITY, NOTHING)
    assert idle(made, STARTED) == InForce(CAPACITY, None)
    made.ask(5, STARTED)
    assert busy(made, STARTED._replace(batch_limit=5, monotonic_ns=6)) == InForce(CAPACITY, False)


def test_an_idle_server_acknowledges_nothing_and_that_is_no_error():
    made = asked(2)
    for _ in range(1000):
        assert idle(made, NOTHING) == InForce(None, None)
    made = asked(2, step(7, 8))
    assert idle(made, step(7, 8)) == InForce(8, None)  # the older limit is in force still


def test_a_limit_that_is_asked_again_stays_acknowledged_while_the_server_is_idle():
    made = asked(2)
    busy(made, step(1, 2))
    made.ask(2, step(1, 2))
    assert idle(made, step(1, 2)) == InForce(2, True)


def test_an_older_limit_is_in_force_until_the_next_step_however_long_that_takes():
    made = asked(8)
    busy(made, step(1, 8))
    made.ask(2, step(1, 8))
    assert busy(made, step(1, 8)) == InForce(8, False)  # a step of more than a window made its tokens
    assert busy(made, step(2, 2)) == InForce(2, True)


def test_a_step_under_way_when_it_was_asked_acknowledges_its_own_limit_only():
    made = asked(2, step(1, 8))
    assert busy(made, step(2, 8)) == InForce(8, False)


def test_running_above_a_limit_that_was_just_lowered_is_no_error():
    made = asked(2, step(1, CAPACITY, running=30))
    for number in range(2, 30):
        assert busy(made, step(number, 2, running=30 - number)) == InForce(2, True)


def test_a_plug_in_that_falls_silent_under_traffic_is_believed_for_a_while_only():
    made = asked(2)
    busy(made, step(1, 2))
    assert [busy(made, step(1, 2)) for _ in range(3)] == [InForce(2, True)] * 2 + [InForce(CAPACITY, False)]
    assert busy(made, step(2, 2)) == InForce(2, True)


def test_a_server_that_was_started_anew_has_acknowledged_nothing():
    made = asked(2)
    busy(made, step(9, 2))
    made.forget()
    assert busy(made, step(9, 2)) == InForce(CAPACITY, False)
    assert busy(made, STARTED._replace(monotonic_ns=3)) == InForce(CAPACITY, False)
    assert busy(made, step(1, 2, at_ns=4)) == InForce(2, True)  # whatever its clock says


def test_a_limit_above_the_capacity_is_acknowledged_by_the_capacity():
    assert busy(asked(1000), step(1, CAPACITY)) == InForce(CAPACITY, True)


def test_asking_for_the_known_capacity_needs_no_plug_in():
    made = asked(CAPACITY, capacity=CAPACITY)
    for _ in range(100):
        assert busy(made, NOTHING) == InForce(CAPACITY, None)


def until_given_up(made, report, *, between=lambda: None, duration_s=1.0):
    for windows in range(1, 100):
        between()
        try:
            busy(made, report(windows) if callable(report) else report, duration_s=duration_s)
        except ConfigError as error:
            return windows, str(error)
    raise AssertionError("it was never given up")


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (NOTHING, "no vLLM scheduler has read /run/limit in 5 s of traffic: vLLM needs fuel_ray in its"),
        (STARTED, "a scheduler attached to /run/limit, but reported no step in 5 s of traffic"),
        (
            lambda number: step(number, CAPACITY),
            "the scheduler kept 32 during 5 s of traffic. Start vLLM ",
        ),
    ],
)
def test_traffic_without_an_acknowledgement_is_an_error_that_says_what_to_do(report, words):
    windows, text = until_given_up(asked(2), report)
    assert windows == 5 and text.startswith(f"batch limit 2 is not in force: {words}")


def test_one_long_window_is_not_enough():
    assert until_given_up(asked(2), NOTHING, duration_s=60.0)[0] == 3


def test_idle_windows_and_the_capacity_neither_count_nor_start_the_count_again():
    made = asked(2, capacity=CAPACITY)

    def between():
        idle(made, NOTHING)
        made.ask(CAPACITY, NOTHING)
        busy(made, NOTHING)
        made.ask(2, NOTHING)

    assert until_given_up(made, NOTHING, between=between)[0] == 5


def test_one_acknowledgement_starts_the_count_again():
    made = asked(2)
    for number in range(1, 50):
        made.ask(2 if number % 4 else 3, step(number, 2))
        busy(made, step(number + 1, 2))
