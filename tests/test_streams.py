"""What is printed may go anywhere: to a reader that leaves, a full disk, another encoding, no width."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuel_ray.output import print_unless_blocked

ROOT = Path(__file__).parent.parent


def shell(command, cwd=ROOT, **variables):
    """A shell's line, with $F for fuel-ray; its stderr is Python's alone."""
    env = {
        "PYTHONPATH": str(ROOT),
        "PATH": "/usr/bin:/bin",
        "F": f"{sys.executable} -m fuel_ray",
        **variables,
    }
    script = ["bash", "-c", f"set -o pipefail; {command}"]
    return subprocess.run(script, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("line", "code", "unbuffered"),
    [
        ("", 141, ""),
        ("sweep --help", 141, ""),
        ("sweep --help", 141, "1"),
        ("doctor --backend sim", 141, "1"),
        ("watch --once", 1, ""),  # rich's own way to leave
    ],
)
def test_a_reader_that_has_left_is_no_error_to_speak_of(line, code, unbuffered):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "fuel_ray", *line.split()]
    env = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, env=env, stdout=write, stderr=subprocess.PIPE, check=False, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (code, b"")


def test_a_line_that_nobody_takes_is_lost_and_holds_nobody_up(monkeypatch):
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as taken, os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        print_unless_blocked("one")
        assert taken.readline() == b"one\n"
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while os.write(writer, b"x" * 4096):
                pass
        os.set_blocking(writer, True)
        print_unless_blocked("two")  # would wait for ever
        taken.close()
        print_unless_blocked("three")  # SIGPIPE is no end either
        monkeypatch.undo()
        with contextlib.suppress(BrokenPipeError):
            stream.close()


@pytest.mark.parametrize("line", ["--version", "sweep --help"])
def test_a_full_disk_at_the_end_of_the_output_is_told(line):
    done = shell(f"$F {line} >/dev/full")
    assert done.returncode == 1
    assert done.stderr == "fuel-ray: the printed output is incomplete: No space left on device\n"


@pytest.mark.parametrize("line", ["sweep --help", "doctor --backend sim"])
def test_closed_streams_are_no_error(line):
    assert shell(f"$F {line} >&- 2>&-").returncode == 0


@pytest.mark.parametrize("columns", ["0", "1"])
def test_a_terminal_of_no_width_is_printed_to(columns):
    done = shell("$F sweep --help", COLUMNS=columns)
    assert done.returncode == 0 and "--steps" in done.stdout


@pytest.mark.parametrize(
    "variables",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
)
@pytest.mark.parametrize("line", ["arena --help"])
def test_another_encoding_is_printed_in(line, variables):
    assert shell(f"$F {line}", **variables).returncode == 0


def test_a_working_directory_that_is_gone_is_told(tmp_path):
    done = shell(f"mkdir gone && cd gone && rmdir ../gone && $F train --steps 16; cd {ROOT}", cwd=tmp_path)
    assert done.stderr == "fuel-ray: the working directory no longer exists: cd to another one\n"
