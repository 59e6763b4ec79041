"""The named rewards at known points, and what each of them prefers."""

from dataclasses import replace

import numpy as np
import pytest

from fuel_ray.build.objective import build_objective
from fuel_ray.config import PRESETS
from fuel_ray.objective import Energy, GreenDls, greendls_kv_reward, greendls_reward
from fuel_ray.sim.node import SimulatedNode
from fuel_ray.sim.pack import load_pack
from fuel_ray.types import Knobs, Requests, Slo
from fuel_ray.workload.spec import parse_workload
from tests.test_codec import WINDOW


@pytest.mark.parametrize(
    ("delay_ms", "kv_usage", "expected"),
    [
        (5_000.0, 0.3, 150 * 5_000 / 20_000 - 5 * 0.2),
        (5_000.0, 0.7, 150 * 5_000 / 20_000),
        (5_000.0, 0.95, 150 * 5_000 / 20_000 - 10 * 0.05),
        (10_000.0, 0.3, 75 - 1.0),
        (10_000.0, 0.7, 75.0),
        (10_000.0, 0.95, 75 - 0.5),
        (12_500.0, 0.3, -2_500.0),
        (12_500.0, 0.7, -2_500.0),
        (12_500.0, 0.95, -2_500.0),
    ],
)
def test_the_kv_reward_below_at_and_above_the_slo(delay_ms, kv_usage, expected):
    assert greendls_kv_reward(delay_ms, 20_000.0, kv_usage, 10_000.0) == pytest.approx(expected)
    clipped = min(max(expected / 50, -2), 2)
    window = replace(WINDOW, completed=1, e2es_s=(delay_ms / 1000,), energy_j=20.0, kv_usage=kv_usage)
    assert GreenDls(10.0, kv=True, normalized=True).reward(window) == pytest.approx(clipped)
    if kv_usage == 0.7:
        assert greendls_reward(delay_ms, 20_000.0, 10_000.0) == pytest.approx(expected)


def test_the_weight_k_scales_the_efficiency_term():
    assert greendls_kv_reward(1_000, 10_000, 0.7, 10_000, k=300) == pytest.approx(30.0)


def test_greendls_scores_a_window_by_mean_latency_and_energy_per_request():
    reward = GreenDls(slo_e2e_s=10.0, kv=False, normalized=False).reward(WINDOW)
    window = replace(WINDOW, completed=2)  # e2e 4 s and 6 s, 900 J
    assert GreenDls(10.0, kv=False, normalized=False).reward(window) == pytest.approx(150 * 5000 / 450_000)
    assert reward > 0


@pytest.mark.parametrize(
    "objective", [GreenDls(10.0, kv=True, normalized=False), Energy(Slo(1.0), 0.2, 200.0, 400.0)]
)
def test_a_stalled_window_scores_worse_the_longer_somebody_waits(objective):
    working = replace(WINDOW, ttfts_s=(0.1,), waiting=0)
    stalled = replace(
        WINDOW, completed=0, output_tokens=0, ttfts_s=(), tpots_s=(), e2es_s=(), waiting=4, oldest_wait_s=0.4
    )
    longer = replace(stalled, oldest_wait_s=0.9)
    assert objective.reward(longer) < objective.reward(stalled) < objective.reward(working)


@pytest.mark.parametrize(
    ("kv", "normalized", "expected"),
    [
        (False, False, 150 * 5 / 450),
        (False, True, 150 * 5 / 450 / 50),
        (True, False, 150 * 5 / 450 - 5 * 0.075),  # KV usage is 0.425
        (True, True, (150 * 5 / 450 - 5 * 0.075) / 50),
    ],
)
def test_greendls_on_a_window_in_each_form(kv, normalized, expected):
    window = replace(WINDOW, completed=2)
    assert GreenDls(10.0, kv=kv, normalized=normalized).reward(window) == pytest.approx(expected)


def test_greendls_beyond_the_slo_is_the_delay_in_ms_and_clipped_if_normalised():
    window = replace(WINDOW, completed=2)  # mean e2e 5 s
    assert GreenDls(4.0, kv=True, normalized=False).reward(window) == pytest.approx(-1000.0)
    assert GreenDls(4.0, kv=True, normalized=True).reward(window) == -2.0
    assert GreenDls(4.0, kv=False, normalized=True).reward(window) == -2.0


def test_energy_is_what_was_saved_less_the_price_of_misses_over_typical_energy():
    objective = Energy(Slo(1.0), token_price_j=1.0, miss_price_j=200.0, scale_w=400.0)
    # 1800 tokens at 1 J, 900 J used, one TTFT of 2 s missed; 400 W for 2 s
    assert objective.reward(WINDOW) == pytest.approx((1800 - 900 - 200) / 800)


