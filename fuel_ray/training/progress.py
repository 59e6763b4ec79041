"""What is seen of trials while they run: metrics of episodes, a line per result, nodes that are missing."""

import math
import re
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from ray import tune
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME

from fuel_ray.build.cluster import gpus_per_node
from fuel_ray.cluster.hosts import NODE_RESOURCE, num_nodes
from fuel_ray.config import LearnConfig
from fuel_ray.env import unlearnable
from fuel_ray.errors import NodeError
from fuel_ray.progress import Bar
from fuel_ray.training.ray_private import reseed

_OWN_ERROR = re.compile(r"fuel_ray\.errors\.\w+: (.*)")
_ERROR = re.compile(r"(?!ray\.|traceback:)[A-Za-z_][\w.]*: \S")  # as a traceback ends, but in Ray's own


class Episodes(RLlibCallback):
    """What is logged of training episodes, what of them no one learns from, and how a resumed one begins."""

    def on_sample_end(self, *, samples: list[Any], **_: Any) -> None:
        """Drop the last step of what a node's failure ended, or a limit that was not in force."""
        measured = [e[:-1] if len(e) and unlearnable(e.get_infos(-1)) else e for e in samples]
        samples[:] = [episode for episode in measured if len(episode)]

    def on_checkpoint_loaded(self, *, algorithm: Any, **_: Any) -> None:
        """See to it that a resumed training does not begin with the arrivals that it began with before."""
        done = algorithm.metrics.peek((ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME), default=0)
        algorithm.env_runner_group.foreach_env_runner(partial(reseed, steps=int(done)))

    def on_episode_end(self, *, episode: Any, metrics_logger: Any, **_: Any) -> None:
        """Log reward per window, joules per request, SLO attainment and mean clock."""
        infos = [info for info in episode.get_infos() if "energy_j" in info]
        if any(info["arrivals"] for info in infos):
            shown = figures(infos, reward=episode.get_return() / len(infos))
            metrics_logger.log_dict(shown, key="fuel", window=50)


def figures(infos: Sequence[Mapping[str, Any]], *, reward: float) -> dict[str, float]:
    """What is logged of training windows, of which ``reward`` is the mean."""
    arrivals = sum(info["arrivals"] for info in infos)
    known = [info["slo_attainment"] for info in infos if info["slo_attainment"] is not None]
    return {
        "reward": reward,
        "energy_j_per_request": sum(info["energy_j"] for info in infos) / max(arrivals, 1),
        "slo_attainment": float(np.mean(known)) if known else math.nan,
        "mean_gpu_clock_mhz": float(np.mean([info["gpu_clock_mhz"] for info in infos])),
    }


class Progress(tune.Callback):
    """Says after each training result how far the trials are."""

    def __init__(self, config: LearnConfig, *, trials: int, bar: Bar) -> None:
        self._steps, self._trials, self._bar = config.steps, trials, bar
        self._done: dict[str, int] = {}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **_: Any) -> None:
        row = curve_row(result)
        self._done[trial.trial_id] = min(row["env_steps"], self._steps)
        sizes = "/".join(map(str, trial.config["env_config"]["block_sizes"]))
        steps = f"block {sizes:>3}  {self._done[trial.trial_id]:>7,}/{self._steps:,} steps"
        shown = [
            *_shown(row["reward"], "reward {:.2f}"),
            *_shown(row["energy_j_per_request"], "{:.1f} J/request"),
            *_shown(row["slo_attainment"], "SLO attainment {:.1%}"),
        ]
        note = "  ".join([steps, "exploring:", *shown] if shown else [steps])
        self._bar.at(sum(self._done.values()) / (self._trials * self._steps), note)


class NodeWatch(tune.Callback):
    """Ends the run when no trial can go on for want of nodes; Tune would wait for them for ever."""

    def __init__(self, config: LearnConfig) -> None:
        self._needed, self._gpus = config.nodes_per_trial, gpus_per_node(config)
        self._wait_s = config.node_wait_s
        self._enough_s = time.monotonic()

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        """Raises NodeError if for too long there have been too few nodes for any trial."""
        running = any(trial.status == "RUNNING" for trial in trials)
        if running or (there := num_nodes(self._gpus)) >= self._needed:
            self._enough_s = time.monotonic()
        elif time.monotonic() - self._enough_s > self._wait_s:
            errors = [reason(error) for trial in trials if (error := trial.get_error())]
            raise NodeError(
                f"for {self._wait_s:g} s the cluster has had only {there} of the {self._needed} node(s) with "
                f"the resource {NODE_RESOURCE} that a trial needs; start the host again, and continue with "
                "--resume" + (f" (the trial's last error: {errors[-1]})" if errors else "")
            )


def curve_row(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the learning curve shows of a training result; None where no episode ended yet."""
    fuel = result.get("env_runners", {}).get("fuel", {})
    names = ("reward", "energy_j_per_request", "slo_attainment")
    steps = int(result.get("num_env_steps_sampled_lifetime", 0))
    return {"env_steps": steps} | {name: _known(fuel.get(name)) for name in names}


def _known(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _shown(value: float | None, form: str) -> list[str]:
    return [] if value is None else [form.format(value)]


def reason(error: BaseException) -> str:
    """Why a trial failed: our own error in what Ray and RLlib made of it, else the last one in there."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    own = [found.group(1) for line in lines if (found := _OWN_ERROR.match(line.strip()))]
    named = [line for line in lines if _ERROR.match(line)]
    return (own or named or lines)[-1]
