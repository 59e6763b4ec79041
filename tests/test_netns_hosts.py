"""Throw-away hosts of a run that was killed do not stand in the way of the next."""

import signal
import subprocess
import sys

import pytest

from tests.netns_hosts import NetnsHosts, missing

pytestmark = pytest.mark.cluster
PREFIX, NET = "fuelk", "10.77.39"
RUN = """
import sys, time
from pathlib import Path
from tests.netns_hosts import NetnsHosts
with NetnsHosts(Path(sys.argv[1]), 1, prefix=sys.argv[2], net=sys.argv[3]):
    print("up", flush=True)
    time.sleep(600)
"""


def left():
    """Names of this test's hosts, cables and bridge on this machine."""
    found = subprocess.check_output("ip netns list; ip -o link", shell=True, text=True)
    return [line for line in found.splitlines() if PREFIX in line]


def test_what_a_killed_run_left_is_cleared_and_a_living_one_is_left_alone(tmp_path):
    if missing():
        pytest.skip(f"no {', '.join(missing())}")
    for name in ("killed", "refused", "next"):
        (tmp_path / name).mkdir()
    command = [sys.executable, "-c", RUN, str(tmp_path / "killed"), PREFIX, NET]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "up\n"
        with (
            pytest.raises(RuntimeError, match="another run has the hosts fuelk"),
            NetnsHosts(tmp_path / "refused", 1, prefix=PREFIX, net=NET),
        ):
            pass
        assert run.poll() is None and len(left()) == 3
        run.send_signal(signal.SIGKILL)
    assert len(left()) == 3
    with NetnsHosts(tmp_path / "next", 2, prefix=PREFIX, net=NET) as hosts:
        assert len(hosts.ips) == 2
    assert left() == []
