"""The rules that a learned policy has to beat, and how they are tuned: pure, one published rule per file."""

from fuel_ray.policies.baselines.agft import AgftLinUcb
from fuel_ray.policies.baselines.clipper import Clipper
from fuel_ray.policies.baselines.eais import Eais
from fuel_ray.policies.baselines.feedback import Feedback
from fuel_ray.policies.baselines.models import BatchModel, StepModel, fit_batches, fit_steps, token_limits
from fuel_ray.policies.baselines.oracle import find_load_table, find_schedule
from fuel_ray.policies.baselines.tuning import Score, Scorer, tune_static
from fuel_ray.policies.baselines.voltana import Dwell, VoltanaLlm
from fuel_ray.policies.static import ClockSchedule, LoadTable, Planned, Static

__all__ = [
    "AgftLinUcb",
    "BatchModel",
    "Clipper",
    "ClockSchedule",
    "Dwell",
    "Eais",
    "Feedback",
    "LoadTable",
    "Planned",
    "Score",
    "Scorer",
    "Static",
    "StepModel",
    "VoltanaLlm",
    "find_load_table",
    "find_schedule",
    "fit_batches",
    "fit_steps",
    "token_limits",
    "tune_static",
]
