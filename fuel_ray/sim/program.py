"""A policy that looks at its node as numbers and arrays, which ``sim.choice`` compiles.

A program has a base, a table or a prediction, that says a clock; and it may have a Q network, which leaves
the base where it expects to gain more than that costs. What it sees of a window is a ``sight``.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from fuel_ray.sim.clock_axis import AtClock
from fuel_ray.sim.pack import Constants

# Entries of a sight (float64): the window that ended ...
RUNNING, WAITING, IN_SYSTEM, KV_USAGE, ARRIVALS, PROMPT_TOKENS, OUTPUT_TOKENS = range(7)
OLDEST_WAIT_S, CLOCK_MHZ, LIMIT = range(7, 10)
# ... and what is remembered of those before it
SEEN, RATE_RPS, FAST_RATE_RPS, PROMPT_MEAN, GAP_S, SLOW_GAP_S = range(10, 16)
SIGHT = 16
# Kinds of a base
TABLE, PREDICTION = range(2)
TRIM = 9  # terms of a linear trim


class Server(NamedTuple):
    """What a program knows of its server and of what is promised; numbers so that it compiles once."""

    capacity: float  # the highest batch limit
    kv_tokens: float
    ttft_s: float  # limits; infinite where there is none
    tpot_s: float
    highest_mhz: float


class Program(NamedTuple):
    """A policy as arrays; those of a network are empty where there is none."""

    base: int  # TABLE or PREDICTION
    x: int  # entries of the sight that a table is read at
    y: int
    x_knots: np.ndarray  # ascending
    y_knots: np.ndarray
    mhz: np.ndarray  # (x knots, y knots), linear between them; of a stepped table up to each knot
    stepped: bool
    stretch: float  # of the TPOT limit that a prediction is to keep
    constants: Constants  # of the GPU as a prediction has it, which its server may differ from
    clocks: np.ndarray  # the same at each of the server's clocks, an ``AtClock`` per row
    trim_mhz: np.ndarray  # (TRIM,)
    shift_mhz: float
    batch_limit: int
    features: np.ndarray  # codes of what the network sees
    fixed: np.ndarray  # their values, of those that do not change
    weight_1: np.ndarray  # (inputs, units), as of every layer
    bias_1: np.ndarray
    weight_2: np.ndarray
    bias_2: np.ndarray
    limit_weight: np.ndarray
    limit_bias: np.ndarray
    clock_weight: np.ndarray
    clock_bias: np.ndarray
    grid_limits: np.ndarray
    grid_mhz: np.ndarray
    per_100_mhz: float  # of Q, away from the base
    reach_mhz: float  # how far it may be left
    lower_limits: bool  # whether for a lower batch limit too


# What a network may see, by code
FEATURES = (
    "fixed", "running_of_capacity", "waiting_of_capacity", "kv_usage", "free_kv_tokens", "arrival_rate_ewma",
    "arrival_rate_trend", "prompt_token_throughput", "output_token_throughput", "token_gap", "gpu_clock",
    "oldest_wait", "arrival_rate_10s", "arrival_rate_4s", "prompt_tokens_per_arrival", "batch_limit",
    "token_gap_3s", "token_gap_8s",
)  # fmt: skip


def program(**parts: Any) -> Program:
    """A program of these parts and nothing else: no network, no trim."""
    none, table = np.zeros(0), np.zeros((0, 0))
    network: dict[str, Any] = {
        "features": np.zeros(0, np.int64), "fixed": none, "weight_1": table, "bias_1": none,
        "weight_2": table, "bias_2": none, "limit_weight": table, "limit_bias": none, "clock_weight": table,
        "clock_bias": none, "grid_limits": none, "grid_mhz": none, "per_100_mhz": 0.0,
        "reach_mhz": math.inf, "lower_limits": False,
    }  # fmt: skip
    plain: dict[str, Any] = {
        "x": IN_SYSTEM, "y": IN_SYSTEM, "x_knots": np.zeros(1), "y_knots": np.zeros(1),
        "mhz": np.zeros((1, 1)), "stepped": False, "stretch": 1.0,
        "constants": Constants(*[0.0] * len(Constants._fields)),
        "clocks": np.zeros((0, len(AtClock._fields))), "trim_mhz": np.zeros(TRIM),
        "shift_mhz": 0.0,
    }  # fmt: skip
    return Program(**{**network, **plain, **parts})


def base_alone(p: Program) -> Program:
    """The same without its network, whose grid it keeps."""
    return p._replace(features=np.zeros(0, np.int64))
