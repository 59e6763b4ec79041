"""The second stage: the load that the policy is for, as a workload's spec; named, or read from counters."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from fuel_ray.address import server_url
from fuel_ray.build.live import server_endpoint
from fuel_ray.errors import ConfigError, NodeError
from fuel_ray.live.foreign_load import came
from fuel_ray.live.vllm.kv_monitor import MetricsClient
from fuel_ray.live.vllm.metrics import MetricsSnapshot, difference
from fuel_ray.onboarding.config import OnboardConfig
from fuel_ray.onboarding.state import Onboarding
from fuel_ray.record import write_json
from fuel_ray.workload.lengths import OUTPUT_TOKENS, PROMPT_TOKENS
from fuel_ray.workload.spec import Workload, parse_workload

DEFAULT = "the default; set your own with --workload or --observe-minutes"
_SEGMENT_S = 30.0  # at least, of one rate
_SEGMENTS = 40  # at most
_LOST = 3  # pages in a row without an answer, after which the watch ends

Page = tuple[float, MetricsSnapshot]  # monotonic s


@dataclass(frozen=True, slots=True)
class Observed:
    """What counters tell of a load: its rates in turn, and mean lengths."""

    rates: tuple[tuple[float, float], ...]  # (requests per s, s)
    prompt_mean: float  # tokens
    output_mean: float  # tokens
    requests: int

    def spec(self) -> str:
        """As a workload: these rates, lognormal lengths with these means."""
        steps = "+".join(f"{rate_rps:.4g}@{seconds:.4g}" for rate_rps, seconds in self.rates)
        text = f"piecewise:rates={steps},prompt_mean={max(self.prompt_mean, 8):.4g}"
        text += f",output_mean={max(self.output_mean, 4):.4g}"
        if self.prompt_mean > 2048:
            text += f",max_prompt_tokens={round(4 * self.prompt_mean)}"
        if self.output_mean > 512:
            text += f",max_output_tokens={round(4 * self.output_mean)}"
        return text


def find(state: Onboarding) -> dict[str, Any]:
    """Name the load, or watch it for the minutes that were asked for.

    Raises:
        ConfigError: no request came.
    """
    config = state.config
    if config.observe_minutes is None:
        origin = DEFAULT if config.workload == OnboardConfig().workload else "given"
        print(f"{config.workload} ({origin}): {about(config.workload)}")
        _require_room(state, config.workload)
        return {"workload": config.workload, "origin": origin, "about": about(config.workload)}
    config = _observed_config(state)
    print(
        f"watching the traffic of {config.live.server} for {config.observe_minutes:g} min through its "
        "counters; no requests are sent"
    )
    observed = summary(list(_pages(config)))
    spec = observed.spec()
    parse_workload(spec)
    facts = {"origin": f"read from the counters of {config.live.server}", "requests": observed.requests}
    facts |= {"prompt_mean": observed.prompt_mean, "output_mean": observed.output_mean}
    write_json(state.folder / "observed.json", {"workload": spec, **facts, "rates": observed.rates})
    lengths = f"{observed.prompt_mean:.0f} prompt and {observed.output_mean:.0f} output tokens on average"
    print(f"{observed.requests} requests, {lengths}; a lognormal distribution is assumed\nworkload: {spec}")
    _require_room(state, spec)
    return {"workload": spec, **facts, "about": about(spec)}


def about(spec: str) -> str:
    """A load in a line."""
    workload = parse_workload(spec)
    prompt, output, longest_prompt, longest_output = mean_lengths(workload)
    return (
        f"{workload.mean_rate_rps:.3g} requests/s on average, {prompt:.0f} prompt and {output:.0f} output "
        f"tokens (at most {longest_prompt} and {longest_output})"
    )


def _require_room(state: Onboarding, spec: str) -> None:
    """Raises ConfigError where the server would refuse the longest requests of a load."""
    room = state.facts.get("max_model_len")
    _, _, prompt, output = mean_lengths(parse_workload(spec))
    if room and prompt + output > room:
        raise ConfigError(
            f"workload {spec} has requests of up to {prompt} prompt and {output} output tokens, but the "
            f"server accepts {room} in total (max_model_len). Give one that fits: fuel-ray onboard --resume "
            f"{state.folder} --workload {spec}{',' if ':' in spec else ':'}max_prompt_tokens={room // 2},"
            f"max_output_tokens={room // 4}"
        )


def summary(pages: Sequence[Page]) -> Observed:
    """What pages of one server's counters, in turn, tell of its load.

    Raises:
        ConfigError: no request came.
    """
    rates, arrived, ended, prompt_tokens, output_tokens = [], 0, 0, 0, 0
    for (before_s, before), (after_s, after) in pairwise(pages):
        counted = difference(before, after, after_s - before_s)
        if counted.restarted:
            continue
        arrivals = max(0, came(before, after, counted))
        rates.append((arrivals / counted.seconds, counted.seconds))
        arrived, ended = arrived + arrivals, ended + counted.requests_succeeded
        prompt_tokens += counted.prompt_tokens
        output_tokens += counted.generation_tokens
    if not arrived or not ended:
        raise ConfigError(
            "--observe-minutes: no request arrived and finished; watch longer, or give --workload instead"
        )
    return Observed(tuple(rates), prompt_tokens / arrived, output_tokens / ended, arrived)


def _observed_config(state: Onboarding) -> OnboardConfig:
    """The settings with the server whose traffic is read."""
    config = state.config
    if config.observe_server is not None:
        url = server_url(config.observe_server, flag="--observe-server")
        return replace(config, live=replace(config.live, server=url, metrics_url=None))
    if config.live.server is None:
        raise ConfigError(
            "--observe-minutes: a server that is just started has no traffic; give one with --observe-server"
        )
    return config


def _pages(config: OnboardConfig) -> Iterator[Page]:
    """Its pages until the time is over; a page that is lost makes its neighbours' time longer."""
    assert config.observe_minutes is not None
    duration_s = 60.0 * config.observe_minutes
    every_s = min(max(_SEGMENT_S, duration_s / _SEGMENTS), duration_s / 2)
    lost = 0
    with contextlib.closing(MetricsClient(server_endpoint(config.live))) as client:
        began_s = time.monotonic()
        for number in range(round(duration_s / every_s) + 1):
            time.sleep(max(0.0, began_s + number * every_s - time.monotonic()))
            try:
                page = client.scrape()
            except NodeError as error:
                lost += 1
                print(f"  a scrape failed: {error}", flush=True)
                if lost == _LOST:
                    raise
                continue
            lost = 0
            print(f"  {number * every_s:.0f} s: {page.running} running, {page.waiting} waiting", flush=True)
            yield time.monotonic(), page


def mean_lengths(workload: Workload, *, seconds: float = 600.0) -> tuple[float, float, int, int]:
    """Mean and highest prompt and output tokens of a load; the usual ones where it has no requests."""
    drawn = workload.generate(seconds, rng=np.random.default_rng(0))
    if not len(drawn):
        return float(PROMPT_TOKENS), float(OUTPUT_TOKENS), 4096, 1024
    prompts, outputs = drawn.prompt_tokens, drawn.output_tokens
    return float(prompts.mean()), float(outputs.mean()), int(prompts.max()), int(outputs.max())
