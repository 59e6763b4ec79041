"""Train GreenDLS's DQN, by its own constants, on the simulated V100S; compare with what its authors report.

    python benchmarks/greendls.py [--seeds 3]

Constants (github.com/HIT-HPC-Group/GreenDLS, llm/src): 4 features, 198 actions, a net of 4 -> 32 ReLU -> 32
Tanh -> 1 + 198, Adam 5e-4, MSE, uniform replay of 1e5, batch 64, epsilon from 1 to 0.1 by 8e-5 per update,
8,000 updates, done = 1 always, so nothing is bootstrapped. Its load: a whole number of requests each second,
evenly spaced, 600 s, 1 to 15, mean 5.95; ours is drawn with that range and mean.

What differs: its server takes whole batches and decides between two; ours batches continuously, so a decision
is a window of ``--interval-s``, and the batch limit acts on admission.
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fuel_ray.codec import GREENDLS_GRID, Encoder
from fuel_ray.control import ControlLoop
from fuel_ray.objective import GreenDls
from fuel_ray.policies.baselines.greendls import GREENDLS_CODEC, GREENDLS_SLO, GreenDlsNet
from fuel_ray.sim.node import SimulatedNode
from fuel_ray.sim.perf_model import load_pack
from fuel_ray.types import Knobs
from fuel_ray.workload import parse_workload

STEPS, BATCH, EPISODE_S = 8_000, 64, 600.0
PUBLISHED = "published: 3568 requests, 10.15 J/request, 0 violations; (32, 937) x93 at 8.96 J, (16, 757) x37"


class Net(nn.Module):
    """GreenDLS's duelling net, under the names that ``GreenDlsNet`` reads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh())
        self.value, self.advantage = nn.Linear(32, 1), nn.Linear(32, len(GREENDLS_GRID))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.trunk(x)
        advantage = self.advantage(hidden)
        return self.value(hidden) + advantage - advantage.mean(-1, keepdim=True)


def speeds(folder: Path) -> str:
    """A load of 1 to 15 requests a second with a mean of 5.95, that rises and falls twice in ten minutes."""
    rng = np.random.default_rng(0)
    shape = 5.95 - 4.2 * np.cos(np.arange(600) * 2 * np.pi / 300) + rng.normal(0, 1.5, 600)
    (folder / "speeds.txt").write_text(" ".join(map(str, np.clip(np.rint(shape), 1, 15).astype(int))))
    return f"speeds:path={folder / 'speeds.txt'},lengths=fixed,prompt_mean=4,output_mean=32"


def train(loop: ControlLoop, *, seed: int) -> Net:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net, encoder = Net(), Encoder(GREENDLS_CODEC, loop.node.spec)
    adam = torch.optim.Adam(net.parameters(), lr=5e-4)
    seen, taken, earned = [], [], []
    epsilon, now_s = 1.0, EPISODE_S
    for step in range(STEPS):
        if now_s >= EPISODE_S:
            encoder.reset()
            x, now_s = encoder.encode(loop.reset(seed=seed * 1000 + step)), 0.0
        greedy = int(net(torch.from_numpy(x)).argmax())
        action = int(rng.integers(len(GREENDLS_GRID))) if rng.random() < epsilon else greedy
        record = loop.step(GREENDLS_GRID.decode(action))
        seen.append(x), taken.append(action), earned.append(record.reward / 50)
        x, now_s = encoder.encode(record.metrics), now_s + record.metrics.duration_s
        if step < BATCH:
            continue
        at = rng.integers(len(seen), size=BATCH)
        q = net(torch.from_numpy(np.stack([seen[i] for i in at])))
        chosen = q.gather(1, torch.tensor([[taken[i]] for i in at])).squeeze(1)
        loss = nn.functional.mse_loss(chosen, torch.tensor([earned[i] for i in at], dtype=torch.float32))
        adam.zero_grad(), loss.backward(), adam.step()
        epsilon = max(0.1, epsilon - 8e-5)
    return net


def evaluate(loop: ControlLoop, net: Net, *, seed: int) -> None:
    arrays = {name: p.detach().numpy() for name, p in net.named_parameters()}
    policy = GreenDlsNet(arrays, loop.node.spec)
    policy.reset()
    window = loop.reset(seed=10_000 + seed)
    energy_j, requests, actions, by_action_j, by_action_n = 0.0, 0, Counter(), Counter(), Counter()
    while requests == 0 or window.arrivals or window.running:
        record = loop.step(policy.decide(window))
        window, knobs = record.metrics, (record.applied.batch_limit, record.applied.gpu_clock_mhz)
        energy_j, requests = energy_j + window.energy_j, requests + window.arrivals
        actions[knobs] += 1
        by_action_j[knobs] += window.energy_j
        by_action_n[knobs] += window.completed
    records = loop.node.take_records()
    late = int((~records.keeps(GREENDLS_SLO)).sum())
    print(
        f"seed {seed}: {requests} requests, {energy_j / requests:.2f} J/request, {late} beyond 10 s, "
        f"mean e2e {records.e2e_s.mean():.2f} s, p95 {np.percentile(records.e2e_s, 95):.2f} s"
    )
    for knobs, count in actions.most_common(4):
        each = by_action_j[knobs] / max(by_action_n[knobs], 1)
        print(f"    limit {knobs[0]:>2} at {knobs[1]:>4} MHz: x{count:<4} {each:.2f} J/request")


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--interval-s", type=float, default=4.0)
    given = arguments.parse_args()
    pack = load_pack("v100s-qwen7b-int4")
    with tempfile.TemporaryDirectory() as folder:
        node = SimulatedNode(
            pack, parse_workload(speeds(Path(folder))), kv_block_size=16, horizon_s=EPISODE_S
        )
    # their reward: k delay / energy within 0.9 of the SLO, 0.9 SLO - delay beyond it
    loop = ControlLoop(node, GreenDls(slo_e2e_s=9.0, kv=False, normalized=False), interval_s=given.interval_s)
    print(PUBLISHED)
    for seed in range(given.seeds):
        evaluate(loop, train(loop, seed=seed), seed=seed)
    print("fixed pairs on the same load, by mean reward:")
    pairs = [(limit, clock_mhz) for limit in (8, 16, 24, 28, 32) for clock_mhz in range(757, 1598, 60)]
    found = sorted((fixed(loop, Knobs(*pair)) for pair in pairs), reverse=True)
    for reward, limit, clock_mhz, energy_j, e2e_s in [*found[:5], *[f for f in found if f[1:3] == (32, 937)]]:
        print(
            f"    limit {limit} at {clock_mhz} MHz: reward {reward:.2f}, {energy_j:.2f} J/request, "
            f"mean e2e {e2e_s:.2f} s"
        )


def fixed(loop: ControlLoop, knobs: Knobs) -> tuple[float, int, int, float, float]:
    """Mean reward, the pair, J per request and mean e2e."""
    window = loop.reset(seed=10_000)
    energy_j, requests, rewards = 0.0, 0, []
    while len(rewards) < 300 and (requests == 0 or window.arrivals or window.running):
        record = loop.step(knobs)
        window = record.metrics
        energy_j, requests = energy_j + window.energy_j, requests + window.arrivals
        rewards.append(record.reward / 50)
    e2e_s = float(loop.node.take_records().e2e_s.mean())
    return float(np.mean(rewards)), knobs.batch_limit, knobs.gpu_clock_mhz, energy_j / requests, e2e_s


if __name__ == "__main__":
    main()
