"""Branches of a twin, the head that says energy and misses each, and what is learned from them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fuel_ray.build.codec import build_codec
from fuel_ray.build.nodes import build_node, build_spec
from fuel_ray.config import PRESETS
from fuel_ray.policies.anchor import REACH_MHZ, Anchor
from fuel_ray.policies.learned import LearnedPolicy
from fuel_ray.policies.network import folded, q_values, worth
from fuel_ray.policies.rules import see
from fuel_ray.policies.static import LoadTable
from fuel_ray.sim.branches import Plan, collect, soft_missed, start
from fuel_ray.sim.choice import encode
from fuel_ray.sim.program import SIGHT
from fuel_ray.sim.snapshot import limits_of, missed
from fuel_ray.training.branching import Seen, branch_loss, branches, empty
from fuel_ray.training.rl_module import DuelingQNet
from fuel_ray.types import Knobs

CONFIG = replace(PRESETS["default"], block_sizes=(16,), slo_tpot_s=0.0123)
SPEC = build_spec(CONFIG, 16)
CODEC = build_codec(CONFIG, SPEC)
TABLE = LoadTable([4.0, 8.0], [Knobs(40, 1095), Knobs(40, 1395), Knobs(40, 1695)])
PLAN = Plan(
    every=10, tries=2, hold=3, horizon=12, within_mhz=300.0, other_limit=0.3, soft=1e-9, noise_mhz=0.0
)
PRICE = CODEC.features.index("miss_price")


def network(seed=0):
    torch.manual_seed(seed)
    limits, clocks = len(CODEC.grid.batch_limits), len(CODEC.grid.gpu_clocks_mhz)
    return DuelingQNet(
        len(CODEC.features), limits=limits, clocks=clocks, hidden=(16, 16), head="priced", price_feature=PRICE
    )


def arrays_of(net):
    return {name: values.detach().numpy() for name, values in net.state_dict().items()}


def policy(arrays, *, weight=0.03, price_j=200.0, anchor=True):
    codec = replace(CODEC, miss_price_j=price_j)
    held = Anchor(TABLE, weight, REACH_MHZ) if anchor else None
    return LearnedPolicy(arrays, codec, SPEC, head="priced", anchor=held)


@pytest.fixture(scope="module")
def collected():
    """What branching one episode of 120 s showed, and the node that was branched."""
    zeros = {name: np.zeros_like(values) for name, values in arrays_of(network()).items()}
    node = build_node(CONFIG, 16, horizon_s=200.0)
    node.reset(seed=5)
    out, totals = empty(200, len(CODEC.features)), np.zeros(3)
    found = policy(zeros).compiled(SPEC)
    random = np.random.default_rng(1).random(512)
    n = collect(*start(node.inside), *found, limits_of(CONFIG.slo), PLAN, 120, random, out, totals)
    return out, n, totals


def served(knobs, windows=200):
    """Energy per window and the node, under the table but for the ``knobs`` of some windows."""
    node, table = build_node(CONFIG, 16, horizon_s=200.0), LoadTable(TABLE.rates_rps, TABLE.knobs)
    node.reset(seed=5)
    chosen, energy_j = SPEC.max_performance, []
    for k in range(windows):
        node.apply(knobs.get(k, chosen))
        window = node.measure(1.0)
        energy_j.append(window.energy_j)
        chosen = table.decide(window)
    return np.array(energy_j), node


def test_a_branch_is_what_the_node_would_have_done(collected):
    out, n, _ = collected
    own_j, own = served({}, 10 + 1 + PLAN.horizon)
    first = next(k for k in range(n) if out.action[k] != out.base[k])  # the first place is after window 10
    action = CODEC.grid.decode(out.action[first])
    held = {11 + k: action for k in range(PLAN.hold)}
    other_j, other = served(held, 10 + 1 + PLAN.horizon)
    assert out.energy_j[first] == pytest.approx((other_j - own_j)[11:].sum(), abs=1e-9)
    assert (other_j == own_j)[:11].all()
    limits = limits_of(CONFIG.slo)
    more = missed(other.inside.state, 0, limits) - missed(own.inside.state, 0, limits)
    assert out.misses[first] == pytest.approx(more)


def test_branches_do_not_disturb_the_episode(collected):
    _, _, totals = collected
    energy_j, _ = served({}, 120)
    assert totals[0] == pytest.approx(energy_j.sum(), rel=1e-12)


def test_what_is_tried_is_within_reach_and_no_lower_limit(collected):
    out, n, _ = collected
    assert n > 15
    for action, base in zip(out.action[:n], out.base[:n], strict=True):
        tried, own = CODEC.grid.decode(action), CODEC.grid.decode(base)
        assert abs(tried.gpu_clock_mhz - own.gpu_clock_mhz) <= REACH_MHZ
        assert tried.batch_limit >= own.batch_limit
    assert len(set(out.action[:n])) > 10


def test_a_request_near_its_limit_counts_in_part():
    _, node = served({}, 60)
    state, limits = node.inside.state, limits_of(CONFIG.slo)
    assert soft_missed(state, 0, limits, 1e-9) == pytest.approx(missed(state, 0, limits))
    assert missed(state, 0, limits) < soft_missed(state, 0, limits, 0.6)


@pytest.mark.parametrize("price_j", [10.0, 200.0, 4000.0])
def test_the_priced_head_acts_as_it_was_trained(price_j):
    net = network()
    seen = np.random.default_rng(0).random((5, len(CODEC.features)), np.float32)
    seen[:, PRICE] = np.log1p(price_j) / 10
    energy, misses = (costs.detach().numpy() for costs in net.costs(torch.from_numpy(seen)))
    q = net(torch.from_numpy(seen)).detach().numpy()
    acting = folded(arrays_of(net), clocks=len(CODEC.grid.gpu_clocks_mhz), miss_price_j=price_j)
    for k in range(5):
        own = q_values(acting, seen[k], head="priced")
        of_energy, of_miss = worth(price_j)
        summed = of_energy * energy[k] + of_miss * misses[k]
        assert np.ptp(q[k] - own) < 1e-4 and np.ptp(q[k] - summed) < 1e-4


def test_another_price_makes_another_policy():
    net, window = network(3), None
    node = build_node(CONFIG, 16, horizon_s=60.0)
    node.reset(seed=1)
    window = [node.measure(1.0) for _ in range(20)][-1]
    free = [policy(arrays_of(net), price_j=price_j, weight=0.0) for price_j in (1.0, 5000.0)]
    chosen = {own.decide(window) for own in free}
    assert len(chosen) == 2
    assert free[0].for_slo(CONFIG.slo, miss_price_j=5000.0).decide(window) in chosen


def test_a_known_optimum_is_learned_at_any_price():
    """Energy falls by 100 J with every 100 MHz less; below 1500 MHz each 100 MHz misses one more."""
    rng, net, clocks = np.random.default_rng(0), network(1), np.array(CODEC.grid.gpu_clocks_mhz)
    seen, n = Seen(4096, len(CODEC.features)), 4000
    new = empty(n, len(CODEC.features))
    new.observation[:] = rng.random((n, len(CODEC.features)))
    new.action[:], new.base[:] = rng.integers(len(clocks), size=(2, n))
    below = np.maximum(1500 - clocks, 0) / 100
    new.energy_j[:] = clocks[new.action] - clocks[new.base]
    new.misses[:] = below[new.action] - below[new.base]
    seen.add(new, n)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(200):
        loss = branch_loss(net, seen.sample(256, rng), seen.spread())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    window = new.observation[:1].copy()
    for price_j, wanted_mhz in ((20.0, 900), (1000.0, 1500)):
        window[:, PRICE] = np.log1p(price_j) / 10
        best = CODEC.grid.decode(int(net(torch.from_numpy(window)).argmax()) % len(clocks)).gpu_clock_mhz
        assert abs(best - wanted_mhz) <= 90


@pytest.mark.parametrize(
    "change",
    [
        {"node": "ray"},
        {"mode": "generalist"},
        {"conditional": True},
        {"reward": "greendls"},
        {"slo_share": None},
        {"grid": "seed"},
        {"normalisation": "running"},
        {"features": (*CONFIG.features, "gpu_power")},
        {"train": replace(CONFIG.train, branch_tries=0)},
        {"train": replace(CONFIG.train, head="smooth")},
        {"train": replace(CONFIG.train, hidden=(64,))},
    ],
)
def test_only_what_can_be_compiled_branches(change):
    assert branches(CONFIG)
    assert not branches(replace(CONFIG, **change))


def test_a_compiled_policy_sees_what_the_codec_sees():
    """Over an episode, averages included; on the same windows."""
    own = policy(arrays_of(network()))
    program, server = own.compiled(SPEC)
    sight, seen = np.zeros(SIGHT), np.zeros(len(CODEC.features))
    node = build_node(CONFIG, 16, horizon_s=120.0)
    node.reset(seed=3)
    own.reset()
    for k in range(100):
        node.apply(Knobs(40, CODEC.grid.gpu_clocks_mhz[k % 60]))
        window = node.measure(1.0)
        see(sight, window)
        encode(program, sight, server, seen)
        assert seen == pytest.approx(own.observe(window), abs=1e-6)
