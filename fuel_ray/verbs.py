"""The verbs of the command line: what each does, and an example of it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verb:
    """What is said of a verb before anything of it is loaded."""

    what: str
    example: str  # the words after the verb
    settings: str | None = None  # module:Class of them, where the verb's own module takes seconds to load


GROUPS = {
    "on any machine, on a simulated server (the twin)": {
        "demo": Verb("show in a minute what a trained policy saves", ""),
        "sweep": Verb(
            "train a policy per KV block size, compare with baselines",
            "--preset quick",
            "fuel_ray.config:SweepConfig",
        ),
        "train": Verb(
            "train a policy per KV block size, without the comparison",
            "--block-sizes 16 --workload azure-conv",
            "fuel_ray.config:TrainVerbConfig",
        ),
        "evaluate": Verb(
            "compare policies on the twin or on a real server",
            "--block-sizes 16 --seeds 3 --static max 40@1380 --policies example",
        ),
        "recommend": Verb(
            "choose the policy and block size to deploy for a workload",
            "--workload steady:rate_rps=8 --block-sizes 16 --policies example",
        ),
        "arena": Verb(
            "compare policies on many workloads, with 95 % intervals",
            "--scenarios mmpp --policies example",
            "fuel_ray.arena.config:ArenaConfig",
        ),
        "report": Verb("write the report of a sweep again", "results/sweep-20261127-120000"),
    },
    "for your own server": {
        "onboard": Verb(
            "measure a server, train a policy for it, and prepare deployment",
            "--server http://127.0.0.1:8000 --workload azure-conv",
            "fuel_ray.onboarding.config:OnboardConfig",
        ),
        "profile": Verb(
            "measure step times, power and latency of a server",
            "--node live --live.model Qwen/Qwen3-8B",
        ),
        "calibrate": Verb(
            "fit a calibration pack (a twin) to a profile",
            "--profile results/profile-.../profile.jsonl --traces results/profile-.../traces/*.json "
            "--name own --out own.json",
        ),
        "validate": Verb("compare the twin with recorded traces", "results/evaluate-.../traces/*.json"),
        "packs": Verb("list the calibration packs, or show one in full", "h100-qwen3-8b"),
        "benchmark": Verb(
            "send requests to a vLLM server, record latency and power",
            "--model Qwen/Qwen3-8B --request-rate 4 --num-prompts 200",
        ),
    },
    "in production": {
        "deploy": Verb(
            "let a policy control a running vLLM server",
            "--policy results/sweep-.../policies/block_16 --shadow --metrics-port 9464",
        ),
        "watch": Verb(
            "show running deployments in the terminal", "--urls http://gpu-1:9464 http://gpu-2:9464"
        ),
        "export": Verb(
            "turn an RLlib checkpoint into a policy folder",
            "--checkpoint results/sweep-.../tune/TRIAL/checkpoint_000004 --out policy",
        ),
    },
    "hosts": {
        "doctor": Verb("check what this host or a cluster needs", "--cluster"),
        "clock-helper": Verb(
            "set GPU clocks for unprivileged controllers, as root", "--gpu-ids 0 --users alice"
        ),
        "unlock": Verb("reset GPU clocks that a killed controller left locked", ""),
    },
}
VERBS = {name: verb for group in GROUPS.values() for name, verb in group.items()}
