"""Clock leases: real controllers that are really killed, with a fake NVML in their processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pynvml
import pytest

from fuel_ray.cli import main
from fuel_ray.errors import ConfigError, DiskError, GpuError
from fuel_ray.live.gpu import lease_state
from fuel_ray.live.gpu.lease import ClockLease
from fuel_ray.live.gpu.lease_state import owners, state_folder
from fuel_ray.live.gpu.nvml import Gpus
from fuel_ray.live.processes import orderly_signals
from tests.fake_nvml import FakeGpu, FakeNvml

ROOT = Path(__file__).parent.parent

# Takes the place of pynvml in other processes: FakeNvml's functions, with a log of who sets clocks when.
FAKE_PYNVML = f"""
import os, time
exec(compile(open({pynvml.__file__!r}).read(), {pynvml.__file__!r}, "exec"))
from tests.fake_nvml import FakeGpu, FakeNvml
_fake = FakeNvml(FakeGpu("GPU-0"), FakeGpu("GPU-1"))
globals().update({{name: getattr(_fake, name) for name in vars(FakeNvml) if name.startswith("nvml")}})

def _logged(name):
    call = getattr(_fake, name)
    def logged(gpu, *mhz):
        call(gpu, *mhz)
        with open(os.environ["FAKE_NVML_LOG"], "a") as log:
            print(time.monotonic(), os.getpid(), "set" if mhz else "reset", gpu.uuid, file=log)
    return logged

nvmlDeviceSetGpuLockedClocks = _logged("nvmlDeviceSetGpuLockedClocks")
nvmlDeviceResetGpuLockedClocks = _logged("nvmlDeviceResetGpuLockedClocks")
"""

CONTROLLER = """
import multiprocessing, subprocess, sys, time
from fuel_ray.live.gpu.lease import ClockLease
from fuel_ray.live.gpu.nvml import Gpus
from fuel_ray.live.processes import orderly_signals

children = sys.argv[1]
with orderly_signals():
    gpus = Gpus(["GPU-0", "GPU-1"])
    lease = ClockLease(gpus.uuids)
    try:
        lease.renew()
        gpus.pin(1200)
        if children == "subprocess":
            print(subprocess.Popen(["sleep", "60"], start_new_session=True, stdout=subprocess.DEVNULL).pid)
        if children == "fork":
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            child.start()
            print(child.pid)
        print("ready", flush=True)
        time.sleep(60)
    finally:
        lease.release(gpus.close)
