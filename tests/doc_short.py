"""What makes a command of README and docs short enough for a test, and what it leaves behind."""

from collections.abc import Mapping
from pathlib import Path

from tests.doc_commands import Command

# Why a command is not run here, and the test that covers it instead
NOT_RUN = {
    "doctor --cluster-file cluster.yaml": (
        "the machines of cluster.yaml do not exist",
        "test_doctor.py::test_the_hosts_of_a_cluster_file_are_asked_by_ssh",
    ),
    "doctor --cluster": (
        "there is no cluster",
        "test_doctor.py::test_every_host_of_a_cluster_is_looked_at",
    ),
    "unlock --cluster": (
        "there is no cluster",
        "test_cluster.py::test_unlock_asks_every_host_and_goes_on_where_one_fails",
    ),
    "sweep --node ray --backend sim": (
        "there is no cluster",
        "test_cluster_training.py::test_two_nodes_make_the_rollouts_of_a_trial",
    ),
    "sweep --node ray --backend live": (
        "each node of the cluster starts a vLLM server on its GPU",
        "test_cluster_vllm.py::test_a_server_behind_an_actor_is_measured_and_dies_with_it",
    ),
    "sweep --node live": (
        "Ray's workers measure the GPU, and the fake one is in this process alone",
        "test_live_real.py::test_a_sweep_learns_and_evaluates_on_a_live_node",
    ),
    "train --node live": (
        "Ray's workers measure the GPU, and the fake one is in this process alone",
        "test_live_real.py::test_a_sweep_learns_and_evaluates_on_a_live_node",
    ),
    "train --callbacks wandb mlflow": (
        "the trackers are not installed with fuel_ray",
        "test_trackers.py::test_without_a_server_results_are_in_the_folder_of_the_run",
    ),
}

Short = Mapping[str, str]  # values by flag; those of a flag that has none are empty

_LEARN = {
    **{"--steps": "600", "--block-sizes": "16", "--tuning-seeds": "1"},
    **{"--train.iterations": "1", "--train.average-results": "1"},
    **{"--gpu-clocks-mhz": "990 1485 1980", "--grid-batch-limits": "32"},
}
_JUDGE = {"--seeds": "2", "--tuning-seeds": "1", "--axis-seeds": "0", "--seconds": "60", "--workers": "1"}
_SWEEP = {**_LEARN, "--seeds": "1", "--axis-seeds": "0", "--control-workload": "None"}
_PROFILE = {
    **{"--batches": "1 2 4", "--contexts": "32 64", "--prompts": "64 128", "--windows": "1"},
    **{"--no-traces": "", "--block-sizes": "16"},
}
_ONBOARD = {
    **{"--batches": "1 2 4", "--contexts": "32 64", "--prompts": "64 128", "--windows": "1"},
    **{"--clocks-mhz": "1980", "--no-traces": "", "--validate-seconds": "30", "--accept-fidelity": ""},
    **{"--seeds": "2", "--workload": "steady:rate_rps=4"},
    **{"--steps": "600", "--tuning-seeds": "1", "--train.iterations": "1", "--train.average-results": "1"},
    **{"--gpu-clocks-mhz": "990 1485 1980", "--grid-batch-limits": "32"},
}
SHORT: dict[str, Short] = {
    "arena": {**_JUDGE, "--scenarios": "steady-60", "--no-oracle": "", "--no-peers": ""},
    "benchmark": {"--num-prompts": "8", "--random-output-len": "5"},
    "calibrate": {},
    "demo": {"--seeds": "1", "--seconds": "60"},
    "deploy": {"--max-steps": "3", "--interval": "0.1"},
    "evaluate": {"--seeds": "1", "--seconds": "30", "--block-sizes": "16"},
    "onboard": _ONBOARD,
    "profile": _PROFILE,
    "recommend": {**_JUDGE, "--block-sizes": "16"},
    "sweep": _SWEEP,
    "train": _LEARN,
    "watch": {"--once": ""},
}
# On a server, windows last a second
SHORT_LIVE: dict[str, Short] = {
    "evaluate": {"--seconds": "3"},
    "onboard": {"--validate-seconds": "5"},
    "profile": {"--clocks-mhz": "1980"},
}
LEAVES = {  # a file in --out
    "arena": "arena-*/summary.csv",
    "deploy": "deploy-*/steps.jsonl",
    "evaluate": "evaluate-*/summary.csv",
    "onboard": "onboard-*/commands.sh",
    "profile": "profile-*/profile.jsonl",
    "sweep": "sweep-*/report.html",
    "train": "train-*/policies/block_16/manifest.json",
}


def why_not(command: Command) -> tuple[str, str] | None:
    """Why a command is not run here, and what covers it; None if it is run."""
    shown = " ".join(command.words)
    return next(
        (why for begin, why in NOT_RUN.items() if shown == begin or shown.startswith(f"{begin} ")), None
    )


def is_live(words: tuple[str, ...]) -> bool:
    """Whether a server is measured."""
    return "--node live" in " ".join(words) or (words[0] == "onboard" and "--node" not in words)


def shortened(words: tuple[str, ...], more: Short) -> list[str]:
    """The words with what makes them short, and with ``more``, in place of what they say."""
    verb, live = words[0], is_live(words)
    if {"--help", "--resume"} & {*words} or verb in ("packs", "unlock", "doctor"):
        return [*words]
    values = {**SHORT.get(verb, {}), **(SHORT_LIVE.get(verb, {}) if live else {}), **more}
    if "--observe-minutes" in words:
        values.pop("--workload")
    kept = list(words)
    for flag in values:
        kept = without(kept, flag)
    return [*kept, *(word for flag, value in values.items() for word in (flag, *value.split()))]


def without(words: list[str], flag: str) -> list[str]:
    """The words without a flag and its values."""
    if flag not in words:
        return words
    at = words.index(flag)
    rest = words[at + 1 :]
    end = next((number for number, word in enumerate(rest) if word.startswith("--")), len(rest))
    return [*words[:at], *rest[end:]]


def left_by(verb: str, out: Path) -> list[Path]:
    """What a verb promises to leave."""
    return sorted(out.glob(LEAVES[verb]))
