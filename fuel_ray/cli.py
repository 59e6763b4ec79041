"""fuel-ray VERB: the command line."""

import importlib
import sys

from fuel_ray.errors import ConfigError, FuelRayError
from fuel_ray.flags import parse_flags
from fuel_ray.live.processes import orderly_signals

# verb: (module, class of its settings, what it does)
VERBS = {
    "sweep": ("sweep", "SweepConfig", "train and compare one policy per KV block size"),
    "train": ("train", "TrainVerbConfig", "train one policy per KV block size"),
    "evaluate": ("evaluate", "EvaluateConfig", "compare policies on a simulated or a live node"),
    "profile": ("profile", "ProfileConfig", "measure a node for `calibrate`: steps, prefills, idle power"),
    "arena": ("arena", "ArenaConfig", "compare every policy on every workload, with intervals"),
    "recommend": ("recommend", "RecommendConfig", "name the block size and policy to deploy for a load"),
    "validate": ("validate", "ValidateConfig", "compare the simulator with recorded traces"),
    "calibrate": ("calibrate", "CalibrateConfig", "fit a calibration pack from a profile of your server"),
    "benchmark": (
        "benchmark",
        "BenchmarkConfig",
        "send a load to a vLLM server and record power and KV cache",
    ),
    "export": ("export", "ExportConfig", "turn an RLlib checkpoint into a policy folder"),
    "deploy": ("deploy", "DeployConfig", "let a policy control a running vLLM server"),
    "watch": ("watch", "WatchConfig", "show in a terminal what deployments do"),
    "clock-helper": ("clock_helper", "ClockHelperConfig", "set clocks for controllers that may not, as root"),
    "doctor": ("doctor", "DoctorConfig", "say what this host, or a cluster, lacks for a node"),
    "unlock": ("unlock", "UnlockConfig", "give back GPU clocks that a killed run left locked"),
    "report": ("report", "ReportConfig", "write a run's report again"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a verb; 0 if it worked, 2 if the user asked for something wrong, 130 if interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_usage())
            return 0
        if argv[0] not in VERBS:
            raise ConfigError(f"{argv[0]} is no verb; there are {', '.join(VERBS)}")
        return _run(argv[0], argv[1:])
    except FuelRayError as error:
        print(f"fuel-ray: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fuel-ray: interrupted", file=sys.stderr)
        return 130


def _run(verb: str, argv: list[str]) -> int:
    name, settings, _ = VERBS[verb]
    module = importlib.import_module(f"fuel_ray.commands.{name}")
    prog = f"fuel-ray {verb}"
    config = (
        module.parse(argv, prog=prog)
        if hasattr(module, "parse")
        else parse_flags(getattr(module, settings), argv, prog=prog)
    )
    with orderly_signals():
        code: int = module.run(config)
    return code


def _usage() -> str:
    lines = [f"  {verb:<12} {what}" for verb, (_, _, what) in VERBS.items()]
    return "\n".join(["usage: fuel-ray VERB [--flag value ...]    (fuel-ray VERB --help)", "", *lines])
