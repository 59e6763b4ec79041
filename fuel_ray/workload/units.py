"""What the numbers of a trace mean: units of time and block sizes, told from the numbers themselves."""

import logging
from pathlib import Path

import numpy as np

from fuel_ray.errors import ConfigError
from fuel_ray.workload.cells import UNITS, Unit

logger = logging.getLogger(__name__)

_PER_SECOND: dict[Unit, float] = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
_FASTEST_RPS = 200.0  # mean of a whole trace; of the published ones, none is above 50
_IMPOSSIBLE_RPS = 1 / 3600, 1000.0
_EPOCH_S = 1e9, 2.2e9  # 2001 to 2039, since 1970
_NO_TIME_S = 1e10  # neither since 1970 nor since anything else; 20240510000000 is a date
_NEARLY_ALL = 0.9  # of the prompts
LARGEST_BLOCK = 1 << 16  # tokens
_TOLD = (
    "%s: hash_ids read as blocks of %d tokens, which match the lengths of %.0f %% of the prompts; the "
    "format's %d match %.0f %%; block=N sets it by hand"
)
_UNMATCHED = (
    "%s: hash_ids read as blocks of %d tokens, which match the lengths of %.0f %% of the prompts only; "
    "block=N sets it by hand"
)


def in_seconds(
    time: np.ndarray, *, source: Path, usual: Unit, slowest_rps: float, known: Unit | None
) -> np.ndarray:
    """Ascending times in seconds: in the unit known, else that of the epoch, else the format's ``usual`` one.

    Another than the usual unit is said.

    Raises:
        ConfigError: no trace has the mean rate that the usual unit makes, and no other unit must be meant.
    """
    unit = (
        known or _epoch_unit(time) or _likely_unit(time, source=source, usual=usual, slowest_rps=slowest_rps)
    )
    if time[-1] / _PER_SECOND[unit] > _NO_TIME_S:
        example = "a date written as a number? It is read as 2024-05-10 00:00:00"
        raise ConfigError(f"{source}: {time[-1]:.15g} {unit} is not a time of a trace: {example}")
    if known is None and unit != usual:
        said = "%s: timestamps read as %s, %s; in %s, the format's unit, %s; unit=%s sets it by hand"
        there = _rate_in(time, unit), usual, _rate_in(time, usual)
        logger.warning(said, source, unit, *there, "|".join(UNITS))
    elif not slowest_rps <= _rate_rps(time, unit) <= _FASTEST_RPS:
        logger.warning("%s: with timestamps in %s it is %s on average", source, unit, _rate_in(time, unit))
    return time if unit == "s" else np.divide(time, _PER_SECOND[unit])


def time_order(time: np.ndarray, *, source: Path, absolute: bool) -> np.ndarray | None:
    """The stable order by time, which is said; None if the rows have it.

    Raises:
        ConfigError: a clock that is not ``absolute`` goes back to its start, as in files put together.
    """
    earlier = np.flatnonzero(np.diff(time) < 0) + 1  # rows before their predecessor
    if not len(earlier):
        return None
    if not absolute and _epoch_unit(time) is None and (row := _restart(time, earlier)):
        raise ConfigError(
            f"{source}: the clock goes back from {time[row - 1]:g} to {time[row]:g} at request {row + 1:,}, "
            "as in traces put one after the other: split the file, or sort it by time if it is one trace"
        )
    said = "%s: %s of %s requests come before their predecessor in the file; sorted by time"
    logger.warning(said, source, f"{len(earlier):,}", f"{len(time):,}")
    return np.argsort(time, kind="stable")


