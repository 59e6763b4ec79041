"""Baselines, the network, replay, and policy folders."""

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from fuel_ray.build.codec import build_codec
from fuel_ray.build.nodes import build_loop, build_node
from fuel_ray.build.resolve import resolve
from fuel_ray.codec import SEED_GRID, ActionGrid, Codec, Encoder
from fuel_ray.config import PRESETS
from fuel_ray.control import run_policy
from fuel_ray.errors import PolicyError
from fuel_ray.policies.learned import LearnedPolicy, Manifest, load_policy, read_manifest, save_policy
from fuel_ray.policies.network import folded, q_values
from fuel_ray.policies.static import LoadTable, Static
from fuel_ray.training import policies as train
from fuel_ray.training.replay import ReplayBuffer
from fuel_ray.training.rl_module import DuelingQNet
from fuel_ray.training.rollout import Exploration, Sampler, near
from fuel_ray.training.trials import Checkpointed, Trained, averaged
from fuel_ray.tuning.runs import Score
from fuel_ray.tuning.search import tune_static
from fuel_ray.types import Knobs, Slo
from tests.policy_folders import write_policy
from tests.test_codec import SPEC, WINDOW


def parabola(policy):
    """Least energy at 1305 MHz; attainment is lost below 1200 MHz and below 16 requests."""
    knobs = policy.decide(WINDOW)
    kept = min(1.0, knobs.gpu_clock_mhz / 1200) * min(1.0, knobs.batch_limit / 16)
    return Score(50 + ((knobs.gpu_clock_mhz - 1305) / 100) ** 2 + knobs.batch_limit / 1000, kept)


def test_tuned_static_finds_a_known_optimum_on_the_gpus_own_grid():
    found = tune_static(parabola, SPEC, share=0.95, limits=(8, 16, 32))
    assert found == Knobs(16, 1305)


def test_tuned_static_keeps_the_slo_or_comes_closest():
    def hard(policy):
        score = parabola(policy)
        return Score(score.energy_j_per_request, score.slo_attainment * 0.9)

    found = tune_static(hard, SPEC, share=0.95, limits=(8, 16))
    assert hard(Static(found)).slo_attainment == pytest.approx(0.9)


def test_tuned_static_stops_at_the_slo_where_less_energy_would_break_it():
    def cheaper_when_slow(policy):
        clock_mhz = policy.decide(WINDOW).gpu_clock_mhz
        return Score(clock_mhz / 10, min(1.0, clock_mhz / 1200))

    assert tune_static(cheaper_when_slow, SPEC, share=0.95, limits=(16,)).gpu_clock_mhz == 1140


def test_scores_rank_by_energy_within_the_slo_and_by_attainment_without():
    good, dear, cheap, hopeless = Score(50, 0.96), Score(60, 0.99), Score(40, 0.94), Score(30, 0.5)
    assert sorted([hopeless, cheap, dear, good], key=lambda score: score.rank(0.95)) == [
        good, dear, cheap, hopeless,
    ]  # fmt: skip


def test_a_load_table_decides_by_rates_up_to_and_including_its_own():
    table = LoadTable([2.0, 8.0], [Knobs(1, 990), Knobs(2, 1200), Knobs(3, 1500)])
    for arrivals, limit in ((0, 1), (4, 1), (5, 2), (16, 2), (17, 3), (1000, 3)):
        table.reset()
        assert table.decide(replace(WINDOW, arrivals=arrivals)).batch_limit == limit  # in 2 s


@pytest.mark.parametrize(("average", "slow_windows"), [({}, 6), ({"ewma_s": 4.0}, 2)])
def test_a_load_table_averages_over_ten_seconds_or_its_own(average, slow_windows):
    table = LoadTable([5.0], [Knobs(1, 990), Knobs(2, 1200)], **average)
    table.decide(replace(WINDOW, arrivals=0, duration_s=1.0))
    busy = replace(WINDOW, arrivals=10, duration_s=1.0)
    limits = [table.decide(busy).batch_limit for _ in range(10)]
    assert limits.index(2) == slow_windows  # 10 (1 - exp(-t / 10)) passes 5 after 6.9 s
    assert table.plan(np.array([0, *[10] * 10]))[0].tolist() == [1, *limits]


