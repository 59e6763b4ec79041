"""When a policy is overruled, by which rule, and when it is let go on."""

from dataclasses import replace
from itertools import pairwise

import pytest

from fuel_ray.codec import ActionGrid, Codec
from fuel_ray.drift import DriftDetector
from fuel_ray.guard import Guard, Rules
from fuel_ray.types import Knobs, Slo
from tests.test_codec import SPEC, WINDOW

CALM = replace(WINDOW, duration_s=1.0, oldest_wait_s=0.0, waiting=0, ttfts_s=(), tpots_s=(), e2es_s=())
LOW, HIGH = Knobs(8, 990), SPEC.max_performance


def checked(guard, *windows, chosen=LOW):
    return [guard.check(chosen, last=window, spec=SPEC) for window in windows]


def clocks(verdicts):
    return [verdict.knobs.gpu_clock_mhz for verdict in verdicts]


def reasons(verdicts):
    return [verdict.reasons for verdict in verdicts]


def test_without_rules_nothing_is_overruled():
    bad = replace(CALM, oldest_wait_s=99.0, waiting=999, ttfts_s=(99.0,) * 99)
    assert checked(Guard(), bad) == checked(Guard(), CALM)
    assert reasons(checked(Guard(), bad)) == [()] and checked(Guard(), bad)[0].knobs == LOW


def test_a_bound_of_zero_leaves_its_rule_out():
    waiting = replace(CALM, oldest_wait_s=9.0, waiting=9)
    assert reasons(checked(Guard(Rules(max_wait_s=0.0, max_waiting=0)), waiting)) == [()]


@pytest.mark.parametrize(
    ("rules", "trouble", "reason"),
    [
        (Rules(max_wait_s=1.0), {"oldest_wait_s": 1.1}, "wait"),
        (Rules(max_waiting=10), {"waiting": 11}, "queue"),
        (Rules(slo=Slo(ttft_s=1.0)), {"ttfts_s": (0.1,) * 30 + (2.0,) * 10}, "latency"),
        (Rules(slo=Slo(e2e_s=10.0, share=None)), {"e2es_s": (11.0,) * 30}, "latency"),
    ],
)
def test_the_shield_is_raised_at_once_and_let_go_after_a_calm_time(rules, trouble, reason):
    guard = Guard(replace(rules, release_s=3.0))
    verdicts = checked(guard, CALM, replace(CALM, **trouble))
    assert reasons(verdicts) == [(), (reason,)] and verdicts[1].knobs == HIGH
    served = replace(CALM, ttfts_s=(0.1,) * 20, e2es_s=(1.0,) * 20)
    after = reasons(checked(guard, *[served] * 60))
    held = after.index(())
    assert after[:held] == [(reason,)] * held and after[held:] == [()] * (60 - held)
    assert held >= 2


def test_the_shield_holds_while_the_load_stays_near_its_bound():
    guard = Guard(Rules(max_wait_s=1.0, release_s=3.0))
    near = replace(CALM, oldest_wait_s=0.6)
    verdicts = checked(guard, replace(CALM, oldest_wait_s=1.1), *[near] * 20, *[CALM] * 3)
    assert reasons(verdicts)[:-1] == [("wait",)] * 23 and reasons(verdicts)[-1] == ()


def test_near_a_bound_alone_does_not_raise_the_shield():
    guard = Guard(Rules(max_wait_s=1.0))
    assert reasons(checked(guard, *[replace(CALM, oldest_wait_s=0.9)] * 20)) == [()] * 20


def test_a_share_of_misses_that_the_slo_allows_is_left_alone():
    window = replace(CALM, ttfts_s=(0.1,) * 19 + (2.0,))
    assert reasons(checked(Guard(Rules(slo=Slo(ttft_s=1.0))), *[window] * 100)) == [()] * 100


def test_two_misses_among_few_requests_do_not_raise_the_shield():
    window = replace(CALM, ttfts_s=(2.0,))
    assert reasons(checked(Guard(Rules(slo=Slo(ttft_s=1.0))), window, window)) == [(), ()]


def test_without_telemetry_the_fallback_rules():
    assert checked(Guard(Rules(fallback=Knobs(48, 1350))), None)[0].knobs == Knobs(48, 1350)
    (verdict,) = checked(Guard(), None)
    assert verdict.knobs == HIGH and verdict.reasons == ("stale",)


