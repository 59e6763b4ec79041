"""From the text form of a workload to the workload: every name, key and default is here."""

import difflib
import os
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from fuel_ray.errors import ConfigError
from fuel_ray.outside import made, reference
from fuel_ray.types import Requests
from fuel_ray.workload.arrivals import Arrivals, Burst, Diurnal, Evenly, Gamma, Mmpp, Piecewise
from fuel_ray.workload.cells import UNITS, Unit
from fuel_ray.workload.formats import FORMATS, read_recorded, read_shipped, read_speeds
from fuel_ray.workload.lengths import (
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    ClippedLognormal,
    Independent,
    Lengths,
    Resampled,
    SharedPrefixes,
)
from fuel_ray.workload.listed import Listed, listed
from fuel_ray.workload.mixed import Mixed
from fuel_ray.workload.options import Options, as_number
from fuel_ray.workload.stretches import Stretches
from fuel_ray.workload.synthetic import Synthetic
from fuel_ray.workload.trace import Replay, replay
from fuel_ray.workload.units import LARGEST_BLOCK


class Workload(Protocol):
    """A source of requests; immutable and picklable."""

    @property
    def name(self) -> str: ...

    @property
    def period_s(self) -> float | None:
        """Time after which it repeats, in distribution at least; None if it is stationary."""

    @property
    def mean_rate_rps(self) -> float: ...

    @property
    def halves(self) -> tuple["Workload", "Workload"] | None:
        """Of a recorded trace, which no random generator changes: one to learn from, one to be judged on."""

    def generate(self, duration_s: float, *, rng: np.random.Generator, start_s: float = 0.0) -> Requests:
        """Requests of [start_s, start_s + duration_s) of the workload's own time, counted from start_s."""

    def digest(self) -> str:
        """12 hex characters that name the definition, trace contents included and the name excluded."""


def drawn(workload: Workload, duration_s: float, *, seed: int, random_start: bool) -> Requests:
    """The requests of a seed, from the workload's beginning or from a random point of its period.

    Of a recorded trace that is cut into stretches, from where that of the seed begins.
    """
    rng, period_s = np.random.default_rng(seed), workload.period_s
    start_s = rng.uniform(0.0, period_s) if random_start and period_s else 0.0
    if isinstance(workload, Stretches):
        start_s = workload.start_s(duration_s, seed=seed)
    return workload.generate(duration_s, rng=rng, start_s=start_s)


def parse_workload(text: str) -> Workload:
    """The workload of ``NAME[:key=value,...]``, such as ``diurnal:low_rps=1,high_rps=12``.

    NAME may be ``package.module:function``, which is called with the values.

    Raises:
        ConfigError: a name, key or value is wrong, or a trace file cannot be read.
    """
    name, names = text.strip().partition(":")[0], (*_ARRIVALS, "mixed", "listed", *_SHIPPED, *FORMATS)
    if name not in names and (code := reference(text.strip())):
        found: Workload = made(code, needs=_NEEDS, **Options(text, name=code).values())
        return found
    options = Options(text, defaults=_PRESETS.get(name, ""))
    workload: Workload
    if name in FORMATS or name in _SHIPPED:
        workload = _replay(options)
    elif name == "mixed":
        workload = Mixed(options.text, options.number("high_rps", 13, low=0.001, high=10_000))
    elif name == "listed":
        workload = _listed(options)
    elif name in _ARRIVALS:
        arrivals, lengths, prefixes = _ARRIVALS[name](options), _lengths(options), _prefixes(options)
        workload = Synthetic(options.text, arrivals, lengths, prefixes)
    else:
        if Path(name).suffix in (".csv", ".json", ".jsonl", ".parquet"):
            raise ConfigError(f"--workload {name}: name the trace's format too, as in azure:path={name}")
        near = difflib.get_close_matches(name, names, n=1)
        meant = f"did you mean {near[0]}? There are" if near else "choose from"
        raise ConfigError(
            f"unknown workload {name!r}: {meant} {', '.join(names)} and package.module:function of your own"
        )
    options.refuse_the_rest()
    return workload


def _listed(options: Options) -> Listed:
    try:
        return listed(options.text, options.text_of("requests") or "")
    except ValueError as error:
        form = "SECOND@PROMPT_TOKENS/OUTPUT_TOKENS*COUNT, joined by +, as in 0@128/500*8+2.5@1024/4"
        raise options.error(f"requests has {str(error)!r}; {form}") from error


def _steady(options: Options) -> Arrivals:
    return Piecewise(((options.number("rate_rps", 5, low=0.001, high=10_000), 1.0),))


def _gamma(options: Options) -> Arrivals:
    rate_rps = options.number("rate_rps", 5, low=0.001, high=10_000)
    return Gamma(rate_rps, cv=options.number("cv", 2, low=0.01, high=20))


def _piecewise(options: Options) -> Arrivals:
    written = options.text_of("rates") or "2@300+10@300"
    steps = []
    for step in written.split("+"):
        rate_rps, seconds = (as_number(part) for part in step.partition("@")[::2])
        if not (0 <= rate_rps <= 10_000 and 0.001 <= seconds <= 1e7):
            raise options.error(f"rates has {step!r}; REQ_PER_S@SECONDS, joined by +, as in 2@60+10@30")
        steps.append((rate_rps, seconds))
    if not any(rate_rps for rate_rps, _ in steps):
        raise options.error("all rates are 0; at least one must be above 0")
    return Piecewise(tuple(steps))


def _diurnal(options: Options) -> Arrivals:
    high_rps = options.number("high_rps", 12, low=0.001, high=10_000)
    low_rps = options.number("low_rps", min(1.0, high_rps), low=0, high=high_rps)
    return Diurnal(low_rps, high_rps, period_s=options.number("period_s", 1200, low=1, high=1e7))


