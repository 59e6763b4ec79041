"""Training on nodes of a cluster, while its parts are killed in mid-episode."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.test_cluster import actors_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]

EVERY = 512  # steps between two checkpoints
STEPS = 8 * EVERY
FLAGS = [
    *("--preset", "plain"),  # its checkpoints are scored in an eighth of the time
    *("--node", "ray", "--backend", "sim", "--block-sizes", "16", "--steps", str(STEPS)),
    *("--train.iterations", str(STEPS // EVERY), "--train.episode-steps", "100", "--node-wait-s", "20"),
]


class Training:
    """A run of ``fuel-ray train`` in a process of its own."""

    def __init__(self, folder, *flags):
        self.folder, self.log = folder, folder / "log"
        with self.log.open("a") as out:
            command = [sys.executable, "-m", "fuel_ray", "train", "--out", "results", *FLAGS, *flags]
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=folder)

    def wait_for(self, results):
        """Return once Tune has had this many results."""
        deadline_s = time.monotonic() + 240
        while self.text().count("\ntrain  block") < results:
            assert self.process.poll() is None and time.monotonic() < deadline_s, self.text()
            time.sleep(0.05)

    def text(self):
        return self.log.read_text()

    def end(self, timeout_s=400):
        assert self.process.wait(timeout_s) == 0, self.text()

    @property
    def run_dir(self):
        (run_dir,) = self.folder.glob("results/train-*")
        return run_dir

    def results(self):
        """Env steps and trial process of each result, in order."""
        (path,) = self.run_dir.glob("tune/*/result.json")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [(row["num_env_steps_sampled_lifetime"], row["pid"]) for row in rows]


def kill(hosts, title):
    """SIGKILL the one process of this title on the hosts."""
    (pid,) = [pid for host in hosts for pid in actors_of(host, title)]
    os.kill(pid, signal.SIGKILL)


def expected(count=STEPS // EVERY):
    return [EVERY * (i + 1) for i in range(count)]


@pytest.mark.parametrize("algorithm", ["dqn", "ppo"])
def test_a_killed_node_costs_an_episode(algorithm, two_hosts, tmp_path):
    training = Training(tmp_path, "--train.algorithm", algorithm)
    training.wait_for(2)
    time.sleep(0.5)
    kill(two_hosts.hosts, "ray::NodeActor")
    training.end()
    steps, pids = zip(*training.results(), strict=True)
    assert list(steps) == expected() and len(set(pids)) == 1  # the trial went on
    assert (training.run_dir / "policies/block_16/weights.safetensors").is_file()


def test_a_killed_trial_with_its_env_runner_goes_on_from_its_last_checkpoint(two_hosts, tmp_path):
    training = Training(tmp_path)
    training.wait_for(3)
    time.sleep(0.5)
    kill([two_hosts.head], "ray::FastDqn")
    training.end()
    steps, pids = zip(*training.results(), strict=True)
    assert len(set(pids)) == 2
    assert sorted(set(steps)) == expected()
    assert len(steps) - len(set(steps)) <= 1  # at most one result was trained for again


def test_a_killed_driver_goes_on_with_resume(two_hosts, tmp_path):
    training = Training(tmp_path)
    training.wait_for(3)
    training.process.kill()
    training.process.wait()
    resumed = Training(tmp_path, "--resume", str(training.run_dir.relative_to(tmp_path)))
    resumed.end()
    steps, _ = zip(*resumed.results(), strict=True)
    assert sorted(set(steps)) == expected()
    assert len(steps) - len(set(steps)) <= 2  # Tune learns of a checkpoint a moment after it was written
    assert not any(actors_of(host) for host in two_hosts.hosts)


def test_a_node_that_does_not_come_back_fails_the_trial_with_the_reason(two_hosts, tmp_path):
    lonely = two_hosts.add()
    for host in two_hosts.hosts:  # all others are taken
        two_hosts.lose(host)
    two_hosts.hosts.clear()
    training = Training(tmp_path, "--node-failures", "2", "--node-wait-s", "5")
    training.wait_for(2)
    two_hosts.lose(lonely)
    began_s = time.monotonic()
    assert training.process.wait(400) == 2
    print(f"said after {time.monotonic() - began_s:.0f} s")
    assert "times in a row, at last with" in training.text().splitlines()[-1]
    two_hosts.hosts += [two_hosts.add(), two_hosts.add()]


def test_two_nodes_make_the_rollouts_of_a_trial(two_hosts, tmp_path):
    training = Training(tmp_path, "--nodes-per-trial", "2")
    training.wait_for(2)
    assert [len(actors_of(host)) for host in two_hosts.hosts] == [1, 1]
    kill(two_hosts.hosts[:1], "ray::NodeActor")
    training.end()
    assert training.results()[-1][0] >= STEPS


def test_a_run_in_storage_goes_on_on_a_machine_that_has_not_its_folder(two_hosts, tmp_path):
    storage = ["--storage", f"file://{tmp_path}/shared"]
    training = Training(tmp_path, *storage)
    training.wait_for(3)
    training.process.kill()
    training.process.wait()
    name = training.run_dir.name
    shutil.rmtree(tmp_path / "results")
    resumed = Training(tmp_path, "--resume", f"results/{name}", *storage)
    resumed.end()
    assert (tmp_path / "shared" / name / "policies/block_16/weights.safetensors").is_file()
    (path,) = tmp_path.glob(f"shared/{name}/tune/*/result.json")
    steps = [json.loads(line)["num_env_steps_sampled_lifetime"] for line in path.read_text().splitlines()]
    assert steps[-1] == STEPS and min(steps) < STEPS