def test_without_telemetry_a_raised_shield_stays():
    guard = Guard(Rules(max_wait_s=1.0, fallback=Knobs(48, 1350)))
    assert checked(guard, replace(CALM, oldest_wait_s=2.0), None)[1].knobs == HIGH


def test_no_clock_is_below_the_floor():
    (verdict,) = checked(Guard(Rules(floor_mhz=1200)), CALM)
    assert verdict.knobs == Knobs(8, 1200) and verdict.reasons == ("floor",)


def test_the_clock_falls_step_by_step_and_rises_at_once():
    guard = Guard(Rules(max_step_mhz=300))
    assert clocks(checked(guard, *[CALM] * 4)) == [1680, 1380, 1080, 990]
    assert clocks(checked(guard, CALM, chosen=Knobs(8, 1980))) == [1980]


def test_a_clock_that_changed_is_not_lowered_within_the_dwell_time():
    guard = Guard(Rules(dwell_s=3.0))
    checked(guard, CALM)
    checked(guard, CALM, chosen=Knobs(8, 1500))
    verdicts = checked(guard, *[CALM] * 4)
    assert clocks(verdicts) == [1500, 1500, 990, 990] and reasons(verdicts)[0] == ("dwell",)


def test_once_the_budget_of_switches_is_spent_the_clock_may_only_rise_until_a_minute_has_passed():
    guard = Guard(Rules(switches_per_minute=4))
    found = []
    for second in range(140):
        chosen = Knobs(8, 990 if second % 2 else 1980)
        found += clocks(checked(guard, CALM, chosen=chosen))
    switches = [now != before for before, now in pairwise(found)]
    assert max(sum(switches[i : i + 60]) for i in range(80)) <= 5  # the last one may be a rise
    assert found[8:60] == [1980] * 52 and 990 in found[60:120]


def test_rules_of_the_clock_do_not_hold_the_shield_back():
    guard = Guard(Rules(max_wait_s=1.0, max_step_mhz=15, dwell_s=60.0, switches_per_minute=1))
    checked(guard, CALM, CALM)
    assert checked(guard, replace(CALM, oldest_wait_s=2.0))[0].knobs == HIGH


def test_a_node_with_one_clock_has_no_rules_of_the_clock():
    guard = Guard(Rules(floor_mhz=1200, max_step_mhz=15, dwell_s=9.0))
    spec = replace(SPEC, gpu_clocks_mhz=(1980,))
    assert guard.check(LOW, last=CALM, spec=spec).reasons == ()


def test_a_reset_forgets_the_shield():
    guard = Guard(Rules(max_wait_s=1.0))
    checked(guard, replace(CALM, oldest_wait_s=2.0))
    guard.reset()
    assert reasons(checked(guard, CALM)) == [()]


CODEC = Codec(("arrival_rate_ewma", "gpu_clock"), ActionGrid((8,), (990,)), Slo(1.0))


def detector(**ranges):
    return DriftDetector(CODEC, SPEC, ranges=ranges)


def arriving(rate):
    return replace(CALM, arrivals=rate)


def test_a_load_outside_the_trained_range_is_drift_once_it_lasts_and_until_it_is_over():
    drift = detector(arrival_rate_ewma=(0.05, 0.6))  # 1 to 12 req/s
    found = [drift.update(arriving(rate)) for rate in [6] * 60 + [20] * 60 + [6] * 120]
    begun, over = found.index(True), len(found) - found[::-1].index(True)
    assert 75 < begun < 100 and 130 < over < 200
    assert all(found[begun:over])


def test_a_burst_is_no_drift():
    drift = detector(arrival_rate_ewma=(0.05, 0.6))
    assert not any(drift.update(arriving(rate)) for rate in [6] * 60 + [20] * 8 + [6] * 60)


def test_without_ranges_drift_is_what_the_features_cannot_express():
    drift = detector()
    assert not any(drift.update(arriving(15)) for _ in range(100))
    assert any(drift.update(arriving(30)) for _ in range(100))


def test_under_drift_the_fallback_rules():
    guard = Guard(Rules(fallback=Knobs(48, 1350)), drift=detector(arrival_rate_ewma=(0.0, 0.1)))
    verdicts = checked(guard, *[arriving(20)] * 60)
    assert reasons(verdicts)[0] == () and verdicts[-1].reasons == ("drift",)
    assert verdicts[-1].knobs == Knobs(48, 1350)
