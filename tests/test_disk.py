"""A disk that takes no more: one line, exit code 1, and nothing that is cut short is left or lost."""

import contextlib
import errno
import io
import json
import logging
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pyarrow.fs import FileSelector, LocalFileSystem, copy_files

from fuel_ray.cli import main
from fuel_ray.config import SweepConfig
from fuel_ray.disk import disk_faults, fault_in, write_or_keep, writing
from fuel_ray.errors import ConfigError, DiskError
from fuel_ray.policies.learned import read_policy, save_policy
from fuel_ray.record import StepLog, fetch, make_folder, publish, read_json, update_csv, write_csv, write_json
from fuel_ray.training.run import running
from fuel_ray.training.storage import disk_faults_told, forget_stop, whole_files
from tests.policy_folders import write_policy
from tests.stub_vllm import Stub, serving

DATA = Path(__file__).parent / "data"
NUMBERS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG, errno.EFBIG, errno.EIO),
)


def full_for(monkeypatch, is_lost, number=errno.ENOSPC):
    """No file of ours takes its place where ``is_lost``; numba has files of its own."""
    replace = os.replace

    def full(source, target):
        if is_lost(Path(target)):
            raise OSError(number, os.strerror(number))
        replace(source, target)

    monkeypatch.setattr("fuel_ray.disk.os.replace", full)


