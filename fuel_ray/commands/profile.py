"""fuel-ray profile: measure what `fuel-ray calibrate` fits a pack to, on a live or a simulated node.

Each point is a burst of equal requests, clock by clock: steps that only decode, by requests in the batch and
context; prompts one by one, by length; many prompts at once; and the idle server.
"""

import contextlib
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from fuel_ray.build.nodes import build_loop, build_spec, served
from fuel_ray.config import ServingConfig, to_dict
from fuel_ray.errors import ConfigError
from fuel_ray.flags import parse_serving
from fuel_ray.record import new_folder, origin, write_json
from fuel_ray.types import Knobs, NodeSpec, WindowMetrics

CLOCKS = 8  # profiled by default, from half of the highest clock to the highest
_LONGEST_S = 120  # in which a point has to be there
_SETTLED = "after_s=1.5"  # the first window is at the highest clock, and a change takes up to 0.2 s
_PREFILL_REPEATS = 5
_SUSTAINED = 64  # prompts at once


@dataclass(frozen=True)
class ProfileConfig(ServingConfig):
    """Measure decode steps, prefills and idle power of a node, for `fuel-ray calibrate`."""

    kv_tokens: int | None = None
    """Size of the KV pool in tokens, of a server that is started too; None: the pack's or server's own."""
    block_sizes: tuple[int, ...] = (16,)
    """KV block size in tokens: one."""
    clocks_mhz: tuple[int, ...] = ()
    """Clocks to profile in MHz; none: eight from half of the highest to the highest."""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """Requests that decode together; those above the server's capacity are left out."""
    contexts: tuple[int, ...] = (128, 1024)
    """Prompt tokens of the requests that decode."""
    prompts: tuple[int, ...] = (128, 512, 2048, 4096)
    """Prompt tokens of the prefills."""
    output_tokens: int = 2048
    """Tokens that a decoding request may have before its point is measured; with the prompt it has to fit
    the server's --max-model-len."""
    windows: int = 3
    """Windows of 1 s per decode point."""


def parse(argv: list[str], *, prog: str) -> ProfileConfig:
    """Settings from flags.

    Raises:
        ConfigError: a flag is wrong.
    """
    config = parse_serving(ProfileConfig, argv, prog=prog, default=ProfileConfig())
    if len(config.block_sizes) != 1:
        raise ConfigError("--block-sizes: a profile is of one server, give one block size")
    spec = build_spec(config, config.block_sizes[0])
    unknown = set(config.clocks_mhz) - set(spec.gpu_clocks_mhz)
    if unknown:
        clocks = spec.gpu_clocks_mhz
        raise ConfigError(
            f"--clocks-mhz {sorted(unknown)}: none of the {len(clocks)} clocks {clocks[0]}..{clocks[-1]}"
        )
    return config


def run(config: ProfileConfig) -> int:
    """Print a line per point as it is measured, and write profile.jsonl; what there is when stopped stays."""
    size = config.block_sizes[0]
    run_dir = new_folder(config.out, "profile")
    facts = {**origin("profile"), "config": to_dict(config), "origin": _origin(config)}
    path = run_dir / "profile.jsonl"
    with served(replace(config, out=run_dir), size) as there, path.open("w") as file:
        spec = build_spec(there, size)
        write_json(run_dir / "run.json", {**facts, "gpu_name": spec.gpu_name, "model": spec.model})
        for row in _rows(there, spec):
            print(" ".join(f"{key}={_short(value)}" for key, value in row.items()), flush=True)
            file.write(json.dumps(row) + "\n")
            file.flush()
    print(
        f"\nwrote {path}; next: fuel-ray calibrate --profile {path} --name NAME --gpu {spec.gpu_name!r} ..."
    )
    return 0


def _origin(config: ServingConfig) -> str:
    return "measured" if config.live_server else f"modelled, pack {config.pack}"


def _rows(config: ProfileConfig, spec: NodeSpec) -> Iterator[dict[str, Any]]:
    batches = [n for n in config.batches if n <= spec.batch_limits[-1]]
    for clock_mhz in sorted(config.clocks_mhz or _spread(spec.gpu_clocks_mhz), reverse=True):
        yield _idle(config, clock_mhz)
        for context in config.contexts:
            for n in batches:
                yield from _decode(config, clock_mhz, n, context)
        for tokens in config.prompts:
            yield from _prefill(config, clock_mhz, tokens)
        yield from _sustained(config, clock_mhz, max(config.prompts, default=2048))


def _idle(config: ProfileConfig, clock_mhz: int) -> dict[str, Any]:
    with _under_load(config, "burst:count=0") as windows_of:
        _, *windows = islice(windows_of(clock_mhz), config.windows + 1)
    return {"phase": "idle", "clock_mhz": clock_mhz, "power_w": _power_w(windows)}


