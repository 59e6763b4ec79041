"""What can happen to a server and its GPU under a deployment: knobs stay safe, and control comes back."""

import gc
import json
import logging
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fuel_ray.config import GuardConfig
from fuel_ray.control import ControlLoop
from fuel_ray.deploy import attach as build_deploy
from fuel_ray.deploy import deployment
from fuel_ray.deploy.attach import Target, attach
from fuel_ray.deploy.deployment import Attached, Deployment
from fuel_ray.deploy.recorder import Recorder
from fuel_ray.drift import DriftDetector
from fuel_ray.errors import NodeError, PolicyError
from fuel_ray.guard import Guard
from fuel_ray.live import node
from fuel_ray.objective import Energy
from fuel_ray.policies.learned import read_policy
from fuel_ray.record import StepLog
from fuel_ray.types import Knobs, NodeSpec
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.policy_folders import SLO, write_policy
from tests.stub_vllm import serving
from tests.test_codec import WINDOW
from tests.test_lease import until
from tests.traffic_stub import TrafficStub

LOW = Knobs(4, 990)


class Events:
    """An observer that writes down what it is told, and what the GPU's clock was then."""

    def __init__(self, gpu):
        self.gpu, self.all = gpu, []

    def attached(self, attached):
        self.all.append(("attached", None))

    def measured(self, record, *, decision_s, saved_j):
        self.all.append(("measured", record))

    def lost(self, step, chosen, error):
        self.all.append(("lost", (step, error)))

    def detached(self, error):
        self.all.append(("detached", (error, self.gpu.locked_mhz)))

    def of(self, kind):
        return [what for name, what in self.all if name == kind]

    def steps(self):
        """Of all windows, measured or lost, in order."""
        return [
            what.step if name == "measured" else what[0]
            for name, what in self.all
            if name in ("measured", "lost")
        ]


class QuietWatchdog:
    """Takes no second to start; the real one is tested with the lease and with killed deployments."""

    def __init__(self, folder, uuids, lock_fds):
        pass

    def lives(self):
        return True

    def end(self, *, given_back):
        pass

    def close(self):
        pass


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.lease._Watchdog", QuietWatchdog)
    monkeypatch.setattr(deployment, "PATIENCE_S", 0.4)
    monkeypatch.setattr(deployment, "RETRY_S", (0.05, 0.2))
    monkeypatch.setattr(build_deploy, "SCRAPE_S", 0.3)
    monkeypatch.setattr(node, "GPU_INTERVAL_S", 0.01)  # a window of 50 ms needs some readings


@pytest.fixture
def nvml(monkeypatch):
    fake = FakeNvml(FakeGpu(uuid="GPU-0"))
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", fake)
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.holds_sys_admin", lambda proc: True)
    return fake


@pytest.fixture
def stub():
    with serving(TrafficStub()) as served:
        yield served


class Run:
    """A deployment over the stub server and the fake GPU."""

    def __init__(self, stub, nvml, tmp_path):
        (self.gpu,) = nvml.gpus
        self.limit_file = stub.limit_file = tmp_path / "limit"
        folder = read_policy(write_policy(tmp_path / "policy", best=LOW))
        self.target = Target(
            server=stub.url,
            gpu_ids=("0",),
            limit_file=self.limit_file,
            max_num_seqs=32,
            clock_control="on",
            shadow=False,
            allow_mismatch=False,
            guard=GuardConfig(fallback="16@1500"),
        )
        self._attach = lambda: attach(self.target, folder, interval_s=0.05)
        self.events = Events(self.gpu)

    def __call__(self, *, windows):
        run = Deployment(self._attach, [self.events], interval_s=0.05)
        run.run(self._attach(), max_steps=windows)
        assert self.events.steps() == list(range(windows)), "every window is measured or lost, once"
        assert self.gpu.locked_mhz is None and not self.limit_file.exists()
        return self.events

    def last_window_is_controlled(self):
        record = self.events.of("measured")[-1]
        return record.applied == LOW and record.verdict.reasons == ()


@pytest.fixture
def run(stub, nvml, tmp_path):
    return Run(stub, nvml, tmp_path)


