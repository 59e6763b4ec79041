"""Published baselines: each rule on hand-made windows, and each at work on the simulated node."""

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest

from fuel_ray.build.nodes import build_loop
from fuel_ray.config import PRESETS
from fuel_ray.control import run_policy
from fuel_ray.policies.agft import AgftLinUcb
from fuel_ray.policies.clipper import Clipper
from fuel_ray.policies.eais import Eais
from fuel_ray.policies.feedback import Feedback
from fuel_ray.policies.models import BatchModel, StepModel, fit_batches, fit_steps, token_limits
from fuel_ray.policies.static import LoadTable, Static
from fuel_ray.policies.voltana import Dwell, VoltanaLlm
from fuel_ray.sim.pack import load_pack
from fuel_ray.tuning.clock_search import (
    allowed_penalty,
    find_load_table,
    penalty,
    trace_of,
)
from fuel_ray.types import Knobs, RequestRecords, Slo
from tests.test_codec import SPEC, WINDOW

SLO = Slo(ttft_s=1.0, tpot_s=0.05)
E2E = Slo(e2e_s=10.0, share=None)
CLOCKS = SPEC.gpu_clocks_mhz
QUIET = replace(
    WINDOW, duration_s=1.0, arrivals=0, completed=0, prompt_tokens=0, output_tokens=0, running=0, waiting=0,
    kv_usage=0.0, oldest_wait_s=0.0, ttfts_s=(), tpots_s=(), e2es_s=(),
)  # fmt: skip
PERF = load_pack("h100-qwen3-8b").perf


def finished(*e2es_s, **changes):
    return replace(QUIET, e2es_s=e2es_s, completed=len(e2es_s), **changes)


# Clipper


def test_clipper_raises_by_one_lowers_by_a_tenth_near_the_slo_and_by_three_beyond_it():
    policy = Clipper(SPEC, E2E)
    worst_s = [5.0, 9.0, 9.1, 10.0, 10.1, 1.0]
    limits = [policy.decide(finished(1.0, worst)).batch_limit for worst in worst_s]
    assert limits == [9, 10, 9, 8, 5, 6]


def test_clipper_keeps_the_clock_highest_and_the_limit_within_the_server():
    policy = Clipper(SPEC, E2E)
    for _ in range(10):
        assert policy.decide(finished(11.0)).gpu_clock_mhz == CLOCKS[-1]
    assert policy.decide(finished(11.0)).batch_limit == 1
    for _ in range(200):
        limit = policy.decide(QUIET).batch_limit
    assert limit == SPEC.batch_limits[-1]
    policy.reset()
    assert policy.decide(QUIET).batch_limit == 9


def test_clipper_takes_the_worst_of_all_limits_and_of_the_oldest_wait():
    assert Clipper(SPEC, SLO).decide(replace(QUIET, ttfts_s=(0.1, 0.95))).batch_limit == 7
    assert Clipper(SPEC, SLO).decide(replace(QUIET, ttfts_s=(0.1,), tpots_s=(0.06,))).batch_limit == 5
    assert Clipper(SPEC, SLO).decide(replace(QUIET, oldest_wait_s=2.0)).batch_limit == 5


def test_clipper_while_binding_raises_only_a_limit_that_holds_requests_back():
    policy = Clipper(SPEC, E2E, only_while_binding=True)
    windows = [QUIET, replace(QUIET, running=8), replace(QUIET, running=8), replace(QUIET, waiting=1)]
    assert [policy.decide(window).batch_limit for window in windows] == [8, 9, 9, 10]


# EAIS


def eais(**changes):
    models = (BatchModel(637, 0.4, 1.0, 2.0, 8.0), BatchModel(1597, 0.1, 0.5, 4.0, 4.0))
    return Eais(models, **{"slo_s": 10.0, **changes})


def test_eais_takes_the_largest_batch_that_keeps_the_slo_at_the_cheapest_clock():
    window = replace(QUIET, arrivals=4, waiting=2, oldest_wait_s=0.5)
    # 1.2 (0.5 + (b - 2) / 4) + 0.4 b + 1 < 9: b = 11 (8.7); 1.2 (..) + 0.1 b + 0.5 < 9: b = 21 (8.9)
    assert eais().decide(window) == Knobs(11, 637)  # 2 + 8 / 11 J < 4 + 4 / 21 J


