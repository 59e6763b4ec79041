"""The first stage: whether everything that is needed is there, and what the server is."""

import contextlib
import shlex
import time
from collections.abc import Iterator
from typing import Any

from fuel_ray.build.live import server_endpoint
from fuel_ray.codec import clock_range
from fuel_ray.commands.doctor import show
from fuel_ray.errors import ConfigError, NodeError
from fuel_ray.live.checks import Check, host_checks
from fuel_ray.live.vllm.kv_monitor import MetricsClient
from fuel_ray.live.vllm.metrics import MetricsSnapshot, difference
from fuel_ray.onboarding.config import OnboardConfig
from fuel_ray.onboarding.state import Onboarding

LISTENS = 4  # what we sent ourselves may take a while to end
LISTEN_S = 3.0  # in which a server without other traffic counts no request
_TO_START = ("vLLM", "plug-in", "block sizes", "port")  # checks that matter only to a server that is started

HOW_TO_SET_CLOCKS = (
    "Setting clocks needs CAP_SYS_ADMIN: run `sudo fuel-ray clock-helper --gpu-ids ... --users USER` and set "
    "FUEL_RAY_CLOCK_SOCKET in fuel_ray's environment, or start its container with --cap-add=SYS_ADMIN; see "
    "docs/deploy.md, Privilege"
)
HOW_TO_SET_LIMITS = (
    "Setting it needs fuel_ray in vLLM's environment, FUEL_RAY_LIMIT_FILE=FILE in the server's, and "
    "--limit-file FILE here"
)


def look(state: Onboarding) -> dict[str, Any]:
    """Check the host, ask the server and say what of it fuel_ray can set.

    Raises:
        ConfigError: something that is needed is missing.
    """
    checks = list(_checks(state.config)) if state.config.node == "live" else []
    if checks and show("", checks):
        raise ConfigError(
            "a check failed: fix what the lines that begin with FAIL say, and start again, or rehearse "
            "without a GPU: fuel-ray onboard --node sim"
        )
    found = state.look()
    found["idle_power"] = next((_line(check) for check in checks if check.what == "idle power"), None)
    clocks_mhz, limits = found["gpu_clocks_mhz"], found["batch_limits"]
    blocks = "" if found["num_kv_blocks"] is None else f", {found['num_kv_blocks']} KV blocks"
    print(
        f"{found['model']} on {len(found['gpu_uuids']) or 1} x {found['gpu_name']}, {found['engine']}, ",
        end="",
    )
    print(f"block size {found['kv_block_size']}{blocks}, capacity {limits[-1]} requests")
    if lines := _assumed(state, found):
        print("\n".join(lines))
    if len(clocks_mhz) == 1:
        print(
            "fuel_ray cannot set the GPU's clocks here, so it only observes them and assumes "
            f"{clocks_mhz[0]} MHz. {HOW_TO_SET_CLOCKS}."
        )
    if limits[0] == limits[-1]:
        print(
            f"fuel_ray cannot set the batch limit here; policies choose the clock only. {HOW_TO_SET_LIMITS}."
        )
    if unknown := sorted({*state.config.clocks_mhz} - {*clocks_mhz}):
        given = " ".join(map(str, unknown))
        raise ConfigError(f"--clocks-mhz {given}: not supported here; {clock_range(clocks_mhz)}")
    return found


def _assumed(state: Onboarding, found: dict[str, Any]) -> list[str]:
    """What the server does not tell, and what is taken for it."""
    lines = []
    if any(line.startswith("max_num_seqs") for line in found["assumed"]):
        limit = found["batch_limits"][-1]
        lines.append(f"the server does not report its --max-num-seqs, which is assumed to be {limit}")
    if state.config.max_num_batched_tokens is None:
        lines += [line for line in found["assumed"] if line.startswith("max_num_batched_tokens")]
    return [f"{line}; if that is wrong, give --{flag}" for line in lines for flag in (_flag(line),)]


def _flag(line: str) -> str:
    return "max-num-seqs" if "max-num-seqs" in line else "max-num-batched-tokens"


def _line(check: Check) -> str:
    return check.found if check.remedy is None else f"{check.found}: {check.remedy}"


def _checks(config: OnboardConfig) -> Iterator[Check]:
    """Those that matter here."""
    checks = host_checks(
        gpu_ids=config.live.gpu_ids,
        vllm=shlex.split(config.live.vllm) or ["vllm"],
        block_sizes=config.block_sizes,
        folder=config.out,
        live=True,
    )
    return (check for check in checks if config.live.server is None or check.what not in _TO_START)


def require_alone(config: OnboardConfig) -> None:
    """Check that nobody else sends requests to a server that is measured.

    Raises:
        NodeError: somebody does.
    """
    if config.node != "live" or config.live.server is None:
        return
    with contextlib.closing(MetricsClient(server_endpoint(config.live))) as client:
        for _ in range(LISTENS):
            before = client.scrape()
            time.sleep(LISTEN_S)
            if not (there := _foreign(before, client.scrape())):
                return
    raise NodeError(
        f"{config.live.server} serves other requests ({there}), but it must be idle to be measured. Take it "
        "out of the load balancer, or start another server like it"
    )


def _foreign(before: MetricsSnapshot, after: MetricsSnapshot) -> str:
    counted = difference(before, after, LISTEN_S)
    if after.running or after.waiting:
        return f"{after.running} running, {after.waiting} waiting"
    if counted.requests_succeeded or counted.generation_tokens or counted.prompt_tokens:
        return f"{counted.requests_succeeded} finished within {LISTEN_S:g} s"
    return ""
