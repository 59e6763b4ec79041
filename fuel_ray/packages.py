"""Packages of others that are not installed here, or not as they should be: what to install, in one line."""

import importlib.util
from importlib import metadata
from types import ModuleType

_INSTALLED_BY = {  # by module, where a package has another name or comes with one of ours
    "pynvml": "nvidia-ml-py",
    "yaml": "pyyaml",
    "prometheus_client": "prometheus-client",
    "pyarrow": "ray",
}
_EXTRAS = {  # by package, the extra of pyproject.toml that has it
    "ray": "train",
    "torch": "train",
    "pandas": "train",
    "matplotlib": "train",
    "fsspec": "train",
    "pyyaml": "cluster",
}


def blamed(error: ImportError | AttributeError) -> str | None:
    """What a verb lacks and how to install it, if an error is a package's fault; None if it is our own."""
    if isinstance(error, AttributeError):
        return _not_the_one(error)
    while not error.name and isinstance(error.__cause__, ImportError):  # as Ray's, about what it lacks itself
        error = error.__cause__
    module = (error.name or "").partition(".")[0]
    if module == "fuel_ray" or not module:
        return None
    if isinstance(error, ModuleNotFoundError) and not _is_here(module):
        return f"needs the package {module}, which is not installed: run pip install '{provider(module)}'"
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    install = f"pip install '{requirement(module)}' --force-reinstall"
    return f"cannot load the package {module}, which is installed here ({said}): {install}"


def provider(module: str) -> str:
    """What pip has to be given for a module that is lacking: an extra of ours, or the package itself."""
    extra = _EXTRAS.get(_INSTALLED_BY.get(module, module))
    return requirement(module) if extra is None else f"fuel_ray[{extra}]"


def requirement(module: str) -> str:
    """The package that has a module, with the versions that fuel_ray needs where that is known."""
    package = _INSTALLED_BY.get(module, module)
    try:
        wanted = metadata.requires("fuel_ray") or []
    except metadata.PackageNotFoundError:  # a checkout that was never installed
        return package
    return next((text.partition(";")[0].strip() for text in wanted if text.startswith(package)), package)


def _is_here(module: str) -> bool:
    """Whether a module is here, whatever it lacks itself."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _not_the_one(error: AttributeError) -> str | None:
    """Another package of that name, or another version, has no such function."""
    module = error.obj
    if not isinstance(module, ModuleType) or module.__name__.partition(".")[0] == "fuel_ray":
        return None
    name = module.__name__.partition(".")[0]
    where = getattr(module, "__file__", None)
    return (
        f"needs {module.__name__}.{error.name}, which {where} does not have; it is another package of that "
        f"name, or another version: pip install '{requirement(name)}' --force-reinstall"
    )