def test_eais_bounds_the_batch_by_what_arrives_in_time_and_by_32():
    few = replace(QUIET, arrivals=1)  # at most int(1 x 10 + 0) = 10
    assert eais().decide(few) == Knobs(4, 637)  # 1.2 x 5 + 0.4 x 5 + 1 is not below 9
    many = replace(QUIET, arrivals=40, waiting=300)  # the SLO alone would allow 39
    assert eais().decide(many) == Knobs(32, 637)


def test_eais_goes_to_the_highest_clock_when_no_clock_keeps_the_slo():
    assert eais().decide(replace(QUIET, arrivals=5, waiting=1, oldest_wait_s=12.0)) == Knobs(1, 1597)


def test_batch_models_are_lines_through_the_performance_model():
    slow, fast = fit_batches(PERF, (1305, 1980), max_batch=128)
    step_s, _, _ = PERF.step_cost(32, 32 * 622, 0, 1980)
    assert fast.latency_s(32) > 220 * step_s  # decoding alone
    assert slow.latency_s(32) > fast.latency_s(32)
    assert slow.energy_j_per_request(32) < fast.energy_j_per_request(32)
    assert fast.energy_j_per_request(64) < fast.energy_j_per_request(4)


# VoltanaLLM


STEPS = (StepModel(900, 1e-3, 1e-6, 0.02, 1e-3, 0.1), StepModel(1800, 5e-4, 5e-7, 0.01, 5e-4, 0.05))


def voltana(**changes):
    settings = {"ttft_s": 1.0, "tpot_s": 0.05, "batch_limit": 64, "kv_tokens": 20_000, **changes}
    return VoltanaLlm(STEPS, **settings)


BUSY = replace(QUIET, arrivals=2, running=10, output_tokens=500, kv_usage=0.5, knobs=Knobs(64, 1800))


def test_voltana_takes_the_lowest_clock_that_is_predicted_to_keep_the_slo():
    assert voltana().decide(BUSY) == Knobs(64, 900)  # 10 x 1 ms + 10,000 x 1 us + 20 ms = 40 ms
    assert voltana().decide(replace(BUSY, running=20)) == Knobs(64, 900)  # 50 ms
    assert voltana().decide(replace(BUSY, running=21)) == Knobs(64, 1800)


def test_voltana_adds_a_margin_and_subtracts_an_offset():
    more = replace(BUSY, running=21)
    assert voltana(margin=0.1).decide(more).gpu_clock_mhz == 900
    assert voltana(margin=0.1, offset_s=0.005).decide(more).gpu_clock_mhz == 1800


def test_voltana_predicts_the_time_to_first_token_of_the_mean_prompt():
    assert voltana(tpot_s=9.0).decide(replace(BUSY, prompt_tokens=1800)).gpu_clock_mhz == 900  # 1.0 s
    assert voltana(tpot_s=9.0).decide(replace(BUSY, prompt_tokens=1802)).gpu_clock_mhz == 1800


def test_voltana_stretches_decoding_by_the_time_that_prompts_take():
    one = replace(BUSY, arrivals=1)  # 0.1 s and 1 ms per prompt token of each second
    assert voltana().decide(replace(one, prompt_tokens=95)).gpu_clock_mhz == 900  # 40 ms / 0.805
    assert voltana().decide(replace(one, prompt_tokens=105)).gpu_clock_mhz == 1800


def test_voltana_goes_highest_when_overloaded_or_somebody_waits():
    assert voltana().decide(replace(BUSY, kv_usage=0.96, running=0)).gpu_clock_mhz == 1800
    assert voltana().decide(replace(BUSY, waiting=1)).gpu_clock_mhz == 1800
    assert voltana(tpot_s=0.001).decide(BUSY).gpu_clock_mhz == 1800


def test_voltana_keeps_its_clock_when_idle_and_takes_the_lowest_after_five_seconds():
    policy, idle = voltana(), replace(QUIET, knobs=Knobs(64, 1800))
    assert [policy.decide(idle).gpu_clock_mhz for _ in range(6)] == [1800] * 5 + [900]
    policy.reset()
    assert policy.decide(idle).gpu_clock_mhz == 1800


def test_dwell_holds_a_clock_before_it_falls_and_lets_it_rise_at_once():
    class Script:
        wishes = iter([900, 900, 900, 1800, 900, 900, 900])

        def reset(self):
            pass

        def decide(self, window):
            return Knobs(64, next(self.wishes))

    policy, clock_mhz, taken = Dwell(Script(), dwell_s=3.0), 1200, []
    for _ in range(7):
        clock_mhz = policy.decide(replace(QUIET, knobs=Knobs(64, clock_mhz))).gpu_clock_mhz
        taken.append(clock_mhz)
    assert taken == [1200, 1200, 900, 1800, 1800, 1800, 900]