@contextlib.contextmanager
def little_room():
    """No file of this process may grow over 4 KiB; not as a fixture, for pytest may log to a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("number", NUMBERS)
def test_every_fault_of_a_disk_is_one_and_the_old_file_stays(number, tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_json(path, {"old": True})

    def fail(*_):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("fuel_ray.disk.os.replace", fail)
    with pytest.raises(DiskError, match=os.strerror(number)) as caught:
        write_json(path, {"old": False})
    assert read_json(path) == {"old": True} and [file.name for file in tmp_path.iterdir()] == ["run.json"]
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and str(path) in str(again)


@pytest.mark.parametrize("write", [write_json, write_csv])
def test_a_file_that_does_not_fit_is_not_there_at_all(write, tmp_path):
    with little_room():
        with pytest.raises(DiskError, match="File too large"):
            write(tmp_path / "x", [{"text": "y" * 10_000}])
        assert not list(tmp_path.iterdir())


def test_a_table_that_cannot_be_added_to_keeps_its_rows(tmp_path):
    with little_room():
        path = tmp_path / "summary.csv"
        write_csv(path, [{"block_size": "8", "text": "a"}])
        with pytest.raises(DiskError):
            update_csv(path, [{"block_size": "16", "text": "y" * 10_000}])
        assert path.read_text().splitlines() == ["block_size,text", "8,a"]


def test_a_name_as_long_as_a_disk_takes_can_be_written(tmp_path):
    write_json(tmp_path / ("x" * 250 + ".json"), 1)
    with pytest.raises(DiskError, match="File name too long"):
        write_json(tmp_path / ("x" * 300), 1)
    with pytest.raises(DiskError, match="File name too long"):
        make_folder(tmp_path / ("x" * 300))


def test_a_place_that_can_be_no_file_is_a_wrong_wish_and_no_fault(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Not a directory"):
        write_json(tmp_path / "file" / "x", 1)
    with pytest.raises(ZeroDivisionError), disk_faults(), writing("x"):
        _ = 1 / 0
    with pytest.raises(FileNotFoundError), disk_faults():
        (tmp_path / "nowhere").read_text()


@pytest.mark.parametrize("broken", ["weights.safetensors", "codec.json", "manifest.json"])
def test_a_policy_is_all_old_or_all_new(broken, tmp_path, monkeypatch):
    folder = tmp_path / "policy"
    write_policy(folder)
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    found = read_policy(folder)
    opened = Path.open

    def full(path, mode="r", **options):
        if path.name == f"{broken}.partial" and "w" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, mode, **options)

    monkeypatch.setattr(Path, "open", full)
    arrays = {name: array + np.float32(1) for name, array in found.arrays.items()}
    with pytest.raises(DiskError, match=broken):
        save_policy(folder, arrays, found.codec, found.manifest)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old


def test_results_that_fit_nowhere_are_printed(tmp_path, monkeypatch, capsys):
    with little_room():
        monkeypatch.setattr("fuel_ray.disk._others", lambda name: iter([tmp_path / "b" / name]))
        text = json.dumps(["y" * 10_000])
        with pytest.raises(DiskError, match="it was printed"):
            write_or_keep(tmp_path / "a", {"x.json": text})
        assert text in capsys.readouterr().out
        write_or_keep(tmp_path / "a", {"x.json": "1"})


def test_a_pack_that_cannot_be_written_leaves_the_old_one(tmp_path, capsys, monkeypatch):
    pack = tmp_path / "pack.json"
    pack.write_text("old")
    full_for(monkeypatch, lambda target: target == pack)
    profile = str(DATA / "h100_profile_20261125.jsonl")
    words = ["calibrate", "--profile", profile, "--name", "n", "--gpu", "H100", "--out", str(pack)]
    assert main(words) == 1
    found = capsys.readouterr()
    assert found.err.startswith("fuel-ray: cannot write") and found.err.count("\n") == 1
    assert pack.read_text() == "old" and "left out" in found.out


def test_a_pack_is_written_where_a_link_leads(tmp_path):
    pack, link = tmp_path / "of-today.json", tmp_path / "pack.json"
    link.symlink_to(pack)
    profile = str(DATA / "h100_profile_20261125.jsonl")
    assert main(["calibrate", "--profile", profile, "--name", "n", "--gpu", "H100", "--out", str(link)]) == 0
    assert link.is_symlink() and read_json(pack)["name"] == "n"


@pytest.mark.parametrize(
    "words", [["validate", "--json", str(DATA / "h100_trace_16_open5.json")], ["--help"]]
)
@pytest.mark.parametrize("unbuffered", [[], ["-u"]])
def test_output_that_finds_no_room_is_exit_code_1_and_one_line(words, unbuffered):
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, *unbuffered, "-m", "fuel_ray", *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "fuel-ray: the printed output is incomplete: No space left on device\n"


def test_a_full_log_does_not_end_an_evaluation(tmp_path):
    short = ["--seconds", "20", "--seeds", "1", "--workload", "steady:rate_rps=2", "--out", str(tmp_path)]
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "fuel_ray", "evaluate", *short]
        done = subprocess.run(command, stdout=full, stderr=full, text=True, check=False)
    (run_dir,) = tmp_path.iterdir()
    assert done.returncode == 1 and read_json(run_dir / "run.json")["partial"] is False
    assert (run_dir / "summary.csv").read_text().count("\n") > 2


def test_an_evaluation_that_finds_no_room_is_elsewhere_as_a_whole(tmp_path, monkeypatch, capsys):
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(other))
    lost = tmp_path / "out"
    full_for(
        monkeypatch, lambda target: target.name == "summary.csv" and lost in target.parents, errno.EDQUOT
    )
    short = ["--seconds", "20", "--seeds", "1", "--workload", "steady:rate_rps=2"]
    assert main(["evaluate", *short, "--out", str(tmp_path / "out")]) == 1
    (run_dir,) = other.iterdir()
    assert {path.name for path in run_dir.iterdir()} == {"run.json", "summary.csv", "steps.jsonl"}
    found = capsys.readouterr()
    assert "J/request" in found.out and f"it was written to {run_dir} instead" in found.err
    assert "quota exceeded" in found.err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_points_of_a_profile_that_find_no_room_are_elsewhere_and_whole(tmp_path, monkeypatch, capsys, number):
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(other))
    write = os.write

    def full(fd, data):
        if b'"phase": "decode"' in data:
            write(fd, data[:20])
            raise OSError(number, os.strerror(number))
        return write(fd, data)

    unlink = Path.unlink

    def unlinked(path, **options):
        if number == errno.EROFS and path.name == "profile.jsonl":
            raise OSError(number, os.strerror(number))
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", unlinked)

    monkeypatch.setattr("fuel_ray.record.os.write", full)
    partial = Path.open

    def opened(path, mode="r", **options):
        if path.name == "profile.jsonl.partial" and other not in path.parents:
            raise OSError(number, os.strerror(number))
        return partial(path, mode, **options)

    monkeypatch.setattr(Path, "open", opened)
    few = ["--clocks-mhz", "1980", "--batches", "1", "2", "--contexts", "128", "--prompts", "128"]
    assert main(["profile", *few, "--out", str(tmp_path / "out")]) == 1
    (path,) = other.glob("profile-*/profile.jsonl")
    phases = [json.loads(line)["phase"] for line in path.read_text().splitlines()]
    assert phases == ["idle", "decode", "decode", "prefill"]
    assert f"it was written to {path.parent} instead" in capsys.readouterr().err


def test_storage_never_has_half_a_file_nor_a_resumed_run_half_a_folder(tmp_path, monkeypatch):
    run_dir = tmp_path / "here/sweep-1"
    run_dir.mkdir(parents=True)
    write_json(run_dir / "run.json", "old")
    publish(run_dir, f"{tmp_path}/shared")
    write_json(run_dir / "run.json", "x" * 10_000)
    with little_room(), pytest.raises(DiskError, match="File too large"):
        publish(run_dir, f"{tmp_path}/shared")
    assert read_json(tmp_path / "shared/sweep-1/run.json") == "old"
    publish(run_dir, f"{tmp_path}/shared")
    with little_room(), pytest.raises(DiskError, match="there/sweep-1"):
        fetch(tmp_path / "there/sweep-1", f"{tmp_path}/shared")
    assert not (tmp_path / "there/sweep-1").exists()
    fetch(tmp_path / "there/sweep-1", f"{tmp_path}/shared")
    assert read_json(tmp_path / "there/sweep-1/run.json") == "x" * 10_000


def test_a_log_that_cannot_be_made_is_a_fault_of_the_disk(tmp_path):
    with pytest.raises(DiskError, match="File name too long"):
        StepLog(tmp_path / ("x" * 300))


def test_tunes_files_are_whole_or_not_there(tmp_path):
    for folder, size in (("small", 100), ("large", 10_000)):
        (tmp_path / folder / "deep").mkdir(parents=True)
        (tmp_path / folder / "deep" / "state.json").write_bytes(b"x" * size)
    with little_room():
        files = pickle.loads(pickle.dumps(whole_files()))
        target = str(tmp_path / "there")
        copying = {"source_filesystem": LocalFileSystem(), "destination_filesystem": files}
        copy_files(str(tmp_path / "small"), target, **copying)
        with pytest.raises(OSError, match="File too large"):
            copy_files(str(tmp_path / "large"), target, **copying)
        assert (tmp_path / "there/deep/state.json").read_bytes() == b"x" * 100
        found = [
            info.path for info in files.get_file_info(FileSelector(target, recursive=True)) if info.is_file
        ]
        assert found == [f"{target}/deep/state.json"]


def test_a_trial_that_tune_wanted_to_stop_goes_on(tmp_path):
    path = tmp_path / "experiment_state-1.json"
    path.write_text(json.dumps({"runner_data": {"_cached_trial_decisions": {"a": "STOP"}, "x": 1}}))
    (tmp_path / "experiment_state-2.json").write_text("{")
    forget_stop(tmp_path)
    assert read_json(path) == {"runner_data": {"_cached_trial_decisions": {}, "x": 1}}


def test_what_tune_makes_of_a_full_disk_is_one_error(tmp_path):
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("ray").addHandler(handler)
    tunes = logging.getLogger("ray.tune.execution.tune_controller")
    error = OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left on device")
    with pytest.raises(DiskError, match="No space left on device"), disk_faults_told(str(tmp_path)):
        tunes.error("Trial task failed for trial", exc_info=error)
        tunes.error("Trials did not complete: []")
        raise EOFError("Ran out of input")
    with pytest.raises(EOFError), disk_faults_told(str(tmp_path)):
        tunes.error("another error")
        raise EOFError("Ran out of input")
    logging.getLogger("ray").removeHandler(handler)
    assert said.getvalue() == "another error\n"
    assert fault_in("permission denied") is None


def test_a_run_that_finds_no_room_says_how_to_go_on(tmp_path):
    config = SweepConfig(block_sizes=(16,), out=tmp_path)
    with (
        pytest.raises(DiskError, match=r"No space left on device.*fuel-ray sweep --resume .*sweep-"),
        running(config, "sweep", [config.workload], held_out=()),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of a size, and says how to let it grow."""
    if os.geteuid() or shutil.which("mount") is None:
        pytest.skip("mounting needs root")
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size, *options):
        kind = ["-o", ",".join([f"size={size}", *options])]
        done = subprocess.run(["mount", "-t", "tmpfs", *kind, "tmpfs", str(folder)], check=False)
        if done.returncode:
            pytest.skip("mounting is not allowed here")
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("size", ["64k", "2m"], ids=["before the first checkpoint", "after some"])
def test_a_training_whose_disk_fills_up_goes_on_from_its_last_checkpoint(size, small_disk):
    disk = small_disk(size)
    train = [sys.executable, "-m", "fuel_ray", "train"]
    new = ["--block-sizes", "16", "--steps", "2560", "--train.iterations", "5", "--out", str(disk)]
    done = subprocess.run([*train, *new], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    (run_dir,) = disk.iterdir()
    assert "No space left on device" in done.stderr and done.stderr.count("\n") == 1
    assert f"fuel-ray train --resume {run_dir}" in done.stderr
    subprocess.run(["mount", "-o", "remount,size=30m", str(disk)], check=True)
    done = subprocess.run([*train, "--resume", str(run_dir)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (run_dir / "policies/block_16/manifest.json").is_file()
    began_at = next(line for line in done.stdout.splitlines() if line.startswith("train  block"))
    assert ("512/2,560" in began_at) == (size == "64k")


@pytest.mark.slow
def test_a_benchmark_on_a_full_disk_and_on_one_that_is_read_only(small_disk, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(other))
    with serving(Stub()) as stub:
        load = ["--port", stub.url.rsplit(":", 1)[1], "--num-prompts", "20", "--request-rate", "50"]
        words = ["benchmark", "--model", "tiny", *load, "--enable-kv-trace", "--kv-monitor-interval", "0.05"]
        disk = small_disk("4k")
        (disk / "filling").write_bytes(b"x" * 4096)
        assert main([*words, "--save-result", "--result-dir", str(disk / "results")]) == 1
        (path,) = other.glob("results/*.json")
        assert json.loads(path.read_text())["completed"] == 20
        assert (
            f"No space left on device; free some space; it was written to {path.parent}"
            in capsys.readouterr().err
        )
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        sent = len(stub.bodies)
        assert main([*words, "--save-result", "--result-dir", str(disk)]) == 1
        assert main([*words, "--save-result", "--result-dir", str(disk / "new")]) == 1
        assert len(stub.bodies) == sent
    assert "Read-only file system" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["arena", "evaluate", "profile", "train", "sweep"])
def test_a_verb_on_a_read_only_disk_is_one_line(verb, small_disk, capsys):
    disk = small_disk("1m", "ro")
    assert main([verb, "--block-sizes", "16", "--out", str(disk)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
