"""A user without a home, or whose files are read-only, uses every verb."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fuel_ray import home
from fuel_ray.cli import VERBS, main

ROOT = Path(__file__).parent.parent
UID = 54321  # nobody's
# May read the interpreter wherever it is, and write nothing but what everybody may
PLAIN = "+dac_read_search"
AS_PLAIN_USER = f"""
mount -o remount,ro,bind / && exec setpriv --reuid={UID} --regid={UID} --clear-groups --no-new-privs \\
    --bounding-set=-all,{PLAIN} --inh-caps=-all,{PLAIN} --ambient-caps=-all,{PLAIN} "$@"
"""
HELP = """
import contextlib, io, sys
from fuel_ray.cli import main
for verb in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main([verb, "--help"])
        except SystemExit as stop:
            code = stop.code
    print(verb, code or 0)
"""


def as_plain_user(*words, **variables):
    """Run Python as a user without name and home; /dev/shm alone can be written to."""
    command = ["unshare", "--mount", "sh", "-c", AS_PLAIN_USER, "sh", sys.executable, *words]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def container():
    if os.geteuid() != 0 or not shutil.which("setpriv") or not shutil.which("unshare"):
        pytest.skip("needs root, setpriv and unshare")
    if (tried := as_plain_user("-c", "open('/dev/shm/fuel-ray-try', 'x')")).returncode:
        pytest.skip(f"no mount namespace with a /dev/shm of its own file system: {tried.stderr}")
    Path("/dev/shm/fuel-ray-try").unlink()
    yield
    shutil.rmtree(f"/dev/shm/fuel-ray-{UID}", ignore_errors=True)


def test_every_verb_starts_for_a_plain_user_in_a_container(container):
    done = as_plain_user("-c", HELP, *VERBS)
    assert done.stdout.splitlines() == [f"{verb} 0" for verb in VERBS], done.stderr


@pytest.mark.slow
def test_a_plain_user_in_a_container_evaluates(container, tmp_path):
    out = Path("/dev/shm", f"fuel-ray-{UID}", "out")
    words = ["--block-sizes", "16", "--seeds", "1", "--seconds", "20", "--static", "max", "--out", str(out)]
    done = as_plain_user("-m", "fuel_ray", "evaluate", *words)
    assert done.returncode == 0, done.stderr
    assert list(out.glob("evaluate-*/summary.csv"))


@pytest.fixture
def homes(monkeypatch, tmp_path):
    """A folder that can be written to but for "theirs" in it; the package cannot be."""
    for name in ("NUMBA_CACHE_DIR", "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "temporary").mkdir()
    access = os.access
    closed = (str(ROOT), str(tmp_path / "theirs"))
    monkeypatch.setattr(
        os, "access", lambda path, mode: not str(path).startswith(closed) and access(path, mode)
    )
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return tmp_path


@pytest.mark.parametrize(
    ("where", "lacking"),
    [
        ("not there", {"HOME"}),  # the other two are found below it
        ("theirs", {"NUMBA_CACHE_DIR", "MPLCONFIGDIR"}),  # keys in it can be read
        ("own", set()),
    ],
)
def test_libraries_get_a_folder_where_the_home_is_none(homes, monkeypatch, where, lacking):
    (homes / "own").mkdir()
    monkeypatch.setenv("HOME", str(homes / where))
    own = str(homes / "temporary" / f"fuel-ray-{os.geteuid()}")
    assert home.stand_ins() == dict.fromkeys(lacking, own)


def test_a_folder_that_is_set_stays(homes, monkeypatch):
    monkeypatch.setenv("HOME", str(homes / "theirs"))
    monkeypatch.setenv("NUMBA_CACHE_DIR", "elsewhere")
    assert set(home.stand_ins()) == {"MPLCONFIGDIR"}


def test_a_folder_that_another_may_write_to_is_not_used(homes, monkeypatch):
    monkeypatch.setenv("HOME", str(homes / "theirs"))
    open_to_all = homes / "temporary" / f"fuel-ray-{os.geteuid()}"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    given = Path(home.stand_ins()["NUMBA_CACHE_DIR"])
    assert given != open_to_all and given.stat().st_mode & 0o077 == 0


def test_nothing_that_can_be_written_to_is_one_line(monkeypatch, capsys):
    def refuse(*args):
        raise RuntimeError("cannot cache function 'play': no locator available for file 'scheduler.py'")

    monkeypatch.setattr("fuel_ray.cli._run", refuse)
    assert main(["evaluate"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "NUMBA_CACHE_DIR" in said
