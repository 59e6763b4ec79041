"""Learning from branches: when it is done, the head that says two costs, and a known optimum."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fuel_ray.algorithms import branches
from fuel_ray.build.nodes import build_spec
from fuel_ray.codec import PRICED_FEATURES, ActionGrid, Codec
from fuel_ray.config import PRESETS, LearnConfig
from fuel_ray.errors import ConfigError
from fuel_ray.flags import parse_serving
from fuel_ray.policies.anchor import Anchor
from fuel_ray.policies.compiled import room
from fuel_ray.policies.learned import LearnedPolicy, load_policy, read_policy, save_policy
from fuel_ray.policies.network import ENERGY_J, folded, q_values
from fuel_ray.policies.rules import see
from fuel_ray.policies.static import LoadTable
from fuel_ray.sim.choice import choose
from fuel_ray.sim.node import SimulatedNode
from fuel_ray.sim.pack import load_pack
from fuel_ray.training.branching import Seen, branch_loss, empty
from fuel_ray.training.dqn import FastDqn, learner_of
from fuel_ray.training.rl_module import DuelingQNet
from fuel_ray.types import Knobs, Slo
from fuel_ray.workload.spec import parse_workload
from tests.policy_folders import write_policy
from tests.test_codec import WINDOW

SPEC, SLO = build_spec(PRESETS["default"], 16), Slo(1.0, 0.02)
GRID = ActionGrid((16, 40, 64, 128), tuple(range(990, 1981, 30)))
PRICE = PRICED_FEATURES.index("miss_price")
TABLE = LoadTable([4.0, 10.0], [Knobs(40, 1200), Knobs(40, 1440), Knobs(40, 1650)])
PRICES_J = (0.0, 3.0, 200.0, 5000.0)


def network(seed=0):
    torch.manual_seed(seed)
    shape = {"limits": len(GRID.batch_limits), "clocks": len(GRID.gpu_clocks_mhz), "hidden": (24, 24)}
    return DuelingQNet(len(PRICED_FEATURES), **shape, head="priced", price_feature=PRICE)


def arrays_of(net):
    return {name: array.numpy().copy() for name, array in net.state_dict().items()}


def decided(net):
    """The arrays of a network that says much, and not the same of all that it sees."""
    return {name: 4.0 * array if name.endswith("weight") else array for name, array in arrays_of(net).items()}


def shown(price_j, n=50):
    """Random observations at a price."""
    seen = np.random.default_rng(2).random((n, len(PRICED_FEATURES)), np.float32)
    seen[:, PRICE] = np.log1p(price_j) / 10.0
    return seen


def folded_q(net, price_j, observations):
    acting = folded(arrays_of(net), clocks=len(GRID.gpu_clocks_mhz), miss_price_j=price_j)
    return np.array([q_values(acting, seen, head="priced") for seen in observations])


@pytest.mark.parametrize("price_j", PRICES_J)
def test_a_priced_head_acts_as_it_was_trained(price_j):
    net, seen = network(), shown(price_j)
    trained = net(torch.from_numpy(seen)).detach().numpy()
    np.testing.assert_allclose(folded_q(net, price_j, seen), trained, atol=2e-5)


@pytest.mark.parametrize("price_j", PRICES_J)
def test_q_is_linear_in_the_energy_and_in_the_misses(price_j):
    net, seen = network(), shown(price_j)
    q = net(torch.from_numpy(seen)).detach().numpy()
    energy, misses = (cost.detach().numpy() for cost in net.costs(torch.from_numpy(seen)))
    total_j = ENERGY_J * energy + price_j * misses
    scale_j = 300.0 * (1.0 + price_j / 200.0)
    between = q[:, 1:] - q[:, :1]
    np.testing.assert_allclose(between, (total_j[:, :1] - total_j[:, 1:]) / scale_j, atol=2e-5)


@pytest.mark.parametrize("lower_limits", [False, True])
@pytest.mark.parametrize("price_j", PRICES_J)
def test_the_compiled_network_chooses_as_the_one_in_python(price_j, lower_limits):
    node = SimulatedNode(load_pack("h100-qwen3-8b"), parse_workload("mmpp"), kv_block_size=16, horizon_s=1.0)
    node.reset(seed=0)
    codec = Codec(PRICED_FEATURES, GRID, SLO, miss_price_j=price_j)
    anchor = Anchor(TABLE, 0.002, 300.0, lower_limits)
    policy = LearnedPolicy(decided(network()), codec, SPEC, head="priced", anchor=anchor)
    program, server = policy.compiled(SPEC)
    sight, hidden = room(program)
    *_, clocks = node.inside
    rng, chosen, left = np.random.default_rng(3), [], 0
    policy.reset()
    for _ in range(200):
        window = replace(
            WINDOW,
            duration_s=1.0,
            arrivals=int(rng.integers(25)),
            prompt_tokens=int(rng.integers(9000)),
            output_tokens=int(rng.integers(5000)),
            running=int(rng.integers(100)),
            waiting=int(rng.integers(30)),
            kv_usage=float(rng.random()),
            oldest_wait_s=float(rng.random()),
            knobs=Knobs(40, int(rng.choice(SPEC.gpu_clocks_mhz))),
        )
        see(sight, window)
        limit, row = choose(program, sight, server, clocks, hidden)
        chosen.append(policy.decide(window))
        assert Knobs(limit, int(clocks[row, 0])) == chosen[-1]
        left += chosen[-1] not in TABLE.knobs
    assert left > 50 and len(set(chosen)) > 5
    lower = any(knobs.batch_limit < TABLE.knobs[0].batch_limit for knobs in chosen)
    assert not lower or lower_limits


def a_trade_off():
    """Less energy at lower clocks, fewer misses at higher ones, whatever is seen."""
    arrays = {name: np.zeros_like(array) for name, array in arrays_of(network()).items()}
    rising = np.linspace(0.0, 1.0, 10, dtype=np.float32)
    arrays["clock_costs.bias"] = np.concatenate([rising, 1.0 - rising])
    return arrays


def test_a_policy_folder_of_a_priced_head_takes_any_price(tmp_path):
    manifest = replace(read_policy(write_policy(tmp_path / "p")).manifest, head="priced", model=SPEC.model)
    codec = Codec(PRICED_FEATURES, GRID, SLO, miss_price_j=1.0)
    save_policy(tmp_path / "p", a_trade_off(), codec, manifest)
    policy = load_policy(tmp_path / "p", SPEC)
    assert policy.decide(WINDOW).gpu_clock_mhz == 990
    assert policy.for_slo(SLO, miss_price_j=1000.0).decide(WINDOW).gpu_clock_mhz == 1980
    assert policy.for_slo(SLO, miss_price_j=99.0).decide(WINDOW).gpu_clock_mhz == 990
    assert policy.for_slo(SLO, miss_price_j=101.0).decide(WINDOW).gpu_clock_mhz == 1980


DEFAULT = PRESETS["default"]


def train(**changes):
    return {"train": replace(DEFAULT.train, **changes)}


def test_the_default_branches():
    assert branches(DEFAULT) and learner_of(DEFAULT) is not FastDqn
    assert branches(replace(DEFAULT, workload="mmpp", slo_tpot_s=0.02, anchor=False))


@pytest.mark.parametrize(
    "changes",
    [
        train(branch_tries=0),
        {"node": "ray"},
        {"node": "live"},
        {"mode": "generalist"},
        {"mode": "fixed_price"},
        {"conditional": True},
        {"reward": "greendls"},
        {"slo_share": None},
        {"slo_e2e_s": 10.0},
        {"grid": "seed"},
        {"normalisation": "running"},
        train(head="smooth"),
        train(hidden=(64,)),
        {"features": (*PRICED_FEATURES, "gpu_power")},
    ],
    ids=str,
)
def test_what_cannot_be_branched_learns_from_what_it_does(changes):
    config = replace(DEFAULT, **changes)
    assert not branches(config) and learner_of(config) is FastDqn


def test_what_the_network_would_see_otherwise_than_the_loop_is_not_compiled():
    """An end-to-end limit is what the oldest wait is measured by, and implies a TPOT limit only in rules."""
    for slo in (Slo(1.0, 0.02, 8.0), Slo(None, None, 8.0)):
        codec = Codec(PRICED_FEATURES, GRID, slo)
        policy = LearnedPolicy(arrays_of(network()), codec, SPEC, head="priced", anchor=Anchor(TABLE, 0.1))
        assert policy.compiled(SPEC) is None


def made_up(rng, n=3000, clocks=21):
    """Energy rises with the clock; below a clock that a feature names, requests miss."""
    busy = rng.random(n) > 0.5
    base, clock = np.full(n, clocks // 2), rng.integers(clocks, size=n)

    def misses(at):
        return 0.5 * np.maximum(np.where(busy, 14, 5) - at, 0)

    found = empty(n, 2)
    found.observation[:, 0] = busy
    found.action[:], found.base[:] = clock, base
    found.energy_j[:] = 10.0 * (clock - base) + rng.normal(0.0, 5.0, n)
    found.misses[:] = misses(clock) - misses(base)
    return found


def test_a_known_optimum_is_learned_from_differences_alone():
    """Half a miss or 10 J per clock: misses are avoided from 20 J a miss on."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    q = DuelingQNet(2, limits=1, clocks=21, hidden=(32, 32), head="priced", price_feature=1)
    seen = Seen(2500, 2)
    seen.add(made_up(rng), 3000)
    optimizer, scale = torch.optim.Adam(q.parameters(), lr=5e-3), seen.spread()
    for _ in range(400):
        loss = branch_loss(q, seen.sample(128, rng), scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    best = {}
    for price_j in (3.0, 100.0):
        states = torch.tensor([[load, np.log1p(price_j) / 10.0] for load in (0.0, 1.0)]).float()
        best[price_j] = q(states).argmax(-1).tolist()
    assert max(best[3.0]) <= 1, "where a miss costs next to nothing, the lowest clock"
    assert best[100.0] == [pytest.approx(5, abs=2), pytest.approx(14, abs=2)]


def test_the_ring_keeps_the_newest_samples():
    ring, new = Seen(5, 1), empty(8, 1)
    for first in (0, 8):
        new.energy_j[:] = np.arange(first, first + 8)
        ring.add(new, 3 if first == 0 else 4)
    kept = ring.sample(400, np.random.default_rng(0)).energy_j
    assert set(kept) == {2.0, 8.0, 9.0, 10.0, 11.0}
    assert ring.spread()[0] == pytest.approx(np.std([2, 8, 9, 10, 11]) / ENERGY_J, rel=1e-4)


def test_an_action_that_is_held_beyond_the_comparison_is_refused():
    with pytest.raises(ConfigError, match="must be at most --train"):
        parse_serving(LearnConfig, ["--train.branch-hold", "30"], prog="train")
    own = parse_serving(LearnConfig, ["--train.branch-tries", "0"], prog="train")
    assert not branches(own)


@pytest.mark.parametrize(
    "flag",
    [
        *("gamma 0.9", "n-step 3", "priority 0", "hold-steps 2", "learning-starts 100", "num-envs 8"),
        *("fragment-steps 8", "episode-steps 100", "target-update-updates 100"),
        *("epsilon-initial 0.3", "epsilon-final 0.1", "epsilon-share 0.2"),
    ],
)
def test_what_branches_have_no_use_for_is_refused(flag):
    name, value = flag.split()
    with pytest.raises(ConfigError, match=f"--train.{name}: training with branches"):
        parse_serving(LearnConfig, [f"--train.{name}", value], prog="train")
    parse_serving(LearnConfig, [f"--train.{name}", value, "--train.branch-tries", "0"], prog="train")


@pytest.mark.parametrize(
    "switch", ["--train.branch-tries 0", "--train.algorithm ppo", "--train.algorithm rllib-dqn"]
)
def test_who_does_not_branch_has_no_use_for_how(switch):
    with pytest.raises(ConfigError, match=r"--train.branch-every: .* does not use it"):
        parse_serving(LearnConfig, [*switch.split(), "--train.branch-every", "2"], prog="train")