def _decode(config: ProfileConfig, clock_mhz: int, n: int, context: int) -> Iterator[dict[str, Any]]:
    """A row of the windows in which ``n`` requests did nothing but decode."""
    lengths = f"lengths=fixed,prompt_mean={context},output_mean={config.output_tokens}"
    used: list[WindowMetrics] = []
    contexts: list[float] = []
    generated, running = 0, 0
    with _under_load(config, f"burst:count={n},{_SETTLED},{lengths}") as windows_of:
        for window in windows_of(clock_mhz):
            if running == window.running == n and not (window.prompt_tokens or window.preemptions):
                used.append(window)
                contexts.append(context + (generated + window.output_tokens / 2) / n)
            elif used or window.completed:
                break
            generated, running = generated + window.output_tokens, window.running
            if len(used) == config.windows:
                break
    tokens = sum(window.output_tokens for window in used)
    if not tokens:
        print(f"skipped: {n} requests of {context} tokens did not decode together for a window", flush=True)
        return
    yield {
        "phase": "decode",
        "clock_mhz": clock_mhz,
        "b": n,
        "ctx_mid": statistics.fmean(contexts),
        "itl": sum(window.duration_s for window in used) * n / tokens,
        "power_w": _power_w(used),
        "sm_mhz": statistics.fmean(window.gpu_clock_mhz or clock_mhz for window in used),
        "windows": len(used),
    }


def _prefill(config: ProfileConfig, clock_mhz: int, tokens: int) -> Iterator[dict[str, Any]]:
    """A row of the TTFT of prompts that come one after another to an idle server."""
    lengths = f"lengths=fixed,prompt_mean={tokens},output_mean=2"
    workload = f"burst:count={_PREFILL_REPEATS},every_s=2,{_SETTLED},{lengths}"
    ttfts_s: list[float] = []
    with _under_load(config, workload) as windows_of:
        for window in windows_of(clock_mhz):
            ttfts_s += window.ttfts_s
            if len(ttfts_s) >= _PREFILL_REPEATS:
                break
    if ttfts_s:
        ttft_s = statistics.median(ttfts_s)
        yield {"phase": "prefill", "clock_mhz": clock_mhz, "n_in": tokens, "c": 1, "ttft_p50": ttft_s}


def _sustained(config: ProfileConfig, clock_mhz: int, tokens: int) -> Iterator[dict[str, Any]]:
    """A row of the energy of prompts while more of them wait."""
    workload = f"burst:count={_SUSTAINED},{_SETTLED},lengths=fixed,prompt_mean={tokens},output_mean=1"
    used: list[WindowMetrics] = []
    ttfts_s: list[float] = []
    waiting = 0
    with _under_load(config, workload) as windows_of:
        for window in windows_of(clock_mhz):
            ttfts_s += window.ttfts_s
            if waiting and window.waiting and window.prompt_tokens:
                used.append(window)
            waiting = window.waiting
            if len(ttfts_s) >= _SUSTAINED:
                break
    if not used:
        print(f"skipped: {_SUSTAINED} prompts of {tokens} tokens were there in less than two windows")
        return
    yield {
        "phase": "prefill_sustained",
        "clock_mhz": clock_mhz,
        "n_in": tokens,
        "c": _SUSTAINED,
        "ttft_p50": statistics.median(ttfts_s),
        "energy_j": sum(window.energy_j for window in used),
        "prompt_tok": sum(window.prompt_tokens for window in used),
    }


@contextlib.contextmanager
def _under_load(config: ProfileConfig, workload: str) -> Iterator[Callable[[int], Iterator[WindowMetrics]]]:
    """The windows of a node that has just been given this load, at a clock, without a batch limit."""
    loop = build_loop(config, config.block_sizes[0], horizon_s=float(_LONGEST_S), workload=workload)

    def windows(clock_mhz: int) -> Iterator[WindowMetrics]:
        yield loop.reset(seed=config.seed)
        for _ in range(_LONGEST_S):
            yield loop.step(Knobs(loop.node.spec.batch_limits[-1], clock_mhz)).metrics

    with contextlib.closing(loop.node):
        yield windows


def _spread(clocks_mhz: Sequence[int]) -> tuple[int, ...]:
    """Eight clocks from half of the highest to the highest."""
    upper = [clock_mhz for clock_mhz in clocks_mhz if clock_mhz >= clocks_mhz[-1] / 2]
    return tuple(sorted({upper[round(i * (len(upper) - 1) / (CLOCKS - 1))] for i in range(CLOCKS)}))


def _power_w(windows: Sequence[WindowMetrics]) -> float:
    return sum(window.energy_j for window in windows) / sum(window.duration_s for window in windows)


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
