"""Simple rules that look at the node: tables and a prediction, with a trim; plain data, and at work."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from fuel_ray.policies.models import token_limits
from fuel_ray.policies.static import Compiled, are_counts
from fuel_ray.sim import program as compiled
from fuel_ray.sim.clock_axis import ClockAxis
from fuel_ray.sim.pack import Constants, PerfModel
from fuel_ray.sim.program import TRIM, Program, Server
from fuel_ray.types import Knobs, NodeSpec, Slo, WindowMetrics

Key = Literal["arrival_rate", "fast_arrival_rate", "in_system"]
_KEYS = {
    "arrival_rate": compiled.RATE_RPS,
    "fast_arrival_rate": compiled.FAST_RATE_RPS,
    "in_system": compiled.IN_SYSTEM,
}
_NO_TRIM = (0.0,) * TRIM


@dataclass(frozen=True, slots=True)
class Rule:
    """A clock by tables of one or two ``keys`` or, without any, by prediction; plus a trim and a shift.

    Tables are linear between their knots and flat beyond. A prediction takes, of the clocks at which a
    model's time between tokens is within ``stretch`` times the TPOT limit, that of least energy per token.
    """

    batch_limit: int
    keys: tuple[Key, ...] = ()
    knots: tuple[tuple[float, ...], ...] = ()  # of each key, ascending
    clocks_mhz: tuple[tuple[float, ...], ...] = ()  # by the first key, then the second
    perf: PerfModel | None = None  # of a prediction
    stretch: float = 1.0
    trim_mhz: tuple[float, ...] = _NO_TRIM  # per term of ``sim.choice``'s trim
    shift_mhz: float = 0.0  # of every clock: up is more careful

    def __post_init__(self) -> None:
        """Raises ValueError where it makes no sense."""
        _expect(are_counts([self.batch_limit]), "the batch limit is no count")
        _expect(len(self.keys) <= 2 and set(self.keys) <= set(get_args(Key)), f"keys {self.keys}")
        _expect(len(self.knots) == len(self.keys) and all(map(_ascends, self.knots)), "knots do not ascend")
        _expect((self.perf is None) == bool(self.keys), "it needs a table or a model")
        _expect(len(self.trim_mhz) == TRIM, f"a trim has {TRIM} terms")
        rows, columns = ([len(knots) for knots in self.knots] + [1, 1])[:2] if self.keys else (0, 0)
        _expect(
            len(self.clocks_mhz) == rows and all(len(row) == columns for row in self.clocks_mhz),
            "its clocks do not fit its knots",
        )
        numbers = [self.stretch, self.shift_mhz, *self.trim_mhz, *(f for row in self.clocks_mhz for f in row)]
        _expect(bool(np.isfinite(numbers).all()), "it has numbers that are none")

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        perf = self.perf
        model = None
        if perf is not None:
            model = {
                "constants": perf.constants._asdict(),
                "axis": asdict(perf.axis),
                "rest_w": perf.rest_w,
            }
        return {**{name: getattr(self, name) for name in self.__slots__}, "perf": model}

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> "Rule":
        """The inverse of ``to_dict``; what is no rule is a ValueError or a TypeError."""
        typed = {name: _tuples(value) for name, value in raw.items() if name != "perf"}
        if (model := raw.get("perf")) is not None:
            axis = ClockAxis(**{name: _tuples(value) for name, value in model["axis"].items()})
            typed["perf"] = PerfModel(Constants(**model["constants"]), axis, model["rest_w"])
        return Rule(**typed)

    def moved(self, by: float) -> "Rule":
        """The same, more careful: clocks higher by so many MHz, a prediction's stretch lower by so much."""
        return self.stretched(self.stretch - by) if self.predicts else self.shifted(by)

    @property
    def predicts(self) -> bool:
        """Whether it is a prediction and no table."""
        return self.perf is not None

    def shifted(self, mhz: float) -> "Rule":
        """The same, this much more careful."""
        return replace(self, shift_mhz=self.shift_mhz + mhz)

    def stretched(self, stretch: float) -> "Rule":
        """The same prediction, within this share of the TPOT limit."""
        return replace(self, stretch=stretch)

    def program(self, gpu_clocks_mhz: Sequence[int]) -> Program:
        """As the compiled loop reads it, of a node with these clocks."""
        parts: dict[str, Any] = {}
        if self.perf is not None:
            clocks = np.array([self.perf.at(clock_mhz) for clock_mhz in gpu_clocks_mhz], float)
            parts |= {"constants": self.perf.constants, "clocks": clocks}
        for axis, key, knots in zip("xy", self.keys, self.knots, strict=False):
            parts |= {axis: _KEYS[key], f"{axis}_knots": np.array(knots, float)}
        if self.keys:
            parts["mhz"] = np.array(self.clocks_mhz, float)
        return compiled.program(
            base=compiled.TABLE if self.keys else compiled.PREDICTION,
            stretch=float(self.stretch),
            trim_mhz=np.array(self.trim_mhz, float),
            shift_mhz=float(self.shift_mhz),
            batch_limit=self.batch_limit,
            **parts,
        )


