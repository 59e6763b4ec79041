"""Send a load to a running vLLM server and record GPU, CPU, KV cache and latencies beside each other."""

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from fuel_ray.address import Access, server_url
from fuel_ray.build.benchmark_trace import benchmark_run, benchmarked_server, cache_of, counted_by_server
from fuel_ray.disk import write_or_keep
from fuel_ray.errors import ConfigError, TelemetryError
from fuel_ray.live.load.loadgen import LoadGenerator
from fuel_ray.live.load.prompts import DrawnLoad
from fuel_ray.live.monitors import Measured, monitors
from fuel_ray.live.vllm.endpoint import Endpoint, PageError
from fuel_ray.live.vllm.kv_monitor import MetricsClient
from fuel_ray.live.vllm.metrics import MetricsSnapshot
from fuel_ray.live.vllm.server import served_models
from fuel_ray.record import make_folder
from fuel_ray.report.benchmark import benchmark_result, check, errors_by_kind
from fuel_ray.sim.doubts import run_doubts
from fuel_ray.sim.recorded import trace_text
from fuel_ray.types import Slo

_INTERRUPTED = "interrupted"
_GOODPUT = {"ttft": "ttft_s", "tpot": "tpot_s", "e2el": "e2e_s"}  # of `vllm bench serve`
_NAME_LETTERS = 60  # of the model, in the name of a file


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(DrawnLoad, Access):
    """Benchmark a running vLLM server: latencies, GPU and CPU power, KV cache usage."""

    model: str
    """Name of the model to request. The path that the server was started with will do too."""
    backend: Literal["vllm"] = "vllm"
    """Kind of server."""
    base_url: str | None = None
    """URL of the server, instead of --host and --port. An example is https://gateway/prefix."""
    host: str = "127.0.0.1"
    """Host of the server."""
    port: int = 8000
    """Port of the server."""
    max_concurrency: int | None = None
    """Most requests in flight at once; further ones wait in the client, so that the rate may fall below
    --request-rate. With --request-rate inf the server always has this many. None: no limit."""
    goodput: tuple[str, ...] = ()
    """Limits in ms as KEY:VALUE, such as ttft:1000 tpot:50 e2el:8000. request_goodput then counts the
    requests per second that meet all of them, as in `vllm bench serve --goodput`."""
    gpu_ids: tuple[str, ...] | None = None
    """GPUs of the server: nvidia-smi's indices, or UUIDs. None: the first of CUDA_VISIBLE_DEVICES. Empty: no
    GPU is measured."""
    gpu_monitor_interval: float = 0.05
    """Seconds between two samples of GPU and CPU."""
    kv_monitor_interval: float = 0.5
    """Seconds between two samples of the KV cache; at least 0.05."""
    monitor_cpu: bool = False
    """Record CPU power and utilisation."""
    enable_kv_trace: bool = False
    """Record the KV cache over time."""
    save_result: bool = False
    """Write the result as JSON to --result-dir."""
    save_trace: bool = False
    """Write a trace for `fuel-ray validate` and `fuel-ray calibrate` to --result-dir."""
    result_dir: Path = Path("benchmark_results")
    """Folder for the result and the trace."""
    max_num_seqs: int | None = None
    """Requests that the server can run at once, for the trace. None: what the server reports, else vLLM's
    default."""
    max_num_batched_tokens: int | None = None
    """Tokens per step of the server, for the trace. None: what the server reports, else vLLM's default."""
    timeout_s: float = 600.0
    """Seconds after which a request is given up."""


def run(config: BenchmarkConfig) -> int:
    """Run the benchmark, print its figures and check, and write them, whatever ends it.

    1 if no request was answered or the result is not where it should be, 130 if it was interrupted.

    Raises:
        DiskError: the result is not in its folder; the message says where it is.
    """
    goodput = _goodput(config.goodput)
    requests, prompts = config.draw()
    if config.save_result or config.save_trace:
        make_folder(config.result_dir)
    server = _endpoint(config)
    before = _before(config, server)
    model = _served_as(server, config.model)
    load = LoadGenerator(
        server,
        requests,
        prompts=prompts,
        model=model,
        timeout_s=config.timeout_s,
        max_concurrency=config.max_concurrency,
    )
    monitored = monitors(
        server,
        gpu_ids=config.gpu_ids,
        gpu_interval_s=config.gpu_monitor_interval,
        cpu=config.monitor_cpu,
        kv_interval_s=config.kv_monitor_interval if config.enable_kv_trace else None,
    )
    with monitored as measured:
        for missing in measured.missing:
            print(missing)
        ended = _send(load, config.num_prompts)
    result = benchmark_result(
        load.so_far(),
        measured,
        model=config.model,
        request_rate=config.request_rate,
        num_prompts=config.num_prompts,
        ended=ended,
        max_concurrency=config.max_concurrency,
        goodput=goodput,
    )
    print("\n".join(check(result, measured)), flush=True)
    now = datetime.now()
    if config.save_result:
        _save(config, "benchmark", json.dumps(result, indent=2), now)
    if config.save_trace:
        trace = _trace(config, server, before=before, load=load, measured=measured, result=result)
        if trace is not None:
            _save(config, "trace", trace, now)
    return _code(result)


