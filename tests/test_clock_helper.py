"""The clock helper: who may ask, what it takes, and that no clock outlives its controller."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import closing
from pathlib import Path

import pytest

from fuel_ray.cli import main
from fuel_ray.errors import ConfigError, GpuError, PrivilegeError
from fuel_ray.live.gpu.clock_client import SOCKET_VARIABLE, ClockClient
from fuel_ray.live.gpu.clock_helper import ClockHelper, listening_socket
from fuel_ray.live.gpu.lease import ClockLease
from fuel_ray.live.gpu.nvml import Gpus
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.test_lease import until


class RootsNvml(FakeNvml):
    """Lets only the helper's thread set clocks."""

    def _may_set(self, gpu):
        self.privileged = threading.current_thread().name == "clock helper"
        super()._may_set(gpu)


@pytest.fixture
def gpus(monkeypatch):
    fake = RootsNvml(FakeGpu("GPU-0"), FakeGpu("GPU-1"), FakeGpu("GPU-2"))
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", fake)
    return fake.gpus


class Helper:
    """A helper for GPU-0 and GPU-1 in a thread."""

    def __init__(self, path, *, uids=frozenset()):
        self.path = path
        self._stop = threading.Event()
        self._listener = listening_socket(path, gid=None)
        self._gpus = {uuid: Gpus([uuid], direct=True) for uuid in ("GPU-0", "GPU-1")}
        helper = ClockHelper(self._gpus, self._listener, uids=uids)
        self._thread = threading.Thread(target=helper.serve, args=(self._stop,), name="clock helper")
        self._thread.start()

    def close(self):
        self._stop.set()
        self._thread.join(5.0)
        self._listener.close()
        for gpus in self._gpus.values():
            gpus.close()


@pytest.fixture
def helper(gpus, tmp_path, monkeypatch):
    made = Helper(tmp_path / "clocks.sock")
    monkeypatch.setenv(SOCKET_VARIABLE, str(made.path))
    yield made
    made.close()


def test_a_controller_without_the_privilege_sets_clocks_through_the_helper(gpus, helper):
    controller = Gpus(["GPU-0"])
    assert controller.can_set_clocks() and controller.pin(1201) == 1200
    assert gpus[0].locked_mhz == (1200, 1200)
    controller.close()
    assert gpus[0].locked_mhz is None


def test_without_the_helper_it_may_not(gpus, monkeypatch, tmp_path):
    with Gpus(["GPU-0"]) as controller, pytest.raises(PrivilegeError):
        controller.pin(1200)
    monkeypatch.setenv(SOCKET_VARIABLE, str(tmp_path / "nobody.sock"))
    with Gpus(["GPU-0"]) as controller:
        assert not controller.can_set_clocks()
        with pytest.raises(GpuError, match=r"clock helper at .* does not answer"):
            controller.pin(1200)


def test_what_a_connection_pinned_is_reset_when_it_ends(gpus, helper):
    client = ClockClient(helper.path)
    client.pin("GPU-0", 990)
    client.pin("GPU-1", 1200)
    client.close()
    until(lambda: gpus[0].locked_mhz is None is gpus[1].locked_mhz, within_s=2.0)


KILLED = """
import sys, time
from pathlib import Path
from fuel_ray.live.gpu.clock_client import ClockClient
client = ClockClient(Path(sys.argv[1]))
client.pin("GPU-0", 990)
print("ready", flush=True)
time.sleep(60)
"""


