"""What a policy sees and what it may choose: the feature table and the action grid."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from fuel_ray.averages import (
    FAST_EWMA_S,
    ArrivalRate,
    PromptPerArrival,
    RecentRequests,
    RequestMeans,
    TokenGaps,
)
from fuel_ray.errors import ConfigError
from fuel_ray.metrics import window_attainment
from fuel_ray.outside import load
from fuel_ray.types import Knobs, NodeSpec, Slo, WindowMetrics


@dataclass(frozen=True, slots=True)
class Context:
    """What a feature may need beyond the window."""

    spec: NodeSpec
    slo: Slo
    arrival_rate_ewma_rps: float
    miss_price_j: float = 0.0
    requests: RequestMeans = RequestMeans()  # noqa: RUF009  (it is frozen)
    arrival_rate_4s_rps: float = 0.0
    prompt_tokens_per_arrival: float = 0.0
    token_gaps_s: tuple[float, ...] = (0.0, 0.0)  # over ``GAP_EWMA_S``


@dataclass(frozen=True, slots=True)
class Feature:
    """One entry of the observation: value / scale, clipped to [0, high]."""

    scale: float
    value: Callable[[WindowMetrics, Context], float | None]  # None reads as 0
    high: float = 1.0
    load: bool = False  # whether it describes the load, so that a value unseen in training is drift

    def scaled(self, window: WindowMetrics, context: Context) -> float | None:
        """The value in units of its scale; None if it is unknown."""
        value = self.value(window, context)
        return None if value is None else value / self.scale


def _wait_of_slo(w: WindowMetrics, c: Context) -> float:
    limit_s = c.slo.e2e_s or c.slo.ttft_s
    return w.oldest_wait_s / limit_s if limit_s else 0.0


def _inference_of_slo(w: WindowMetrics, c: Context) -> float:
    limit_s = c.slo.e2e_s or c.slo.ttft_s
    return sum(w.e2es_s) / len(w.e2es_s) / limit_s if w.e2es_s and limit_s else 0.0


def _token_gap_of_slo(w: WindowMetrics, c: Context) -> float:
    """Time between a request's tokens while the window lasted, by the TPOT limit."""
    if not w.output_tokens or c.slo.tpot_s is None:
        return 0.0
    return w.running * w.duration_s / w.output_tokens / c.slo.tpot_s


def _mean_gap_of_slo(k: int, c: Context) -> float:
    return c.token_gaps_s[k] / c.slo.tpot_s if c.slo.tpot_s else 0.0


def _free_kv_tokens(w: WindowMetrics, c: Context) -> float:
    return (1.0 - w.kv_usage) * (c.spec.num_kv_blocks or 0) * c.spec.kv_block_size