def test_a_load_table_looks_the_rate_up():
    table = LoadTable([2.0, 8.0], [Knobs(1, 990), Knobs(2, 1200), Knobs(3, 1500)])
    assert table.decide(WINDOW) == Knobs(2, 1200)  # 12 arrivals in 2 s
    for _ in range(50):
        knobs = table.decide(type(WINDOW)(**{**_fields(WINDOW), "arrivals": 40}))
    assert knobs == Knobs(3, 1500)
    table.reset()
    assert table.decide(type(WINDOW)(**{**_fields(WINDOW), "arrivals": 0})) == Knobs(1, 990)


def _fields(window):
    return {name: getattr(window, name) for name in window.__slots__}


@pytest.mark.parametrize("head", ["joint", "additive"])
def test_numpy_and_torch_compute_the_same_q(head):
    torch.manual_seed(0)
    net = DuelingQNet(10, limits=3, clocks=5, hidden=(32, 16), head=head)
    observations = torch.rand(4, 10)
    arrays = {name: p.detach().numpy() for name, p in net.named_parameters()}
    expected = net(observations).detach().numpy()
    for row, q in zip(observations.numpy(), expected, strict=True):
        np.testing.assert_allclose(q_values(arrays, row, head=head), q, atol=1e-5)


@pytest.mark.parametrize("head", ["joint", "additive"])
def test_the_advantages_add_nothing_on_average(head):
    net = DuelingQNet(4, limits=3, clocks=5, hidden=(8,), head=head)
    arrays = {name: p.detach().numpy() for name, p in net.named_parameters()}
    observation = np.ones(4, np.float32)
    hidden = np.maximum(arrays["trunk.0.weight"] @ observation + arrays["trunk.0.bias"], 0)
    value = arrays["value.weight"] @ hidden + arrays["value.bias"]
    assert q_values(arrays, observation, head=head).mean() == pytest.approx(value[0], abs=1e-5)


def test_an_additive_head_numbers_actions_as_the_grid_does():
    arrays = {
        "value.weight": np.zeros((1, 1)), "value.bias": np.zeros(1),
        "limit_advantage.weight": np.zeros((2, 1)), "limit_advantage.bias": np.array([0.0, 100.0]),
        "clock_advantage.weight": np.zeros((3, 1)), "clock_advantage.bias": np.array([0.0, 1.0, 2.0]),
    }  # fmt: skip
    q = q_values(arrays, np.zeros(1), head="additive")
    assert q.tolist() == pytest.approx([-51, -50, -49, 49, 50, 51])


def buffer(capacity=100, **kwargs):
    settings = {"gamma": 0.5, "n_step": 3, "rng": np.random.default_rng(0), **kwargs}
    return ReplayBuffer(capacity, 1, **settings)


def test_returns_are_summed_over_n_steps_and_bootstrapped_sooner_at_the_end():
    replay = buffer()
    replay.add(np.arange(6.0)[:, None], np.arange(5), np.array([1.0, 2.0, 4.0, 8.0, 16.0], np.float32))
    replay.refresh()
    batch = replay.sample(2000)
    rows = {int(a): (r, d, o[0]) for a, r, d, o in zip(
        batch.actions, batch.returns, batch.discounts, batch.next_observations, strict=True)}  # fmt: skip
    assert rows[0] == (1 + 1 + 1, 0.125, 3.0)
    assert rows[3] == (8 + 8, 0.25, 5.0)
    assert rows[4] == (16, 0.5, 5.0)


def test_a_single_step_return_is_the_reward():
    replay = buffer(n_step=1)
    replay.add(np.arange(4.0)[:, None], np.arange(3), np.array([1.0, 2.0, 4.0], np.float32))
    replay.refresh()
    batch = replay.sample(200)
    assert (batch.returns == 2.0**batch.actions).all() and (batch.discounts == 0.5).all()
    assert (batch.next_observations[:, 0] == batch.observations[:, 0] + 1).all()


def test_the_next_action_is_held_to_the_table_of_the_state_that_is_bootstrapped_from():
    penalties = np.array([[0.0, 0.1], [np.inf, 0.0]])
    replay = buffer(n_step=2, penalties=penalties)
    replay.add(np.zeros((4, 1)), np.arange(3), np.zeros(3, np.float32), bases=[1, 0, 1, 0])
    replay.refresh()
    batch = replay.sample(100)
    following = np.array([1, 0, 0])[batch.actions]  # two steps on, or the end
    np.testing.assert_array_equal(batch.next_penalties, penalties.astype(np.float32)[following])
    free = buffer()
    free.add(np.zeros((2, 1)), np.array([0]), np.zeros(1, np.float32))
    free.refresh()
    assert not free.sample(3).next_penalties.any()