def test_step_models_are_lines_through_the_performance_model():
    (model,) = fit_steps(PERF, (1305,), max_num_seqs=128)
    for requests, tokens in ((4, 3000), (40, 25_000), (100, 70_000)):
        step_s, _, _ = PERF.step_cost(requests, tokens, 0, 1305)
        assert model.itl_s(requests, tokens) == pytest.approx(step_s, rel=0.05)
    assert model.prefill_s(512) < fit_steps(PERF, (990,), max_num_seqs=128)[0].prefill_s(512)


def test_an_end_to_end_limit_is_split_into_first_and_other_tokens():
    assert token_limits(SLO) == (1.0, 0.05)
    assert token_limits(E2E, output_tokens=100) == (1.0, 0.09)
    assert token_limits(Slo(tpot_s=0.1)) == (float("inf"), 0.1)


# Feedback


def feedback(**changes):
    return Feedback(SPEC, ttft_s=1.0, tpot_s=0.05, batch_limit=64, **changes)


def test_feedback_lowers_the_clock_by_15_mhz_after_three_calm_windows():
    policy = feedback()
    clocks = [policy.decide(QUIET).gpu_clock_mhz for _ in range(7)]
    assert clocks == [1980, 1980, 1965, 1965, 1965, 1950, 1950]


def test_feedback_raises_at_once_near_a_limit_and_to_the_highest_beyond_it():
    policy = feedback(memory_s=1.0, down_mhz=300)
    for _ in range(6):
        policy.decide(QUIET)
    near, between, beyond = (replace(QUIET, tpots_s=(share * 0.05,)) for share in (0.96, 0.9, 1.01))
    windows = (between, near, near, between, between, between, between, beyond)
    clocks = [policy.decide(window).gpu_clock_mhz for window in windows]
    assert clocks == [1380, 1440, 1500, 1500, 1500, 1500, 1500, 1980]


def test_feedback_remembers_ten_seconds_and_takes_the_95th_percentile():
    policy = feedback()
    policy.decide(replace(QUIET, ttfts_s=(2.0,)))
    assert len({policy.decide(QUIET).gpu_clock_mhz for _ in range(9 + 2)}) == 1
    assert policy.decide(QUIET).gpu_clock_mhz == 1965
    policy.reset()
    rare = replace(QUIET, ttfts_s=(0.1,) * 99 + (2.0,))
    assert [policy.decide(rare).gpu_clock_mhz for _ in range(3)][-1] == 1965


def test_feedback_sees_who_waits():
    policy = feedback(down_mhz=300)
    for _ in range(3):
        policy.decide(QUIET)
    assert policy.decide(replace(QUIET, oldest_wait_s=1.5, waiting=3)).gpu_clock_mhz == 1980


# AGFT


def agft(**changes):
    return AgftLinUcb(SPEC, SLO, batch_limit=64, clocks_mhz=(990, 1380, 1980), **changes)


def test_linucb_learns_the_clock_of_least_energy():
    policy, knobs, energies_j = agft(), Knobs(64, 1980), {990: 700.0, 1380: 400.0, 1980: 600.0}
    taken = []
    for _ in range(200):
        knobs = policy.decide(replace(BUSY, energy_j=energies_j[knobs.gpu_clock_mhz], knobs=knobs))
        taken.append(knobs.gpu_clock_mhz)
    assert set(taken) == {990, 1380, 1980}
    assert taken[-50:].count(1380) >= 45


def test_linucb_updates_as_ridge_regression_does():
    policy, rng = agft(), np.random.default_rng(0)
    xs, rewards = rng.random((30, 8)), rng.random(30)
    for x, reward in zip(xs, rewards, strict=True):
        policy._learn(0, x, reward)
    np.testing.assert_allclose(policy._inverse[0], np.linalg.inv(np.eye(8) + xs.T @ xs), atol=1e-9)
    np.testing.assert_allclose(policy._moment[0], xs.T @ rewards)


def test_linucb_drops_clocks_that_are_much_worse_but_never_the_highest():
    policy = agft(prune_after=5)
    for arm, reward in ((0, -9.0), (1, -1.0), (2, -9.0)):
        for _ in range(5):
            policy._learn(arm, np.ones(8), reward)
    assert policy._alive().tolist() == [False, True, True]  # of 990, 1380 and 1980 MHz


