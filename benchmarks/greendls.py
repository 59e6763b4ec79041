"""Train GreenDLS's DQN, by its own constants, on its own kind of server; compare with its authors' report.

    python benchmarks/greendls.py [--seeds 4] [--keep-backlog]

Constants (github.com/HIT-HPC-Group/GreenDLS, llm/src): 4 features, 198 actions, a net of 4 -> 32 ReLU -> 32
Tanh -> 1 + 198, Adam 5e-4, MSE, uniform replay of 1e5, batch 64, epsilon from 1 to 0.1 by 8e-5 per update,
8,000 updates, done = 1 always, so nothing is bootstrapped.

Its server takes whole batches and decides between two: 3568 requests in 93 batches of 32 and 37 of 16
leave no other reading. So a decision here waits for a full batch, whose time and energy are those of as many
requests served at once by the twin of pack ``v100s-qwen7b-int4`` (4 tokens in, 32 out).

Assumed: the load, a whole number of requests each second, evenly spaced, 600 s, is Poisson's (its range of
1 to 15 and its mean of 5.95 are those of 600 draws); a batch that ends beyond the SLO in training empties the
queue, since with done = 1 each decision is an episode of its own (``--keep-backlog``: it does not).
"""

import argparse
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from fuel_ray.codec import GREENDLS_GRID
from fuel_ray.objective import greendls_reward
from fuel_ray.sim.node import SimulatedNode
from fuel_ray.sim.perf_model import load_pack
from fuel_ray.types import Knobs, Requests
from fuel_ray.workload import parse_workload

UPDATES, BATCH, LOAD_S, MEAN_RPS, SLO_S = 8_000, 64, 600, 5.95, 10.0
PUBLISHED = (
    "published: 3568 requests, 10.15 J/request, none beyond 10 s; batches of 32 at 937 MHz x93 at 8.96 J, "
    "of 16 at 757 MHz x37 at 16.1 J"
)
LIMITS, CLOCKS = GREENDLS_GRID.batch_limits, GREENDLS_GRID.gpu_clocks_mhz
PACK = load_pack("v100s-qwen7b-int4")


class Net(nn.Module):
    """GreenDLS's duelling net."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh())
        self.value, self.advantage = nn.Linear(32, 1), nn.Linear(32, len(GREENDLS_GRID))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.trunk(x)
        advantage = self.advantage(hidden)
        return self.value(hidden) + advantage - advantage.mean(-1, keepdim=True)


def batch_costs() -> np.ndarray:
    """Seconds and joules of a full batch: (2, limits, clocks)."""
    node = SimulatedNode(
        PACK, parse_workload("steady"), kv_block_size=16, horizon_s=1.0, max_num_seqs=max(LIMITS)
    )
    costs = np.zeros((2, len(LIMITS), len(CLOCKS)))
    for i, size in enumerate(LIMITS):
        at_once = Requests(
            arrival_s=np.zeros(size),
            prompt_tokens=np.full(size, 4),
            output_tokens=np.full(size, 32),
            prefix_id=np.full(size, -1),
            prefix_tokens=np.zeros(size, int),
        )
        for j, clock_mhz in enumerate(CLOCKS):
            node.replay(at_once)
            node.apply(Knobs(size, clock_mhz))
            windows = [node.measure(0.01)]
            while windows[-1].running or windows[-1].waiting:
                windows.append(node.measure(0.01))
            costs[:, i, j] = node.take_records().finished_s.max(), sum(w.energy_j for w in windows)
    return costs


class BatchServer:
    """Serves full batches of a load that is known; the last one takes what is left."""

    def __init__(self, costs: np.ndarray, *, seed: int) -> None:
        rates = np.clip(np.random.default_rng(seed).poisson(MEAN_RPS, LOAD_S), 1, 15)
        self.arrival_s = np.concatenate([second + np.arange(n) / n for second, n in enumerate(rates)])
        self._rates, self._costs = rates, costs
        self.served, self.now_s, self.busy_s, self.energy_j = 0, 0.0, 0.0, 0.0
        self._took_s, self._power_w = 0.0, PACK.perf.idle_w

    @property
    def done(self) -> bool:
        return self.served >= len(self.arrival_s)

    def state(self) -> np.ndarray:
        """Power, oldest wait, last batch's time, arrivals of the last second, each of order 10: (4,)."""
        wait_s = max(0.0, self.now_s - self.arrival_s[self.served])
        rate = self._rates[min(max(int(self.now_s) - 1, 0), LOAD_S - 1)]
        shares = [self._power_w / 250, min(wait_s / SLO_S, 1), min(self._took_s / SLO_S, 1), rate / 10]
        return np.round(10 * np.array(shares), 3).astype(np.float32)

    def step(self, action: int) -> tuple[float, float]:
        """Wait for a full batch and serve it: its reward, and the latency of its oldest request in s."""
        at = divmod(action, len(CLOCKS))
        size = min(LIMITS[at[0]], len(self.arrival_s) - self.served)
        self._took_s, energy_j = self._costs[:, *at]
        self._power_w = energy_j / self._took_s
        begin_s = max(self.now_s, self.arrival_s[self.served + size - 1])
        delay_s = begin_s + self._took_s - self.arrival_s[self.served]
        self.now_s, self.served = begin_s + self._took_s, self.served + size
        self.busy_s, self.energy_j = self.busy_s + self._took_s, self.energy_j + energy_j
        return greendls_reward(1e3 * delay_s, 1e3 * energy_j / size, 0.9 * 1e3 * SLO_S) / 50, delay_s

    def drop_backlog(self) -> None:
        """Forget who is waiting, but for the last."""
        waiting = int(np.searchsorted(self.arrival_s, self.now_s))
        self.served = max(self.served, waiting - 1)