"""


class Controller:
    """A process that has pinned the clocks of GPU-0 and GPU-1."""

    def __init__(self, folder, *, children="none"):
        (folder / "lib").mkdir(parents=True)
        (folder / "lib/pynvml.py").write_text(FAKE_PYNVML)
        self.state, self._log = folder / "state", folder / "nvml.log"
        env = {
            "PYTHONPATH": f"{folder / 'lib'}:{ROOT}",
            "FAKE_NVML_LOG": str(self._log),
            "FUEL_RAY_STATE_DIR": str(self.state),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", CONTROLLER, children],
            env=os.environ | env,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self.children = []
        while (line := self._process.stdout.readline().strip()) != "ready":
            assert line, "the controller did not start"
            self.children.append(int(line))

    def calls(self):
        """(monotonic s, pid, set or reset, UUID) of each call."""
        rows = [line.split() for line in self._log.read_text().splitlines()]
        return [(float(at_s), int(pid), what, uuid) for at_s, pid, what, uuid in rows]

    def resets(self):
        return [(pid, uuid) for _, pid, what, uuid in self.calls() if what == "reset"]

    def end(self, number):
        """Its exit code."""
        self._process.send_signal(number)
        return self._process.wait(10.0)

    def close(self):
        for pid in (*self.children, *watchdogs(self.state)):
            os.kill(pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait(10.0)
        self._process.stdout.close()


@pytest.fixture
def controller(tmp_path):
    made = []

    def start(**options):
        made.append(Controller(tmp_path / f"controller{len(made)}", **options))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeGpu("GPU-0")
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(fake, FakeGpu("GPU-1")))
    return fake


@pytest.fixture
def state(tmp_path, monkeypatch):
    folder = tmp_path / "own state"
    monkeypatch.setenv("FUEL_RAY_STATE_DIR", str(folder))
    folder.mkdir()
    return folder


def watchdogs(folder):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(folder).encode() in words and any(b"watch()" in word for word in words):
            found.append(int(path.parent.name))
    return found


def until(condition, *, within_s):
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {within_s} s"
        time.sleep(0.005)


def write_state(folder, uuid="GPU-0", **changed):
    owner = {"gpu_uuid": uuid, "pid": 2**22 + 1, "start_time": "1", "boot_id": lease_state._boot_id()}
    owner |= {"taken_at": "2026-01-01T00:00:00+00:00", "command": "fuel-ray run"} | changed
    (folder / f"{uuid}.json").write_text(json.dumps(owner))


def state_files(folder):
    return [path.name for path in folder.glob("*.json*")]


@pytest.mark.parametrize("children", ["none", "subprocess", "fork"])
def test_a_killed_controllers_clocks_are_given_back_within_2_s(controller, children):
    killed = controller(children=children)
    (watchdog,) = watchdogs(killed.state)
    assert killed.resets() == []
    killed_s = time.monotonic()
    assert killed.end(signal.SIGKILL) == -signal.SIGKILL
    until(lambda: not state_files(killed.state), within_s=2.0)
    assert killed.resets() == [(watchdog, "GPU-0"), (watchdog, "GPU-1")]
    assert killed.calls()[-1][0] - killed_s < 2.0
    until(lambda: not watchdogs(killed.state), within_s=2.0)
    for child in killed.children:
        os.kill(child, 0)


def test_signals_that_end_others_do_not_end_the_watchdog(controller):
    killed = controller()
    (watchdog,) = watchdogs(killed.state)
    assert os.getsid(watchdog) not in (os.getsid(0), killed.pid)
    assert f"PPid:\t{killed.pid}\n" not in Path(f"/proc/{watchdog}/status").read_text()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        os.kill(watchdog, number)
    killed.end(signal.SIGKILL)
    until(lambda: not state_files(killed.state), within_s=2.0)
    assert len(killed.resets()) == 2


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, -signal.SIGINT)]
)
def test_a_controller_that_is_told_to_end_gives_its_clocks_back_itself(controller, number, code):
    ended = controller()
    assert ended.end(number) == code
    assert sorted(ended.resets()) == [(ended.pid, "GPU-0"), (ended.pid, "GPU-1")]
    assert state_files(ended.state) == watchdogs(ended.state) == []


def test_an_ended_lease_leaves_no_watchdog_and_no_state(gpu, state):
    gpus = Gpus(["GPU-0"])
    lease = ClockLease(gpus.uuids)
    gpus.pin(1200)
    assert owners(state)["GPU-0"].pid == os.getpid() and owners(state)["GPU-0"].lives()
    for _ in range(2):
        lease.release(gpus.close)
    assert (gpu.calls, gpu.locked_mhz) == (["reset"], None)
    assert state_files(state) == watchdogs(state) == []
    with pytest.raises(GpuError, match="has ended"):
        lease.renew()


def test_a_second_controller_is_refused_by_the_firsts_pid_and_command(controller, gpu):
    first = controller()
    with pytest.raises(GpuError, match=rf"(?s)GPU-1 is controlled by pid {first.pid} \(.*orderly_signals"):
        ClockLease(["GPU-1"], folder=first.state)
    assert sorted(state_files(first.state)) == ["GPU-0.json", "GPU-1.json"]
    assert len(watchdogs(first.state)) == 1


def test_a_lease_that_is_refused_one_gpu_lets_the_others_go(gpu, state):
    lease = ClockLease(["GPU-1"])
    with pytest.raises(GpuError, match="GPU-1 is controlled"):
        ClockLease(["GPU-0", "GPU-1"])
    ClockLease(["GPU-0"]).release(lambda: None)
    lease.release(lambda: None)


def test_clocks_left_by_a_killed_controller_and_watchdog_are_given_back_by_the_next(controller, gpu):
    killed = controller()
    (watchdog,) = watchdogs(killed.state)
    os.kill(watchdog, signal.SIGKILL)
    killed.end(signal.SIGKILL)
    assert (killed.resets(), gpu.calls) == ([], [])
    ClockLease(["GPU-0"], folder=killed.state).release(lambda: None)
    assert gpu.calls == ["reset"]
    assert state_files(killed.state) == ["GPU-1.json"]


def test_a_watchdog_that_died_is_started_again(gpu, state):
    lease = ClockLease(["GPU-0"])
    (first,) = watchdogs(state)
    lease.renew()
    assert watchdogs(state) == [first]
    os.kill(first, signal.SIGKILL)
    until(lambda: lease.renew() or watchdogs(state) not in ([], [first]), within_s=5.0)
    assert len(watchdogs(state)) == 1
    lease.release(lambda: None)


def test_without_a_watchdog_there_is_no_lease(gpu, state, monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.lease._WATCHDOG", "import os; os.fork() and os._exit(0)")
    with pytest.raises(GpuError, match="watchdog did not start"):
        ClockLease(["GPU-0"])
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(GpuError, match="cannot start the clock watchdog"):
        ClockLease(["GPU-0"])
    assert state_files(state) == []


def test_clocks_that_cannot_be_given_back_stay_on_record(gpu, state):
    gpus = Gpus(["GPU-0"])
    lease = ClockLease(gpus.uuids)
    gpus.pin(1200)
    gpu.lost = True
    with pytest.raises(GpuError, match="GPU is lost"):
        lease.release(gpus.close)
    assert state_files(state) == ["GPU-0.json"] and watchdogs(state) == []


@pytest.mark.parametrize("changed", [{"start_time": "1"}, {"boot_id": "another"}, {"pid": 2**22 + 1}])
def test_a_reused_pid_is_not_mistaken_for_the_owner(changed, gpu, state):
    this = {"pid": os.getpid(), "start_time": lease_state.start_time(os.getpid())}
    write_state(state, **this)
    assert owners(state)["GPU-0"].lives()
    write_state(state, **this | changed)
    assert not owners(state)["GPU-0"].lives()


def test_a_lease_waits_for_the_watchdog_of_an_owner_that_died_only_so_long(gpu, state, monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.lease_state.LOCK_WAIT_S", 0.1)
    with lease_state.lock(state, "GPU-0"):
        with pytest.raises(GpuError, match="an unknown process still holds its lock"):
            ClockLease(["GPU-0"])
        write_state(state)
        with pytest.raises(GpuError, match=r"watchdog of pid \d+ \(fuel-ray run\).*, which died"):
            ClockLease(["GPU-0"])


@pytest.mark.parametrize("refusal", [ConfigError, DiskError])  # a file in its place, or not this user's
def test_the_state_folder_is_the_first_that_can_be_written_to(refusal, monkeypatch, tmp_path):
    monkeypatch.setenv("FUEL_RAY_STATE_DIR", str(tmp_path / "asked/for"))
    assert state_folder() == tmp_path / "asked/for"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUEL_RAY_STATE_DIR", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="file"):
        state_folder()
    monkeypatch.delenv("FUEL_RAY_STATE_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    refused = []

    def make_folder(path):
        refused.append(path)
        raise refusal("not writable")

    monkeypatch.setattr("fuel_ray.live.gpu.lease_state.make_folder", make_folder)
    monkeypatch.setattr("fuel_ray.live.gpu.lease_state._private_folder", lambda path: path)
    assert state_folder() == Path(f"/tmp/fuel-ray-{os.getuid()}")
    assert refused == [Path("/run/fuel-ray"), tmp_path / "fuel-ray"]


def test_a_private_folder_that_somebody_else_made_is_refused(tmp_path):
    assert lease_state._private_folder(tmp_path / "own").stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(tmp_path / "own")
    with pytest.raises(ConfigError, match="another user"):
        lease_state._private_folder(tmp_path / "link")


def test_the_first_signal_ends_the_block_and_the_second_does_not_end_its_cleaning_up():
    before = signal.getsignal(signal.SIGTERM)
    cleaned = False
    with pytest.raises(SystemExit) as stop, orderly_signals():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGHUP)
            cleaned = True
    assert (stop.value.code, cleaned) == (143, True)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_that_is_ignored_stays_so(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with orderly_signals():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_unlock_resets_what_dead_controllers_left_and_says_so(gpu, state, capsys):
    assert main(["unlock"]) == 0
    assert str(state) in capsys.readouterr().out
    write_state(state)
    (state / "GPU-1.json").write_text("{")
    assert main(["unlock"]) == 0
    assert capsys.readouterr().out == "GPU GPU-0: clocks given back\nGPU GPU-1: clocks given back\n"
    assert (gpu.calls, state_files(state)) == (["reset"], [])


def test_unlock_leaves_a_living_controller_its_clocks_unless_forced(controller, gpu, monkeypatch, capsys):
    living = controller()
    monkeypatch.setenv("FUEL_RAY_STATE_DIR", str(living.state))
    assert main(["unlock"]) == 0
    assert f"GPU GPU-0: not reset, it is in use by pid {living.pid} (" in capsys.readouterr().out
    assert main(["unlock", "--gpu-ids", "0"]) == 2
    assert f"controlled by pid {living.pid} (" in capsys.readouterr().err
    assert gpu.calls == []
    assert main(["unlock", "--gpu-ids", "0", "--force"]) == 0
    assert capsys.readouterr().out == "GPU GPU-0: clocks given back\n"
    assert gpu.calls == ["reset"]
    assert sorted(state_files(living.state)) == ["GPU-0.json", "GPU-1.json"]


def test_unlock_resets_the_gpus_that_it_is_told_whatever_the_files_say(gpu, state, capsys):
    gpu.locked_mhz = (900, 900)
    assert main(["unlock", "--gpu-ids", "0", "GPU-1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert gpu.locked_mhz is None


def test_unlock_goes_on_after_a_gpu_that_refuses(gpu, state, capsys):
    gpu.lockable = False
    write_state(state)
    write_state(state, "GPU-1")
    assert main(["unlock"]) == 2
    printed = capsys.readouterr()
    assert "GPU-0" in printed.err and printed.out == "GPU GPU-1: clocks given back\n"
    assert state_files(state) == ["GPU-0.json"]


@pytest.mark.parametrize(
    "flags", ["--gpu-ids 7", "--gpu-ids GPU-x", "--gpu-ids 0 0", "--force", "--gpu-id 0", "0", "--gpu-ids -1"]
)
def test_what_is_wrong_is_said_in_one_line(flags, gpu, state, capsys):
    assert main(["unlock", *flags.split()]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("fuel-ray: ") and len(printed.err.splitlines()) == 1
    assert (printed.out, gpu.calls) == ("", [])