FEATURES: dict[str, Feature] = {
    # The ten of the seed preset, in its order and with its scales
    "gpu_power": Feature(1000.0, lambda w, c: w.energy_j / w.duration_s),
    "gpu_util": Feature(1.0, lambda w, c: w.gpu_util),
    "gpu_mem_util": Feature(1.0, lambda w, c: w.gpu_mem_util),
    "cpu_power": Feature(
        200.0, lambda w, c: None if w.cpu_energy_j is None else w.cpu_energy_j / w.duration_s
    ),
    "cpu_util": Feature(1.0, lambda w, c: w.cpu_util),
    "running": Feature(50.0, lambda w, c: w.running),
    "waiting": Feature(50.0, lambda w, c: w.waiting),
    "kv_usage": Feature(1.0, lambda w, c: w.kv_usage),
    "request_throughput": Feature(20.0, lambda w, c: w.completed / w.duration_s),
    "token_throughput": Feature(2000.0, lambda w, c: w.output_tokens / w.duration_s),
    # Optional ones
    "prefix_cache_hit_rate": Feature(1.0, lambda w, c: w.prefix_hit_rate),
    "slo_attainment": Feature(1.0, lambda w, c: window_attainment(w, c.slo)),
    "kv_used_share": Feature(1.0, lambda w, c: w.kv_usage),
    "kv_free_share": Feature(1.0, lambda w, c: 1.0 - w.kv_usage),
    "kv_block_size": Feature(64.0, lambda w, c: c.spec.kv_block_size, high=4.0),
    "gpu_clock": Feature(1.0, lambda w, c: w.knobs.gpu_clock_mhz / c.spec.gpu_clocks_mhz[-1]),
    "batch_limit": Feature(1.0, lambda w, c: w.knobs.batch_limit / c.spec.batch_limits[-1]),
    "arrival_rate": Feature(20.0, lambda w, c: w.arrivals / w.duration_s),
    # Ends at 20 req/s, as the policies that were trained on it saw it; drift sees it beyond
    "arrival_rate_ewma": Feature(20.0, lambda w, c: c.arrival_rate_ewma_rps, load=True),
    "arrival_rate_10s": Feature(20.0, lambda w, c: c.arrival_rate_ewma_rps, high=5.0),
    "arrival_rate_4s": Feature(20.0, lambda w, c: c.arrival_rate_4s_rps, high=5.0),
    "prompt_tokens_per_arrival": Feature(2000.0, lambda w, c: c.prompt_tokens_per_arrival, high=5.0),
    "prompt_tokens_ewma": Feature(1000.0, lambda w, c: c.requests.prompt_tokens, high=32.0, load=True),
    "output_tokens_ewma": Feature(500.0, lambda w, c: c.requests.output_tokens, high=32.0, load=True),
    "prefix_hit_rate_ewma": Feature(1.0, lambda w, c: c.requests.prefix_hit_rate, load=True),
    "oldest_wait": Feature(1.0, _wait_of_slo),
    # What a policy for any load and SLO needs
    "running_of_capacity": Feature(1.0, lambda w, c: w.running / c.spec.batch_limits[-1]),
    "waiting_of_capacity": Feature(1.0, lambda w, c: w.waiting / c.spec.batch_limits[-1]),
    "arrival_rate_trend": Feature(
        1.0, lambda w, c: 0.5 + (w.arrivals / w.duration_s - c.arrival_rate_ewma_rps) / 20.0
    ),
    "prompt_token_throughput": Feature(20_000.0, lambda w, c: w.prompt_tokens / w.duration_s),
    "output_token_throughput": Feature(8_000.0, lambda w, c: w.output_tokens / w.duration_s),
    "free_kv_tokens": Feature(26_000.0, _free_kv_tokens),
    "token_gap": Feature(2.0, _token_gap_of_slo),
    "token_gap_3s": Feature(2.0, lambda w, c: _mean_gap_of_slo(0, c)),
    "token_gap_8s": Feature(2.0, lambda w, c: _mean_gap_of_slo(1, c)),
    "tpot_limit": Feature(5.0, lambda w, c: math.log((c.slo.tpot_s or 0.05) / 0.005)),
    "miss_price": Feature(10.0, lambda w, c: math.log1p(c.miss_price_j)),
    # GreenDLS's four (llm/src/scheduler.py): 10 x value, rounded to 3 places
    "greendls_power": Feature(0.1, lambda w, c: round(w.energy_j / w.duration_s / 250, 4), high=100.0),
    "greendls_wait": Feature(0.1, lambda w, c: round(min(_wait_of_slo(w, c), 1.0), 4), high=10.0),
    "greendls_inference": Feature(0.1, lambda w, c: round(min(_inference_of_slo(w, c), 1.0), 4), high=10.0),
    "greendls_rate": Feature(0.1, lambda w, c: round(w.arrivals / w.duration_s / 10, 4), high=100.0),
}
SEED_FEATURES = tuple(FEATURES)[:10]
PRICED_FEATURES = (
    "running_of_capacity", "waiting_of_capacity", "kv_usage", "free_kv_tokens", "arrival_rate_10s",
    "arrival_rate_4s", "arrival_rate_trend", "prompt_tokens_per_arrival", "prompt_token_throughput",
    "output_token_throughput", "token_gap", "token_gap_3s", "token_gap_8s", "gpu_clock", "oldest_wait",
    "tpot_limit", "miss_price",
)  # fmt: skip
GREENDLS_FEATURES = tuple(name for name in FEATURES if name.startswith("greendls_"))
PLAIN_FEATURES = (*SEED_FEATURES, "arrival_rate_ewma", "gpu_clock", "oldest_wait")