def test_a_weight_is_that_of_the_draw_whatever_became_of_the_priority_since():
    replay = buffer(n_step=1)
    replay.add(np.arange(4.0)[:, None], np.arange(3), np.zeros(3, np.float32))
    replay.refresh()
    replay.set_priorities(np.array([0]), np.array([1000.0]))
    assert (replay.sample(100).weights == 1.0).all(), "all were drawn alike"
    replay.refresh()
    batch = replay.sample(1000)
    assert batch.weights[batch.index == 0].max(initial=0.0) < 0.3 < batch.weights.max()


def test_new_transitions_have_the_highest_priority():
    replay = buffer(alpha=1.0)
    replay.add(np.zeros((2, 1)), np.array([0]), np.zeros(1, np.float32))
    replay.set_priorities(np.array([0]), np.array([8.0]))
    replay.add(np.zeros((2, 1)), np.array([1]), np.zeros(1, np.float32))
    replay.refresh()
    assert 0.45 < replay.sample(4000).actions.mean() < 0.55


def test_an_error_of_zero_is_still_drawn_now_and_then():
    replay = buffer(alpha=1.0)
    replay.add(np.zeros((3, 1)), np.arange(2), np.zeros(2, np.float32))
    replay.set_priorities(np.array([0, 1]), np.array([0.0, 0.1]))
    replay.refresh()
    assert 0 < (replay.sample(20_000).actions == 0).mean() < 0.05


def test_the_ring_forgets_the_oldest():
    replay = buffer(capacity=4)
    replay.add(np.zeros((7, 1)), np.arange(6), np.zeros(6, np.float32))
    replay.refresh()
    assert len(replay) == 4
    assert set(replay.sample(500).actions.tolist()) == {2, 3, 4, 5}


def test_transitions_are_drawn_in_proportion_to_their_priority():
    replay = buffer(alpha=1.0)
    replay.add(np.zeros((3, 1)), np.arange(2), np.zeros(2, np.float32))
    replay.set_priorities(np.array([0, 1]), np.array([3.0, 1.0]))
    replay.refresh()
    batch = replay.sample(20_000)
    drawn = Counter(batch.actions.tolist())
    assert drawn[0] / drawn[1] == pytest.approx(3.0, rel=0.1)
    assert batch.weights[batch.actions == 0].max() < batch.weights[batch.actions == 1].min()


def manifest(**changes):
    spec = build_node(PRESETS["default"], 16, horizon_s=1.0).spec
    facts = {
        "kv_block_sizes": (16,), "model": spec.model, "gpu_name": spec.gpu_name, "engine": "e", "pack": "p",
        "pack_sha256": "0", "reward": "energy", "workload": "w", "workload_digest": "d", "head": "additive",
        "fuel_ray_version": "0",
    }  # fmt: skip
    return Manifest(**{**facts, **changes})


@pytest.fixture
def saved(tmp_path):
    loop = build_loop(PRESETS["default"], 16, horizon_s=60.0)
    codec = build_codec(PRESETS["plain"], loop.node.spec)
    grid = codec.grid
    net = DuelingQNet(
        13, limits=len(grid.batch_limits), clocks=len(grid.gpu_clocks_mhz), hidden=(), head="additive"
    )
    rng = np.random.default_rng(0)
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    arrays = {n: rng.normal(0, 3, s).astype(np.float32) for n, s in shapes.items()}
    save_policy(tmp_path / "policy", arrays, codec, manifest())
    return tmp_path / "policy", arrays, codec, loop


def test_a_loaded_policy_decides_as_the_saved_one(saved):
    folder, arrays, codec, loop = saved
    original = LearnedPolicy(arrays, codec, loop.node.spec, head="additive")
    loaded = load_policy(folder, loop.node.spec)
    rng = np.random.default_rng(1)
    seen = []
    for _ in range(100):
        load = {"running": int(rng.integers(50)), "waiting": int(rng.integers(50)), "kv_usage": rng.random()}
        seen.append(replace(WINDOW, energy_j=rng.uniform(100, 1400), **load))
    chosen = [[policy.decide(window) for window in seen] for policy in (original, loaded)]
    assert chosen[0] == chosen[1]
    assert len(set(chosen[0])) > 1


