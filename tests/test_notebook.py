"""The notebook in examples/ works from its first cell to its last, on a base installation."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples/first_policy.ipynb"
BARRED = ("ray", "torch", "pandas")  # what a base installation does not have

# Runs the cells in order, as a kernel would, where the packages above cannot be imported
RUN = """
import json, sys
for name in sys.argv[2:]:
    sys.modules[name] = None
cells, names = json.load(open(sys.argv[1]))["cells"], {"__name__": "__main__"}
for number, cell in enumerate(cells):
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
assert names["plt"].get_fignums(), "it draws nothing"
"""


def cells(kind):
    return [
        "".join(cell["source"])
        for cell in json.loads(NOTEBOOK.read_text())["cells"]
        if cell["cell_type"] == kind
    ]


@pytest.fixture(scope="module")
def printed():
    pytest.importorskip("matplotlib")
    ended = subprocess.run(
        [sys.executable, "-c", RUN, str(NOTEBOOK), *BARRED],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_notebooks_policy_keeps_the_slo_on_held_out_seeds_and_saves_energy(printed):
    rows = re.findall(r"^(\S.*?) +([\d.]+) J/request +([+-][\d.]+)% +([\d.]+)% within", printed, re.MULTILINE)
    energy_j = {name: float(joules) for name, joules, *_ in rows}
    kept = {name: float(percent) for name, *_, percent in rows}
    assert kept["ours"] >= 95.0
    assert energy_j["ours"] < energy_j["fixed 1380 MHz"] < energy_j["highest clock"]


def test_the_notebook_tunes_on_other_seeds_than_it_judges_on(printed):
    assert re.search(r"^chosen: full \d+$", printed, re.MULTILINE)
    source = "\n".join(cells("code"))
    assert "TUNING_SEEDS" in source and "HELD_OUT_SEED" in source


def test_the_notebook_is_kept_without_outputs():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