@lru_cache
def feature_table(extra: tuple[str, ...]) -> dict[str, Feature]:
    """All features by name, those of ``package.module:FEATURES`` included.

    Raises:
        ConfigError: one is no mapping of names to features, or has a name that there is already.
    """
    table = dict(FEATURES)
    for name in extra:
        found = load(name)
        if not isinstance(found, Mapping) or not all(isinstance(x, Feature) for x in found.values()):
            raise ConfigError(f"{name} must be a mapping of names to Feature")
        if twice := [feature for feature in found if feature in table]:
            raise ConfigError(
                f"{name}: a feature named {', '.join(twice)} exists already; choose another name"
            )
        table |= found
    return table


@dataclass(frozen=True, slots=True)
class ActionGrid:
    """Every pair of a batch limit and a clock; index = limit index x number of clocks + clock index."""

    batch_limits: tuple[int, ...]
    gpu_clocks_mhz: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.batch_limits) * len(self.gpu_clocks_mhz)

    def decode(self, index: int) -> Knobs:
        """The pair with this index."""
        limit, clock = divmod(int(index), len(self.gpu_clocks_mhz))
        return Knobs(self.batch_limits[limit], self.gpu_clocks_mhz[clock])

    def encode(self, knobs: Knobs) -> int:
        """The index of a pair.

        Raises:
            ConfigError: the pair is not in the grid.
        """
        try:
            limit = self.batch_limits.index(knobs.batch_limit)
            return limit * len(self.gpu_clocks_mhz) + self.gpu_clocks_mhz.index(knobs.gpu_clock_mhz)
        except ValueError:
            raise ConfigError(f"{knobs} is not in the action grid") from None


GREENDLS_BATCH_LIMITS = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36)
SEED_GRID = ActionGrid(GREENDLS_BATCH_LIMITS, tuple(range(540, 1501, 60)))
GREENDLS_GRID = ActionGrid(GREENDLS_BATCH_LIMITS, tuple(range(517, 1538, 60)))
GridName = Literal["node", "seed", "greendls"]


def parse_knobs(text: str, spec: NodeSpec) -> Knobs:
    """Knobs from "max", "LIMIT" or "LIMIT@MHZ", such as 48@1350.

    Raises:
        ConfigError: it is none of these, or the node cannot be set so.
    """
    if text == "max":
        return spec.max_performance
    limit, _, clock = text.partition("@")
    clocks, (lowest, highest) = spec.gpu_clocks_mhz, spec.batch_limits
    try:
        knobs = Knobs(int(limit), int(clock) if clock else clocks[-1])
    except ValueError:
        raise ConfigError(f"{text}: must be max, LIMIT or LIMIT@MHZ, such as 48@1350") from None
    if lowest == highest != knobs.batch_limit:
        raise ConfigError(
            f"{text}: the batch limit of this node is {highest} and cannot be set; give the server's "
            "FUEL_RAY_LIMIT_FILE with --live.limit-file"
        )
    if not lowest <= knobs.batch_limit <= highest:
        raise ConfigError(f"{text}: the batch limit must be from {lowest} to {highest}")
    if knobs.gpu_clock_mhz not in clocks:
        raise ConfigError(f"{text}: {clock} MHz is not a supported clock; {clock_range(clocks)}")
    return knobs


def clock_range(clocks_mhz: Sequence[int]) -> str:
    """The ascending clocks as a message names them."""
    steps = {high - low for low, high in pairwise(clocks_mhz)}
    lowest, highest = clocks_mhz[0], clocks_mhz[-1]
    if not steps:
        return f"the only clock is {highest} MHz"
    even = f"in steps of {steps.pop()}" if len(steps) == 1 else f"({len(clocks_mhz)} clocks)"
    return f"supported are {lowest} to {highest} MHz {even}"


def node_grid(
    spec: NodeSpec, *, clock_step_mhz: int, lowest_clock_share: float, batch_limits: Sequence[int]
) -> ActionGrid:
    """A grid of what the node supports: clocks at least ``clock_step_mhz`` apart, down from the maximum.

    Limits above the node's capacity become its capacity, which is always included; it is the only one where
    the limit cannot be set.
    """
    highest = spec.gpu_clocks_mhz[-1]
    clocks = [highest]
    for clock_mhz in reversed(spec.gpu_clocks_mhz):
        if clock_mhz >= lowest_clock_share * highest and clocks[-1] - clock_mhz >= clock_step_mhz:
            clocks.append(clock_mhz)
    lowest, capacity = spec.batch_limits
    limits = {limit for limit in batch_limits if lowest <= limit < capacity} | {capacity}
    return ActionGrid(tuple(sorted(limits)), tuple(reversed(clocks)))


