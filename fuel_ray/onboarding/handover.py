"""The last stage: the commands that put the policy in front of the server, at first only to watch."""

import os
import shlex
from pathlib import Path
from typing import Any

from fuel_ray.address import login_variable
from fuel_ray.commands import deploy
from fuel_ray.disk import whole
from fuel_ray.onboarding.server import HOW_TO_SET_CLOCKS
from fuel_ray.onboarding.state import Onboarding
from fuel_ray.policies.catalogue import label
from fuel_ray.report.wording import ascii_only
from fuel_ray.vllm_plugin import LIMIT_FILE_VARIABLE

_DEFAULT_URL = "http://127.0.0.1:8000"
_STEPS = (
    (
        "shadow",
        "1. Shadow: records what the policy would do and what the server does without it; changes nothing.",
        ("--shadow",),
    ),
    (
        "canary",
        "2. Canary: the policy controls the server for a random tenth of the time, compared with the rest.",
        ("--canary", "0.1"),
    ),
    (
        "live",
        "3. Live: the policy controls the server until you stop it; then clock and limit are reset.",
        (),
    ),
)


def write(state: Onboarding) -> dict[str, Any]:
    """commands.sh; every line of it was read by deploy's own parser."""
    shared = _shared(state)
    commands = {name: [*shared, *flags] for name, _, flags in _STEPS}
    for words in commands.values():
        deploy.parse(words, prog="fuel-ray deploy")
    lines = ["#!/bin/sh", *(f"# {line}" for line in _said(state)), ""]
    for name, what, _ in _STEPS:
        lines += [f"# {what}", shlex.join(["fuel-ray", "deploy", *commands[name]]), ""]
    text = ascii_only("\n".join(lines))
    with whole(state.folder / "commands.sh") as file:
        file.write(text)
    print(text)
    return {
        "commands": {name: shlex.join(["fuel-ray", "deploy", *words]) for name, words in commands.items()}
    }


def policy_of(state: Onboarding) -> Path:
    """The recommended policy; the trained one where no policy is recommended."""
    folder = state.folder.absolute()
    recommended = folder / "policies" / "recommended"
    return recommended if recommended.exists() else folder / state.journal.found("train")["policy"]


def _shared(state: Onboarding) -> list[str]:
    """Flags of all three commands."""
    live = state.config.live
    words = ["--policy", str(policy_of(state)), "--server", live.server or _DEFAULT_URL]
    if uuids := state.facts["gpu_uuids"]:
        words += ["--gpu-ids", *uuids]
    words += ["--max-num-seqs", str(state.facts["batch_limits"][-1])]
    given = {
        "limit-file": _limit_file(state),
        "served-model": live.served_model,
        "api-key-env": live.api_key_env,
        "ca-file": live.ca_file,
        "metrics-url": live.metrics_url,
    }
    for flag, value in given.items():
        words += [] if value is None else [f"--{flag}", str(value)]
    return [*words, "--out", str(state.folder.absolute())]


def _limit_file(state: Onboarding) -> Path | None:
    """The running server's, or one for a server that will be started."""
    live = state.config.live
    return live.limit_file if live.server is not None else state.folder.absolute() / "limit"


def _serve(state: Onboarding) -> str:
    """The command that starts the server as it was started here, on vLLM's own port."""
    config, live = state.config, state.config.live
    words = [*shlex.split(live.vllm), "serve", live.model, "--block-size", str(state.kv_block_size)]
    words += ["--max-num-seqs", str(state.facts["batch_limits"][-1])]
    if config.kv_tokens is not None:
        words += ["--num-gpu-blocks-override", str(state.facts["num_kv_blocks"])]
    if not config.prefix_caching:
        words.append("--no-enable-prefix-caching")
    variable = f"{LIMIT_FILE_VARIABLE}={shlex.quote(str(_limit_file(state)))}"
    return f"{variable} {shlex.join([*words, *shlex.split(live.flags)])}"


def _said(state: Onboarding) -> list[str]:
    """What a reader should know before the first line is run."""
    found, live = state.journal.found("recommend"), state.config.live
    lines = [f"{state.facts['model']} on {state.facts['gpu_name']}, workload {state.workload}"]
    lines.append(f"{found['headline']}.")
    if state.config.node == "sim":
        lines.append("A rehearsal on the twin: with a server of your own, the commands look like this.")
    elif live.server is None:
        lines.append(f"Start the server first, as onboard did: {_serve(state)}")
    if policy_of(state).name != "recommended":
        best = label(found["best"])
        lines.append(f"{best} is recommended, but is no policy folder; this is the trained policy.")
    if not state.sets_clocks:
        lines.append(f"2 and 3 save nothing until fuel_ray can set the clocks here. {HOW_TO_SET_CLOCKS}.")
    if live.server is not None and login_variable(live.server) in os.environ:
        lines.append("The login of --server is not written here; add it to the address again.")
    return lines
