"""Settings from the command line: flags on top of a preset and a --config file, checked for their ranges."""

import contextlib
import dataclasses
import inspect
import io
import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import partial, reduce
from itertools import pairwise
from operator import or_
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import tyro

from fuel_ray.address import (
    VLLM_KEY,
    check_no_key,
    check_variable,
    flag_value,
    key_of_flags,
    page_url,
    server_url,
)
from fuel_ray.algorithms import check_algorithm, check_used
from fuel_ray.codec import feature_table
from fuel_ray.config import (
    PRESETS,
    LearnConfig,
    Reward,
    Serving,
    ServingConfig,
    SweepConfig,
    TrainConfig,
    load_config,
    to_dict,
)
from fuel_ray.errors import ConfigError
from fuel_ray.flag_help import narrowed, page
from fuel_ray.flag_words import check_folder, check_words, one_line, wrong_flag
from fuel_ray.node_config import LiveConfig
from fuel_ray.objective import from_outside
from fuel_ray.outside import reference

NOT_NAMED = "which is loaded only if the command line names it too"

# Lowest and highest value of each number, or of each in a tuple, and the flags that have this range
_COUNT, _SHARE, _STEP_SIZE, _WAIT_S = (1, 10**9), (0.0, 1.0), (1e-9, 1.0), (0.0, 86_400.0)
_GROUPS: dict[tuple[float, float], str] = {
    _COUNT: "steps seeds kv_tokens nodes_per_trial node_failures max_num_seqs gpu_clocks_mhz live_seconds "
    "grid_clock_step_mhz grid_batch_limits live.vocab_size guard.max_waiting guard.floor_mhz max_steps "
    "guard.max_step_mhz guard.switches_per_minute episodes steps_per_episode batches contexts prompts "
    "max_num_batched_tokens live.max_num_batched_tokens "
    "output_tokens windows num_prompts max_concurrency random_input_len random_output_len vocab_size",
    _SHARE: "grid_lowest_clock_share train.gamma train.priority train.epsilon_initial train.epsilon_final "
    "train.branch_other_limit",
    _STEP_SIZE: "train.lr train.epsilon_share train.lr_final_share",
    _WAIT_S: "node_wait_s guard.max_wait_s guard.release_s guard.dwell_s",
    (1.0, 86_400.0): "live.request_timeout_s live.start_timeout_s seconds",
    (0, 2**31 - 1): "seed miss_price_j",
    (0.05, 3600.0): "interval_s",
    (1.0, 3600.0): "canary_block_s",
    (0.001, 0.5): "canary",
    (1, 65_535): "metrics_port port",
    (1, 8): "tuning_seeds",
    (0, 10_000): "axis_seeds",
    (0, 30): "train.branch_tries",
    (1, 256): "workers",
    (1e-6, 1e6): "power_cap_w",
    (1e-6, math.inf): "request_rate",
    (0.01, 3600.0): "gpu_monitor_interval kv_monitor_interval",
    (0.001, 86_400.0): "timeout_s",
}
_RANGES = {
    f"train.{f.name}": _COUNT for f in dataclasses.fields(TrainConfig) if f.type in (int, tuple[int, ...])
} | {name: limits for limits, names in _GROUPS.items() for name in names.split()}

T = TypeVar("T")


def parse_flags(config_class: type[T], argv: list[str], *, prog: str, default: T | None = None) -> T:
    """Parse command-line flags into a frozen dataclass; its numbers are in their ranges.

    Raises:
        ConfigError: a flag or a value is wrong, in one line.
        SystemExit: with code 0, after --help.
    """
    check_no_key(argv)
    parsed = partial(
        tyro.cli,
        config_class,
        prog=prog,
        default=default if default is not None else tyro.MISSING_NONPROP,
        description=inspect.cleandoc(config_class.__doc__ or ""),
        config=(tyro.conf.AvoidSubcommands,),
    )
    shown, complaint = io.StringIO(), io.StringIO()
    try:
        with narrowed(), contextlib.redirect_stdout(shown), contextlib.redirect_stderr(complaint):
            config: T = parsed(args=argv)
    except SystemExit as stop:
        if not stop.code:
            print(page(shown.getvalue(), prog), end="")
            raise
        raise ConfigError(wrong_flag(argv, parsed) or one_line(complaint.getvalue())) from None
    check_words(argv, several=set(map(_flag, _lists(to_dict(config)))))
    check_ranges(config)
    return config