@pytest.mark.parametrize(
    ("tuned", "fallback"),
    [((16, 1500), (16, 1500)), ((64, 1500), (32, 1980)), ((16, 1001), (32, 1980)), (None, (32, 1980))],
)
def test_the_fallback_is_the_tuned_pair_where_the_node_has_it(run, stub, tmp_path, tuned, fallback):
    knobs = None if tuned is None else Knobs(*tuned)
    folder = read_policy(write_policy(tmp_path / "tuned", best=LOW, tuned_static=knobs))
    run._attach = lambda: attach(replace(run.target, guard=GuardConfig()), folder, interval_s=0.05)
    stub.script[6] = [stub.restart]
    (stale,) = [r for r in run(windows=9).of("measured") if r.verdict.reasons == ("stale",)]
    assert stale.applied == Knobs(*fallback)


def test_a_server_that_restarts_costs_a_window_and_nothing_is_made_of_its_counters(run, stub):
    stub.script[8] = [stub.restart]
    events = run(windows=12)
    ((_, error),) = events.of("lost")
    assert "restarted" in str(error) and events.of("detached") == [] and run.last_window_is_controlled()
    assert all(record.metrics.output_tokens >= 0 for record in events.of("measured"))


def test_after_a_lost_window_the_fallback_rules_for_one_window(run, stub):
    stub.script[8] = [stub.restart]
    records = run(windows=12).of("measured")
    stale = [record for record in records if record.verdict.reasons == ("stale",)]
    assert len(stale) == 1 and stale[0].applied == Knobs(16, 1500)


@pytest.mark.parametrize(
    "fault",
    [{"status": 500}, {"truncate": True}, {"metrics_delay_s": 1.0}, {"page_override": "vllm:num\n"}],
    ids=["500", "truncated", "hangs", "another page"],
)
def test_a_server_without_good_metrics_gets_its_knobs_back_until_it_has_them(run, stub, fault):
    stub.at(8, **fault)
    pages = 14 if "metrics_delay_s" in fault else 22  # a page that hangs takes six times as long
    stub.at(pages, **{name: getattr(stub, name) for name in fault})
    events = run(windows=40)
    assert len(events.of("lost")) >= 2
    error, clock_mhz = events.of("detached")[0]
    assert "no control window could be measured" in str(error) and stub.url in str(error)
    assert clock_mhz is None, "clocks are back while nobody looks"
    assert len(events.of("attached")) >= 2 and run.last_window_is_controlled()


def test_a_slow_page_makes_longer_windows_and_no_lost_ones(run, stub):
    stub.at(6, metrics_delay_s=0.15)
    events = run(windows=10)
    assert events.of("lost") == [] and run.last_window_is_controlled()
    assert events.of("measured")[-1].metrics.duration_s >= 0.15


def test_a_server_that_comes_back_with_another_block_size_is_left_alone_until_it_fits(run, stub):
    stub.script[8] = [stub.restart, lambda: stub.__dict__.update(block_size=32)]
    stub.at(14, block_size=16)
    events = run(windows=20)
    errors = [str(error) for error, _ in events.of("detached")]
    assert any("the server has changed" in error for error in errors) and any(
        "trained for KV block size 16" in error for error in errors
    )
    assert all(clock_mhz is None for _, clock_mhz in events.of("detached"))
    assert run.last_window_is_controlled()


def test_a_server_that_comes_back_with_another_model_is_left_alone_until_it_fits(run, stub):
    stub.script[8] = [stub.restart, lambda: setattr(stub, "model", "other")]
    stub.at(14, model="tiny")
    events = run(windows=20)
    errors = [str(error) for error, _ in events.of("detached")]
    assert any("other, and were" in error for error in errors) and any(
        "trained for model tiny" in error for error in errors
    )
    assert run.last_window_is_controlled()


def test_a_server_that_is_gone_is_waited_for(run, stub, nvml, tmp_path):
    stub.script[8] = [lambda: threading.Thread(target=stub.stop).start()]
    port = int(stub.url.rpartition(":")[2])

    def later():
        time.sleep(1.5)
        with serving(TrafficStub(limit_file=run.limit_file), port=port):
            finished.wait(20.0)

    finished = threading.Event()
    thread = threading.Thread(target=later)
    thread.start()
    try:
        events = run(windows=40)
    finally:
        finished.set()
        thread.join()
    assert events.of("detached") and run.last_window_is_controlled()


def test_a_gpu_that_is_lost_is_waited_for_and_its_clocks_are_given_back_then(run, stub):
    stub.script[8] = [lambda: setattr(run.gpu, "lost", True)]
    threading.Timer(2.0, lambda: setattr(run.gpu, "lost", False)).start()
    events = run(windows=30)
    assert any("GPU is lost" in str(error) for error, _ in events.of("detached"))
    assert "reset" in run.gpu.calls and run.last_window_is_controlled()


