"""Imports point down only, and every foreign library has its home."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "fuel_ray").rglob("*.py"))
FLOORS = [  # lowest first; what is on one floor may import its neighbours
    (
        *("types", "histogram", "errors", "outside", "disk", "output", "address", "packages", "home"),
        *("stages", "progress", "verbs"),
    ),
    (
        *(
            "metrics",
            "objective",
            "averages",
            "codec",
            "drift",
            "guard",
            "stats",
            "workload",
            "sim",
            "policies",
        ),
        "vllm_plugin",  # runs in vLLM's process; live.vllm shares its file
    ),
    ("control",),
    ("json_settings", "node_config", "config", "algorithms", "flags", "flag_words", "flag_help", "outside"),
    ("env", "record", "live", "cluster"),
    ("build",),
    ("tuning",),
    ("training",),
    ("arena", "report", "deploy"),
    ("commands", "onboarding"),
    ("cli", "__main__"),
]
HOMES = {
    "ray": ("training", "cluster"),
    "torch": ("training",),
    "gymnasium": ("env",),
    "numba": ("sim",),
    "scipy": ("stats",),
    "safetensors": ("policies.learned",),
    "matplotlib": ("report.figures", "report.clocks", "arena.figures"),
    "pandas": ("report",),
    "tyro": ("flags", "commands", "onboarding.config"),
    "fsspec": ("record", "training.storage"),
    "yaml": ("cluster.ssh",),
    "pynvml": ("live.gpu.nvml",),
    "aiohttp": ("live.load",),
    "psutil": ("live.cpu", "live.processes"),
    "prometheus_client": ("deploy.exporter", "live.vllm"),
    "rich": ("commands.watch", "progress"),
    "vllm": ("vllm_plugin",),
}


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT / "fuel_ray").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _within(module: str, homes: tuple[str, ...]) -> bool:
    return any(module == home or (home and module.startswith(home + ".")) for home in homes)


def _layer(module: str) -> int | None:
    return next((level for level, names in enumerate(FLOORS) if _within(module, names)), None)


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_imports_point_down_only(path):
    own = _layer(_module(path))
    for name in _imports(path):
        imported = _layer(name.removeprefix("fuel_ray.")) if name.startswith("fuel_ray.") else None
        if own is not None and imported is not None:
            assert imported <= own, f"{_module(path)} (layer {own}) imports {name} (layer {imported})"


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_every_module_has_a_layer(path):
    own = _module(path)
    assert own == "" or _layer(own) is not None


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.py")), ids=lambda path: path.stem)
def test_an_experiment_is_a_few_lines_over_a_verb(path):
    own = {name for name in _imports(path) if name.startswith("fuel_ray")}
    assert own <= {"fuel_ray.cli", "fuel_ray.cli.main"}
    assert len(path.read_text().splitlines()) < 30


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_a_foreign_library_is_imported_only_in_its_home(path):
    for name in _imports(path):
        homes = HOMES.get(name.split(".")[0])
        assert homes is None or _within(_module(path), homes), f"{_module(path)} imports {name}"


def test_a_verb_imports_no_other():
    for path in FILES:
        if _module(path).startswith("commands."):
            assert not [name for name in _imports(path) if name.startswith("fuel_ray.commands.")], path


@pytest.mark.parametrize("statement", ["import fuel_ray", "import fuel_ray.policies.learned"])
def test_acting_needs_neither_ray_nor_torch(statement):
    code = f"{statement}; import sys; sys.exit(bool({{'ray', 'torch', 'matplotlib'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


ACT = """
import sys
from pathlib import Path
import numpy as np
from fuel_ray.codec import Codec, SEED_GRID
from fuel_ray.policies.learned import Manifest, load_policy, save_policy
from fuel_ray.types import NodeSpec, Slo
spec = NodeSpec("n", "gpu", (), "model", 16, 1000, (1, 128), (540, 1500))
codec = Codec(("running",), SEED_GRID, Slo(1.0))
shapes = {"value.weight": (1, 1), "value.bias": (1,), "advantage.weight": (187, 1), "advantage.bias": (187,)}
arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
arrays["advantage.bias"][20] = 1.0
manifest = Manifest((16,), "model", "gpu", "e", "p", "0", "r", "w", "d", "joint", "0")
save_policy(Path(sys.argv[1]), arrays, codec, manifest)
from tests.test_codec import WINDOW
knobs = load_policy(Path(sys.argv[1]), spec).decide(WINDOW)
assert (knobs.batch_limit, knobs.gpu_clock_mhz) == (2, 720), knobs
sys.exit(bool({"ray", "torch", "matplotlib"} & set(sys.modules)))
"""


def test_a_loaded_policy_decides_without_ray_or_torch(tmp_path):
    done = subprocess.run([sys.executable, "-c", ACT, str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == 0
