"""fuel-ray VERB: the command line."""

import importlib
import sys
from functools import partial
from typing import get_type_hints

from fuel_ray.disk import disk_faults
from fuel_ray.errors import ConfigError, DiskError, FuelRayError
from fuel_ray.flags import parse_flags
from fuel_ray.live.processes import orderly_signals
from fuel_ray.output import lasting_output

VERBS = {  # each is the module of that name in commands
    "sweep": "train and compare one policy per KV block size",
    "train": "train one policy per KV block size",
    "evaluate": "compare policies on a simulated or a live node",
    "profile": "measure a node for `calibrate`: steps, prefills, idle power",
    "arena": "compare every policy on every workload, with intervals",
    "recommend": "name the block size and policy to deploy for a load",
    "validate": "compare the simulator with recorded traces",
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


def main(argv: list[str] | None = None) -> int:
    """Run a verb; 0 if it worked, 1 if a disk took no more, 2 if it was asked wrongly, 130 if interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        with disk_faults(), lasting_output() as lost:
            code = _verb(argv)
            if lost():
                raise DiskError(f"what was printed is not complete: {lost()}")
        return code
    except FuelRayError as error:
        print(f"fuel-ray: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, DiskError) else 2
    except KeyboardInterrupt:
        print("fuel-ray: interrupted", file=sys.stderr)
        return 130


def _verb(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: fuel-ray VERB [--flag value ...]    (fuel-ray VERB --help)\n")
        print("\n".join(f"  {verb:<12} {what}" for verb, what in VERBS.items()))
        return 0
    if argv[0] not in VERBS:
        raise ConfigError(f"{argv[0]} is no verb; there are {', '.join(VERBS)}")
    return _run(argv[0], argv[1:])


def _run(verb: str, argv: list[str]) -> int:
    module = importlib.import_module(f"fuel_ray.commands.{verb.replace('-', '_')}")
    parse = getattr(module, "parse", None) or partial(parse_flags, get_type_hints(module.run)["config"])
    config = parse(argv, prog=f"fuel-ray {verb}")
    with orderly_signals():
        code: int = module.run(config)
    return code