def test_a_policy_forgets_the_past_on_reset():
    codec = Codec(("arrival_rate_ewma",), ActionGrid((8, 16), (990,)), Slo(1.0))
    arrays = {
        "value.weight": np.zeros((1, 1)), "value.bias": np.zeros(1),
        "advantage.weight": np.array([[0.0], [1.0]]), "advantage.bias": np.array([0.0, -0.5]),
    }  # fmt: skip
    policy = LearnedPolicy(arrays, codec, SPEC, head="joint")
    busy, quiet = replace(WINDOW, arrivals=40), replace(WINDOW, arrivals=0)  # in 2 s, of a scale of 20/s
    assert [policy.decide(window).batch_limit for window in (busy, quiet)] == [16, 16]
    policy.reset()
    assert policy.decide(quiet).batch_limit == 8


def test_a_policy_for_another_block_size_is_refused(saved):
    other = build_node(PRESETS["default"], 32, horizon_s=1.0).spec
    with pytest.raises(PolicyError, match="block size"):
        load_policy(saved[0], other)


def test_a_policy_for_another_model_is_refused(saved):
    folder, arrays, codec, loop = saved
    save_policy(folder, arrays, codec, manifest(model="other"))
    with pytest.raises(PolicyError, match="other"):
        load_policy(folder, loop.node.spec)


@pytest.mark.parametrize("damage", ["manifest.json", "codec.json", "weights.safetensors"])
def test_a_damaged_folder_is_refused(saved, damage):
    folder, _, _, loop = saved
    (folder / damage).write_text("{}")
    with pytest.raises(PolicyError, match="policy"):
        load_policy(folder, loop.node.spec)


def scale(raw, *, each=1.0, **change):
    size = len(raw["features"])
    return {"count": 2, "mean": [0.0] * size, "sum_of_squares": [each] * size, **change}


def _write(folder, name, change):
    raw = json.loads((folder / name).read_text())
    change(raw)
    (folder / name).write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("codec.json", lambda raw: raw["features"].__setitem__(0, "mood")),
        ("codec.json", lambda raw: raw["features"].pop()),  # the weights see one more
        ("codec.json", lambda raw: raw["grid"]["gpu_clocks_mhz"].pop()),  # the weights have more actions
        ("manifest.json", lambda raw: raw.update(head="joint")),
        ("manifest.json", lambda raw: raw.update(head="deep")),
        ("manifest.json", lambda raw: raw.update(format=2)),
        ("manifest.json", lambda raw: raw.update(kv_block_sizes=None)),
        ("manifest.json", lambda raw: raw.pop("model")),
        ("codec.json", lambda raw: raw.update(running_scale=scale(raw, count="x"))),
        ("codec.json", lambda raw: raw.update(running_scale=scale(raw, mean=[0.0]))),
        ("codec.json", lambda raw: raw.update(running_scale=scale(raw, each=-1.0))),
    ],
)
def test_a_folder_whose_parts_do_not_fit_each_other_is_refused(saved, name, change):
    folder, _, _, loop = saved
    _write(folder, name, change)
    with pytest.raises(PolicyError, match="policy"):
        load_policy(folder, loop.node.spec)


def test_weights_that_are_not_numbers_are_refused(saved):
    folder, arrays, codec, loop = saved
    save_policy(folder, {name: array * np.nan for name, array in arrays.items()}, codec, manifest())
    with pytest.raises(PolicyError, match="policy"):
        load_policy(folder, loop.node.spec)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(PolicyError, match="nowhere"):
        load_policy(tmp_path / "nowhere", SPEC)


def test_a_loaded_policy_controls_a_node_as_the_saved_one(saved):
    folder, arrays, codec, loop = saved
    policies = (
        LearnedPolicy(arrays, codec, loop.node.spec, head="additive"),
        load_policy(folder, loop.node.spec),
    )
    runs = [run_policy(loop, policy, seed=5, steps=50) for policy in policies]
    assert runs[0] == runs[1]