def server_of(spec: NodeSpec, slo: Slo) -> Server:
    """What programs know of a node."""
    ttft_s, tpot_s = token_limits(slo)
    kv_tokens = float((spec.num_kv_blocks or 0) * spec.kv_block_size)
    return Server(float(spec.batch_limits[-1]), kv_tokens, ttft_s, tpot_s, float(spec.gpu_clocks_mhz[-1]))


class RulePolicy:
    """A rule at work on a node."""

    def __init__(self, rule: Rule, spec: NodeSpec, slo: Slo) -> None:
        self.rule = rule
        self._spec, self._slo = spec, slo
        self._program, self._server = rule.program(spec.gpu_clocks_mhz), server_of(spec, slo)
        self._clocks_mhz = np.array(spec.gpu_clocks_mhz, float).reshape(-1, 1)
        self._hidden = np.zeros((3, 1))
        self.reset()

    def reset(self) -> None:
        self._sight = np.zeros(compiled.SIGHT)
        self._choose()  # compiles it before a server waits

    def decide(self, window: WindowMetrics) -> Knobs:
        see(self._sight, window)
        return self._choose()

    def _choose(self) -> Knobs:
        from fuel_ray.sim.choice import choose  # noqa: PLC0415  (a table does not wait for numba)

        limit, row = choose(self._program, self._sight, self._server, self._clocks_mhz, self._hidden)
        return Knobs(limit, self._spec.gpu_clocks_mhz[row])

    def compiled(self, spec: NodeSpec) -> Compiled:
        """The rule and what it knows of the node."""
        return self._program, self._server


def see(sight: np.ndarray, window: WindowMetrics) -> None:
    """What ``sim.choice.look`` sees of a simulated window, of any."""
    from fuel_ray.sim.choice import remember  # noqa: PLC0415  (as above)

    per_s = 1.0 / window.duration_s
    sight[compiled.RUNNING], sight[compiled.WAITING] = window.running, window.waiting
    sight[compiled.KV_USAGE], sight[compiled.OLDEST_WAIT_S] = window.kv_usage, window.oldest_wait_s
    sight[compiled.ARRIVALS] = window.arrivals * per_s
    sight[compiled.PROMPT_TOKENS] = window.prompt_tokens * per_s
    sight[compiled.OUTPUT_TOKENS] = window.output_tokens * per_s
    sight[compiled.LIMIT], sight[compiled.CLOCK_MHZ] = window.knobs.batch_limit, window.knobs.gpu_clock_mhz
    remember(sight)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _ascends(knots: tuple[float, ...]) -> bool:
    return bool(knots) and list(knots) == sorted(set(knots)) and bool(np.isfinite(knots).all())


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(f"no rule: {otherwise}")
