"""fuel-ray VERB: the command line."""

import difflib
import importlib
import io
import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import cast, get_type_hints

from fuel_ray import __version__
from fuel_ray.disk import disk_faults
from fuel_ray.errors import ConfigError, DiskError, FuelRayError
from fuel_ray.home import nowhere_to_write, stand_ins
from fuel_ray.output import lasting_output
from fuel_ray.packages import blamed
from fuel_ray.verbs import GROUPS, VERBS

_ANYWHERE = ("unlock", "watch", "clock-helper")  # need no working directory
_SHELLS = ("bash", "zsh", "fish")
_NARROWEST = 40  # columns; tyro's help never ends below 10
_NOBODY_READS = 141  # what a shell says of a command that SIGPIPE has ended


def main(argv: list[str] | None = None) -> int:
    """Run a verb.

    0 if it worked, 1 if a disk or standard output takes no more, 2 if the user asked for something wrong,
    130 if interrupted, 141 if nobody reads the output any more.
    """
    _prepare_output()
    try:
        with disk_faults(), lasting_output() as lost:
            try:
                return _answer(sys.argv[1:] if argv is None else argv)
            finally:
                if lost():
                    raise DiskError(f"the printed output is incomplete: {lost()}")
    except DiskError as error:
        return _complain(str(error), code=1)
    except BrokenPipeError:
        if _nobody_reads():
            return _NOBODY_READS
        raise
    except SystemExit as error:
        _leave_ray(error.code)
        raise


def _leave_ray(code: object) -> None:
    """A signal to a whole group of processes, as of systemd or timeout, ends Ray's before this one."""
    hosts = sys.modules.get("fuel_ray.cluster.hosts")
    if hosts is not None and isinstance(code, int) and not hosts.left(within_s=5.0):
        os._exit(code)  # what was opened is closed


def _answer(argv: Sequence[str]) -> int:
    verb = argv[0] if argv else "help"
    try:
        return _said(verb, argv[1:])
    except DiskError:
        raise
    except FuelRayError as error:
        return _complain(str(error))
    except (ImportError, AttributeError, RuntimeError) as error:
        lack = nowhere_to_write(error) if isinstance(error, RuntimeError) else blamed(error)
        if lack is None:
            raise
        return _complain(f"{verb} {lack}")
    except KeyboardInterrupt:
        return _complain("interrupted", code=130)


def _said(verb: str, argv: Sequence[str]) -> int:
    if verb in ("version", "--version", "-V"):
        print(f"fuel-ray {__version__}")
        return 0
    if verb == "--print-completion":
        return _completion(argv)
    if verb in ("help", "--help", "-h"):
        return _run(argv[0], ["--help"]) if argv else _usage()
    return _run(verb, list(argv))


def _usage() -> int:
    print("usage: fuel-ray VERB [--flag value ...]")
    for title, verbs in GROUPS.items():
        print(f"\n{title}")
        print("\n".join(f"  {name:<12} {verb.what}" for name, verb in verbs.items()))
    print(
        "\nStart with `fuel-ray demo`. `fuel-ray VERB --help` shows an example and all flags of a verb."
        "\nTab completion: fuel-ray --print-completion bash|zsh|fish. Version: fuel-ray --version."
    )
    return 0


def _run(verb: str, argv: list[str]) -> int:
    if verb not in VERBS:
        raise ConfigError(_no_verb(verb, argv))
    if verb not in _ANYWHERE and not _has_folder():  # without one MKL aborts the process
        raise ConfigError("the working directory no longer exists: cd to another one")
    os.environ |= stand_ins()
    flags = importlib.import_module("fuel_ray.flags")  # not at the top: this may lack a package too
    prog = f"fuel-ray {verb}"
    if VERBS[verb].settings is not None and {"-h", "--help"} & {*argv}:
        flags.parse_serving(_settings(verb), argv, prog=prog)  # shows the page, and the exit is raised
    module = _module(verb)
    parse = getattr(module, "parse", None) or partial(flags.parse_flags, _settings(verb))
    config = parse(argv, prog=prog)
    processes = importlib.import_module("fuel_ray.live.processes")
    with processes.orderly_signals():
        code: int = module.run(config)
    return code


def _module(verb: str) -> ModuleType:
    return importlib.import_module(f"fuel_ray.commands.{verb.replace('-', '_')}")


def _settings(verb: str) -> type:
    """The class of a verb's settings."""
    if (where := VERBS[verb].settings) is not None:
        module, _, name = where.partition(":")
        return cast(type, getattr(importlib.import_module(module), name))
    return cast(type, get_type_hints(_module(verb).run)["config"])


def _completion(words: Sequence[str]) -> int:
    shell = words[0] if words else ""
    if shell not in _SHELLS:
        raise ConfigError(f"--print-completion {shell}: must be one of {', '.join(_SHELLS)}")
    flags = importlib.import_module("fuel_ray.flags")
    print(flags.completion(shell, {verb: _settings(verb) for verb in VERBS}))
    return 0


def _no_verb(word: str, others: Sequence[str]) -> str:
    """What to write instead of a word that is no verb."""
    if word.startswith("-"):
        verb = next((other for other in others if other in VERBS), "VERB")
        return f"{word} must come after the verb: fuel-ray {verb} {word} ..."
    near = difflib.get_close_matches(word.lower(), VERBS, n=1, cutoff=0.5)
    if near:
        return f"unknown verb {word!r}: did you mean {near[0]}? `fuel-ray help` lists all verbs"
    return f"unknown verb {word!r}; verbs are {', '.join(VERBS)}"


def _complain(what: str, *, code: int = 2) -> int:
    print(f"fuel-ray: {' '.join(what.split())}", file=sys.stderr)
    return code


def _prepare_output() -> None:
    """Make what is printed fit where it goes: closed streams, other encodings, a terminal of no width."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")
    if shutil.get_terminal_size().columns < _NARROWEST:
        os.environ["COLUMNS"] = str(_NARROWEST)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe without a reader; it goes nowhere from then on."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes there again at its end
        return True
    return False


def _has_folder() -> bool:
    try:
        return bool(Path.cwd())
    except OSError:
        return False
