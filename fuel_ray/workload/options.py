"""The text form of a workload: ``NAME[:key=value,...]``.

A path may have commas in it; in quotes also a comma before what looks like the next ``key=``.
"""

import difflib
import math
import re
from collections.abc import Iterable

from fuel_ray.errors import ConfigError

_QUOTED = re.compile(r"""(["']).*\1""")
_PART = re.compile(r"""((?:[^,"']|(?<==)"[^"]*"|(?<==)'[^']*'|["'])*)(?:,|$)""")
_KEY = re.compile(r"\s*[A-Za-z_]\w*\s*=")


class Options:
    """The pairs of one spec; knows which keys it was asked for, so that any other can be refused.

    Raises:
        ConfigError: from any method, if the text is not what it asks for.
    """

    def __init__(self, text: str, *, name: str | None = None, defaults: str = "") -> None:
        self.text = text.strip()
        self.name = name or self.text.partition(":")[0]
        pairs = self.text[len(self.name) + 1 :]
        self._asked: list[str] = []
        self._given = self._pairs(defaults) | self._pairs(pairs)

    def text_of(self, key: str) -> str | None:
        """The value as written; None if the key is not given."""
        if key not in self._asked:
            self._asked.append(key)
        return self._given.get(key)

    def number(self, key: str, default: float, *, low: float, high: float) -> float:
        """A number in [low, high]."""
        written = self.text_of(key)
        value = default if written is None else as_number(written)
        if not low <= value <= high:
            raise self.error(f"{key} is {written or default!r}; it must be a number from {low:g} to {high:g}")
        return float(value)

    def count(self, key: str, default: int, *, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        value = self.number(key, default, low=low, high=high)
        if not value.is_integer():
            raise self.error(f"{key} is {value:g}; it must be a whole number from {low} to {high}")
        return int(value)

    def choice(self, key: str, default: str, allowed: Iterable[str]) -> str:
        """One of the allowed words."""
        value = self.text_of(key) or default
        if value not in (allowed := tuple(allowed)):
            raise self.error(f"{key} is {value!r}; it must be one of {', '.join(allowed)}")
        return value

    def values(self) -> dict[str, float | str]:
        """All values; numbers as such, whole ones as int."""
        numbers = {key: as_number(text) for key, text in self._given.items()}
        return self._given | {
            key: int(x) if x.is_integer() else x for key, x in numbers.items() if not math.isnan(x)
        }

    def refuse_the_rest(self) -> None:
        """Check that every key given was asked for."""
        for key in self._given:
            if key not in self._asked:
                quotes = '; put a path with a comma in quotes: path="..."' if "path" in self._given else ""
                raise self.error(f"unknown key {key}{self._meant(key)}{quotes}")

    def _meant(self, key: str) -> str:
        """The key that was probably meant, and all keys."""
        near = difflib.get_close_matches(key, self._asked, n=1)
        known = f"keys are {', '.join(self._asked)}"
        return f": did you mean {near[0]}? The {known}" if near else f"; the {known}"

    def error(self, problem: str) -> ConfigError:
        """The error to raise about this spec."""
        return ConfigError(f"workload {self.text!r}: {problem}")

    def _pairs(self, text: str) -> dict[str, str]:
        pairs: dict[str, str] = {}
        for pair in self._split(text):
            key, _, value = (part.strip() for part in pair.partition("="))
            if not key or not value or key in pairs:
                raise self.error(f"{pair!r}: give key=value, and each key once")
            pairs[key] = value[1:-1] if _QUOTED.fullmatch(value) else value
        return pairs

    def _split(self, text: str) -> list[str]:
        """At the commas that are not in quotes, nor in a path: what follows one there is no key=value."""
        parts: list[str] = []
        for part in _PART.findall(text):
            if parts and parts[-1].lstrip().startswith("path=") and not _KEY.match(part):
                parts[-1] += f",{part}"
            else:
                parts.append(part)
        return [part.rstrip(",") for part in parts if part.strip(",")]


def as_number(text: str) -> float:
    """The number written, or nan, which is in no range."""
    try:
        return float(text)
    except ValueError:
        return math.nan