def test_energy_never_scores_below_its_floor():
    crowded = replace(WINDOW, completed=0, e2es_s=(), waiting=10_000, oldest_wait_s=60.0)
    assert Energy(Slo(1.0), 1.0, 200.0, 400.0).reward(crowded) == -4.0


def test_an_overloaded_node_scores_worse_than_a_busy_one():
    means = {}
    for rate_rps in (5, 60):
        workload = parse_workload(f"steady:rate_rps={rate_rps}")
        node = SimulatedNode(load_pack("h100-qwen3-8b"), workload, kv_block_size=16, horizon_s=60)
        node.reset(seed=0)
        windows = [node.measure(1.0) for _ in range(60)]
        for preset in ("default", "seed"):
            objective = build_objective(PRESETS[preset])
            means[preset, rate_rps] = np.mean([objective.reward(window) for window in windows[20:]])
    assert means["default", 60] < means["default", 5] - 1
    assert means["seed", 60] < means["seed", 5] - 0.5


def test_an_idle_window_is_neutral_for_greendls():
    idle = replace(WINDOW, completed=0, waiting=0, running=0, ttfts_s=(), tpots_s=(), e2es_s=())
    assert GreenDls(10.0, kv=True, normalized=True).reward(idle) == 0.0


def test_the_token_price_moves_rewards_by_the_tokens_alone():
    free, priced = (Energy(Slo(1.0), price, 200.0, 400.0) for price in (0.0, 0.3))
    for energy_j in (100.0, 900.0):
        window = replace(WINDOW, energy_j=energy_j)
        assert priced.reward(window) - free.reward(window) == pytest.approx(0.3 * 1800 / 400 / 2)


def test_each_missed_limit_costs_its_price():
    objective = Energy(Slo(1.0, 0.015, 5.0), 0.2, 200.0, 400.0)
    assert objective.misses(WINDOW) == 3  # one TTFT of 2 s, one TPOT of 20 ms, one e2e of 6 s


def test_the_default_reward_is_of_order_one():
    objective = build_objective(PRESETS["default"])
    node = SimulatedNode(load_pack("h100-qwen3-8b"), parse_workload("steady"), kv_block_size=16, horizon_s=60)
    node.reset(seed=0)
    rewards = [objective.reward(node.measure(1.0)) for _ in range(60)]
    assert 0.05 < np.abs(rewards).mean() < 2


def saturated(pack, clock_mhz, *, seconds=120):
    """Windows of a node that always has 32 requests running."""
    n = 4000
    work = Requests(np.zeros(n), np.full(n, 64), np.full(n, 256), np.full(n, -1), np.zeros(n, np.int64))
    node = SimulatedNode(pack, parse_workload("steady"), kv_block_size=16, horizon_s=1.0)
    node.replay(work)
    node.apply(Knobs(32, clock_mhz))
    node.measure(30.0)
    return node.measure(float(seconds))


def test_energy_prefers_the_energy_optimum_of_the_a100_and_greendls_does_not():
    pack = load_pack("a100-llama31-8b")
    clocks = [clock for clock in pack.gpu_clocks_mhz if clock >= 705]
    windows = {clock: saturated(pack, clock) for clock in clocks}
    joules = {clock: w.energy_j / w.output_tokens for clock, w in windows.items()}
    optimum = min(joules, key=joules.__getitem__)
    assert 810 <= optimum <= 1005
    energy = Energy(Slo(e2e_s=1e6), token_price_j=joules[optimum], miss_price_j=0.0, scale_w=150.0)
    preferred = max(clocks, key=lambda clock: energy.reward(windows[clock]))
    assert joules[preferred] <= 1.01 * joules[optimum]
    served = {
        clock: replace(w, e2es_s=(32 * w.duration_s / w.completed,) * w.completed)
        for clock, w in windows.items()
    }
    greendls = GreenDls(1e6, kv=False, normalized=False)
    slowest = max(clocks, key=lambda clock: greendls.reward(served[clock]))
    assert slowest == min(clocks)
    assert joules[slowest] > 1.02 * joules[optimum]


def test_the_default_energy_reward_is_near_the_energy_optimum_of_the_saturated_a100():
    pack = load_pack("a100-llama31-8b")
    windows = {clock: saturated(pack, clock) for clock in pack.gpu_clocks_mhz}
    joules = {clock: w.energy_j / w.output_tokens for clock, w in windows.items()}
    built = build_objective(replace(PRESETS["default"], pack="a100-llama31-8b"))
    objective = replace(built, miss_price_j=0.0)
    preferred = max(windows, key=lambda clock: objective.reward(windows[clock]))
    assert joules[preferred] < 1.01 * min(joules.values())
    assert joules[max(joules)] > 1.4 * min(joules.values())  # of the highest clock


