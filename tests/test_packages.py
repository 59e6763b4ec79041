"""A package that is not here, or is another of its name, is told in one line with what to install."""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest

from fuel_ray import packages
from fuel_ray.cli import VERBS

ROOT = Path(__file__).parent.parent
PACKAGES = {  # module: what pip is given
    **dict.fromkeys(("ray", "torch", "pandas", "matplotlib", "fsspec", "pyarrow"), "fuel_ray[train]"),
    "numpy": "numpy",
    "scipy": "scipy",
    "numba": "numba",
    "gymnasium": "gymnasium",
    "tyro": "tyro",
    "safetensors": "safetensors",
    "pynvml": "nvidia-ml-py",
    "aiohttp": "aiohttp",
    "psutil": "psutil",
    "prometheus_client": "prometheus-client",
    "rich": "rich",
    "yaml": "fuel_ray[cluster]",
}
OF_EXTRAS = [module for module, given in PACKAGES.items() if given.startswith("fuel_ray[")]
TRAINING = ("onboard", "sweep", "train", "arena", "report")  # the verbs of [train]
DEPLOYMENT = ("deploy", "watch", "doctor", "unlock", "clock-helper", "benchmark")
NOT_OF_A_DEPLOYMENT = ("ray", "torch", "pandas", "numba", "matplotlib", "fsspec", "yaml", "gymnasium")
# Runs command lines without some modules
RUN = """
import contextlib, io, json, sys
from fuel_ray.cli import main
without, lines = json.loads(sys.argv[1])
found, gone = [], set()
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in gone:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
for modules in without:
    gone = set(modules)
    kept = {n: m for n, m in sys.modules.items() if n.partition(".")[0] in gone}
    ours = [n for n in sys.modules if n.startswith("fuel_ray.") and n != "fuel_ray.errors"]
    if "fuel_ray.env" in ours:
        sys.modules["gymnasium"].registry.pop("fuel_ray/Serving-v0", None)  # it registers itself again
    for name in [*kept, *ours]:
        del sys.modules[name]
    for line in lines:
        said, code = io.StringIO(), None
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                code = main(line)
            except SystemExit as stop:
                code = stop.code
        found.append((modules, line, code or 0, said.getvalue()))
    sys.modules |= kept
print(json.dumps(found))
"""


def told(without, lines, cwd=ROOT, **options):
    """(modules that were not there, command line, exit code, stderr) of each command line."""
    command = [sys.executable, "-c", RUN, json.dumps([without, lines])]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_verb_says_which_package_it_lacks():
    lacking = set()
    for (module,), (verb, _), code, said in told([[m] for m in PACKAGES], [[v, "--help"] for v in VERBS]):
        if code != 0:
            assert (code, said.count("\n")) == (2, 1), said
            wanted = (
                f"needs the package {module}, which is not installed: run pip install '{PACKAGES[module]}"
            )
            assert said.startswith(f"fuel-ray: {verb} {wanted}"), said
            lacking.add((verb, module))
    assert {("sweep", "tyro"), ("report", "pandas"), ("watch", "rich"), ("deploy", "pynvml")} <= lacking
    assert not {("doctor", "ray"), ("sweep", "ray"), ("demo", "torch")} & lacking


def test_a_deployment_needs_few_packages():
    lines = [*([verb, "--help"] for verb in DEPLOYMENT), ["doctor", "--backend", "sim"], ["unlock"]]
    for _, line, code, said in told([NOT_OF_A_DEPLOYMENT], lines):
        assert code == 0, (line, said)
    lines = [["doctor", "--cluster"], ["unlock", "--cluster"], ["doctor", "--cluster-file", "cluster.yaml"]]
    for _, line, code, said in told([NOT_OF_A_DEPLOYMENT], lines):
        assert code == 2 and "needs the package" in said and said.count("\n") == 1, (line, said)


def test_the_base_has_every_verb_but_those_that_train_or_draw():
    evaluated = ["evaluate", "--block-sizes", "16", "--seeds", "1", "--seconds", "20", "--static", "max"]
    lines = [[verb, "--help"] for verb in VERBS if verb not in TRAINING]
    with tempfile.TemporaryDirectory() as folder:
        runs = [["packs"], ["packs", "h100-qwen3-8b"], [*evaluated, "--out", folder]]
        for _, line, code, said in told([OF_EXTRAS], [*lines, *runs]):
            assert code == 0, (line, said)


def test_an_extra_is_named_for_what_it_brings():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base, extras = project["dependencies"], project["optional-dependencies"]
    names = {extra: {re.match(r"[\w-]+", text)[0] for text in extras[extra]} for extra in extras}
    for package, extra in packages._EXTRAS.items():
        assert package in names[extra] and not any(text.startswith(package) for text in base)
    assert {*names["train"], *names["cluster"]} == {*packages._EXTRAS, "fuel_ray"}
    for module in OF_EXTRAS:
        assert packages.provider(module) == PACKAGES[module]


def test_a_package_that_is_lacking_in_mid_run_is_told_before_anything_is_written(tmp_path):
    lines = [[verb, "--steps", "16", "--out", str(tmp_path / "results")] for verb in ("train", "sweep")]
    for _, line, code, said in told([["torch"]], lines):
        assert code == 2 and said.count("\n") == 1, (line, said)
        assert f"fuel-ray: {line[0]} needs the package torch" in said
        assert said.endswith("pip install 'fuel_ray[train]'\n")
    assert list(tmp_path.iterdir()) == []


def test_another_package_of_the_same_name_is_told(tmp_path):
    (tmp_path / "pynvml.py").write_text("")
    command = [sys.executable, "-m", "fuel_ray", "doctor"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert str(tmp_path / "pynvml.py") in done.stderr and "nvidia-ml-py" in done.stderr


def test_a_package_that_cannot_be_loaded_is_told(tmp_path):
    (tmp_path / "psutil.py").write_text(
        "raise ImportError('libfoo.so.1: cannot open', name='psutil._native')"
    )
    command = [sys.executable, "-m", "fuel_ray", "doctor"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "cannot load the package psutil" in done.stderr and "libfoo.so.1" in done.stderr


@pytest.mark.parametrize("policy", ["nowhere/", "results/sweep-1/policies/block_16"])
def test_a_policy_folder_that_is_not_there_is_told_without_numba(policy):
    lines = [["deploy", "--policy", policy]]
    ((_, _, code, said),) = told([NOT_OF_A_DEPLOYMENT], lines)
    assert code == 2 and policy in said and "numba" not in said