def test_a_policy_trained_with_running_scales_is_saved_with_them(tmp_path):
    config = replace(PRESETS["plain"], normalisation="running")
    loop = build_loop(config, 16, horizon_s=30.0)
    net = DuelingQNet(13, limits=3, clocks=15, hidden=(), head="additive")
    arrays = {name: p.detach().numpy() for name, p in net.named_parameters()}
    (tmp_path / "run.json").write_text('{"engine": "vllm 0.20.2"}')
    with resolve(config, run="r") as found:
        trial = Trained((16,), (Checkpointed(100, None, arrays),))
        train._chosen(found, tmp_path, trial, [(Score(1.0, 1.0), 0.0)], 0.97)
    codec = Codec.from_dict(json.loads((tmp_path / "policies/block_16/codec.json").read_text()))
    seen = Encoder(codec, loop.node.spec).encode(loop.reset(seed=0))
    assert codec.running_scale.count > 1 and seen.any()


def test_the_codec_on_disk_is_json(saved):
    raw = json.loads((saved[0] / "codec.json").read_text())
    assert Codec.from_dict(raw).grid == saved[2].grid


def test_actions_of_the_seed_grid_can_be_taken_by_a_joint_head():
    net = DuelingQNet(10, limits=11, clocks=17, hidden=(8,), head="joint")
    arrays = {name: p.detach().numpy() for name, p in net.named_parameters()}
    codec = Codec(("running",) * 1, SEED_GRID, Slo(e2e_s=10.0))
    assert q_values(arrays, np.zeros(10, np.float32), head="joint").shape == (len(codec.grid),)


def test_results_are_averaged_with_those_just_before():
    results = [Checkpointed(k, None, {"w": np.full(2, float(k), np.float32)}) for k in range(4)]
    means = [result.arrays["w"].tolist() for result in averaged(results, last=3)]
    assert means == [[0, 0], [0.5, 0.5], [1, 1], [2, 2]]
    assert [result.env_steps for result in averaged(results, last=1)] == [0, 1, 2, 3]


def test_a_smooth_head_acts_folded_as_it_was_trained():
    net = DuelingQNet(13, limits=3, clocks=14, hidden=(8,), head="smooth")
    arrays = {name: p.detach().numpy() for name, p in net.named_parameters()}
    x = np.random.default_rng(0).random(13).astype(np.float32)
    acting = folded(arrays, clocks=14)
    np.testing.assert_allclose(
        q_values(acting, x, head="smooth"), net(torch.from_numpy(x)).detach().numpy(), atol=1e-5
    )
    assert folded(acting, clocks=14).keys() == acting.keys()


def test_exploration_takes_random_actions_for_a_share_of_the_time_and_holds_them():
    exploration = Exploration(50, 1000, hold_steps=5, rng=np.random.default_rng(0))
    chosen = np.stack([exploration.choose(np.full(50, -1), 0.3) for _ in range(2000)])
    random = chosen >= 0
    assert random.mean() == pytest.approx(0.3, abs=0.02)
    held = (chosen[1:] == chosen[:-1]) & random[1:]
    assert held.sum() / random[1:].sum() == pytest.approx(0.8, abs=0.03)  # 4 of 5 windows go on
    assert (exploration.choose(np.zeros(50, int), 1.0) > 0).mean() > 0.9


class Counting:
    """Observes how many steps the episode has had; ends after three."""

    base, penalty = None, 0.0

    def reset(self, *, seed=None):
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.full(1, self.steps, np.float32), float(action), False, self.steps == 3, {"n": self.steps}

    def close(self):
        pass


def test_fragments_are_consecutive_steps_of_one_episode():
    exploration = Exploration(2, 2, hold_steps=1, rng=np.random.default_rng(0))
    sampler = Sampler([Counting(), Counting()], exploration, seed=0)
    first = sampler.sample(lambda seen, _: seen[:, 0].astype(int), steps=4, epsilon=0.0)
    again = sampler.sample(lambda seen, _: seen[:, 0].astype(int), steps=2, epsilon=0.0)
    assert [[float(*seen) for seen in f.observations] for f in first] == [[0, 1, 2, 3]] * 2 + [[0, 1]] * 2
    assert first[0].rewards == first[0].actions == [0, 1, 2]
    assert [[float(*seen) for seen in f.observations] for f in again] == [[1, 2, 3]] * 2
    assert [info["n"] for info in again[0].infos] == [2, 3]