def completion(shell: str, verbs: Mapping[str, type]) -> str:
    """A script that lets a shell complete the verbs and their flags, by the classes of their settings."""
    kinds: list[Any] = [Annotated[kind, tyro.conf.subcommand(name)] for name, kind in verbs.items()]
    words, script = ["--tyro-print-completion", shell], io.StringIO()
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        tyro.cli(reduce(or_, kinds), prog="fuel-ray", args=words, config=(tyro.conf.AvoidSubcommands,))
    return script.getvalue()


def parse_serving(
    config_class: type[Serving], argv: list[str], *, prog: str, default: Serving | None = None
) -> Serving:
    """Settings of a verb: ``default`` or else the preset, then the --config file, then flags.

    Raises:
        ConfigError: a flag, a file or a value is wrong.
    """
    preset, path = value_of(argv, "--preset"), value_of(argv, "--config")
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"--preset {preset}: unknown; choose from {', '.join(PRESETS)}")
    base = default or _of_class(config_class, PRESETS[preset or "default"])
    if path is not None:
        base = load_config(Path(path), base=base)
        if preset is not None and base.preset != preset:
            raise ConfigError(
                f"--preset {preset}: --config {path} is of preset {base.preset}; leave --preset out"
            )
    config = parse_flags(config_class, argv, prog=prog, default=base)
    check_named(config, argv)
    found = checked(config)
    if isinstance(found, LearnConfig):  # not in ``checked``: who learns in an environment is not ours
        check_used(found)
    return found


def checked(config: Serving) -> Serving:
    """The settings, checked, whoever gives them; a server's login and key are in the environment alone.

    Raises:
        ConfigError: names the first value that is wrong.
    """
    check_ranges(config)
    validate(config)
    return dataclasses.replace(config, live=_without_secrets(config))


def check_named(settings: Any, words: Sequence[str]) -> None:
    """Check that code from outside is named by the user's own words, not only by a file.

    Raises:
        ConfigError: some is not; the message says what to add to the command line.
    """
    given = (word.partition("=")[2] if word.startswith("--") and "=" in word else word for word in words)
    named = {reference(value) for value in given}
    values = [(name, str(text)) for name, text in _values(to_dict(settings)) if isinstance(text, str)]
    for name, text in values:
        if reference(text) not in (None, *named):
            raise ConfigError(
                f"the settings name your own code, {NOT_NAMED}: add {_flag(name)} "
                + " ".join(text for own, text in values if own == name)
            )


def resumed(
    folder: Path,
    argv: list[str],
    *,
    prog: str,
    base: Serving,
    may_change: Sequence[str],
    file: str = "run.json",
) -> Serving:
    """The settings that the run in a folder began with, which flags may repeat; some may change.

    Raises:
        ConfigError: it is not the folder of a run, or a flag differs from its settings.
    """
    check_folder(folder, prog.removeprefix("fuel-ray "), file=file)
    began = load_config(folder / file, base=base)
    asked = parse_serving(type(base), argv, prog=prog, default=began)
    for f in dataclasses.fields(began):
        if f.name in ("out", "resume", "config", *may_change):
            continue
        old, new = getattr(began, f.name), getattr(asked, f.name)
        if old != new:
            raise ConfigError(
                f"--resume {folder}: a resumed run keeps its settings, and this one has {f.name} = {old}, "
                f"not {new}; leave {_flag(f.name)} out, or start a new run"
            )
    changed = {name: getattr(asked, name) for name in ("resume", *may_change)}
    return dataclasses.replace(began, **changed)