@dataclass(slots=True)
class RunningScale:
    """Mean and spread of each feature so far (Welford, Technometrics 4, 1962)."""

    count: int = 0
    mean: list[float] = field(default_factory=list)
    sum_of_squares: list[float] = field(default_factory=list)

    def update(self, values: Sequence[float]) -> None:
        """Take one more observation into account."""
        if not self.mean:
            self.mean, self.sum_of_squares = [0.0] * len(values), [0.0] * len(values)
        self.count += 1
        for i, value in enumerate(values):
            delta = value - self.mean[i]
            self.mean[i] += delta / self.count
            self.sum_of_squares[i] += delta * (value - self.mean[i])

    def apply(self, values: Sequence[float]) -> list[float]:
        """(value - mean) / standard deviation, clipped to [-5, 5]."""
        if self.count < 2:
            return [0.0] * len(values)
        return [
            min(max((value - mean) / math.sqrt(squares / (self.count - 1) + 1e-8), -5.0), 5.0)
            for value, mean, squares in zip(values, self.mean, self.sum_of_squares, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Codec:
    """Which features a policy sees, how they are scaled, and which actions it has."""

    features: tuple[str, ...]
    grid: ActionGrid
    slo: Slo
    running_scale: RunningScale | None = None  # fixed scales of the feature table if None
    miss_price_j: float = 0.0  # of a missed limit; seen by policies with that feature
    extra_features: tuple[str, ...] = ()  # package.module:FEATURES that the user named

    def __post_init__(self) -> None:
        unknown = [name for name in self.features if name not in self.table]
        if unknown or not self.features:
            raise ConfigError(f"features {unknown} are unknown; allowed are {', '.join(self.table)}")

    @property
    def table(self) -> Mapping[str, Feature]:
        """The features that there are."""
        return feature_table(self.extra_features)

    @property
    def low(self) -> np.ndarray:
        """Lower bounds of the observation."""
        return np.full(len(self.features), -5.0 if self.running_scale else 0.0, np.float32)

    @property
    def high(self) -> np.ndarray:
        """Upper bounds of the observation."""
        if self.running_scale:
            return np.full(len(self.features), 5.0, np.float32)
        return np.array([self.table[name].high for name in self.features], np.float32)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON; it names no code."""
        return {name: value for name, value in asdict(self).items() if name != "extra_features"}

    @staticmethod
    def from_dict(raw: dict[str, Any], *, extra_features: tuple[str, ...] = ()) -> "Codec":
        """The inverse of ``to_dict``."""
        scale = raw["running_scale"]
        return Codec(
            features=tuple(raw["features"]),
            grid=ActionGrid(tuple(raw["grid"]["batch_limits"]), tuple(raw["grid"]["gpu_clocks_mhz"])),
            slo=Slo(**raw["slo"]),
            running_scale=RunningScale(**scale) if scale else None,
            miss_price_j=float(raw.get("miss_price_j", 0.0)),
            extra_features=extra_features,
        )


class Encoder:
    """A codec at work on one node: remembers the load of the last seconds."""

    def __init__(self, codec: Codec, spec: NodeSpec, *, learn_scale: bool = False) -> None:
        self._codec = codec
        self._spec = spec
        self._learn_scale = learn_scale
        self._features = [codec.table[name] for name in codec.features]
        self.reset()

    def reset(self) -> None:
        self._arrival_rate, self._fast_rate = ArrivalRate(), ArrivalRate(FAST_EWMA_S)
        self._requests, self._prompts, self._gaps = RecentRequests(), PromptPerArrival(), TokenGaps()

    def context(self, window: WindowMetrics) -> Context:
        """What features may need beside one more window."""
        return Context(
            self._spec,
            self._codec.slo,
            self._arrival_rate.update(window),
            self._codec.miss_price_j,
            self._requests.update(window),
            self._fast_rate.update(window),
            self._prompts.update(window),
            self._gaps.update(window),
        )

    def encode(self, window: WindowMetrics) -> np.ndarray:
        """The observation after a window: (features,) float32 within the codec's bounds."""
        context = self.context(window)
        values = [min(max(f.scaled(window, context) or 0.0, 0.0), f.high) for f in self._features]
        scale = self._codec.running_scale
        if scale is not None:
            if self._learn_scale:
                scale.update(values)
            values = scale.apply(values)
        return np.array(values, np.float32)