def test_linucb_takes_the_highest_clock_while_requests_wait_too_long():
    assert agft().decide(replace(BUSY, oldest_wait_s=1.5)).gpu_clock_mhz == 1980


def test_linucb_does_not_learn_from_a_window_whose_limit_was_not_in_force():
    policy = agft()
    policy.decide(BUSY)
    policy.decide(replace(BUSY, limit_acknowledged=False))
    assert policy._tries.sum() == 0
    policy.decide(replace(BUSY, limit_acknowledged=True))
    assert policy._tries.sum() == 1


def test_linucb_forgets_on_reset_what_it_was_not_told_to_keep():
    policy = agft()
    first = [policy.decide(BUSY) for _ in range(20)]
    policy.reset()
    assert [policy.decide(BUSY) for _ in range(20)] == first
    policy.keep()
    policy.decide(BUSY)
    policy.reset()
    assert policy._tries.sum() == 19


# Clocks by load


def test_the_penalty_is_a_miss_or_the_share_of_a_mean_limit():
    records = RequestRecords(
        arrival_s=np.array([0.0, 1.5]), admitted_s=np.array([0.0, 1.5]), first_token_s=np.array([0.5, 4.0]),
        finished_s=np.array([2.0, 6.5]), prompt_tokens=np.array([5, 5]), output_tokens=np.array([31, 51]),
        preemptions=np.array([0, 0]),
    )  # fmt: skip
    assert penalty(records, SLO).tolist() == [0.0, 1.0]
    assert penalty(records, E2E).tolist() == [0.2, 0.5]
    assert allowed_penalty(SLO, 0.95) == pytest.approx(0.05)
    assert allowed_penalty(E2E, 1.0) == 1.0
    result = trace_of(np.full(3, 600.0), np.ones(3, int), records, SLO)
    assert result.penalty.tolist() == [0.0, 1.0, 1.0]  # the third has no record
    assert result.rate_rps(10.0).tolist() == [0.0, 1.0, 1.0] and result.arrivals == 3


# On the simulated node


def steady_clock(make, rate_rps, *, steps=90):
    """Mean clock of the last 60 s under a steady load with an ample KV pool."""
    config = replace(PRESETS["default"], kv_tokens=None)
    loop = build_loop(config, 16, horizon_s=float(steps), workload=f"steady:rate_rps={rate_rps}")
    records = run_policy(loop, make(loop.node.spec), seed=3, steps=steps)
    return np.mean([record.applied.gpu_clock_mhz for record in records[-60:]]), records


def make_voltana(spec, tpot_s=0.014):
    models = fit_steps(PERF, spec.gpu_clocks_mhz[::4], max_num_seqs=spec.batch_limits[-1])
    tokens = spec.num_kv_blocks * spec.kv_block_size
    return VoltanaLlm(models, ttft_s=1.0, tpot_s=tpot_s, batch_limit=128, kv_tokens=tokens)


def test_voltana_follows_the_load_from_the_lowest_clock_to_the_highest():
    # 200 s with a TPOT limit of 14 ms gave 1006, 1198, 1587 and 1939 MHz
    clocks = [steady_clock(make_voltana, rate_rps, steps=200) for rate_rps in (2, 11, 14, 20)]
    means = [mean for mean, _ in clocks]
    assert means == sorted(means) and means[0] < 1050 and means[-1] > 1850
    tpots_s = [tpot_s for record in clocks[2][1] for tpot_s in record.metrics.tpots_s]
    assert 0.010 < np.mean(tpots_s) < 0.014


def test_dwell_makes_voltana_switch_less_than_half_as_often():
    def switches(make):
        clocks = [record.applied.gpu_clock_mhz for record in steady_clock(make, 11, steps=200)[1]]
        return sum(a != b for a, b in itertools.pairwise(clocks))

    # 60 against 158 in 200 s: of two switches, the way down has to wait
    assert switches(lambda spec: Dwell(make_voltana(spec), dwell_s=5.0)) < 0.5 * switches(make_voltana)


def test_feedback_finds_a_lower_clock_at_low_load():
    def make(spec):
        return Feedback(spec, ttft_s=1.0, tpot_s=0.014, batch_limit=128, down_mhz=60)

    assert steady_clock(make, 2)[0] < steady_clock(make, 12)[0]


