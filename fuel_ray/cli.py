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
from typing import get_type_hints

from fuel_ray import __version__
from fuel_ray.disk import disk_faults
from fuel_ray.errors import ConfigError, DiskError, FuelRayError
from fuel_ray.home import nowhere_to_write, stand_ins
from fuel_ray.output import lasting_output
from fuel_ray.packages import blamed

VERBS = {  # each is the module of that name in commands
    "onboard": "your own server: measure it, train a policy for it, say how to deploy",
    "sweep": "train and compare one policy per KV block size",
    "train": "train one policy per KV block size",
    "evaluate": "compare policies on a simulated or a live node",
    "profile": "measure a node for `calibrate`: steps, prefills, idle power",
    "arena": "compare every policy on every workload, with intervals",
    "recommend": "name the block size and policy to deploy for a load",
    "validate": "compare the simulator with recorded traces",
    "packs": "list the calibration packs, or show one in full",
    "calibrate": "fit a calibration pack from a profile of your server",
    "benchmark": "send a load to a vLLM server and record power and KV cache",
    "export": "turn an RLlib checkpoint into a policy folder",
    "deploy": "let a policy control a running vLLM server",
    "watch": "show in a terminal what deployments do",
    "clock-helper": "set clocks for controllers that may not, as root",
    "doctor": "say what this host, or a cluster, lacks for a node",
    "unlock": "give back GPU clocks that a killed run left locked",
    "report": "write a run's report again",
}
_ANYWHERE = ("unlock", "watch", "clock-helper")  # need no working directory
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
                    raise DiskError(f"what was printed is not complete: {lost()}")
    except DiskError as error:
        return _complain(str(error), code=1)
    except BrokenPipeError:
        if _nobody_reads():
            return _NOBODY_READS
        raise


def _answer(argv: Sequence[str]) -> int:
    verb = argv[0] if argv else "help"
    try:
        if verb in ("version", "--version", "-V"):
            print(f"fuel-ray {__version__}")
            return 0
        if verb in ("help", "--help", "-h"):
            return _run(argv[1], ["--help"]) if len(argv) > 1 else _usage()
        return _run(verb, list(argv[1:]))
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


def _usage() -> int:
    print("usage: fuel-ray VERB [--flag value ...]    (fuel-ray VERB --help, fuel-ray --version)\n")
    print("\n".join(f"  {verb:<12} {what}" for verb, what in VERBS.items()))
    return 0


def _run(verb: str, argv: list[str]) -> int:
    if verb not in VERBS:
        raise ConfigError(_no_verb(verb, argv))
    if verb not in _ANYWHERE and not _has_folder():
        raise ConfigError("the working directory is gone: cd to one that is there")  # MKL aborts the process
    os.environ |= stand_ins()
    module = importlib.import_module(f"fuel_ray.commands.{verb.replace('-', '_')}")
    flags = importlib.import_module("fuel_ray.flags")  # not at the top: these may lack a package too
    processes = importlib.import_module("fuel_ray.live.processes")
    parse = getattr(module, "parse", None) or partial(flags.parse_flags, get_type_hints(module.run)["config"])
    config = parse(argv, prog=f"fuel-ray {verb}")
    with processes.orderly_signals():
        code: int = module.run(config)
    return code


def _no_verb(word: str, others: Sequence[str]) -> str:
    """What to write instead of a word that is no verb."""
    if word.startswith("-"):
        verb = next((other for other in others if other in VERBS), "VERB")
        return f"{word} stands before the verb: fuel-ray {verb} {word} ..."
    near = difflib.get_close_matches(word.lower(), VERBS, n=1, cutoff=0.5)
    if near:
        return f"{word!r} is no verb: did you mean {near[0]}? `fuel-ray help` lists all"
    return f"{word!r} is no verb; there are {', '.join(VERBS)}"


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
