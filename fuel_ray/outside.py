"""Code that the user named on the command line, as ``package.module:NAME``."""

import importlib
import sys
from pathlib import Path
from typing import Any

from fuel_ray.errors import ConfigError


def load(reference: str) -> Any:
    """What this name stands for; modules in the working directory count.

    Raises:
        ConfigError: there is no such module, or nothing of that name in it.
    """
    module, _, name = reference.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"{reference}: {error}") from error