def test_clipper_grows_to_what_the_load_needs_and_no_further_while_binding():
    _, records = steady_clock(lambda spec: Clipper(spec, SLO, only_while_binding=True), 6, steps=200)
    assert 8 < records[-1].applied.batch_limit < 60
    assert steady_clock(lambda spec: Clipper(spec, SLO), 6, steps=200)[1][-1].applied.batch_limit == 128


def test_eais_uses_a_clock_below_the_highest():
    def make(spec):
        models = fit_batches(PERF, spec.gpu_clocks_mhz[::8], max_batch=128)
        return Eais(models, slo_s=10.0, max_batch=128)

    assert steady_clock(make, 6)[0] < 1500


def test_linucb_saves_energy_against_the_highest_clock():
    def make(spec):
        return AgftLinUcb(spec, SLO, batch_limit=128, clocks_mhz=spec.gpu_clocks_mhz[::10])

    def energy_j(records):
        return sum(record.metrics.energy_j for record in records[-60:])

    ours = energy_j(steady_clock(make, 6, steps=200)[1])
    assert ours < 0.85 * energy_j(steady_clock(lambda spec: Static(spec.max_performance), 6, steps=200)[1])


def simulated(seeds, *, slo=SLO, workload="piecewise:rates=2@60+16@60"):
    config = replace(PRESETS["default"], kv_tokens=None)
    loop = build_loop(config, 16, horizon_s=120.0, workload=workload)

    def run(policy):
        traces = []
        for seed in seeds:
            policy.reset()
            windows = [loop.reset(seed=seed)]
            for _ in range(130):
                windows.append(loop.step(policy.decide(windows[-1])).metrics)
            energy_j = np.array([window.energy_j for window in windows])
            arrivals = np.array([window.arrivals for window in windows])
            traces.append(trace_of(energy_j, arrivals, loop.node.take_records(), slo))
        return traces

    return run


def test_a_found_load_table_is_no_worse_than_a_fixed_clock():
    run = simulated([5, 6], slo=Slo(ttft_s=1.0, tpot_s=0.016))
    tables = []

    def noted(policy):
        tables.extend([policy] if isinstance(policy, LoadTable) else [])
        return run(policy)

    table = find_load_table(noted, CLOCKS, batch_limit=128, allowed=0.05, rows=4, stride=8, budget=10)
    assert all(len(set(t.knobs)) > 1 for t in tables)  # a table of one clock is a fixed one, which was run

    def cost(policy):
        traces = run(policy)
        return sum(t.energy_j.sum() for t in traces), sum(t.penalty.sum() for t in traces) / sum(
            t.arrivals for t in traces
        )

    fixed = [cost(Static(Knobs(128, clock))) for clock in CLOCKS[::-1][::8]]
    energy_j, bad = cost(table)
    assert bad <= 0.05
    assert energy_j <= min(e for e, b in fixed if b <= 0.05)


def test_a_load_table_is_searched_at_its_own_average():
    run = simulated([5], slo=Slo(ttft_s=1.0, tpot_s=0.016))
    slow, fast = (
        find_load_table(
            run, CLOCKS, batch_limit=128, allowed=0.05, rows=4, stride=16, budget=0, ewma_s=ewma_s
        )
        for ewma_s in (10.0, 4.0)
    )
    assert (slow.ewma_s, fast.ewma_s) == (10.0, 4.0)
    assert fast.rates_rps[-1] > slow.rates_rps[-1]  # the shorter average sees a higher peak


def test_every_rule_decides_in_under_a_millisecond():
    spec = SPEC
    policies = [
        Clipper(spec, SLO), Feedback(spec, ttft_s=1.0, tpot_s=0.05, batch_limit=64),
        AgftLinUcb(spec, SLO, batch_limit=64, clocks_mhz=spec.gpu_clocks_mhz[::4]),
        Eais(fit_batches(PERF, spec.gpu_clocks_mhz[::8], max_batch=128), slo_s=10.0, max_batch=128),
        VoltanaLlm(fit_steps(PERF, spec.gpu_clocks_mhz, max_num_seqs=128), ttft_s=1, tpot_s=0.01,
                   batch_limit=64, kv_tokens=20_000),
    ]  # fmt: skip
    for policy in policies:
        seconds = []
        for _ in range(50):
            began_s = time.perf_counter()
            policy.decide(BUSY)
            seconds.append(time.perf_counter() - began_s)
        assert np.median(seconds) < 1e-3, type(policy).__name__
