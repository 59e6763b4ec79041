"""Conservation laws and rules of the simulated scheduler."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuel_ray.errors import ConfigError
from fuel_ray.sim import scheduler as rules
from fuel_ray.sim.node import SimulatedNode
from fuel_ray.sim.pack import load_pack
from fuel_ray.sim.scheduler import Engine, advance, new_state
from fuel_ray.types import Knobs, Requests
from fuel_ray.workload.spec import parse_workload

PACK = load_pack("h100-qwen3-8b")
MODEL = PACK.perf.constants


def requests(arrival_s, prompt, output, prefix_id=None, prefix=0):
    n = len(arrival_s)
    return Requests(
        arrival_s=np.asarray(arrival_s, float),
        prompt_tokens=np.broadcast_to(np.asarray(prompt, np.int64), n).copy(),
        output_tokens=np.broadcast_to(np.asarray(output, np.int64), n).copy(),
        prefix_id=np.full(n, -1) if prefix_id is None else np.asarray(prefix_id, np.int64),
        prefix_tokens=np.broadcast_to(np.asarray(prefix, np.int64), n).copy(),
    )


def engine(block_size=16, num_blocks=2000, max_num_seqs=32, max_num_batched_tokens=2048, prefix_caching=True):
    return Engine(block_size, num_blocks, max_num_seqs, max_num_batched_tokens, prefix_caching)


def run_until(state, e, until_s, limit=32, clock_mhz=1980):
    advance(state, e, MODEL, PACK.perf.at(clock_mhz), until_s, limit)


def free_list(state):
    head = len(state.block) - 1
    found, at = [], state.block[head, rules.FOLLOWING]
    while at != head:
        found.append(int(at))
        at = state.block[at, rules.FOLLOWING]
    return found


@st.composite
def scenarios(draw):
    n = draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    prefix = draw(st.sampled_from([0, 20, 64]))
    work = requests(
        np.sort(rng.uniform(0, 3, n)),
        rng.integers(1, 400, n) + prefix,
        rng.integers(1, 120, n),
        prefix_id=rng.integers(0, 2, n) if prefix else None,
        prefix=prefix,
    )
    block_size = draw(st.sampled_from([8, 16, 64]))
    e = engine(
        block_size=block_size,
        num_blocks=draw(st.sampled_from([640, 1200, 8000])) // block_size,
        max_num_seqs=draw(st.sampled_from([2, 8, 32])),
        max_num_batched_tokens=draw(st.sampled_from([64, 512, 8192])),
        prefix_caching=draw(st.booleans()),
    )
    limits = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    return work, e, limits


@settings(max_examples=60, deadline=None)
@given(scenarios())
def test_blocks_tokens_and_requests_are_conserved(scenario):
    work, e, limits = scenario
    s = new_state(work, e)
    tokens, energy_j, running_before = 0, 0.0, 0
    for second in range(400):
        limit = limits[min(second, len(limits) - 1)]
        run_until(s, e, (second + 1) * 0.25, limit=limit)
        tokens += s.count[rules.OUTPUT_TOKENS]
        energy_j += s.clock[rules.ENERGY]
        free = free_list(s)
        referenced = np.flatnonzero(s.block[:-1, rules.REFERENCES] > 0)
        assert len(free) == s.count[rules.FREE_BLOCKS] == len(set(free))
        assert set(free).isdisjoint(referenced.tolist())
        assert len(free) + len(referenced) == e.num_blocks
        holders = s.request[s.run[rules.REQUEST, : s.count[rules.RUNNING]], rules.SLOT]
        assert s.block[:-1, rules.REFERENCES].sum() == s.slot[holders, rules.HELD].sum()
        running = s.count[rules.RUNNING]
        assert running <= max(min(limit, e.max_num_seqs), running_before)
        running_before = running
        assert (np.diff(s.run[rules.REQUEST, :running]) > 0).all()  # in order of arrival
        preempted = s.slot[: s.count[rules.PREEMPTED], rules.PREEMPTED_REQUEST]
        assert (np.diff(preempted) < 0).all()  # the newest went first and comes back last
        there = s.time_s[: s.count[rules.ARRIVED]]
        without = there[there[:, rules.FIRST_TOKEN] < 0, rules.ARRIVAL]
        assert (s.wait[: s.count[rules.WAITS]] == s.clock[rules.NOW] - without).all()  # oldest first
        assert s.count[rules.WAITS] == len(without)
        for k, r in enumerate(s.run[rules.REQUEST, :running]):
            decoding = s.run[rules.DUE, k] > s.count[rules.STEP]
            computed = (
                s.count[rules.STEP] - s.run[rules.ORIGIN, k] if decoding else s.request[r, rules.COMPUTED]
            )
            slot = s.request[r, rules.SLOT]
            unfilled = s.table[slot, computed // e.block_size : s.slot[slot, rules.HELD]]
            assert (s.block[unfilled, rules.CONTENT] == rules.NO_CONTENT).all()  # only full blocks are found
        assert s.step[:, rules.PREFILL].max() <= e.max_num_batched_tokens
        assert s.step[:, rules.SEQS].max() <= e.max_num_seqs
        if s.count[rules.FINISHED] == len(work):
            break
    assert s.count[rules.FINISHED] == len(work)
    assert tokens == work.output_tokens.sum()
    assert s.request[0, rules.PREEMPTED_TIMES] == 0  # never anything but the oldest
    seconds = s.clock[rules.NOW]
    assert MODEL.idle_w * seconds <= energy_j * (1 + 1e-9) and energy_j <= MODEL.power_cap_w * seconds
    assert s.count[rules.FREE_BLOCKS] == e.num_blocks
    first, finish = s.time_s[:, rules.FIRST_TOKEN], s.time_s[:, rules.FINISH]
    assert (first > work.arrival_s).all()
    assert (finish >= first).all()
    assert (np.diff(s.time_s[:, rules.ADMISSION]) >= 0).all()  # first come, first served


def test_windows_add_up_whatever_their_length():
    work, e = requests(np.linspace(0, 2, 20), 300, 60), engine()
    whole, parts = new_state(work, e), new_state(work, e)
    run_until(whole, e, 3.0)
    energy_j = 0.0
    for tenth in range(1, 31):
        run_until(parts, e, tenth / 10)
        energy_j += parts.clock[rules.ENERGY]
    assert energy_j == pytest.approx(whole.clock[rules.ENERGY], rel=1e-9)
    np.testing.assert_allclose(parts.time_s, whole.time_s, rtol=1e-9)


def test_an_idle_engine_draws_idle_power():
    s, e = new_state(requests([10.0], 10, 10), engine()), engine()
    run_until(s, e, 5.0)
    assert s.clock[rules.ENERGY] == pytest.approx(5 * MODEL.idle_w)


def test_a_lowered_limit_lets_running_requests_finish():
    work, e = requests(np.zeros(16), 64, 400), engine()
    s = new_state(work, e)
    run_until(s, e, 0.5, limit=12)
    assert s.count[rules.RUNNING] == 12
    run_until(s, e, 0.6, limit=2)
    assert s.count[rules.RUNNING] == 12 and s.count[rules.PREEMPTIONS] == 0
    run_until(s, e, 60.0, limit=2)
    assert s.count[rules.FINISHED] == 16
    assert s.request[:, rules.PREEMPTED_TIMES].sum() == 0


def test_the_newest_request_is_preempted_when_blocks_run_out():
    work, e = requests([0.0, 0.01, 0.02], 100, 300), engine(num_blocks=40)
    s = new_state(work, e)
    run_until(s, e, 60.0)
    assert s.count[rules.FINISHED] == 3
    assert s.request[0, rules.PREEMPTED_TIMES] == 0
    assert s.request[2, rules.PREEMPTED_TIMES] > 0


def test_a_long_prompt_is_computed_in_chunks_of_the_token_budget():
    work, e = requests([0.0], 1000, 2), engine(max_num_batched_tokens=256)
    s = new_state(work, e)
    chunks = []
    while s.count[rules.FINISHED] == 0:
        run_until(s, e, s.clock[rules.NOW] + 5e-4)
        computed = int(s.request[0, rules.COMPUTED])
        if computed and computed not in chunks:
            chunks.append(computed)
    assert chunks[:4] == [256, 512, 768, 1000]
    assert (
        s.time_s[0, rules.FIRST_TOKEN]
        > s.time_s[0, rules.ADMISSION] + 4 * PACK.perf.step_cost(1, 1, 0, 1980)[0]
    )


def test_decoding_requests_come_before_the_prompts_of_others():
    work, e = requests([0.0, 0.3], [16, 2000], [200, 2]), engine(max_num_batched_tokens=100)
    s = new_state(work, e)
    run_until(s, e, 0.3)
    before = s.count[rules.OUTPUT_TOKENS]
    run_until(s, e, 0.45)
    assert s.time_s[1, rules.ADMISSION] >= 0.3 and s.time_s[1, rules.FIRST_TOKEN] < 0
    assert s.count[rules.OUTPUT_TOKENS] > 0.15 / 0.3 * before * 0.5  # the first goes on meanwhile
    assert s.step[:, rules.PREFILL].max() == 99  # what the decoding one leaves of the budget


@pytest.mark.parametrize(("block_size", "hits"), [(16, 96), (64, 64), (128, 0)])
def test_only_full_blocks_of_a_prefix_are_shared(block_size, hits):
    work = requests([0.0, 5.0], 150, 4, prefix_id=[0, 0], prefix=100)
    e = engine(block_size=block_size)
    s = new_state(work, e)
    run_until(s, e, 4.0)
    run_until(s, e, 8.0)
    assert s.count[rules.PREFIX_HITS] == hits
    assert s.count[rules.PREFIX_QUERIES] == 150


def test_the_last_token_of_a_prompt_is_computed_even_if_all_of_it_is_cached():
    work = requests([0.0, 5.0], 64, 4, prefix_id=[0, 0], prefix=64)
    s = new_state(work, engine())
    run_until(s, engine(), 4.0)
    run_until(s, engine(), 8.0)
    assert s.count[rules.PREFIX_HITS] == 48 and s.count[rules.PROMPT_TOKENS] == 16


def test_nobody_is_admitted_in_a_step_that_preempts():
    e = engine(num_blocks=40, max_num_batched_tokens=64, prefix_caching=False)
    s = new_state(requests([0.0, 0.01, 0.02], 100, 300), e)
    preempting_windows = 0
    while s.count[rules.FINISHED] < 3:
        run_until(s, e, s.clock[rules.NOW] + 5e-4)  # at most one step is composed in it
        if s.count[rules.PREEMPTIONS]:
            preempting_windows += 1
            assert s.count[rules.PREEMPTED] > 0  # its first chunk would have found room
    assert preempting_windows > 0


def test_without_prefix_caching_nothing_is_shared():
    work, e = requests([0.0, 5.0], 150, 4, prefix_id=[0, 0], prefix=100), engine(prefix_caching=False)
    s = new_state(work, e)
    run_until(s, e, 4.0)
    run_until(s, e, 8.0)
    assert s.count[rules.PREFIX_HITS] == 0


def test_pool_pressure_preempts_with_large_blocks_first():
    preemptions = {}
    for block_size in (8, 64):
        e = engine(block_size=block_size, num_blocks=2560 // block_size)
        s = new_state(requests(np.zeros(16), 65, 65), e)
        run_until(s, e, 60.0)
        assert s.count[rules.FINISHED] == 16
        preemptions[block_size] = s.request[:, rules.PREEMPTED_TIMES].sum()
    assert preemptions[64] > preemptions[8] == 0


def test_a_preempted_request_finds_its_blocks_again():
    work, pool = requests([0.0, 0.01, 0.02], 100, 300), {"num_blocks": 40}
    computed = []
    for caching in (True, False):
        e = engine(prefix_caching=caching, **pool)
        s = new_state(work, e)
        run_until(s, e, 60.0)
        computed.append(int(s.count[rules.PROMPT_TOKENS]))
    assert computed[0] < computed[1]


def test_a_larger_block_leaves_more_of_the_pool_unused():
    usage = {}
    for block_size in (8, 64):
        work, e = (
            requests(np.zeros(10), 70, 500),
            engine(block_size=block_size, num_blocks=32_000 // block_size),
        )
        s = new_state(work, e)
        run_until(s, e, 0.5)
        usage[block_size] = 1 - s.count[rules.FREE_BLOCKS] / e.num_blocks
    assert usage[64] > usage[8]


def test_an_arrival_during_a_step_joins_the_step_after_the_next():
    arrival_s = 0.5
    s, e = new_state(requests([0.0, arrival_s], 16, 200), engine()), engine()
    step_ends_s = []
    for now in np.arange(0.4, 0.7, 1e-4):
        run_until(s, e, now)
        if s.count[rules.OUTPUT_TOKENS] and now > 0.4:
            step_ends_s.append(now)
    ready_s = arrival_s + MODEL.frontend_in_s
    first_token_s = s.time_s[1, rules.FIRST_TOKEN] - MODEL.frontend_out_s
    ends_s = [end for end in step_ends_s if ready_s < end <= first_token_s + 1e-4]
    assert len(ends_s) == 3  # of the step during which it came, of the next, of its own
    assert s.time_s[1, rules.ADMISSION] == pytest.approx(ends_s[0], abs=1.1e-4)
    assert first_token_s == pytest.approx(ends_s[2], abs=1.1e-4)


def test_the_same_seed_gives_the_same_bytes():
    def windows():
        node = SimulatedNode(PACK, parse_workload("mmpp"), kv_block_size=16, horizon_s=60.0, kv_tokens=26_000)
        node.reset(seed=7)
        node.apply(Knobs(24, 1500))
        return [node.measure(1.0) for _ in range(60)]

    assert windows() == windows()


def test_overload_queues_and_goes_on():
    node = SimulatedNode(PACK, parse_workload("steady:rate_rps=200"), kv_block_size=16, horizon_s=20.0)
    node.reset(seed=0)
    windows = [node.measure(1.0) for _ in range(20)]
    assert windows[-1].waiting > 1000 and windows[-1].running == 128
    assert windows[-1].oldest_wait_s > windows[5].oldest_wait_s


def test_a_request_larger_than_the_pool_is_refused():
    node = SimulatedNode(PACK, parse_workload("steady"), kv_block_size=16, horizon_s=10.0, kv_tokens=1000)
    with pytest.raises(ConfigError, match="does not fit"):
        node.reset(seed=0)


ORACLE = """
import numpy as np
from fuel_ray.sim.node import SimulatedNode
from fuel_ray.sim.pack import load_pack
from fuel_ray.types import Knobs
from fuel_ray.workload.spec import parse_workload
node = SimulatedNode(load_pack("h100-qwen3-8b"), parse_workload("chat-prefix"), kv_block_size=16,
                     horizon_s=20.0, kv_tokens=9_000)
node.reset(seed=3)
for limit, clock in ((128, 1980), (12, 1500), (64, 990)):
    node.apply(Knobs(limit, clock))
    for _ in range(5):
        print(repr(node.measure(1.0)))
"""


def test_the_compiled_scheduler_equals_plain_python_to_the_bit():
    outputs = []
    for disabled in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", ORACLE], env={"NUMBA_DISABLE_JIT": disabled, "PATH": ""},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] and outputs[0].count("WindowMetrics") == 15
