"""The arguments of ``gymnasium.make`` as settings: every setting of a training, checked as flags are."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fuel_ray.config import PRESETS, LearnConfig, SweepConfig, from_dict, load_config
from fuel_ray.errors import ConfigError
from fuel_ray.flags import check_named, checked

_ENV = "fuel_ray/Serving-v0"
_KV_BLOCK_SIZE = 16  # of an environment that is given none
_OWN = ("preset", "config", "kv_block_size", "steps", "out", "resume")  # read here, the others by from_dict
_NAMES = ("kv_block_size", *(f.name for f in fields(LearnConfig)))


def env_settings(arguments: Mapping[str, Any]) -> LearnConfig:
    """The settings of an environment: a preset's or a file's, changed by its arguments.

    ``kv_block_size`` is the one block size, ``steps`` the windows of an episode. A miss has one price, unless
    ``mode`` or the file says otherwise.

    Raises:
        ConfigError: an argument is unknown or has a wrong value.
    """
    for name in arguments:
        if name not in _NAMES:
            raise ConfigError(f"{_ENV}: unknown {name!r}{_suggested(name)}; allowed are {', '.join(_NAMES)}")
    if arguments.get("resume") is not None:
        raise ConfigError(f"{_ENV}: resume is not an argument of an environment; leave it out")
    base = _base(arguments)
    plain = {name: value for name, value in arguments.items() if name not in _OWN}
    _rename(arguments, plain)
    config = from_dict(plain, base=base, source=_ENV)
    if "out" in arguments:
        config = replace(config, out=Path(arguments["out"]))
    try:
        check_named(config, list(_texts(arguments)))
        config = checked(config)
    except ConfigError as error:
        raise ConfigError(f"{_ENV}: {error}") from error
    if config.node == "live" and config.live.server is None:
        raise ConfigError(f"{_ENV}: a live node needs a running server: give live={{'server': URL, ...}}")
    return config


def _base(arguments: Mapping[str, Any]) -> LearnConfig:
    """What the arguments change: a file's settings, or a preset's at one price of a miss."""
    preset, path = arguments.get("preset"), arguments.get("config")
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"{_ENV}: preset is {preset!r}; allowed are {', '.join(PRESETS)}")
    whole = PRESETS[preset or "default"]
    if path is not None:
        whole = load_config(Path(path), base=whole)
        if preset not in (None, whole.preset):
            raise ConfigError(f"{_ENV}: preset is {preset!r}; {path} has settings of preset {whole.preset!r}")
    elif arguments.get("mode", "fixed_price") == "fixed_price":
        features = tuple(name for name in whole.features if name != "miss_price")
        whole = replace(whole, mode="fixed_price", features=features)
    return _learning(whole)


def _learning(config: SweepConfig) -> LearnConfig:
    """Without what only a verb has a use for."""
    return LearnConfig(**{f.name: getattr(config, f.name) for f in fields(LearnConfig)})


def _rename(arguments: Mapping[str, Any], plain: dict[str, Any]) -> None:
    """Put the two arguments with names of their own under those of the settings."""
    if "steps" in arguments:
        train = plain.get("train", {})
        if not isinstance(train, Mapping) or "episode_steps" in train:
            raise ConfigError(f"{_ENV}: steps is the same as train's episode_steps: give one of them")
        plain["train"] = {**train, "episode_steps": arguments["steps"]}
    if "kv_block_size" in arguments and "block_sizes" in arguments:
        raise ConfigError(f"{_ENV}: kv_block_size and block_sizes exclude each other: give one of them")
    if "block_sizes" not in arguments:
        plain["block_sizes"] = [arguments.get("kv_block_size", _KV_BLOCK_SIZE)]


def _suggested(name: str) -> str:
    near = get_close_matches(name, _NAMES, n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _texts(value: Any) -> Iterator[str]:
    """Every text among the arguments, which is the user's own word for code from outside."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value
