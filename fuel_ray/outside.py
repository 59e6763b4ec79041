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
        ConfigError: there is no such module, or no such name in it.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ConfigError(f"{name}: {error}") from error


def made(name: str, *, needs: Sequence[str], **options: Any) -> Any:
    """What the class or function of that name makes of the options, with all the attributes that it needs.

    Raises:
        ConfigError: it cannot be called so, or makes something else.
    """
    function = load(name)
    try:
        inspect.signature(function).bind(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {error}; it is called with {', '.join(options) or 'nothing'}") from error
    found = function(**options)
    missing = [attribute for attribute in needs if not hasattr(found, attribute)]
    if missing:
        raise ConfigError(f"{name} makes a {type(found).__name__}, which has no {', '.join(missing)}")
    return found