def _mmpp(options: Options) -> Arrivals:
    high_rps = options.number("high_rps", 20, low=0.001, high=10_000)
    low_rps = options.number("low_rps", min(2.0, high_rps), low=0, high=high_rps)
    return Mmpp(low_rps, high_rps, dwell_s=options.number("dwell_s", 60, low=0.1, high=1e7))


def _burst(options: Options) -> Arrivals:
    count = options.count("count", 8, low=0, high=100_000)
    every_s, after_s = (options.number(name, 0, low=0, high=10_000) for name in ("every_s", "after_s"))
    return Burst(count, every_s, after_s)


def _speeds(options: Options) -> Arrivals:
    return Evenly(read_speeds(_path(options)))


def _lengths(options: Options) -> Lengths:
    kind = options.choice("lengths", "lognormal", ("lognormal", "sharegpt", "fixed", *_SHIPPED))
    if kind in _SHIPPED:
        rows = read_shipped(_SHIPPED[kind])
        return Resampled(rows.prompt_tokens.astype(np.int64), rows.output_tokens.astype(np.int64))
    if kind == "fixed":
        prompt_tokens = options.count("prompt_mean", PROMPT_TOKENS, low=1, high=1_000_000)
        output_tokens = options.count("output_mean", OUTPUT_TOKENS, low=1, high=1_000_000)
        return Resampled(np.array([prompt_tokens]), np.array([output_tokens]))
    if kind == "sharegpt":
        # Means of the vLLM paper, figure 11 (arXiv:2309.06180); sigma and limits are ours, as it gives none.
        return _lognormal(options, prompt=(161, 1024), output=(338, 2048), sigma=1.0)
    return _lognormal(options, prompt=(PROMPT_TOKENS, 4096), output=(OUTPUT_TOKENS, 1024), sigma=0.9)


def _lognormal(
    options: Options, *, prompt: tuple[int, int], output: tuple[int, int], sigma: float
) -> Lengths:
    """Lognormal lengths whose (mean, highest) and sigma are these unless the options say otherwise."""
    sigma = options.number("sigma", sigma, low=0.05, high=2)
    highest_prompt = options.count("max_prompt_tokens", prompt[1], low=16, high=1_000_000)
    highest_output = options.count("max_output_tokens", output[1], low=8, high=1_000_000)
    prompt_mean = options.number("prompt_mean", prompt[0], low=8, high=highest_prompt / 2)
    output_mean = options.number("output_mean", output[0], low=4, high=highest_output / 2)
    return Independent(
        prompt=ClippedLognormal(prompt_mean, sigma, low=4, high=highest_prompt),
        output=ClippedLognormal(output_mean, sigma, low=2, high=highest_output),
    )


def _prefixes(options: Options) -> SharedPrefixes | None:
    count = options.count("prefixes", 0, low=0, high=10_000)
    if count == 0:
        return None
    tokens = options.count("prefix_tokens", 500, low=1, high=1_000_000)
    return SharedPrefixes(count, tokens, share=options.number("prefix_share", 0.7, low=0, high=1))


def _replay(options: Options) -> Replay:
    rate_scale = options.number("rate_scale", 1, low=0.001, high=1000)
    longest = options.count("max_prompt_tokens", 1_000_000, low=1, high=1_000_000)
    if options.name in _SHIPPED:
        rows = read_shipped(_SHIPPED[options.name])
        return replay(options.text, rows, rate_scale=rate_scale, max_prompt_tokens=longest)
    path, unit, block = _path(options), None, None
    if options.text_of("unit") is not None:
        unit = cast(Unit, options.choice("unit", "", UNITS))
    if FORMATS[options.name].block_tokens and options.text_of("block") is not None:
        block = options.count("block", 0, low=1, high=LARGEST_BLOCK)
    options.refuse_the_rest()  # before a long file is read
    read = partial(_read, options.name, path, options.text, changed=_changed(path))
    return read(unit=unit, block=block, rate_scale=rate_scale, longest=longest)


@lru_cache(maxsize=4)
def _read(
    name: str,
    path: Path,
    text: str,
    *,
    changed: object,
    unit: Unit | None,
    block: int | None,
    rate_scale: float,
    longest: int,
) -> Replay:
    """A trace, read once while its file does not change: a training makes dozens of nodes."""
    rows = read_recorded(name, path, unit=unit, block=block)
    return replay(text, rows, rate_scale=rate_scale, max_prompt_tokens=longest)


def _changed(path: Path) -> object:
    try:
        there = path.stat()
    except OSError:
        return None
    return there.st_mtime_ns, there.st_size


def _path(options: Options) -> Path:
    path = options.text_of("path")
    if path is None:
        raise options.error("path is missing; give path=FILE")
    return Path(os.path.expanduser(path))  # pathlib's raises where there is no such home


_NEEDS = ("name", "period_s", "mean_rate_rps", "halves", "generate", "digest")  # of a Workload
_ARRIVALS = {
    "steady": _steady,
    "gamma": _gamma,
    "piecewise": _piecewise,
    "diurnal": _diurnal,
    "mmpp": _mmpp,
    "burst": _burst,
    "speeds": _speeds,
    "chat-prefix": _diurnal,
}
# The mean prompt is that of the default, 112 + 0.8 x 500 tokens, so that the two compare; 500 tokens do not
# fill their last KV block at any block size above 4, as real system prompts do not.
_PRESETS = {"chat-prefix": "prompt_mean=112,prefixes=8,prefix_tokens=500,prefix_share=0.8"}
_DATA = Path(__file__).parent / "data"
_SHIPPED = {"azure-conv": _DATA / "azure_conv_2023.csv", "azure-code": _DATA / "azure_code_2023.csv"}
