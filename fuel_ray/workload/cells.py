"""What is written in a cell of a recorded trace: token counts, times and dates, and the unit of a column."""

import math
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Literal, get_args

Unit = Literal["s", "ms", "us", "ns"]
UNITS: tuple[Unit, ...] = get_args(Unit)

MOST = 10_000_000  # tokens or requests per second; beyond it the file is damaged
_MISSING = frozenset(("", "nan", "null", "none", "na", "n/a", "<na>", "-"))
_GROUPED = re.compile(r"[1-9]\d{0,2}(,\d{3})+(\.\d+)?")  # 1,234.5
_TWO_WAYS = re.compile(r"[1-9]\d{0,2},\d{3}")  # 1,234 may be 1.234
NO_TIME = 1e19  # beyond any moment in ns since 1970, and so damaged
_LAST_WORD = re.compile(r"^(.*?)[\s_]*[\s_(\[/]([a-zµμ]+)\s*[)\]]?\s*$", re.IGNORECASE)
_UNIT_WORDS: dict[str, Unit] = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), "s"),
    **dict.fromkeys(("ms", "msec", "millis", "millisecond", "milliseconds"), "ms"),
    **dict.fromkeys(("us", "µs", "μs", "usec", "micros", "microsecond", "microseconds"), "us"),
    **dict.fromkeys(("ns", "nsec", "nanos", "nanosecond", "nanoseconds"), "ns"),
}
_ADDED_WORDS = frozenset(("utc", "gmt", "tokens"))  # to a column's name, which they leave what it is


def count(value: object) -> int | None:
    """A number of tokens, which may be written 472, 472.0, "472" or "1,234"; None if it is missing.

    Raises:
        ValueError: it is not a whole number from 0 to 10,000,000.
    """
    number = _number(value)
    if number is None:
        return None
    if not 0 <= number <= MOST or number != int(number):
        raise ValueError(f"{value!r} is not a whole number from 0 to {MOST:,}")
    return int(number)


def time_of(value: object) -> float | None:
    """A time as a number in the file's own unit; None if it is missing.

    Raises:
        ValueError: it is not a number that a time can be, or one of two.
    """
    if isinstance(value, str) and _TWO_WAYS.fullmatch(value.strip()):
        raise ValueError(f"{value!r} has a comma, of decimals or of thousands: write it without")
    try:
        number = _number(value)
    except ValueError as error:
        raise ValueError(f"{value!r} is not a number, nor a date such as 2024-05-10 00:00:00.5") from error
    if number is not None and not abs(number) < NO_TIME:
        raise ValueError(f"{value!r} is not a time")
    return number


def seconds_of_date(value: object) -> float | None:
    """Seconds since 1970 of an ISO 8601 date and time, in UTC if it names no zone; None if it is missing.

    Raises:
        ValueError: it is no such date.
    """
    if missing(value):
        return None
    text = str(value).strip().removesuffix("UTC").rstrip().replace("/", "-")
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"{value!r} is not a date, as timestamps before it are") from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def is_date(value: object) -> bool:
    """Whether a time is written as a date rather than as a number."""
    try:
        return isinstance(value, str) and seconds_of_date(value) is not None and not _is_number(value)
    except ValueError:
        return False


def missing(value: object) -> bool:
    """Whether there is no value: null, an empty cell, or what pandas writes for one."""
    if isinstance(value, str):
        return value.strip().lower() in _MISSING
    return value is None or (isinstance(value, float) and math.isnan(value))


def column(names: Iterable[str], wanted: str) -> tuple[str, Unit | None] | None:
    """The name in a header that means ``wanted``, and the unit in it: case, blanks and brackets are free."""
    for name in names:
        if _plain(name) == _plain(wanted):
            return name, None
    for name in names:
        words = _LAST_WORD.match(name)
        if words and _plain(words[1]) == _plain(wanted) and words[2].lower() in _ADDED_WORDS | {*_UNIT_WORDS}:
            return name, _UNIT_WORDS.get(words[2].lower())
    return None


def _number(value: object) -> float | None:
    if missing(value):
        return None
    if isinstance(value, str):
        text = value.strip()
        try:
            return float(text.replace(",", "") if _GROUPED.fullmatch(text) else text)
        except ValueError as error:
            raise ValueError(f"{value!r} is not a number") from error
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError("a number of hundreds of digits") from error


def _is_number(text: str) -> bool:
    try:
        return _number(text) is not None
    except ValueError:
        return False


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
