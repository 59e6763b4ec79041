"""docs/files.schema.json, and the files of a run as data that it can be checked against."""

import csv
import functools
import json
from pathlib import Path

import jsonschema

DEFS = json.loads((Path(__file__).parent.parent / "docs/files.schema.json").read_text())["$defs"]
TEXT = {"block_size", "policy", "workload", "workload_digest", "scenario", "slo"}  # columns


def check(name, data):
    """Raise jsonschema.ValidationError where ``data`` is not what the schema says of it."""
    validator(name).validate(json.loads(json.dumps(data)))


@functools.cache
def validator(name):
    return jsonschema.Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": DEFS})


def check_json(name, path):
    check(name, json.loads(path.read_text()))


def check_lines(name, path):
    lines = path.read_text().splitlines()
    assert lines
    for line in lines[:: max(1, len(lines) // 100)]:
        check(name, json.loads(line))


def check_rows(name, path):
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        check(name, {column: value_of(column, text) for column, text in row.items()})


def value_of(column, text):
    """What a field of a table says, as docs/files.md has it."""
    if text in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[text]
    is_number = column not in TEXT or (column == "block_size" and text.isdecimal())
    return json.loads(text) if is_number else text


def check_policy(folder):
    check_json("manifest", folder / "manifest.json")
    check_json("codec", folder / "codec.json")


def check_sweep(run_dir):
    """All files of a finished sweep."""
    check_json("run_sweep", run_dir / "run.json")
    check_json("baselines", run_dir / "baselines.json")
    check_rows("summary_row", run_dir / "summary.csv")
    check_rows("learning_row", run_dir / "learning.csv")
    check_lines("step", run_dir / "steps.jsonl")
    for folder in (run_dir / "policies").iterdir():
        check_policy(folder)
