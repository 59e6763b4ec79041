"""Training results in W&B and MLflow, by Ray Tune's own integrations; the environment has their settings."""

import importlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from ray import tune

from fuel_ray.config import Tracker
from fuel_ray.errors import ConfigError

PROJECT = "fuel_ray"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME names another


def trackers(names: Sequence[Tracker], run_dir: Path) -> list[tune.Callback]:
    """Callbacks that log each trial of a run; what has no server to go to is in the run's folder.

    Raises:
        ConfigError: a package is not installed.
    """
    _check_installed(names)
    make = {"wandb": _wandb, "mlflow": _mlflow}
    return [make[name](run_dir) for name in names]


def check_trackers(names: Sequence[Tracker]) -> None:
    """Find out before a run whether its results can be logged.

    Raises:
        ConfigError: a package is not installed, there is no login, or the server does not answer.
    """
    for name, callback in zip(names, trackers(names, Path()), strict=True):
        if name == "wandb" or "MLFLOW_TRACKING_URI" in os.environ:
            try:
                callback.setup()
            except _faults(name) as error:
                raise ConfigError(f"--callbacks {name}: {error}") from error


def _check_installed(names: Sequence[Tracker]) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"--callbacks {name} needs the package {name}: run pip install {name}")


def _faults(name: Tracker) -> tuple[type[Exception], ...]:
    """What an integration raises where there is no login, or no server that answers."""
    if name == "wandb":
        return (ValueError,)
    return (importlib.import_module("mlflow.exceptions").MlflowException,)  # need not be installed


def _wandb(run_dir: Path) -> tune.Callback:
    """One run of W&B's per trial, in a group per run; a trial that is resumed goes on in its own."""
    from ray.air.integrations.wandb import WandbLoggerCallback  # noqa: PLC0415  (imports wandb if it is there)

    return WandbLoggerCallback(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        group=run_dir.name,
        dir=str(run_dir.resolve()),
        mode=os.environ.get("WANDB_MODE"),  # processes of a cluster have the environment of `ray start`
        entity=os.environ.get("WANDB_ENTITY"),
        resume="allow",
    )


def _mlflow(run_dir: Path) -> tune.Callback:
    """One run of MLflow's per trial; without a server in files, which MLflow 3 has to be told to write."""
    from ray.air.integrations.mlflow import MLflowLoggerCallback  # noqa: PLC0415  (imports mlflow)

    if (server := os.environ.get("MLFLOW_TRACKING_URI")) is None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    return MLflowLoggerCallback(
        tracking_uri=server or (run_dir / "mlruns").resolve().as_uri(),
        experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT),
        tags={"run": run_dir.name},
    )