def _of_class(config_class: type[Serving], preset: SweepConfig) -> Serving:
    """What the preset changes of those settings that ``config_class`` has too."""
    own, default = {f.name for f in dataclasses.fields(config_class)}, SweepConfig()
    changed = {name: value for name, value in vars(preset).items() if value != getattr(default, name)}
    return config_class(**{name: value for name, value in changed.items() if name in own})


def validate(config: ServingConfig) -> None:
    """Check what types cannot.

    Raises:
        ConfigError: names the first value that is out of range, and the range.
    """
    for size in config.block_sizes:
        if not (1 <= size <= 256 and size & (size - 1) == 0):
            raise ConfigError(f"--block-sizes {size}: must be a power of two from 1 to 256, such as 16")
    if not config.block_sizes or len(set(config.block_sizes)) < len(config.block_sizes):
        raise ConfigError("--block-sizes: give at least one, and each one once, such as --block-sizes 16 32")
    if reference(config.reward) == config.reward:
        from_outside(config.reward, config.slo, miss_price_j=config.miss_price_j)
    elif config.reward not in get_args(Reward):
        rewards = ", ".join(get_args(Reward))
        raise ConfigError(
            f"--reward {config.reward}: unknown; choose from {rewards}, or package.module:Class"
        )
    feature_table(config.extra_features)
    _validate_slo(config)
    _validate_live(config)
    if isinstance(config, LearnConfig):
        _validate_training(config)


def check_ranges(config: Any) -> None:
    """Check the numbers of any settings.

    Raises:
        ConfigError: names the first one that is out of range, and the range.
    """
    for name, value in _values(to_dict(config)):
        if name not in _RANGES or value is None:
            continue
        low, high = _RANGES[name]
        if not low <= value <= high:
            most = f"from {low:g} to {high:g}" if high < 10**9 else f"at least {low:g}"
            raise ConfigError(f"{_flag(name)} {value:g}: must be {most}")