def test_when_all_arrivals_are_served_the_energy_reward_ranks_clocks_by_energy():
    pack, n = load_pack("a100-llama31-8b"), 200
    work = Requests(np.arange(n) / 4, np.full(n, 64), np.full(n, 256), np.full(n, -1), np.zeros(n, np.int64))
    built = build_objective(replace(PRESETS["default"], pack="a100-llama31-8b"))
    objective = replace(built, miss_price_j=0.0)
    energy_j, reward = {}, {}
    for clock in pack.gpu_clocks_mhz[::4]:
        node = SimulatedNode(pack, parse_workload("steady"), kv_block_size=16, horizon_s=1.0)
        node.replay(work)
        node.apply(Knobs(32, clock))
        windows = [node.measure(1.0) for _ in range(80)]
        assert sum(window.completed for window in windows) == n
        energy_j[clock] = sum(window.energy_j for window in windows)
        reward[clock] = sum(objective.reward(window) for window in windows)
    assert sorted(energy_j, key=energy_j.__getitem__) == sorted(reward, key=reward.__getitem__, reverse=True)


def test_a_window_that_cannot_be_judged_has_no_reward():
    unknown = replace(WINDOW, histograms={}, ttfts_s=(), tpots_s=(), e2es_s=())
    energy = Energy(Slo(1.0), token_price_j=1.0, miss_price_j=1.0, scale_w=400.0)
    assert energy.reward(unknown) is None and energy.reward(WINDOW) is not None
    assert GreenDls(10.0, kv=False, normalized=False).reward(unknown) is None


OVERLOAD = "steady:rate_rps=20"  # of which a batch limit of 24 serves about half


@pytest.mark.parametrize("limits", [(1.0, None), (1.0, 0.012), (20.0, None)])
def test_misses_over_an_episode_are_those_of_the_records_and_of_who_still_waits(limits):
    node = SimulatedNode(load_pack("h100-qwen3-8b"), parse_workload(OVERLOAD), kv_block_size=16, horizon_s=90)
    node.reset(seed=0)
    node.apply(Knobs(24, 1200))
    windows = [node.measure(1.0) for _ in range(100)]
    slo, records = Slo(*limits), node.take_records()
    begun = sum(len(window.ttfts_s) for window in windows) - len(records)  # no record yet of these
    late = [value for window in windows for value in window.ttfts_s if value > slo.ttft_s]
    waiting = sum(wait_s > slo.ttft_s for wait_s in windows[-1].waits_s)
    slow = 0 if slo.tpot_s is None else (records.tpot_s > slo.tpot_s).sum()
    missed = sum(Energy(slo, 0.2, 200.0, 400.0).misses(window) for window in windows)
    assert begun <= 24 and 0 <= len(late) - (records.ttft_s > slo.ttft_s).sum() <= begun
    assert missed == len(late) + waiting + slow and waiting > 100


def test_a_miss_counts_in_the_window_in_which_its_limit_passes_and_not_again():
    """Three requests come at once and are served one after the other, for about 3 s each."""
    work = Requests(np.zeros(3), np.full(3, 64), np.full(3, 256), np.full(3, -1), np.zeros(3, np.int64))
    node = SimulatedNode(
        load_pack("h100-qwen3-8b"), parse_workload("steady"), kv_block_size=16, horizon_s=1.0
    )
    node.replay(work)
    node.apply(Knobs(1, 990))
    windows = [node.measure(0.5) for _ in range(30)]
    energy = Energy(Slo(ttft_s=0.8), 0.2, 200.0, 400.0)
    assert [energy.misses(window) for window in windows] == [0, 2, *[0] * 28]
    assert sum(len(window.ttfts_s) for window in windows[4:]) == 2  # whose first tokens come long after


def test_serving_more_slowly_does_not_put_misses_off():
    misses = {}
    for limit, clock_mhz in ((64, 1980), (1, 990)):
        node = SimulatedNode(
            load_pack("h100-qwen3-8b"), parse_workload(OVERLOAD), kv_block_size=16, horizon_s=30
        )
        node.reset(seed=0)
        node.apply(Knobs(limit, clock_mhz))
        windows = [node.measure(1.0) for _ in range(30)]
        misses[limit] = sum(Energy(Slo(1.0), 0.2, 200.0, 400.0).misses(window) for window in windows)
        first = sum(value > 1.0 for window in windows for value in window.ttfts_s)
    assert first < 20 and misses[1] > 500 > misses[64]  # ``first``: what was counted of the slow one before


def test_where_waits_are_unknown_a_miss_counts_when_its_first_token_comes():
    energy = Energy(Slo(1.0), 0.2, 200.0, 400.0)
    assert WINDOW.newly_overdue(1.0) is None and energy.misses(WINDOW) == 1  # one TTFT of 2 s
    known = replace(WINDOW, waits_s=(1.4, 0.2), waits_before_s=(1.1, 0.1))
    assert energy.misses(known) == 1 + 1 - 1  # that one was overdue before, and another has become so
