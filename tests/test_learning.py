"""Learning: a known optimum is found, and a run through Tune leaves and resumes what it should."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fuel_ray.training.dqn import _loss
from fuel_ray.training.replay import Batch, ReplayBuffer
from fuel_ray.training.rl_module import DuelingQNet
from tests.schemas import check_sweep


@pytest.mark.parametrize("head", ["joint", "additive", "smooth"])
def test_a_known_optimum_is_learned(head):
    """Three loads, each with one best (limit, clock); the reward of an action falls with its distance."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    best = {0: (0, 1), 1: (1, 3), 2: (2, 4)}
    module = SimpleNamespace(
        q=DuelingQNet(3, limits=3, clocks=5, hidden=(32,), head=head),
        _target_q=DuelingQNet(3, limits=3, clocks=5, hidden=(32,), head=head),
    )
    replay = ReplayBuffer(5000, 3, gamma=0.5, n_step=1, rng=rng)
    loads = rng.integers(0, 3, 3001)
    actions = rng.integers(0, 15, 3000)
    limits, clocks = np.divmod(actions, 5)
    targets = np.array([best[load] for load in loads[:-1]])
    rewards = -np.abs(limits - targets[:, 0]) - np.abs(clocks - targets[:, 1]) + rng.normal(0, 0.3, 3000)
    replay.add(np.eye(3, dtype=np.float32)[loads], actions, rewards.astype(np.float32))
    optimizer = torch.optim.Adam(module.q.parameters(), lr=3e-3)
    for update in range(600):
        replay.refresh()
        batch = replay.sample(64)
        errors, loss = _loss(module, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        replay.set_priorities(batch.index, errors)
        if update % 50 == 0:
            module._target_q.load_state_dict(module.q.state_dict())
    chosen = module.q(torch.eye(3)).argmax(-1).tolist()
    assert [divmod(action, 5) for action in chosen] == [best[load] for load in range(3)]


def test_the_target_is_the_target_networks_value_of_the_online_networks_best_action():
    table = torch.tensor([[1.0, 5.0], [4.0, 3.0]]), torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    module = SimpleNamespace(q=lambda seen: seen @ table[0], _target_q=lambda seen: seen @ table[1])
    batch = Batch(
        observations=np.eye(2, dtype=np.float32),
        actions=np.array([0, 1]),
        returns=np.array([2.0, 3.0], np.float32),
        discounts=np.array([0.5, 0.25], np.float32),
        next_observations=np.eye(2, dtype=np.float32)[::-1].copy(),
        weights=np.array([1.0, 0.5], np.float32),
        index=np.arange(2),
        next_penalties=np.zeros((1, 1), np.float32),
    )
    errors, loss = _loss(module, batch)
    # online best of state 1 is action 0, worth 30 to the target; of state 0 action 1, worth 20
    assert errors.tolist() == [1.0 - (2 + 0.5 * 30), 3.0 - (3 + 0.25 * 20)]
    assert loss.item() == pytest.approx((1.0 * (16 - 0.5) + 0.5 * (5 - 0.5)) / 2)  # Huber: |error| - 1/2
    # forbidden there: action 0 of state 1, and action 1 of state 0 costs more than it gains
    held = replace(batch, next_penalties=np.array([[np.inf, 0.0], [0.0, 4.5]], np.float32))
    errors, _ = _loss(module, held)
    assert errors.tolist() == [1.0 - (2 + 0.5 * 40), 3.0 - (3 + 0.25 * 10)]


def sweep(*flags, out, cwd):
    command = [sys.executable, "-m", "fuel_ray", "sweep", *flags]
    return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, text=True, cwd=cwd)


SMALL = ["--block-sizes", "16", "--seeds", "1", "--steps", "30000", "--train.iterations", "6"]
SEEN = {"energy_j_per_request", "slo_attainment", "mean_gpu_clock_mhz"}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(
    ("flags", "seen"),
    [([], SEEN), (["--train.branch-tries", "0"], SEEN | {"reward"})],
    ids=["branches", "td"],
)
def test_a_killed_sweep_goes_on_from_its_last_checkpoint(flags, seen, tmp_path):
    log = tmp_path / "log"
    with log.open("w") as out:
        process = sweep(*SMALL, *flags, "--out", "results", out=out, cwd=tmp_path)
        deadline = time.monotonic() + 240
        while log.read_text().count("\ntrain ") < 4 and time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
    (run_dir,) = tmp_path.glob("results/sweep-*")
    with log.open("w") as out:
        assert sweep("--resume", f"results/{run_dir.name}", out=out, cwd=tmp_path).wait(400) == 0, (
            log.read_text()
        )
    first = next(line for line in log.read_text().splitlines() if line.startswith("train"))
    assert int(first.split()[3].split("/")[0].replace(",", "")) >= 15_000  # of 5,000 per result
    files = {path.name for path in run_dir.iterdir()}
    assert {"run.json", "summary.csv", "learning.csv", "steps.jsonl", "report.html", "tune"} <= files
    assert (run_dir / "policies/block_16/weights.safetensors").is_file()
    assert list(run_dir.glob("tune/*/events.out.tfevents.*"))
    results = next(run_dir.glob("tune/*/result.json")).read_text().splitlines()
    fuel = json.loads(results[-1])["env_runners"]["fuel"]
    assert seen == set(fuel)
    check_sweep(run_dir)
