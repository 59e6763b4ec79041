"""The page of --help: an example, a line for each flag that most people need, then all flags in groups."""

import os
import re
import shutil
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from fuel_ray.verbs import VERBS

WIDEST = 110  # columns; tyro sets boxes side by side from 130 on, where nothing can be found
_OPTIONS = " options"
_INDENT = " " * 8
_SHORTEST = 18  # columns of the names of the flags that most people need
_MOST = "workload, SLO and run"
_GROUPS = {
    _MOST: (
        *("preset", "block-sizes", "workload", "slo-ttft-s", "slo-tpot-s", "slo-share", "steps"),
        *("node", "policies", "static", "seeds", "seconds", "out", "save", "config", "resume"),
    ),
    "the twin, a simulated server": (
        *("pack", "clock-axis", "kv-tokens", "max-num-seqs", "limit-control", "gpu-clocks-mhz"),
        "prefix-caching",
    ),
    "live nodes and clusters": (
        *("backend", "node-wait-s", "node-failures", "nodes-per-trial", "live-seconds"),
        *("storage", "save-traces"),
    ),
    "learning": (
        *("episodes", "steps-per-episode", "mode", "conditional", "start-from", "anchor", "baselines"),
        *("tune-share", "tuning-seeds", "reward", "miss-price-j", "features", "extra-features"),
        *("normalisation", "grid", "grid-clock-step-mhz", "grid-lowest-clock-share", "grid-batch-limits"),
    ),
}

_OF_VERBS = {  # flags that most people need, of verbs for which they are others
    "onboard": (
        *("server", "model", "gpu-ids", "limit-file", "observe-minutes", "workload", "slo-ttft-s"),
        *("slo-tpot-s", "slo-share", "node", "out", "resume"),
    ),
    "deploy": (
        "policy",
        "server",
        "limit-file",
        "gpu-ids",
        "max-num-seqs",
        "shadow",
        "canary",
        "metrics-port",
    ),
    "benchmark": ("model", "base-url", "port", "request-rate", "num-prompts", "gpu-ids", "save-result"),
}


@dataclass(frozen=True, slots=True)
class _Entry:
    """A flag, with the kind of its value, and what it does."""

    flag: str
    text: str

    @property
    def names(self) -> list[str]:
        return re.findall(r"--([a-z][\w.-]*)", self.flag)

    def full(self, width: int) -> str:
        text = textwrap.TextWrapper(width, _INDENT, _INDENT, break_on_hyphens=False).fill(self.text)
        return "\n".join(filter(None, (f"  {self.flag}", text)))

    def short(self, name: str, column: int, width: int) -> str:
        """A line with its first sentence, from a column on, and, where there is room, its default."""
        sentence = re.split(r"(?<=\.) | \(default: | \(required", self.text, maxsplit=1)[0].removesuffix(".")
        default = re.search(r"\((?:default: )?([^()]+)\)$", self.text)
        start = f"{f'  --{name}':<{column}}"
        is_told = default and default[1] not in ("None", "''")
        whole = f"{start}{sentence}" + (f" ({default[1]})" if default and is_told else "")
        return whole if len(whole) <= width else start + textwrap.shorten(sentence, width - len(start))


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
    width = min(shutil.get_terminal_size().columns, WIDEST)
    name = prog.removeprefix("fuel-ray ")
    if name in VERBS:
        usage += f"\nexample: {prog} {VERBS[name].example}".rstrip()
    by_name = {flag: entry for block in blocks for entry in _parts(block)[-1] for flag in entry.names}
    most = _most(by_name, name)
    return "\n\n".join((usage, *(own for block in blocks for own in _set(block, most, width)))) + "\n"


def _parts(block: str) -> tuple[str, str, str, list[_Entry]]:
    """The title of a block, the line below it, its introduction and its flags; of a text there are none."""
    title, _, rest = block.partition("\n")
    rule, _, rest = rest.partition("\n")
    intro, inner, flags = rest.rpartition(f"\n  {rule.strip()[1:]}\n")
    parts = re.split(r"^(?=  \S)", flags, flags=re.M) if title.startswith(" ") else []
    return title, rule, intro + inner.rstrip(), [_entry(part) for part in parts if part.strip()]


def _most(by_name: Mapping[str, _Entry], verb: str) -> list[tuple[str, _Entry]]:
    """The flags that most people need of a verb, by name."""
    names = _OF_VERBS.get(verb, _GROUPS[_MOST] if _in_groups(by_name) else ())
    return [(name, by_name[name]) for name in names if name in by_name]


def _in_groups(names: Collection[str]) -> bool:
    """Whether a verb has so many flags that they are in groups."""
    return {"workload", "kv-tokens"} <= {*names}


def _set(block: str, most: Sequence[tuple[str, _Entry]], width: int) -> list[str]:
    """A block of the page, set anew: in the first the flags that most people need, and all in groups."""
    title, rule, intro, entries = _parts(block)
    if not title.startswith(" "):
        return [textwrap.fill(" ".join(block.split()), width)]
    groups = _grouped(entries)
    column = max((_SHORTEST, *(len(name) + len("  -- ") for name, _ in most)))
    boxes = {" used most": [e.short(name, column, width) for name, e in most if title == _OPTIONS]}
    boxes |= {name or title: [e.full(width) for e in own] for name, own in groups.items()}
    return ["\n".join((name, rule, *filter(None, [intro]), *own)) for name, own in boxes.items() if own]


def _entry(part: str) -> _Entry:
    """From tyro's columns: a flag, and its text beside or below it."""
    first, *lines = part.rstrip("\n").split("\n")
    flag, _, beside = first.strip().partition("  ")
    text = " ".join(" ".join((beside, *lines)).split())
    return _Entry(flag, text.removesuffix(" (default: )"))


def _grouped(entries: list[_Entry]) -> dict[str, list[_Entry]]:
    """Flags in groups by title; a lone group keeps its own."""
    if not _in_groups([name for entry in entries for name in entry.names]):
        return {"": entries}
    return {f" {title}": _taken(entries, names) for title, names in _GROUPS.items()} | {" more": entries}


def _taken(entries: list[_Entry], names: Sequence[str]) -> list[_Entry]:
    """The entries of these flags, which are not there afterwards."""
    taken = [entry for name in names for entry in entries if name in entry.names]
    entries[:] = [entry for entry in entries if entry not in taken]
    return taken
