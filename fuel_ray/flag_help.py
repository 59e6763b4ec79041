"""The page of --help: an example, then the flags that most people need, then the rest in groups."""

import os
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fuel_ray.verbs import VERBS

WIDEST = 110  # columns; tyro sets boxes side by side from 130 on, where nothing can be found
_OPTIONS = " options"
_GROUPS = {
    "used most": (
        *("help", "preset", "block-sizes", "workload", "slo-ttft-s", "slo-tpot-s", "slo-share", "steps"),
        *("policies", "static", "seeds", "seconds", "out", "save", "config", "resume"),
    ),
    "the simulated node": (
        *("pack", "clock-axis", "kv-tokens", "max-num-seqs", "limit-control", "gpu-clocks-mhz"),
        "prefix-caching",
    ),
    "live nodes and clusters": (
        *("node", "backend", "node-wait-s", "node-failures", "nodes-per-trial", "live-seconds"),
        *("storage", "save-traces"),
    ),
    "learning": (
        *("episodes", "steps-per-episode", "mode", "conditional", "start-from", "anchor", "baselines"),
        *("tune-share", "tuning-seeds", "reward", "miss-price-j", "features", "extra-features"),
        *("normalisation", "grid", "grid-clock-step-mhz", "grid-lowest-clock-share", "grid-batch-limits"),
    ),
}


@contextmanager
def narrowed() -> Iterator[None]:
    """Let no page of the block be wider than can be read."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(min(shutil.get_terminal_size().columns, WIDEST))
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def page(text: str, prog: str) -> str:
    """Tyro's page, as it writes it where there are no box characters, with an example and in groups."""
    usage, *blocks = "\n".join(line.rstrip() for line in text.splitlines()).strip().split("\n\n")
    verb = VERBS.get(prog.removeprefix("fuel-ray "))
    if verb is not None:
        usage += f"\nexample: {prog} {verb.example}".rstrip()
    return "\n\n".join((usage, *(own for block in blocks for own in _grouped(block)))) + "\n"


def _grouped(block: str) -> list[str]:
    """The block of options as several; another, or one of few, as it is."""
    title, _, rest = block.partition("\n")
    rule, _, rest = rest.partition("\n")
    entries = {_name(entry): _filled(entry, len(rule)) for entry in re.split(r"^(?=  -)", rest, flags=re.M)}
    entries.pop("", None)
    if title != _OPTIONS or not {"workload", "kv-tokens"} <= entries.keys():
        return [block]
    groups = {name: _taken(entries, names) for name, names in _GROUPS.items()}
    groups["more"] = list(entries.values())
    return ["\n".join((f" {name}", rule, *own)) for name, own in groups.items() if own]


def _taken(entries: dict[str, str], names: Sequence[str]) -> list[str]:
    return [entries.pop(name) for name in names if name in entries]


def _name(entry: str) -> str:
    """The first long flag of an entry."""
    found = re.match(r"  (?:-\w, )?--([a-z][\w.-]*)", entry)
    return "" if found is None else found[1]


def _filled(entry: str, width: int) -> str:
    """An entry whose explanation is broken where the page ends rather than where its source does."""
    flag, *lines = entry.rstrip("\n").split("\n")
    if not lines:
        return flag
    indent = " " * (len(lines[0]) - len(lines[0].lstrip()))
    text = " ".join(line.strip() for line in lines)
    return "\n".join((flag, textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)))
