"""Settings from JSON: values onto a frozen tree, checked by its types."""

import contextlib
import dataclasses
import difflib
import typing
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal

from fuel_ray.errors import ConfigError
from fuel_ray.outside import Reference, reference


def changed_by(raw: Any, *, base: Any, source: str, renamed: Mapping[str, str]) -> Any:
    """A frozen tree of settings with the values of a JSON object; ``renamed`` has old names of its keys.

    Raises:
        ConfigError: a key is unknown or a value has the wrong type; the message begins with ``source``.
    """
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: must be a JSON object of settings")
    kinds = typing.get_type_hints(type(base))
    changes: dict[str, Any] = {}
    for key, value in ((renamed.get(key, key), value) for key, value in raw.items()):
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1)
            known = f"did you mean {near[0]!r}?" if near else f"keys are {', '.join(kinds)}"
            raise ConfigError(f"{source}: unknown key {key!r}: {known}")
        if dataclasses.is_dataclass(kinds[key]):
            own, where = getattr(base, key), f"{source}: {key}"
            changes[key] = changed_by(value, base=own, source=where, renamed={})
            continue
        try:
            changes[key] = _typed(value, kinds[key])
        except TypeError:
            raise ConfigError(f"{source}: {key} is {value!r}; it must be {_said(kinds[key])}") from None
    return replace(base, **changes)


def _said(kind: Any) -> str:
    """A type as a message names it."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(args)}"
    if origin is tuple:
        return f"a list, each {_said(args[0])}"
    if origin in (typing.Union, UnionType):
        return " or ".join(map(_said, args))
    return {int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}.get(
        kind, "a text"
    )


def _typed(value: Any, kind: Any) -> Any:
    """A value from JSON as the annotated type has it, else TypeError."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_typed(item, args[0]) for item in value)
    if origin in (typing.Union, UnionType):
        for option in args:
            with contextlib.suppress(TypeError):
                return _typed(value, option)
    if isinstance(value, str) and (kind is Path or (kind is Reference and reference(value) == value)):
        return kind(value)
    fits = type(value) is kind or (kind is float and type(value) is int)
    if fits or (origin is Literal and value in args):
        return value
    raise TypeError(value)