def block_tokens(
    prompt_tokens: np.ndarray, blocks: np.ndarray, *, source: Path, usual: int, given: int | None
) -> int:
    """Tokens per block where each prompt is hashed in so many ``blocks``: given, usual or told from the two.

    What is told is said, and what is given but matches few prompts too.

    Raises:
        ConfigError: prompts have more blocks than fit into them.
    """
    counted = (blocks > 0) & (prompt_tokens > 0)
    tokens, blocks = prompt_tokens[counted].astype(np.int64), blocks[counted].astype(np.int64)
    expected = given or usual
    if not len(tokens):
        return expected
    matched = _matched(tokens, blocks)
    if matched[expected] >= _NEARLY_ALL:
        return expected
    too_many = int((blocks > -(-tokens // expected)).sum())
    possible = too_many <= (1 - _NEARLY_ALL) * len(tokens)
    told = _likely_block(matched) if not possible or _varied(tokens, blocks) else None
    if (told and given) or not (told or possible):
        share = (
            f"hash_ids in blocks of {expected} tokens match {100 * matched[expected]:.0f} % of prompt lengths"
        )
        instead = (
            f"{told} match {100 * matched[told]:.0f} %: block={told}" if told else "block=N says their size"
        )
        raise ConfigError(f"{source}: {share}; {instead}")
    if told:
        shares = told, 100 * matched[told], usual, 100 * matched[usual]
        logger.warning(_TOLD, source, *shares)
        return told
    logger.warning(_UNMATCHED, source, expected, 100 * matched[expected])
    return expected


def _epoch_unit(time: np.ndarray) -> Unit | None:
    low, high = float(time.min()), float(time.max())
    for unit in UNITS:
        if _EPOCH_S[0] <= low / _PER_SECOND[unit] and high / _PER_SECOND[unit] <= _EPOCH_S[1]:
            return unit
    return None


def _likely_unit(time: np.ndarray, *, source: Path, usual: Unit, slowest_rps: float) -> Unit:
    rates_rps = {unit: _rate_rps(time, unit) for unit in UNITS}
    if slowest_rps <= rates_rps[usual] <= _FASTEST_RPS:
        return usual
    others = [u for u in UNITS if u != usual and slowest_rps <= rates_rps[u] <= _FASTEST_RPS]
    impossible = not _IMPOSSIBLE_RPS[0] <= rates_rps[usual] <= _IMPOSSIBLE_RPS[1]
    if impossible and len(others) == 1:
        return others[0]
    readings = (
        ", ".join(f"{_rate_in(time, unit)} in {unit}" for unit in others) or "no other unit is likelier"
    )
    raise ConfigError(
        f"{source}: timestamps in {usual}, the format's unit, would be {_rate_in(time, usual)} "
        f"({readings}): unit={'|'.join(UNITS)} says which they are in"
    )


def _rate_rps(time: np.ndarray, unit: Unit) -> float:
    return (len(time) - 1) / float(time[-1] - time[0]) * _PER_SECOND[unit]


def _rate_in(time: np.ndarray, unit: Unit) -> str:
    rate_rps = _rate_rps(time, unit)
    return (
        f"{rate_rps:,.3g} req/s"
        if 0.1 <= rate_rps < 1000
        else (f"{rate_rps:,.0f} req/s" if rate_rps >= 1000 else f"one request in {1 / rate_rps:,.0f} s")
    )


def _restart(time: np.ndarray, earlier: np.ndarray) -> int | None:
    """The first row where the clock begins anew, rather than one row or all of them being out of order."""
    if 3 * len(earlier) > len(time) - 1:
        return None
    for begin, row in zip((0, *earlier[:-1]), earlier, strict=True):
        span = time[row - 1] - time[begin]
        goes_on = row + 1 < len(time) and time[row] <= time[row + 1] < time[row - 1]
        if goes_on and time[row] <= time[begin] + 0.1 * span:
            return int(row)
    return None


def _matched(tokens: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Share of the prompts that blocks of each size explain, hashed with or without the last, partial one."""
    with_partial = (
        -(-tokens // blocks),
        np.where(blocks > 1, (tokens - 1) // np.maximum(blocks - 1, 1), LARGEST_BLOCK),
    )
    whole_only = tokens // (blocks + 1) + 1, tokens // blocks
    covered = [_coverage(low, high) for low, high in (with_partial, whole_only)]
    return np.maximum(*covered) / len(tokens)


def _coverage(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """How many of the ranges [low, high] each number from 0 to LARGEST_BLOCK lies in."""
    some = (low <= high) & (low <= LARGEST_BLOCK)
    begins = np.bincount(low[some], minlength=LARGEST_BLOCK + 2)
    ends = np.bincount(np.minimum(high[some], LARGEST_BLOCK) + 1, minlength=LARGEST_BLOCK + 2)
    return np.cumsum(begins - ends)[: LARGEST_BLOCK + 1]


def _likely_block(matched: np.ndarray) -> int | None:
    """The size that explains nearly all prompts, a power of two if one does."""
    powers = 1 << np.arange(LARGEST_BLOCK.bit_length())
    for sizes in (powers, np.arange(1, LARGEST_BLOCK + 1)):
        best = int(sizes[np.argmax(matched[sizes])])
        if matched[best] >= _NEARLY_ALL:
            return best
    return None


def _varied(tokens: np.ndarray, blocks: np.ndarray) -> bool:
    """Whether prompts of several lengths and blocks say more than that some of each prompt was hashed."""
    return len(np.unique(tokens[blocks > 1])) >= 3
