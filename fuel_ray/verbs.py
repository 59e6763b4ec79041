"""The verbs of the command line: what each does, and an example of it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verb:
    """What is said of a verb before anything of it is loaded."""

    what: str
    example: str  # the words after the verb
    settings: str | None = None  # module:Class of them, where the verb's own module takes seconds to load


GROUPS = {
    "on any machine, with simulated nodes": {
        "demo": Verb("see in a minute what a trained policy saves", ""),
        "sweep": Verb(
            "train a policy per KV block size and compare it with the rules",
            "--preset quick",
            "fuel_ray.config:SweepConfig",
        ),
        "train": Verb(
            "train one policy per KV block size",
            "--block-sizes 16 --workload azure",
            "fuel_ray.config:TrainVerbConfig",
        ),
        "evaluate": Verb(
            "compare policies on a simulated or a live node",
            "--block-sizes 16 --seeds 3 --static max 40@1380 --policies example",
        ),
        "recommend": Verb(
            "name the block size and policy to deploy for a load",
            "--workload steady:rate_rps=8 --block-sizes 16 --policies example",
        ),
        "arena": Verb(
            "compare every policy on every workload, with intervals",
            "--scenarios mmpp --policies example",
            "fuel_ray.arena.config:ArenaConfig",
        ),
        "report": Verb("write a run's report again", "results/sweep-20261127-120000"),
    },
    "your own server": {
        "onboard": Verb(
            "measure a server, train a policy for it, say how to deploy",
            "--server http://127.0.0.1:8000 --workload azure",
            "fuel_ray.onboarding.config:OnboardConfig",
        ),
        "profile": Verb(
            "measure a node for `calibrate`: steps, prefills, idle power",
            "--node live --live.model Qwen/Qwen3-8B",
        ),
        "calibrate": Verb(
            "fit a calibration pack from a profile of your server",
            "--profile results/profile-.../profile.jsonl --traces results/profile-.../traces/*.json "
            "--name own --out own.json",
        ),
        "validate": Verb("compare the simulator with recorded traces", "results/evaluate-.../traces/*.json"),
        "packs": Verb("list the calibration packs, or show one in full", "h100-qwen3-8b"),
        "benchmark": Verb(
            "send a load to a vLLM server and record power and KV cache",
            "--model Qwen/Qwen3-8B --request-rate 4 --num-prompts 200",
        ),
    },
    "in production": {
        "deploy": Verb(
            "let a policy control a running vLLM server",
            "--policy results/sweep-.../policies/block_16 --shadow --metrics-port 9464",
        ),
        "watch": Verb("show in a terminal what deployments do", "--urls http://gpu-1:9464 http://gpu-2:9464"),
        "export": Verb(
            "turn an RLlib checkpoint into a policy folder",
            "--checkpoint results/sweep-.../tune/TRIAL/checkpoint_000004 --out policy",
        ),
    },
    "hosts": {
        "doctor": Verb("say what this host, or a cluster, lacks", "--cluster"),
        "clock-helper": Verb("set clocks for controllers that may not, as root", "--gpu-ids 0 --users alice"),
        "unlock": Verb("give back GPU clocks that a killed run left locked", ""),
    },
}
VERBS = {name: verb for group in GROUPS.values() for name, verb in group.items()}