def _values(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value among the settings, one by one where there are several, with its dotted name."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _values(value, f"{prefix}{name}.")
        else:
            yield from ((prefix + name, item) for item in (value if isinstance(value, list) else [value]))


def _lists(settings: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of those settings that take several values."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _lists(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            yield prefix + name


def _validate_training(config: LearnConfig) -> None:
    table = feature_table(config.extra_features)
    unknown = [name for name in config.features if name not in table]
    if unknown or not config.features or len(set(config.features)) < len(config.features):
        raise ConfigError(
            f"--features {' '.join(unknown)}: give at least one, each one once, out of {', '.join(table)}"
        )
    check_algorithm(config)
    validate_tune_share(config.tune_share, config.slo_share)
    if config.node != "sim" and config.conditional:
        raise ConfigError(
            f"--conditional needs --node sim: it trains on all block sizes at once, and --node {config.node} "
            "has one at a time"
        )
    _validate_prices(config)
    if config.storage is not None and "://" not in config.storage and not config.storage.startswith("/"):
        raise ConfigError(
            f"--storage {config.storage}: must be an absolute path, or a URL such as s3://bucket/folder"
        )
    if config.node != "ray" and config.nodes_per_trial > 1:
        raise ConfigError(f"--nodes-per-trial {config.nodes_per_trial}: needs --node ray; leave it out")


def validate_tune_share(tune_share: float, slo_share: float | None) -> None:
    """Check that what is asked for in tuning is no less than the SLO's share.

    Raises:
        ConfigError: it is less, or no share.
    """
    if not 0 < tune_share <= 1:
        raise ConfigError(f"--tune-share {tune_share}: must be above 0 and at most 1")
    if slo_share is not None and tune_share < slo_share:
        raise ConfigError(
            f"--tune-share {tune_share}: must be at least --slo-share {slo_share}, or policies would be "
            f"tuned to miss the SLO; a little more is better, such as {(1 + slo_share) / 2:g}"
        )


def _validate_prices(config: LearnConfig) -> None:
    priced = config.mode != "fixed_price"
    if priced and (config.reward != "energy" or "miss_price" not in config.features):
        raise ConfigError(
            f"--mode {config.mode} trains at many prices of a miss, so it needs --reward energy and "
            "miss_price among --features; --preset plain needs neither"
        )
    if not priced and "miss_price" in config.features:
        raise ConfigError(
            "--mode fixed_price trains at one price of a miss: remove miss_price from --features"
        )


def _validate_live(config: ServingConfig) -> None:
    if config.node == "sim" and config.backend == "live":
        raise ConfigError("--backend live needs --node ray; for a server on this machine give --node live")
    if not config.live_server:
        return
    if not config.live.model:
        raise ConfigError("a live node needs --live.model, the model as `vllm serve` takes it")
    if config.live.server is not None and len(config.block_sizes) > 1:
        raise ConfigError(
            "--live.server: a running server has one block size; give it with --block-sizes, such as "
            "--block-sizes 16"
        )


def _without_secrets(config: ServingConfig) -> LiveConfig:
    """How the server is spoken to, with its login and its key in this process's environment."""
    live = config.live
    server = live.server and server_url(live.server, flag="--live.server")
    metrics = live.metrics_url and page_url(live.metrics_url, flag="--live.metrics-url")
    on_others = config.node == "ray" or bool(os.environ.get("RAY_ADDRESS"))
    check_variable(live.api_key_env, flag="--live.api-key-env", is_here=not on_others)
    if on_others and "@" in f"{live.server}{live.metrics_url}":
        raise ConfigError(
            "--live.server: a login in the address is not sent to other hosts; use --live.api-key-env"
        )
    try:
        kept, key = key_of_flags(shlex.split(live.flags))
    except ValueError as error:
        raise ConfigError(f"--live.flags: {error}") from None
    if (token := flag_value(kept, "--hf-token")) and not token.startswith("-"):
        raise ConfigError(
            "--live.flags: --hf-token would be stored with the settings; set HF_TOKEN in the environment"
        )
    if key is not None:
        if on_others:
            raise ConfigError(
                f"--live.flags: --api-key is not sent to other hosts; set {VLLM_KEY} for `ray start`"
            )
        os.environ[VLLM_KEY] = key
        live = dataclasses.replace(live, flags=shlex.join(kept))
    return dataclasses.replace(live, server=server, metrics_url=metrics)


def _validate_slo(config: ServingConfig) -> None:
    limits = {"slo_ttft_s": 100.0, "slo_tpot_s": 10.0, "slo_e2e_s": 3600.0}  # s that anybody may promise
    for name, longest_s in limits.items():
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{_flag(name)} {value}: must be above 0 s, or None for no limit")
        if value is not None and value > longest_s:
            raise ConfigError(
                f"{_flag(name)} {value:g}: this is in seconds; for {value:g} ms give {value / 1000:g}"
            )
    if all(getattr(config, name) is None for name in limits):
        raise ConfigError(f"the SLO has no limit: give at least one of {', '.join(map(_flag, limits))}")
    if config.slo_share is not None and not 0 < config.slo_share <= 1:
        raise ConfigError(f"--slo-share {config.slo_share}: must be above 0 and at most 1")
    if config.reward.startswith("greendls") and config.slo_e2e_s is None:
        raise ConfigError(f"--reward {config.reward} needs --slo-e2e-s, which is 10 in GreenDLS")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def value_of(argv: list[str], flag: str) -> str | None:
    """What the words give to a flag at last, before any of them is checked."""
    words = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith(f"{flag}=") else [arg])]
    return next((value for word, value in reversed(list(pairwise(words))) if word == flag), None)