def test_what_a_killed_controller_pinned_is_reset(gpus, helper):
    with subprocess.Popen([sys.executable, "-c", KILLED, str(helper.path)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"ready\n" and gpus[0].locked_mhz == (990, 990)
        with (
            closing(ClockClient(helper.path)) as client,
            pytest.raises(PrivilegeError, match=f"pid {other.pid} has its clock"),
        ):
            client.pin("GPU-0", 1200)
        other.kill()
    until(lambda: gpus[0].locked_mhz is None, within_s=2.0)


def test_a_helper_that_ends_gives_back_what_is_pinned(gpus, helper):
    client = ClockClient(helper.path)
    client.pin("GPU-0", 990)
    helper.close()
    assert gpus[0].locked_mhz is None
    with pytest.raises(GpuError, match="does not answer"):
        client.pin("GPU-0", 990)


def test_a_restarted_helper_is_found_again(gpus, helper):
    client = ClockClient(helper.path)
    client.pin("GPU-0", 990)
    helper.close()
    again = Helper(helper.path)
    try:
        client.pin("GPU-0", 1200)
        assert gpus[0].locked_mhz == (1200, 1200)
    finally:
        client.close()
        again.close()


@pytest.mark.parametrize(
    "line",
    [
        *("pin GPU-0", "pin GPU-0 990 1980", "pin GPU-0 991", "pin GPU-0 -990", "pin GPU-0 0x3de"),
        *("pin GPU-2 990", "pin ../../etc 990", "reset GPU-2", "reset", "", "cap GPU-0 990", "PIN GPU-0 990"),
        *("pin GPU-0 9" + "9" * 60, "\x00\x01\xff", "power GPU-0 100"),
    ],
)
def test_nothing_but_pin_and_reset_of_named_gpus_within_their_clocks_is_taken(gpus, helper, line):
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(5.0)
        raw.connect(str(helper.path))
        raw.sendall(line.encode("latin-1") + b"\n")
        assert raw.recv(4096).startswith(b"no ")
    assert all(gpu.locked_mhz is None and gpu.calls == [] for gpu in gpus)


def test_a_line_without_an_end_is_cut_off(helper):
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(5.0)
        raw.connect(str(helper.path))
        raw.sendall(b"x" * 1000)
        with pytest.raises(ConnectionError):
            while raw.recv(4096):
                pass
            raise ConnectionResetError


def test_a_user_who_may_not_is_turned_away(gpus, helper, monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.clock_helper._CREDENTIALS", FakeCredentials())
    with (
        closing(ClockClient(helper.path)) as client,
        pytest.raises(PrivilegeError, match="user 1234 may not"),
    ):
        client.pin("GPU-0", 990)
    assert gpus[0].locked_mhz is None


class FakeCredentials:
    size = 12

    def unpack(self, raw):
        return 1, 1234, 1234


AS_ANOTHER_USER = """
import os, sys
sys.path[:] = [path for path in sys.path if path]
from pathlib import Path
from fuel_ray.live.gpu.clock_client import ClockClient
os.setgid(65534)
os.setuid(65534)
try:
    ClockClient(Path(sys.argv[1])).pin("GPU-0", 990)
    print("pinned")
except Exception as error:
    print(error)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("mode", "uids", "answer"),
    [
        (0o660, {65534}, "Permission denied"),
        (0o666, set(), "user 65534 may not set clocks here"),
        (0o666, {65534}, "pinned"),
    ],
)
def test_the_kernel_says_who_asks(gpus, mode, uids, answer):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        helper = Helper(Path(folder) / "clocks.sock", uids=frozenset(uids))
        try:
            helper.path.chmod(mode)
            command = [sys.executable, "-c", AS_ANOTHER_USER, str(helper.path)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        finally:
            helper.close()
    assert answer in done.stdout, done.stderr
    assert gpus[0].locked_mhz is None and (gpus[0].calls == ["reset"]) == (answer == "pinned")


def test_a_lease_works_through_the_helper_and_unlock_too(gpus, helper, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FUEL_RAY_STATE_DIR", str(tmp_path))
    controller = Gpus(["GPU-0"])
    lease = ClockLease(controller.uuids, folder=tmp_path)
    controller.pin(990)
    lease.release(controller.close)
    assert gpus[0].locked_mhz is None
    assert main(["unlock", "--gpu-ids", "1"]) == 0 and gpus[1].calls == ["reset"]


def test_the_socket_is_its_owners_alone_and_one_helpers(tmp_path):
    path = tmp_path / "clocks.sock"
    with listening_socket(path, gid=None):
        assert path.stat().st_mode & 0o777 == 0o660
        with pytest.raises(ConfigError, match="another clock helper"):
            listening_socket(path, gid=None)
    listening_socket(path, gid=None).close()
    path.unlink()
    path.write_text("")
    with pytest.raises(ConfigError, match="is not a socket"):
        listening_socket(path, gid=None)


ACTIVATED = """
import os, sys
from tests.fake_nvml import FakeGpu, FakeNvml
import fuel_ray.live.gpu.nvml
fuel_ray.live.gpu.nvml.pynvml = FakeNvml(FakeGpu("GPU-0"))
from fuel_ray.cli import main
os.environ["LISTEN_PID"] = str(os.getpid())
sys.exit(main(["clock-helper", "--gpu-ids", "0", "--users", "root"]))
"""


def test_systemd_may_give_the_socket(tmp_path):
    path = tmp_path / "given.sock"
    with socket.socket(socket.AF_UNIX) as given:
        given.bind(str(path))
        given.listen()
        helper = subprocess.Popen(
            [sys.executable, "-c", ACTIVATED],
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"LISTEN_FDS": "1"},
            preexec_fn=lambda: os.dup2(given.fileno(), 3),  # noqa: PLW1509  (as systemd does)
            pass_fds=(3,),
            stdout=subprocess.PIPE,
        )
        assert helper.stdout.readline().startswith(b"clock helper for GPU-0")
        with closing(ClockClient(path)) as client:
            client.pin("GPU-0", 990)
            helper.terminate()
            assert helper.wait(5.0) == 143
        helper.stdout.close()


@pytest.mark.parametrize(
    "flags",
    ["", "--gpu-ids", "--gpu-ids 9", "--gpu-ids 0 --users nobody-here", "--gpu-ids 0 --group nobody-here"],
)
def test_what_is_wrong_is_said_in_one_line(flags, gpus, tmp_path, capsys):
    assert main(["clock-helper", *flags.split(), "--socket", str(tmp_path / "s")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("fuel-ray: ") and len(printed.splitlines()) == 1
