"""The commands that README and docs show, as words that a parser can be given."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^ *```bash\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
ANY_FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:fuel-ray [\w-]+|python experiments/\w+\.py) [^`]*)`")  # with arguments

SCRIPTS = {  # each is a verb under another name
    "deploy_dqn": "deploy",
    "evaluate_policies": "arena",
    "profile_node": "profile",
    "run_benchmark": "benchmark",
    "sweep_block_size": "sweep",
    "train_dqn": "train",
}
# Commands of others, and what needs another machine: they are shown, and not parsed here
ELSEWHERE = {
    "pip",
    "pytest",
    "python3",
    ".",
    "ray",
    "vllm",
    "$EDITOR",
    "jupyter",
    "docker",
    "sudo",
    "curl",
    "chromium",
    "kubectl",
    "jq",
    "check-jsonschema",
    "wandb",
}
STANDS_FOR = {  # placeholders in the pages, and what stands there in a test
    "...": "results/sweep-1/policies/block_16",
    "MODEL": "Qwen3-8B",
    "NAME": "h100-qwen3-8b",
    "URL": "http://127.0.0.1:8000",
    "FILE": "limit",
    "USER": "fuel-ray",
    "DIR": "results/sweep-1/policies/block_16",
    "LOADS": "loads.json",
    "R": "4",
    "mine.json": "h100-qwen3-8b",  # a pack of one's own
}


NEEDED = {  # what a command in running text may leave out, by verb
    "benchmark": ("--model", "Qwen/Qwen3-8B"),
    "calibrate": ("--profile", "profile.jsonl", "--name", "mine", "--out", "mine.json"),
}


@dataclass(frozen=True)
class Command:
    """One command of a page; ``words`` follow ``fuel-ray``."""

    page: str
    shown: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {self.shown}"


def commands() -> list[Command]:
    """Every command of ours in the pages, once."""
    found: dict[tuple[str, ...], Command] = {}
    for page in PAGES:
        for shown in in_blocks(page):
            for words in ours(shown):
                found.setdefault(words, Command(page.name, shown, words))
        for shown in inline(page):
            for words in map(completed, ours(shown)):
                found.setdefault(words, Command(page.name, shown, words))
    return list(found.values())


def in_blocks(page: Path) -> Iterator[str]:
    """The command lines of the fenced bash blocks."""
    for block in FENCED.findall(page.read_text()):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if shlex.split(line, comments=True):
                yield line.strip()


def inline(page: Path) -> Iterator[str]:
    """Commands of ours with arguments in the text; an ellipsis within says that something is left out."""
    for shown in INLINE.findall(ANY_FENCED.sub("", page.read_text())):
        if "…" not in shown and "[" not in shown:
            yield " ".join(shown.split())


def completed(words: tuple[str, ...]) -> tuple[str, ...]:
    """The words of a command in running text, with what it has to have besides."""
    verb, *given = words
    pairs = [*zip(*[iter(NEEDED.get(verb, ()))] * 2, strict=True)]
    if "live" in given and "--live.model" not in given and "--live.server" not in given:
        pairs.append(("--live.model", "Qwen/Qwen3-8B"))
    return (*words, *(word for flag, value in pairs if flag not in given for word in (flag, value)))


def ours(line: str) -> Iterator[tuple[str, ...]]:
    """What follows ``fuel-ray`` in a line, be it a script of the same name or on a cluster.

    Raises:
        ValueError: the line is neither ours nor known to run elsewhere.
    """
    words = [filled(word) for word in shlex.split(line, comments=True)]
    for part in parted(words):
        if part[0] == "fuel-ray" or (part[0] == "python" and part[1].startswith("experiments/")):
            yield verb_first(part)
        elif part[:2] == ["ray", "exec"]:  # ray exec cluster.yaml 'fuel-ray doctor --cluster'
            yield from ours(part[3])
        elif part[:2] == ["ray", "submit"]:  # ray submit cluster.yaml experiments/X.py ARGUMENTS
            yield verb_first(["python", *part[3:]])
        elif not {part[0], Path(part[0]).name} & ELSEWHERE:
            raise ValueError(f"{line}: no command of ours, and {part[0]} is not among ELSEWHERE")


def parted(words: list[str]) -> Iterator[list[str]]:
    """The commands of a line that && parts, without variables set in front."""
    part: list[str] = []
    for word in (*words, "&&"):
        if word == "&&":
            yield part
            part = []
        elif part or not re.match(r"[A-Z_]+=", word):
            part.append(word)


def verb_first(words: list[str]) -> tuple[str, ...]:
    """The words with the script, if it is one, as its verb."""
    if words[0] == "fuel-ray":
        return tuple(words[1:])
    return (SCRIPTS[Path(words[1]).stem], *words[2:])


def filled(word: str) -> str:
    """A word with what stands for its placeholders."""
    word = STANDS_FOR.get(word, word)
    word = re.sub(r"results/(\w+)-(?:\.\.\.|<time>|DATE|\*)", r"results/\1-1", word)
    word = re.sub(r"\$\(.*\)", "NVIDIA H100 80GB HBM3", word)
    return word.replace("*", "1")