def test_a_permission_that_is_revoked_stops_control_and_its_return_brings_it_back(run, stub, nvml):
    stub.script[8] = [lambda: setattr(nvml, "privileged", False)]
    threading.Timer(2.0, lambda: setattr(nvml, "privileged", True)).start()
    events = run(windows=30)
    errors = [str(error) for error, _ in events.of("detached")]
    assert any("needs root or CAP_SYS_ADMIN" in error for error in errors) and run.last_window_is_controlled()


def test_a_driver_that_refuses_at_first_ends_the_deployment_with_its_words(run, nvml):
    nvml.privileged = False  # as under a hypervisor: nothing says so beforehand
    with pytest.raises(NodeError, match="needs root or CAP_SYS_ADMIN"):
        run(windows=5)
    assert run.events.of("detached") == [] and not run.limit_file.exists()


def test_clocks_that_were_left_locked_are_not_taken_for_clocks_that_are_left_alone(
    run, nvml, monkeypatch, state_folder
):
    nvml.privileged = False
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.holds_sys_admin", lambda proc: False)
    left = state_folder / "GPU-0.json"
    left.write_text("{}")
    try:
        with pytest.raises(NodeError, match="cannot reset the clocks of GPU GPU-0"):
            run(windows=1)
    finally:
        left.unlink()


def test_clocks_that_could_not_be_given_back_are_as_soon_as_they_can_whatever_the_server_does(
    run, stub, nvml, state_folder
):
    stub.script[8] = [lambda: setattr(nvml, "privileged", False)]
    seen = []

    def later():
        until(lambda: run.events.of("detached"), within_s=30.0)
        stub.status = 500
        seen.append(run.gpu.locked_mhz)
        nvml.privileged = True
        time.sleep(1.5)
        seen.append(run.gpu.locked_mhz)
        stub.status = 200

    thread = threading.Thread(target=later)
    thread.start()
    run(windows=40)
    thread.join()
    assert seen == [(990, 990), None] and run.last_window_is_controlled()


def test_a_wall_clock_that_steps_back_changes_nothing(run, monkeypatch):
    steps = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(steps)))
    events = run(windows=6)
    durations = [record.metrics.duration_s for record in events.of("measured")]
    assert len(durations) == 6 and all(0.04 < duration_s < 0.3 for duration_s in durations)


def test_a_control_file_that_is_removed_is_made_again(run, stub):
    stub.script[8] = [run.limit_file.unlink]
    events = run(windows=30)
    assert any("limit file" in str(error) for error, _ in events.of("detached"))
    assert run.last_window_is_controlled()


def test_a_full_disk_costs_lines_and_they_are_counted(tmp_path, monkeypatch, caplog):
    (tmp_path / "steps.jsonl").symlink_to("/dev/full")
    log = StepLog(tmp_path / "steps.jsonl")
    for _ in range(5):
        log.write("{}")
    log.close()
    assert log.lost_lines == 5 and "No space left on device; 1 lines are lost" in caplog.text


def test_a_line_cut_short_by_a_full_disk_does_not_spoil_the_next(tmp_path, monkeypatch):
    import os

    write = os.write
    log = StepLog(tmp_path / "steps.jsonl")
    log.write('{"step": 0}')
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:5]))
    log.write('{"step": 1}')
    monkeypatch.setattr(os, "write", write)
    log.write('{"step": 2}')
    log.close()
    lines = (tmp_path / "steps.jsonl").read_text().splitlines()
    assert log.lost_lines == 1 and [json.loads(lines[0]), json.loads(lines[2])] == [{"step": 0}, {"step": 2}]


def damaged(folder, name, change):
    raw = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**raw, **change}))


HOSTILE = [
    ("manifest.json", {"unknown": 1}),
    ("manifest.json", {"kv_block_sizes": ["16"]}),
    ("manifest.json", {"kv_block_sizes": []}),
    ("manifest.json", {"kv_block_sizes": 16}),
    ("manifest.json", {"head": "deep"}),
    ("manifest.json", {"model": 7}),
    ("manifest.json", {"format": 99}),
    ("manifest.json", {"tuned_static": {"batch_limit": 4}}),
    ("manifest.json", {"tuned_static": {"batch_limit": 4, "gpu_clock_mhz": -1}}),
    ("manifest.json", {"feature_ranges": {"running": [1, 0]}}),
    ("manifest.json", {"feature_ranges": {"running": "ab"}}),
    ("codec.json", {"grid": {"batch_limits": [0], "gpu_clocks_mhz": [990]}}),
    ("codec.json", {"grid": {"batch_limits": [4, 16, 32], "gpu_clocks_mhz": [990, 1500, "1980"]}}),
    ("codec.json", {"grid": {"batch_limits": [32, 16, 4], "gpu_clocks_mhz": [990, 1500, 1980]}}),
    ("codec.json", {"features": ["__import__"]}),
    ("codec.json", {"features": ["running"]}),
    ("codec.json", {"slo": {"ttft_s": -1.0}}),
    ("codec.json", {"slo": {"nonsense": 1.0}}),
]


