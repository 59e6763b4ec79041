"""Code from outside, ``package.module:NAME``; only what the user named on the command line is loaded."""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NewType

from fuel_ray.errors import ConfigError

Reference = NewType("Reference", str)  # package.module:NAME
_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*(?=:|$)")


def reference(text: str) -> Reference | None:
    """The ``package.module:NAME`` that a text is or begins with, up to a colon; None if there is none."""
    found = _REFERENCE.match(text)
    return None if found is None else Reference(found.group())


def load(name: str) -> Any:
    """What a ``package.module:NAME`` names; the working directory counts.

    Raises:
        ConfigError: it is no such name, there is no such module or no such name in it, or it fails.
    """
    if reference(name) != name:  # nor was the user asked to name it
        raise ConfigError(f"{name}: must have the form package.module:NAME")
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        lacking = isinstance(error, ImportError) and not (error.name or "fuel_ray").startswith("fuel_ray")
        if lacking and module.startswith("fuel_ray."):
            raise  # a package that this installation lacks
        raise ConfigError(f"{name}: {error}") from error
    except Exception as error:
        raise ConfigError(f"{name}: {type(error).__name__}: {error}") from error


def called(name: str, *values: Any, **options: Any) -> Any:
    """The class or function of that name.

    Raises:
        ConfigError: there is none, or it cannot be called with these.
    """
    function = load(name)
    try:
        inspect.signature(function).bind(*values, **options)
    except (TypeError, ValueError) as error:
        given = ", ".join([*(["settings"] * len(values)), *options]) or "nothing"
        raise ConfigError(f"{name}: {error}; fuel_ray calls it with {given}") from error
    return function


def made(name: str, *, needs: Sequence[str], **options: Any) -> Any:
    """What the class or function of that name makes of the options, with all the attributes that it needs.

    Raises:
        ConfigError: it cannot be called so, fails, or makes something else.
    """
    function = called(name, **options)
    try:
        found = function(**options)
    except Exception as error:
        raise ConfigError(f"{name}: {type(error).__name__}: {error}") from error
    missing = [attribute for attribute in needs if not hasattr(found, attribute)]
    if missing:
        raise ConfigError(f"{name} returns a {type(found).__name__}, which has no {', '.join(missing)}")
    return found
