"""The stages in their order, and how they are gone through."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fuel_ray.errors import ConfigError, DiskError, FuelRayError, NodeError
from fuel_ray.onboarding import handover, load, policy, server, twin
from fuel_ray.onboarding.config import OnboardConfig
from fuel_ray.onboarding.state import Onboarding
from fuel_ray.progress import Bar
from fuel_ray.report.onboarded import write_onboarding
from fuel_ray.sim.loads import TRACES
from fuel_ray.sim.points import CLOCKS, LOWER_TRACES


@dataclass(frozen=True, slots=True)
class Stage:
    """One step: what it is called, what it does, about how long it takes, what it leaves."""

    name: str
    what: str
    seconds: Callable[[OnboardConfig], float]
    run: Callable[[Onboarding], dict[str, Any]]
    on_server: bool = False


_ROW_S, _TRACE_S = 5.5, 18.5  # of a profile, on average over its points
_FIT_S = 2.0  # by trace


def _clocks(config: OnboardConfig) -> int:
    """How many will be profiled."""
    return (len(config.clocks_mhz) or CLOCKS) if config.live.clock_control == "on" else 1


def _traces(config: OnboardConfig) -> int:
    """How many will be recorded: some of them at two lower clocks too."""
    lower = min(_clocks(config) - 1, 2)
    return (len(TRACES) + lower * len(LOWER_TRACES)) * config.traces


def _profile_s(config: OnboardConfig) -> float:
    if config.node == "sim":
        return 10.0
    rows = 2 + len(config.prompts) + len(config.batches) * len(config.contexts)
    return _clocks(config) * rows * _ROW_S + _traces(config) * _TRACE_S


def _validate_s(config: OnboardConfig) -> float:
    return 1.0 if config.node == "sim" else min(_clocks(config), 2) * (config.validate_seconds + 10.0)


def _server_s(config: OnboardConfig) -> float:
    if config.node == "sim":
        return 1.0
    return 120.0 if config.live.server is None else 10.0


STAGES = (
    Stage(
        "server",
        "check this host and the server",
        _server_s,
        server.look,
        True,
    ),
    Stage("load", "determine the workload", lambda c: 60.0 * (c.observe_minutes or 0.0), load.find),
    Stage("profile", "measure the server's steps, prefills and idle power", _profile_s, twin.measure, True),
    Stage("calibrate", "fit a twin to the profile", lambda c: 2.0 + _FIT_S * _traces(c), twin.fit),
    Stage("validate", "compare twin and server on a new workload", _validate_s, twin.compare, True),
    Stage("slo", "check on the twin whether the SLO can be met", lambda c: 5.0, policy.check_slo),
    Stage("train", "train a policy on the twin", lambda c: 60.0 + c.steps / 700.0, policy.learn),
    Stage(
        "recommend", "compare the policy with the baselines", lambda c: 60.0 + 3.0 * c.seeds, policy.decide
    ),
    Stage("commands", "write the commands that deploy the policy", lambda c: 1.0, handover.write),
)


def onboard(config: OnboardConfig) -> int:
    """Go through the stages that are not done yet; the report is written however it ends."""
    bar = Bar({stage.name: stage.seconds(config) for stage in STAGES}, lines=False)
    state = Onboarding(config, bar)
    left = [stage for stage in STAGES if not state.journal.is_done(stage.name)]
    duration = _minutes(sum(stage.seconds(config) for stage in left))
    print(f"onboard  {state.folder}: {len(left)} stages, about {duration}", flush=True)
    try:
        with bar, contextlib.closing(state):
            _through(state)
    except (KeyboardInterrupt, SystemExit):
        print(f"\ninterrupted; to continue: fuel-ray onboard --resume {state.folder}", flush=True)
        raise
    except DiskError as error:
        raise DiskError(f"{error}. Then continue: fuel-ray onboard --resume {state.folder}") from error
    except NodeError as error:
        raise NodeError(f"{error}. Then continue: fuel-ray onboard --resume {state.folder}") from error
    finally:
        with contextlib.suppress(OSError):  # of a full disk, which has been said if it ended a stage
            print(f"\nreport     {write_onboarding(state.folder)}", flush=True)
    return 0


def _through(state: Onboarding) -> None:
    for number, stage in enumerate(STAGES):
        state.bar.stage(stage.name)
        head = f"\n[{number + 1}/{len(STAGES)}] {stage.name}: {stage.what}"
        if not any(later.on_server for later in STAGES[number:]):
            state.close()
        if state.journal.is_done(stage.name):
            print(f"{head}: already done")
        else:
            seconds = [later.seconds(_seen(state)) for later in STAGES[number:]]
            took = f"about {_minutes(seconds[0])}; all stages end in about {_minutes(sum(seconds))}"
            print(f"{head} ({took})", flush=True)
            _one(state, stage)
        if end := state.journal.found(stage.name).get("end"):
            print(f"\nthe onboarding ends here: {end}")
            return
    print(f"\nto deploy  {state.folder / 'commands.sh'}")


def _seen(state: Onboarding) -> OnboardConfig:
    """The settings, without what the server's stage has found that the server cannot do."""
    config = state.config
    if not state.facts.get("gpu_clocks_mhz"):
        return config
    most = state.facts["batch_limits"][-1]
    config = replace(config, batches=tuple(n for n in config.batches if n <= most) or (most,))
    control = config.live.clock_control if state.sets_clocks else "off"
    return replace(config, live=replace(config.live, clock_control=control))


def _one(state: Onboarding, stage: Stage) -> None:
    """One stage; what stops it is in the journal.

    Raises:
        ConfigError: it has found that it makes no sense to go on.
    """
    state.journal.began(stage.name)
    began_s = time.monotonic()
    try:
        found = stage.run(state)
    except FuelRayError as error:
        state.journal.stopped(stage.name, str(error), {})
        raise
    if "stop" in found:
        state.journal.stopped(stage.name, found["stop"], found)
        raise ConfigError(found["stop"])
    state.journal.ended(stage.name, found, seconds=time.monotonic() - began_s)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