class Rising(Counting):
    """Its load table takes action 1 of four in even windows and action 3, with nothing below, in odd ones."""

    rows = np.array([[0.0] * 4, [np.inf, 0.0, 0.0, 0.0], [0.0] * 4, [np.inf, np.inf, np.inf, 0.0]])
    steps = 0

    @property
    def base(self):
        return 1 + 2 * (self.steps % 2)

    @property
    def penalty(self):
        return self.rows[self.base]


def test_no_action_is_taken_that_may_not_be_though_random_ones_are_held():
    around = np.array([[0, 1], [1, 2], [2, 3], [3, 3]])
    exploration = Exploration(20, 4, hold_steps=3, rng=np.random.default_rng(0), near=around)
    sampler = Sampler([Rising() for _ in range(20)], exploration, seed=0)

    def best(seen, penalties):
        return (np.array([0.0, 0.1, 0.0, 0.0]) - penalties).argmax(-1)

    fragments = [f for _ in range(20) for f in sampler.sample(best, steps=6, epsilon=0.9)]
    assert all(len(f.bases) == len(f.observations) for f in fragments)
    taken = [pair for f in fragments for pair in zip(f.bases, f.actions, strict=False)]
    assert {(base, int(action)) for base, action in taken} == {(1, 1), (1, 2), (1, 3), (3, 3)}


def test_near_a_load_table_random_actions_stay_within_300_mhz_of_its_clock():
    grid = ActionGrid((4, 16, 32), tuple(range(990, 1981, 30)))
    base = Knobs(16, 1080)
    around = near(grid)[grid.encode(base)]
    drawn = [grid.decode(action) for action in around]
    assert {knobs.gpu_clock_mhz for knobs in drawn} == set(range(990, 1381, 30))
    assert sum(knobs.batch_limit == 16 for knobs in drawn) == 19 * len(drawn) / 20
    assert {knobs.batch_limit for knobs in drawn} == {16, 32}, "never a lower one, as the policy will"
    exploration = Exploration(500, len(grid), hold_steps=1, rng=np.random.default_rng(0), near=near(grid))
    bases = np.full(500, grid.encode(base))
    taken = exploration.choose(np.zeros(500, np.int64), 1.0, bases)
    assert set(taken) <= set(around) and len(set(taken)) > 20
    assert len(set(exploration.choose(np.zeros(500, np.int64), 1.0))) > len(set(around))


def test_a_load_table_is_read_as_written_and_as_older_runs_wrote_it():
    table = LoadTable([2.5, 6.0], [Knobs(8, 900), Knobs(16, 1200), Knobs(16, 1980)])
    rows = [[2.5, 8, 900], [6.0, 16, 1200], [None, 16, 1980]]
    for raw in (json.loads(json.dumps(table.to_dict())), rows):
        found = LoadTable.from_dict(raw)
        assert (found.rates_rps, found.knobs, found.ewma_s) == (table.rates_rps, table.knobs, 10.0)


def test_only_another_average_than_that_of_ten_seconds_is_written():
    fast = LoadTable([2.5], [Knobs(8, 900), Knobs(16, 1200)], ewma_s=4.0)
    assert set(LoadTable(fast.rates_rps, fast.knobs).to_dict()) == {"rates_rps", "knobs"}
    assert LoadTable.from_dict(json.loads(json.dumps(fast.to_dict()))).ewma_s == 4.0
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="average"):
            LoadTable.from_dict({**fast.to_dict(), "ewma_s": wrong})


def test_a_manifest_is_read_as_written_and_with_what_older_ones_have(tmp_path):
    knobs, slo = Knobs(16, 1500), Slo(0.5, None, 8.0, None)
    folder = write_policy(tmp_path, tuned_static=knobs, slo=slo, feature_ranges={"running": (0.0, 1.0)})
    written = read_manifest(folder)
    assert (written.tuned_static, written.slo) == (knobs, slo)
    assert written.feature_ranges == {"running": (0.0, 1.0)}
    raw = json.loads((folder / "manifest.json").read_text())
    assert raw["format"] == 1 and raw["tuned_static"] == {"batch_limit": 16, "gpu_clock_mhz": 1500}
    (folder / "manifest.json").write_text(json.dumps({**raw, "evaluation": {"rows": 3}}))
    assert read_manifest(folder) == written
