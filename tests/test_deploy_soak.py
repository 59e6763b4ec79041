"""A deployment under random faults in real time; FUEL_RAY_SOAK_S=600 is the full soak."""

import errno
import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fuel_ray.cli import main
from fuel_ray.types import Knobs
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.policy_folders import write_policy
from tests.stub_vllm import serving
from tests.test_lease import watchdogs
from tests.traffic_stub import TrafficStub

SECONDS = float(os.environ.get("FUEL_RAY_SOAK_S", "60"))
SEED = int(os.environ.get("FUEL_RAY_SOAK_SEED", "0"))
SAFE_S = 12.0  # patience 5 s, a page that hangs 2 s, an NVML that hangs with it, a busy machine


class Faults:
    """One fault after the other, each on for a while and then off."""

    def __init__(self, stub, nvml, folder, state):
        self.stub, self.nvml, self.folder, self.state = stub, nvml, folder, state
        self.full_disk = False
        self.count = dict.fromkeys(self.kinds(), 0)

    def kinds(self):
        return {
            "status 500": lambda on: setattr(self.stub, "status", 500 if on else 200),
            "hangs": lambda on: setattr(self.stub, "metrics_delay_s", 3.0 if on else 0.0),
            "slow": lambda on: setattr(self.stub, "metrics_delay_s", 0.3 if on else 0.0),
            "truncated": lambda on: setattr(self.stub, "truncate", on),
            "not vLLM's": lambda on: setattr(self.stub, "page_override", "hello\n" if on else ""),
            "block size": self._block_size,
            "restart": lambda on: self.stub.restart() if on else None,
            "GPU lost": lambda on: setattr(self.nvml.gpus[0], "lost", on),
            "permission": lambda on: setattr(self.nvml, "privileged", not on),
            "disk full": lambda on: setattr(self, "full_disk", on),
            "limit file": lambda on: (self.folder / "limit").unlink(missing_ok=True) if on else None,
            "watchdog": self._kill_watchdogs,
            "queue": lambda on: setattr(self.stub, "waiting", 200 if on else 0),
        }

    def _block_size(self, on):
        self.stub.restart()
        self.stub.block_size = 32 if on else 16

    def _kill_watchdogs(self, on):
        for pid in watchdogs(self.state) if on else ():
            os.kill(pid, signal.SIGKILL)

    def run(self, seconds, *, rng):
        end_s = time.monotonic() + seconds
        kinds = self.kinds()
        while time.monotonic() < end_s - 20.0:
            name = list(kinds)[rng.integers(len(kinds))]
            self.count[name] += 1
            kinds[name](True)
            time.sleep(float(rng.choice((0.3, 2.0, 9.0), p=(0.5, 0.35, 0.15))))
            kinds[name](False)
            time.sleep(float(rng.uniform(1.0, 4.0)))
        time.sleep(max(0.0, end_s - time.monotonic()))  # calm, so that control has come back at the end
        os.kill(os.getpid(), signal.SIGTERM)


class Watch:
    """Looks ten times a second how long a clock has been locked although nobody has measured."""

    def __init__(self, gpu, folder, can_set):
        self.gpu, self.folder, self.can_set = gpu, folder, can_set
        self.unsafe_s, self.resident_mb, self.stop = [], [], threading.Event()

    def run(self):
        good, since_s = 0, time.monotonic()
        began_s = since_s
        while not self.stop.wait(0.1):
            path = next(self.folder.glob("out/deploy-*/steps.jsonl"), None)
            before, good = good, path.read_text().count('"reward"') if path else 0
            now_s = time.monotonic()
            if good != before or self.gpu.locked_mhz is None or not self.can_set():
                since_s = now_s
            if now_s - since_s > SAFE_S:
                self.unsafe_s.append(now_s - since_s)
            if now_s - began_s > 60.0 * len(self.resident_mb):
                self.resident_mb.append(round(resources()[0]))


def resources():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20, threading.active_count(), len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # a signal amid psutil's open()
def test_a_soak_ends_with_everything_given_back_and_every_window_accounted_for(tmp_path, monkeypatch, capsys):
    state = tmp_path / "state"
    monkeypatch.setenv("FUEL_RAY_STATE_DIR", str(state))
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.holds_sys_admin", lambda proc: True)
    gpu = FakeGpu(uuid="GPU-0", energy_mj=None)
    nvml = FakeNvml(gpu)
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", nvml)
    policy = write_policy(tmp_path / "policy", best=Knobs(4, 990))
    with serving(TrafficStub(limit_file=tmp_path / "limit")) as stub:
        faults = Faults(stub, nvml, tmp_path, state)
        _fill_disks(monkeypatch, faults)
        can_set = lambda: nvml.privileged and not gpu.lost and not faults.full_disk  # noqa: E731
        watch = Watch(gpu, tmp_path, can_set)
        rng = np.random.default_rng(SEED)
        threads = [
            threading.Thread(target=faults.run, args=(SECONDS,), kwargs={"rng": rng}),
            threading.Thread(target=watch.run),
        ]
        before = resources()
        for thread in threads:
            thread.start()
        with pytest.raises(SystemExit) as end:
            main(
                [
                    *("deploy", "--policy", str(policy), "--server", stub.url, "--interval", "0.1"),
                    *("--limit-file", str(tmp_path / "limit"), "--max-num-seqs", "32"),
                    *("--out", str(tmp_path / "out"), "--guard.max-waiting", "100"),
                ]
            )
        watch.stop.set()
        for thread in threads:
            thread.join()
    (folder,) = (tmp_path / "out").glob("deploy-*")
    summary = json.loads((folder / "run.json").read_text())["summary"]
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    with capsys.disabled():
        figures = {name: summary[name] for name in ("windows", "lost_windows", "lost_lines", "overruled")}
        print(f"\nsoak {SECONDS:g} s, seed {SEED}: {figures}, faults {faults.count}")
        print(f"MB, threads, files: {before} before, {resources()} after; unsafe {watch.unsafe_s[:3]}")
        print(f"resident MB each minute, stub and pytest included: {watch.resident_mb}")
        print(f"decision p50 {summary['decision']['p50_s']}, p99 {summary['decision']['p99_s']} s")
    assert end.value.code == 128 + signal.SIGTERM
    assert gpu.locked_mhz is None and not (tmp_path / "limit").exists()
    assert list(state.glob("*.json")) == watchdogs(state) == []
    assert steps == sorted(set(steps)), "each window is written once, in order"
    assert summary["windows"] + summary["lost_windows"] == len(lines) + summary["lost_lines"]
    assert len(lines) + summary["lost_lines"] >= steps[-1] + 1
    assert watch.unsafe_s == []
    assert lines[-1]["applied"] == {"batch_limit": 4, "gpu_clock_mhz": 990}, "control came back"
    assert all(line["output_tokens"] >= 0 and line["energy_j"] >= 0 for line in lines if "reward" in line)


def _fill_disks(monkeypatch, faults):
    write = os.write

    def limited(fd, data):
        if faults.full_disk and b'"step"' in bytes(data):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr(os, "write", limited)
