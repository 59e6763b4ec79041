"""What README and docs show is true: imports work, files are there, rooms are named, code is the files'."""

import ast
import importlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTES = sorted(
    (ROOT / "docs/notes").glob("*.md")
)  # of a day, not kept up to date: their links alone are checked
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = [*sorted((ROOT / "benchmarks").glob("*.py")), *sorted((ROOT / "experiments/studies").glob("*.py"))]
IMPORT = re.compile(r"^\s*from fuel_ray\S* import [\w, ]+", re.MULTILINE)
DOTTED = re.compile(r"\bfuel_ray(?:\.\w+)+")
FILE = re.compile(r"\b(?:benchmarks|experiments|tests|docs|deploy|examples|fuel_ray)/[\w./-]*\w\.\w+")
URL = re.compile(r"https?://\S+")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def named(path):
    return str(path.relative_to(ROOT))


def of_pages(pattern):
    return sorted(
        {
            (named(page), found.strip())
            for page in PAGES
            for found in pattern.findall(URL.sub("", page.read_text()))
        }
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


LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]*))?\)")
FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#{1,6} +(.*?) *$", re.MULTILINE)


def prose(path):
    """A page, or the text of a notebook, without its code."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return FENCED.sub("", text)


def anchors(path):
    """What GitHub makes of a page's headings: lower case, hyphens for blanks, no punctuation."""
    seen, found = Counter(), set()
    for heading in HEADING.findall(prose(path)):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


@pytest.mark.parametrize("page", [*PAGES, *NOTES, *sorted((ROOT / "examples").glob("*.ipynb"))], ids=named)
def test_links_lead_to_files_and_headings_that_are_there(page):
    for target, anchor in LINK.findall(prose(page)):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        assert path.is_relative_to(ROOT), f"{target} is outside the repository"
        if anchor:
            assert anchor in anchors(path), f"{target}#{anchor}"


def test_anchors_are_those_of_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A, b & `c_d`\n\n```\n# no heading\n```\n\n## [Links](x.md) too?\n\n## Same\n\n## Same\n"
    )
    assert anchors(page) == {"a-b--c_d", "links-too", "same", "same-1"}


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
