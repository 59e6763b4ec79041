"""What README and docs show is true: imports work, files are there, rooms are named, code is the files'."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = [*sorted((ROOT / "benchmarks").glob("*.py")), *sorted((ROOT / "experiments/studies").glob("*.py"))]
IMPORT = re.compile(r"^\s*from fuel_ray\S* import [\w, ]+", re.MULTILINE)
DOTTED = re.compile(r"\bfuel_ray(?:\.\w+)+")
FILE = re.compile(r"\b(?:benchmarks|experiments|tests|docs|deploy|examples|fuel_ray)/[\w./-]*\w\.\w+")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def named(path):
    return str(path.relative_to(ROOT))


def of_pages(pattern):
    return sorted(
        {(named(page), found.strip()) for page in PAGES for found in pattern.findall(page.read_text())}
    )


def resolve(dotted):
    """The module, or the name in one, that a dotted name names."""
    parts = dotted.split(".")
    found = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:i]))
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(("page", "line"), of_pages(IMPORT))
def test_an_import_that_is_shown_works(page, line):
    exec(line, {})


@pytest.mark.parametrize(("page", "dotted"), of_pages(DOTTED))
def test_a_dotted_name_is_there(page, dotted):
    resolve(dotted)


@pytest.mark.parametrize(("page", "path"), of_pages(FILE))
def test_a_file_that_is_named_is_there(page, path):
    assert (ROOT / path).exists() or (ROOT / "docs" / path).exists() or (ROOT / "fuel_ray" / path).exists()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_design_names_every_room_and_module():
    rooms = (ROOT / "docs/design.md").read_text().split("```")[1]
    words = set(re.findall(r"\w+", rooms))
    for path in (ROOT / "fuel_ray").iterdir():
        if path.suffix == ".py" and not path.name.startswith("__"):
            assert path.stem in words, path.name
        if (path / "__init__.py").exists():
            assert f"{path.name}/" in rooms, path.name


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_what_a_script_imports_of_the_package_is_there(script):
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fuel_ray"):
            for alias in node.names:
                resolve(f"{node.module}.{alias.name}")


@pytest.mark.parametrize("script", [path for path in SCRIPTS if "studies" in path.parts], ids=named)
def test_a_study_says_its_command_its_time_and_what_to_expect(script):
    said = " ".join((ast.get_docstring(ast.parse(script.read_text())) or "").split())
    assert f"python {named(script)}" in said
    assert "It takes" in said and "What to expect" in said


EXAMPLES = [*sorted((ROOT / "examples").rglob("*.py")), ROOT / "fuel_ray/training/ppo.py"]


def test_the_code_of_the_page_on_extending_is_the_code_of_the_files():
    blocks = BLOCK.findall((ROOT / "docs/extending.md").read_text())
    texts = [path.read_text() for path in EXAMPLES if path.exists()]
    assert len(blocks) >= 5
    for block in blocks:
        assert any(block in text for text in texts), block
