"""The source distribution is whole; the wheel works from another folder, without Ray and torch."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from fuel_ray import __version__

ROOT = Path(__file__).parent.parent
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv*", ".*_cache", ".hypothesis", "*.egg-info", "__pycache__", "results"
)
FOLDERS = ("benchmarks", "deploy", "docs", "examples", "experiments", "fuel_ray", "tests")
PYTHONS = ("python3.11", "python3.12", "python3.13")


def run(*words, cwd, check=True):
    """What a command prints, without this checkout on its path."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done.stdout + done.stderr


def venv(folder, python=sys.executable):
    run(python, "-m", "venv", folder, cwd=folder.parent)
    return folder / "bin"


def test_the_version_and_the_licence_stand_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project and project["license"] == "Apache-2.0"
    assert all((ROOT / name).exists() for name in project["license-files"])
    newest = re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest[1] == __version__


def test_the_notice_names_every_data_file_of_others():
    notice = (ROOT / "NOTICE").read_text()
    for path in (ROOT / "fuel_ray/workload/data").glob("*.csv"):
        assert str(path.relative_to(ROOT)) in notice


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with the source distribution, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("published")
    source = shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE)
    python = venv(folder / "builder") / "python"
    run(python, "-m", "pip", "install", "-q", "build", cwd=folder)
    run(python, "-m", "build", "--outdir", folder / "dist", source, cwd=folder)
    return folder / "dist"


@pytest.mark.slow
def test_the_source_distribution_has_documents_experiments_and_tests(published):
    with tarfile.open(next(published.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = [
        ROOT / name for name in ("LICENSE", "NOTICE", "CHANGELOG.md", "CONTRIBUTING.md", "cluster.yaml")
    ]
    wanted += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    lacking = {str(path.relative_to(ROOT)) for path in wanted if "__pycache__" not in path.parts} - names
    assert not lacking


@pytest.mark.slow
def test_the_wheel_has_the_package_and_its_licence_alone(published):
    with zipfile.ZipFile(next(published.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        metadata = message_from_bytes(wheel.read(f"fuel_ray-{__version__}.dist-info/METADATA"))
    assert {name.partition("/")[0] for name in names} == {"fuel_ray", f"fuel_ray-{__version__}.dist-info"}
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("License-File")) == {"LICENSE", "NOTICE"}
    assert {"cluster", "test", "train"} <= set(metadata.get_all("Provides-Extra"))
    packs = [path.name for path in (ROOT / "fuel_ray/sim/packs").glob("*.json")]
    assert {f"fuel_ray/sim/packs/{name}" for name in packs} <= set(names)


@pytest.mark.slow
@pytest.mark.parametrize("name", PYTHONS)
def test_the_wheel_works_from_another_folder_without_ray_and_torch(published, tmp_path, name):
    if shutil.which(name) is None or "Python" not in run(name, "--version", cwd=tmp_path, check=False):
        pytest.skip(f"no {name} here")
    there = venv(tmp_path / "venv", name)
    run(there / "pip", "install", "-q", next(published.glob("*.whl")), cwd=tmp_path)
    assert run(there / "fuel-ray", "--version", cwd=tmp_path) == f"fuel-ray {__version__}\n"
    words = ["--block-sizes", "16", "--seeds", "1", "--seconds", "20", "--static", "max"]
    assert "J/request" in run(there / "fuel-ray", "evaluate", *words, cwd=tmp_path)
    assert list(tmp_path.glob("results/evaluate-*/summary.csv"))
    assert "pip install 'fuel_ray[train]'" in run(there / "fuel-ray", "train", cwd=tmp_path, check=False)
    installed = run(there / "pip", "list", "--format", "freeze", cwd=tmp_path)
    assert not re.search(r"^(ray|torch)==", installed, re.MULTILINE)