@pytest.mark.parametrize(("name", "change"), HOSTILE, ids=str)
def test_a_policy_folder_with_a_value_that_makes_no_sense_is_refused(tmp_path, name, change):
    folder = write_policy(tmp_path / "policy")
    damaged(folder, name, change)
    with pytest.raises(PolicyError):
        read_policy(folder)


@pytest.mark.parametrize("name", ["manifest.json", "codec.json", "weights.safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"\x00" * 64, b"[" * 100_000, b"\x80\x04cos\nsystem\n(S'false'\ntR.", b" " * 2**21],
    ids=["empty", "object", "zeros", "deep", "pickle", "large"],
)
def test_a_policy_folder_with_another_file_in_its_place_is_refused(tmp_path, name, content):
    folder = write_policy(tmp_path / "policy")
    (folder / name).write_bytes(content)
    with pytest.raises(PolicyError):
        read_policy(folder)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("name", ["manifest.json", "codec.json", "weights.safetensors"])
def test_a_truncated_policy_folder_is_refused(tmp_path, name, share):
    path = write_policy(tmp_path / "policy") / name
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(PolicyError):
        read_policy(tmp_path / "policy")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    folder = write_policy(tmp_path / "policy")
    arrays = dict(load_file(folder / "weights.safetensors"))
    arrays["advantage.weight"][3, 1] = np.nan  # unseen by an observation of zeros
    save_file(arrays, folder / "weights.safetensors")
    with pytest.raises(PolicyError, match="not finite"):
        read_policy(folder)


class DayNode:
    """A node of virtual time under a load that never repeats, with a lost window now and then."""

    spec = NodeSpec("day", "gpu", (), "tiny", 16, 300, (1, 32), (990, 1500, 1980))

    def __init__(self, clock):
        self._clock, self._knobs, self._n = clock, None, 0

    def reset(self, *, seed):
        pass

    def apply(self, knobs):
        self._knobs = knobs
        return knobs

    def measure(self, duration_s):
        self._n += 1
        self._clock[0] += duration_s
        if self._n % 997 == 0:
            raise NodeError("lost")
        n = self._n
        samples_s = tuple(0.01 + (n * k % 101) / 100 for k in range(n % 17))
        return replace(
            WINDOW,
            duration_s=duration_s,
            arrivals=n % 13,
            running=n % 29,
            ttfts_s=samples_s,
            knobs=self._knobs,
        )

    def close(self):
        pass


@pytest.mark.slow
def test_a_day_of_windows_leaves_memory_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fuel_ray"), "disabled", True)  # pytest keeps what is logged
    monkeypatch.setattr(logging.getLogger("fuel_ray.deploy.recorder"), "disabled", True)
    clock = [0.0]
    folder = read_policy(write_policy(tmp_path / "policy"))
    recorder = Recorder(tmp_path, {}, SLO)
    rules = GuardConfig(max_wait_s=1.0, latency=True, switches_per_minute=3, dwell_s=2.0)
    guard = Guard(rules.rules(SLO, DayNode.spec), drift=DriftDetector(folder.codec, DayNode.spec))

    def attached():
        loop = ControlLoop(DayNode(clock), Energy(SLO, 0.0, 200.0, 1.0), guard=guard)
        return Attached(loop, folder.policy(DayNode.spec), lambda: None, lambda record: None)

    def sleep(duration_s):
        clock[0] += duration_s

    run = Deployment(attached, [recorder], interval_s=1.0, clock=lambda: clock[0], sleep=sleep)
    blocks = []
    for hour in range(1, 25):
        run.run(attached(), max_steps=3600 * hour)
        gc.collect()
        blocks.append(sys.getallocatedblocks())
    recorder.close()
    assert clock[0] >= 86_400 and recorder.summary()["windows"] + recorder.summary()["lost_windows"] == 86_400
    assert blocks[-1] - blocks[7] < 2_000, "objects that the last 57,600 windows left behind"