def train(costs: np.ndarray, *, seed: int, keep_backlog: bool) -> Net:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net, server = Net(), BatchServer(costs, seed=seed)
    adam = torch.optim.Adam(net.parameters(), lr=5e-4)
    seen, taken, earned = [], [], []
    epsilon = 1.0
    while len(seen) < UPDATES + BATCH:
        if server.done:
            server = BatchServer(costs, seed=seed)
        x = server.state()
        greedy = int(net(torch.from_numpy(x)).argmax())
        action = int(rng.integers(len(GREENDLS_GRID))) if rng.random() < epsilon else greedy
        reward, delay_s = server.step(action)
        if delay_s > SLO_S and not keep_backlog:
            server.drop_backlog()
        seen.append(x), taken.append(action), earned.append(reward)
        if len(seen) < BATCH:
            continue
        at = rng.integers(len(seen), size=BATCH)
        q = net(torch.from_numpy(np.stack([seen[i] for i in at])))
        chosen = q.gather(1, torch.tensor([[taken[i]] for i in at])).squeeze(1)
        loss = nn.functional.mse_loss(chosen, torch.tensor([earned[i] for i in at], dtype=torch.float32))
        adam.zero_grad(), loss.backward(), adam.step()
        epsilon = max(0.1, epsilon - 8e-5)
    return net


def report(name: str, choose: Callable[[np.ndarray], int], costs: np.ndarray) -> None:
    """Serve a load that nobody was trained on, and print what came of it."""
    server, actions, delays_s, rewards = BatchServer(costs, seed=10_000), Counter(), [], []
    while not server.done:
        action = choose(server.state())
        reward, delay_s = server.step(action)
        limit, clock = divmod(action, len(CLOCKS))
        actions[f"{LIMITS[limit]} at {CLOCKS[clock]} MHz"] += 1
        delays_s.append(delay_s), rewards.append(reward)
    n = server.served
    above_idle_j = server.energy_j - PACK.perf.idle_w * server.busy_s
    most = ", ".join(f"{pair} x{count}" for pair, count in actions.most_common(3))
    print(
        f"{name}: {server.energy_j / n:.2f} J/request, {above_idle_j / n:.2f} above idle; oldest of a batch "
        f"mean {np.mean(delays_s):.2f} s, beyond 10 s {np.mean(np.array(delays_s) > SLO_S):.1%}; "
        f"reward {np.mean(rewards):.2f}; {most}"
    )


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seeds", type=int, default=4)
    arguments.add_argument("--keep-backlog", action="store_true")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    costs = batch_costs()
    print(PUBLISHED)
    for limit, clock_mhz in ((32, 937), (16, 757)):
        seconds, energy_j = costs[:, LIMITS.index(limit), CLOCKS.index(clock_mhz)]
        idle_j = PACK.perf.idle_w * seconds
        print(
            f"a batch of {limit} at {clock_mhz} MHz on the pack: {seconds:.2f} s, "
            f"{energy_j / limit:.2f} J/request, {(energy_j - idle_j) / limit:.2f} above idle"
        )
    for limit, clock_mhz in ((32, 937), (28, 937), (24, 937), (24, 877), (20, 877), (16, 877), (16, 757)):
        action = LIMITS.index(limit) * len(CLOCKS) + CLOCKS.index(clock_mhz)
        report(f"always {limit} at {clock_mhz} MHz", lambda _, action=action: action, costs)
    for seed in range(given.seeds):
        net = train(costs, seed=seed, keep_backlog=given.keep_backlog)
        report(f"DQN, seed {seed}", lambda x, net=net: int(net(torch.from_numpy(x)).argmax()), costs)


if __name__ == "__main__":
    main()