def _goodput(pairs: Sequence[str]) -> Slo | None:
    """The limits that --goodput names; None without any.

    Raises:
        ConfigError: a pair is no KEY:VALUE, its key is unknown or its value is none that a latency can have.
    """
    limits_s: dict[str, float] = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        try:
            limit_ms = float(value)
        except ValueError:
            raise ConfigError(f"--goodput {pair}: give KEY:VALUE in ms, such as ttft:1000") from None
        if name not in _GOODPUT:
            raise ConfigError(f"--goodput {pair}: unknown key {name!r}; keys are {', '.join(_GOODPUT)}")
        if not limit_ms >= 0:
            raise ConfigError(f"--goodput {pair}: the limit must be at least 0 ms")
        limits_s[_GOODPUT[name]] = limit_ms / 1000
    return Slo(**limits_s) if limits_s else None


def _before(config: BenchmarkConfig, server: Endpoint) -> MetricsSnapshot:
    """What the server has counted; what is wrong with its address or page is said before anything is sent."""
    with contextlib.closing(MetricsClient(server)) as client:
        before = client.scrape()
    if config.save_trace:
        cache_of(before)
    return before


def _endpoint(config: BenchmarkConfig) -> Endpoint:
    if config.base_url is not None:
        return Endpoint.of(config.base_url, config, flag="--base-url")
    url = server_url(config.host, flag="--host", port=config.port)
    return Endpoint.of(url, config, flag="--base-url")


def _served_as(server: Endpoint, model: str) -> str:
    """The name to ask for, which is another where the model is what the server was started from.

    Raises:
        ConfigError: the server lists its models, and this is none of them.
    """
    try:
        found = served_models(server)
    except PageError:  # a gateway need not list what it serves
        return model
    names = [served.name for served in found]
    name = model if model in names else next((s.name for s in found if s.root == model), None)
    if name is None:
        raise ConfigError(f"--model: the server has no model {model}; it has {', '.join(names)}")
    return name


def _send(load: LoadGenerator, n: int) -> str | None:
    """Run the load to its end, with a line of progress now and then; why it ended early, if it did."""
    try:
        load.start()
        while not load.wait(2.0):
            now = load.take()
            flying = len(now.in_flight)
            print(f"{now.sent - flying}/{n} finished, {flying} in flight, {now.now_s:.0f} s", flush=True)
        load.take()  # raises what the load itself failed with
    except (KeyboardInterrupt, SystemExit):
        with contextlib.suppress(KeyboardInterrupt):  # a second one: wait for nothing
            load.stop()
        return _INTERRUPTED
    except TelemetryError as error:
        return str(error)
    return None


def _trace(
    config: BenchmarkConfig,
    server: Endpoint,
    *,
    before: MetricsSnapshot,
    load: LoadGenerator,
    measured: Measured,
    result: dict[str, Any],
) -> str | None:
    """The trace's file; None, and why is said, where nobody could replay it."""
    spec = benchmarked_server(
        server,
        cache_of(before),
        measured,
        model=config.model,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
    )
    sent = load.so_far()
    with contextlib.closing(MetricsClient(server)) as client:
        counted = counted_by_server(client, before, sent=len(sent.records))
    run = benchmark_run(
        sent, measured, start_s=load.start_s, energy_j=result["gpu_energy_j"], spec=spec, counted=counted
    )
    facts = {"origin": "measured", "request_rate": result["request_rate"], "seed": config.seed}
    try:
        text = trace_text(run, **facts, dataset=config.dataset_name, partial=result["partial"])
    except ConfigError as error:
        print(f"no trace   was written: {error}")
        return None
    for line in run_doubts(run):
        print(f"trace      {line}")
    return text


def _save(config: BenchmarkConfig, kind: str, text: str, now: datetime) -> None:
    name = f"{Path(config.model).name[:_NAME_LETTERS]}-{kind}-{now:%Y%m%d-%H%M%S}.json"
    write_or_keep(config.result_dir, {name: text})
    print(f"wrote {config.result_dir / name}")


def _code(result: dict[str, Any]) -> int:
    """What the shell is told."""
    if result["partial"]:
        return 130 if result["missing"][0].startswith(_INTERRUPTED) else 1
    if result["completed"] or not result["failed"]:
        return 0
    why = errors_by_kind(result["errors"])
    print(f"fuel-ray: all {result['failed']} requests failed: {'; '.join(why)}", file=sys.stderr)
    return 1
