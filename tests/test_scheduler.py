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
from fuel_ray.sim.perf_model import load_pack, step_cost
from fuel_ray.sim.scheduler import Engine, advance, new_state
from fuel_ray.types import Knobs, Requests
from fuel_ray.workload import parse_workload

PACK = load_pack("h100-qwen3-8b")


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
    advance(state, e, PACK.perf, until_s, limit, clock_mhz)


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
    tokens, running_before = 0, 0
    for second in range(400):
        limit = limits[min(second, len(limits) - 1)]
        run_until(s, e, (second + 1) * 0.25, limit=limit)
        tokens += s.count[rules.OUTPUT_TOKENS]
        free = free_list(s)
        referenced = np.flatnonzero(s.block[:-1, rules.REFERENCES] > 0)
        assert len(free) == s.count[rules.FREE_BLOCKS] == len(set(free))
        assert set(free).isdisjoint(referenced.tolist())
        assert len(free) + len(referenced) == e.num_blocks
        running = s.count[rules.RUNNING]
        assert running <= max(min(limit, e.max_num_seqs), running_before)
        running_before = running
        if s.count[rules.FINISHED] == len(work):
            break
    assert s.count[rules.FINISHED] == len(work)
    assert tokens == work.output_tokens.sum()
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
    assert s.clock[rules.ENERGY] == pytest.approx(5 * PACK.perf.idle_w)


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
    run_until(s, e, 0.02)
    assert s.request[0, rules.EMITTED] == 0 and s.request[0, rules.COMPUTED] <= 512
    run_until(s, e, 10.0)
    assert s.count[rules.FINISHED] == 1 and s.count[rules.PROMPT_TOKENS] + 512 >= 1000


@pytest.mark.parametrize(("block_size", "hits"), [(16, 96), (64, 64), (128, 0)])
def test_only_full_blocks_of_a_prefix_are_shared(block_size, hits):
    work = requests([0.0, 5.0], 150, 4, prefix_id=[0, 0], prefix=100)
    e = engine(block_size=block_size)
    s = new_state(work, e)
    run_until(s, e, 4.0)
    run_until(s, e, 8.0)
    assert s.count[rules.PREFIX_HITS] == hits
    assert s.count[rules.PREFIX_QUERIES] == 150


def test_without_prefix_caching_nothing_is_shared():
    work, e = requests([0.0, 5.0], 150, 4, prefix_id=[0, 0], prefix=100), engine(prefix_caching=False)
    s = new_state(work, e)
    run_until(s, e, 4.0)
    run_until(s, e, 8.0)
    assert s.count[rules.PREFIX_HITS] == 0


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
    alone = new_state(requests([0.0], 16, 200), engine())
    run_until(alone, engine(), 10.0)
    duration_s, _, _ = step_cost(PACK.perf, 1, 60, 0, 1980)
    arrival_s = 0.5
    both = new_state(requests([0.0, arrival_s], 16, 200), engine())
    run_until(both, engine(), 10.0)
    ready_s = arrival_s + PACK.perf.frontend_in_s
    wait_s = both.time_s[1, rules.ADMISSION] - ready_s
    assert 0 <= wait_s <= duration_s * 1.5  # composed when the next step starts ...
    engine_ttft_s = (
        both.time_s[1, rules.FIRST_TOKEN] - PACK.perf.frontend_out_s - both.time_s[1, rules.ADMISSION]
    )
    assert engine_ttft_s > duration_s * 1.5  # ... and executed after that one


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
from fuel_ray.sim.perf_model import load_pack
from fuel_ray.types import Knobs
from fuel_ray.workload import parse_workload
node = SimulatedNode(load_pack("h100-qwen3-8b"), parse_workload("chat-prefix"), kv_block_size=16,
                     horizon_s=20.0, kv_tokens=9_000)
node.reset(seed=3)
for limit, clock in ((128, 1980), (12, 1500), (64, 990)):
    node.apply(Knobs(limit, clock))
    for _ in range(5):
        print(repr(node.measure(1.0)))
"""


@pytest.mark.slow
def test_the_compiled_scheduler_equals_plain_python_to_the_bit():
    outputs = []
    for disabled in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", ORACLE], env={"NUMBA_DISABLE_JIT": disabled, "PATH": ""},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] and outputs[0].count("WindowMetrics") == 15
