"""What is wrong with the words of a command line, told in one line."""

import contextlib
import difflib
import io
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from fuel_ray.errors import ConfigError
from fuel_ray.verbs import VERBS

_NO_NUMBER = r"Error parsing (\S+): (invalid literal for int|could not convert string to float).*: '(.*)'"
_NO_CHOICE = r"Error parsing (\S+): no type matching (.+?) could be instantiated from \['(.*?)'\].*"
_NO_VALUE = r"Missing value for argument '(\S+)'.*"
_NOT_A_LIST = r"Error parsing (\S+): Could not find valid parse for arguments: \[(.*)\]"
_REQUIRED = r"Missing from (.*?): (.*)"
_FIRST_FLAG = r"(?:--\S+ [^,]*, )*(--[\w.-]+|[A-Z]+)"  # tyro writes other names of a flag before its own
_OTHER_CHOICE = r"invalid choice '(.*?)' for argument '(\S+)'\. Expected one of \((.*?),?\)\."
_STRAY = r"Unrecognized options: (.*)"
_KINDS = {"INT": "a whole number", "FLOAT": "a number", "PATH": "a path", "STR": "a text"}


OTHER_NAMES = {"--also": "--policies", "--to": "--out", "--policies": "--policy", "--policy": "--policies"}


def check_words(argv: Sequence[str], *, several: Collection[str]) -> None:
    """Check that a flag of several values is given once; of others the last one counts.

    Raises:
        ConfigError: one is given twice, and the values of the first would be lost.
    """
    given = list(_names(argv))
    for name in given:
        if name in several and given.count(name) > 1:
            raise ConfigError(f"{name} is given twice: give it once, followed by all its values")


def wrong_flag(argv: Sequence[str], parsed: Callable[..., object]) -> str | None:
    """What is said of the first flag that ``parsed`` does not know; None if it knows all."""
    known = sorted(_known(parsed))
    name = next((name for name in _names(argv) if name not in known), None)
    if name is None:
        return None
    if OTHER_NAMES.get(name) in known:
        return f"unknown flag {name}: did you mean {OTHER_NAMES[name]}?"
    tails = [flag for flag in known if flag.partition(".")[2] == name.removeprefix("--")]
    near = tails or difflib.get_close_matches(name.lower(), known, n=1)
    return f"unknown flag {name}" + (f": did you mean {near[0]}?" if near else "; --help lists all flags")


def check_folder(folder: Path, verb: str, *, file: str) -> None:
    """Check that a folder to resume is that of a run of this verb, which has the file with its settings.

    Raises:
        ConfigError: it is another verb's, or no run's.
    """
    such, found = f"such as results/{verb}-20261127-120000", _verb_of(folder)
    if found is not None and verb in VERBS and found != verb:
        raise ConfigError(f"--resume {folder}: that is a folder of fuel-ray {found}; give one {such}")
    if not (folder / file).is_file():
        raise ConfigError(
            f"--resume {folder}: not the folder of a run (no {file} in it); give the folder that the run "
            f"printed, {such}"
        )


def _verb_of(folder: Path) -> str | None:
    """The verb that made a folder, by the command in its files; None where none of them has one."""
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, KeyError, IndexError):
            return str(json.loads(path.read_text(encoding="utf-8"))["command"].split()[1])
    return None


def one_line(text: str) -> str:
    """Tyro's boxed complaint without the box, its title and the pointer to --help."""
    plain = re.sub(r"\x1b\[[0-9;]*m|╭.*|\A[^\n]*\n\s*-{8,}|-{8,}", "", text)  # without ╭ where all is ASCII
    words = " ".join(re.sub(r"[│╰╯─┆┄]", " ", plain).split())
    said = re.sub(r" (For full helptext|Argument helptext:).*", "", words)
    told: dict[str, Callable[[re.Match[str]], str]] = {
        _NO_NUMBER: _no_number,
        _NO_CHOICE: _no_choice,
        _OTHER_CHOICE: lambda found: f"{found[2]} {found[1]}: must be one of {found[3].replace(chr(39), '')}",
        _NOT_A_LIST: lambda found: _not_a_list(found[1], found[2]),
        _NO_VALUE: lambda found: f"{found[1].rpartition('/')[2]} needs a value",
        _REQUIRED: lambda found: _required(found[1], found[2].split("(required)")[:-1]),
        _STRAY: lambda found: f"unexpected {found[1]!r}; --help lists what is accepted",
    }
    for pattern, tell in told.items():
        if found := re.fullmatch(pattern, said):
            return tell(found)
    return said


def _no_number(found: re.Match[str]) -> str:
    return f"{found[1]} {found[3]}: must be a {'whole ' if 'int' in found[2] else ''}number"


def _no_choice(found: re.Match[str]) -> str:
    given = found[3].replace("', '", " ")
    return f"{found[1]} {given}: {_must_be(found[2])}"


def _not_a_list(flag: str, given: str) -> str:
    words = re.findall("'(.*?)'", given)
    apart = " ".join(" ".join(words).replace(",", " ").split())
    if any("," in word for word in words):
        return f"{flag}: separate the values by spaces: {flag} {apart}"
    return f"{flag} {apart}: not what this flag takes; --help shows what is"


def _required(prog: str, missing: Sequence[str]) -> str:
    """What is said of flags without which a verb cannot begin, each followed by its help."""
    flags = [found[1] for part in missing if (found := re.match(_FIRST_FLAG, part.strip()))]
    named = " and ".join(filter(None, (", ".join(flags[:-1]), *flags[-1:])))
    verb = "is" if len(flags) == 1 else "are"
    return f"{named} {verb} required; `{prog} --help` has an example"


def _must_be(kinds: str) -> str:
    """What a value must be, from tyro's short form such as {sim,live} or {None}|FLOAT."""
    words = [_word(word) for kind in kinds.split("|") for word in kind.strip("{}").split(",")]
    return f"must be one of {', '.join(words)}" if len(words) > 2 else f"must be {' or '.join(words[::-1])}"


def _word(kind: str) -> str:
    each = kind.split()
    word = _KINDS.get(each[0], each[0])
    return word if len(each) == 1 else f"{len(each)} {word.removeprefix('a ')}s"


def _names(argv: Sequence[str]) -> Iterator[str]:
    """The flags among the words, as they are in --help."""
    for word in argv:
        name = word.partition("=")[0]
        if re.fullmatch(r"--[a-z][\w.-]*", name, re.IGNORECASE):
            yield name.replace("_", "-")


def _known(parsed: Callable[..., object]) -> set[str]:
    """Every flag that --help names."""
    page = io.StringIO()
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        parsed(args=["--help"])
    return set(re.findall(r"--[a-z][\w.-]*\w", page.getvalue()))
