"""GpuNode on a fake NVML and a real HTTP server that counts as vLLM does."""

import contextlib
import os
import re
import time
from dataclasses import dataclass, replace

import numpy as np
import pynvml
import pytest

from fuel_ray.control import ControlLoop
from fuel_ray.errors import ConfigError, GpuError, NodeError, TelemetryError
from fuel_ray.live.cpu import CpuMeter
from fuel_ray.live.gpu.nvml import Gpus
from fuel_ray.live.load.completion import Attempt
from fuel_ray.live.load.loadgen import LoadGenerator, LoadProgress
from fuel_ray.live.load.prompts import TokenPrompts
from fuel_ray.live.node import GpuNode
from fuel_ray.live.vllm.in_force import InForce
from fuel_ray.live.vllm.kv_monitor import MetricsClient
from fuel_ray.live.vllm.limiter import BatchLimiter
from fuel_ray.objective import Energy
from fuel_ray.types import Knobs, NodeSpec, Requests, Slo
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.stub_vllm import Stub, serving
from tests.test_cpu import _domain
from tests.test_foreign_load import page

CLOCKS = (990, 1500, 1980)


@dataclass
class CountingStub(Stub):
    """Its counters follow the completions that it serves."""

    prompts: int = 0
    tokens: int = 0
    served: int = 0

    async def metrics(self, request):
        counters = {
            "vllm:prompt_tokens_total": self.prompts,
            "vllm:prompt_tokens_cached_total": 0,
            "vllm:generation_tokens_total": self.tokens,
            "vllm:num_requests_running": self.in_flight,
            "vllm:num_requests_waiting": 0,
        }
        for name, value in counters.items():
            pattern = rf"^({re.escape(name)}(?:{{[^}}]*}})?) \S+$"
            self.page = re.sub(pattern, rf"\g<1> {value}", self.page, flags=re.MULTILINE)
        return await super().metrics(request)

    async def _stream(self, request, body):
        response = await super()._stream(request, body)
        self.prompts += len(body["prompt"])
        self.tokens += body["max_tokens"]
        return response


class ListLimiter:
    """Acknowledged at once."""

    def __init__(self):
        self.asked, self.closed = [], False

    @property
    def in_force(self):
        return self.asked[-1] if self.asked else None

    def window(self, *, worked, duration_s):
        return InForce(self.in_force, True if self.asked else None)

    def forget(self):
        pass

    def set(self, limit):
        self.asked.append(limit)
        return limit

    def close(self):
        self.closed = True


class StuckLimiter(ListLimiter):
    def close(self):
        raise NodeError("stuck")


def requests(n, *, every_s=0.02):
    return Requests(
        np.arange(n) * every_s, np.full(n, 12), np.full(n, 6), np.full(n, -1), np.zeros(n, np.int64)
    )


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeGpu(uuid="GPU-0", clocks_mhz=CLOCKS[::-1])
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(fake))
    return fake


@pytest.fixture
def stub():
    with serving(CountingStub()) as served:
        yield served


def live_node(stub, *, clocks=CLOCKS, limiter=None, n=20, every_s=0.02):
    spec = NodeSpec("live", "H100", ("GPU-0",), "tiny", 16, 300, (1, 32), clocks)

    def start_load(seed):
        work = requests(n, every_s=every_s)
        prompts = TokenPrompts(work, vocab_size=100, rng=np.random.default_rng(seed))
        return LoadGenerator(stub.url, work, prompts=prompts, model="tiny")

    return GpuNode(spec, Gpus(["GPU-0"]), MetricsClient(stub.url), limiter=limiter, start_load=start_load)


@pytest.fixture
def node(stub, gpu):
    made = live_node(stub, limiter=ListLimiter())
    made.reset(seed=0)
    yield made
    made.close()


def test_a_clock_below_those_that_may_be_chosen_acts_as_the_lowest_of_them(stub, gpu):
    with contextlib.closing(live_node(stub, clocks=CLOCKS[1:])) as node:
        assert node.apply(Knobs(8, CLOCKS[0])).gpu_clock_mhz == CLOCKS[1]
        assert gpu.locked_mhz == (CLOCKS[1], CLOCKS[1])


def test_windows_and_records_tell_of_the_same_requests(node, stub):
    windows = [node.measure(0.2) for _ in range(6)]
    records = node.take_records()
    assert len(records) == 20 == sum(window.completed for window in windows)
    assert sum(window.arrivals for window in windows) == 20
    assert sum(window.output_tokens for window in windows) == stub.tokens == 120
    for name, column in (("ttfts_s", records.ttft_s), ("tpots_s", records.tpot_s), ("e2es_s", records.e2e_s)):
        pooled = sorted(value for window in windows for value in getattr(window, name))
        assert pooled == pytest.approx(sorted(column.tolist()))
    assert len(node.take_records()) == 0


def test_a_window_lasts_as_long_as_asked_and_begins_where_the_last_ended(node):
    durations = [node.measure(0.1).duration_s for _ in range(5)]
    assert sum(durations) == pytest.approx(0.5, abs=0.1)


def test_knobs_reach_the_gpu_and_the_limiter_and_are_given_back(node, gpu):
    assert node.apply(Knobs(500, 1400)) == Knobs(32, 1500)
    assert gpu.locked_mhz == (1500, 1500)
    node.close()
    assert gpu.locked_mhz is None
    node.close()


def test_a_second_node_may_not_control_the_same_gpu_until_the_first_is_closed(node, stub):
    with pytest.raises(GpuError, match=rf"GPU-0 is controlled by pid {os.getpid()} "):
        live_node(stub)
    live_node(stub, clocks=(1980,)).close()
    node.close()
    live_node(stub).close()


def test_clocks_are_given_back_even_if_the_limit_cannot_be(stub, gpu):
    node = live_node(stub, limiter=StuckLimiter())
    node.apply(Knobs(8, 990))
    with pytest.raises(NodeError, match="stuck"):
        node.close()
    assert gpu.locked_mhz is None


def test_an_observe_only_node_never_touches_the_clock_nor_tells_of_a_limit_that_is_not_set(stub, gpu):
    node = live_node(stub, clocks=(1980,))
    node.reset(seed=0)
    assert node.apply(Knobs(8, 990)) == Knobs(32, 1980)
    assert gpu.locked_mhz is None
    assert node.measure(0.1).knobs == Knobs(32, 1980)
    node.close()


def test_window_energy_is_the_counters(node, gpu):
    node.measure(0.1)
    gpu.energy_mj += 7_000
    assert node.measure(0.1).energy_j == pytest.approx(7.0)


def test_without_a_counter_energy_is_integrated_power(stub, gpu):
    gpu.energy_mj = None
    node = live_node(stub)
    node.reset(seed=0)
    window = node.measure(0.3)
    assert window.energy_j == pytest.approx(400 * window.duration_s, rel=0.05)
    node.close()


def test_a_server_that_dies_is_an_error_and_not_a_window_of_zeros(node, stub):
    node.measure(0.1)
    stub.stop()
    with pytest.raises(TelemetryError):
        node.measure(0.1)


def test_a_lost_gpu_is_an_error(node, gpu):
    node.measure(0.1)
    gpu.lost = True
    with pytest.raises(NodeError):
        node.measure(0.1)


class Pages:
    """A client of a server that shows these pages, one after the other."""

    def __init__(self, *pages):
        self.scrape, self.close = iter(pages).__next__, list


def test_first_tokens_of_a_lost_window_leave_nobody_waiting(gpu, monkeypatch):
    pages = [page(running=9), page(running=9, waiting=5), page(running=14, first_tokens=5)]
    client = Pages(*pages, page(running=14, waiting=1, first_tokens=5))
    spec = NodeSpec("live", "H100", ("GPU-0",), "tiny", 16, 300, (1, 32), (1980,))
    with contextlib.closing(GpuNode(spec, Gpus(["GPU-0"]), client)) as node:
        node.reset(seed=0)
        node.measure(0.2)
        with monkeypatch.context() as hanging, pytest.raises(TelemetryError, match="no reading"):
            hanging.setattr(node._readings, "_entries", list)
            node.measure(0.2)
        assert node.measure(0.2).oldest_wait_s < 0.2


class Looks:
    """A load that stands here and there, as (now, in flight, ended)."""

    def __init__(self, *looks):
        self._looks = iter(looks)

    def take(self):
        now_s, in_flight, ended = next(self._looks)
        return LoadProgress(now_s, 4, ended, in_flight)


def test_a_request_that_fails_while_overdue_stays_missed_once(gpu):
    spec = NodeSpec("live", "H100", ("GPU-0",), "tiny", 16, 300, (1, 32), (1980,))
    first, second, third = (Attempt(k, 0.1 * k, 8, 8) for k in range(3))
    begun, failed = replace(first, first_token_s=2.5), replace(second, error="gone")
    with contextlib.closing(GpuNode(spec, Gpus(["GPU-0"]), Pages(page()))) as node:
        load = Looks(
            *((now_s, (first, second, third), ()) for now_s in (1.0, 2.0)),
            (3.0, (begun, third), (failed,)),
            (4.0, (begun, third), ()),
        )
        seen = [node._served(load) for _ in range(4)]
    missed = [
        sum(ttft_s > 1.5 for ttft_s in served.ttfts_s)
        + sum(wait_s > 1.5 for wait_s in served.waits_s)
        - sum(wait_s > 1.5 for wait_s in served.waits_before_s)
        for served in seen
    ]
    assert missed == [0, 3, 0, 0] and seen[2].ttfts_s == (2.5,)


def test_a_node_that_was_not_reset_cannot_be_measured(stub, gpu):
    node = live_node(stub)
    with pytest.raises(NodeError, match="reset"):
        node.measure(0.1)
    node.close()


def test_what_ended_before_records_were_taken_is_in_the_next_window_still(stub, gpu):
    node = live_node(stub, limiter=ListLimiter())
    node.reset(seed=1)
    time.sleep(0.3)
    taken = len(node.take_records())
    window = node.measure(0.4)
    node.close()
    assert window.arrivals >= window.completed >= taken > 0
    assert len(window.e2es_s) == window.completed


@pytest.fixture
def limited(stub, gpu, tmp_path):
    """Makes a node with a limit file under steady traffic, whose server has the plug-in or not."""
    made = []

    def make(*, plugin, **how):
        limiter = BatchLimiter(tmp_path / "limit")
        stub.__dict__.update(how, limit_file=limiter.path if plugin else None)
        made.append(live_node(stub, limiter=limiter, n=1000))
        made[0].reset(seed=0)
        return made[0]

    yield make
    for node in made:
        node.close()


def test_a_limit_is_in_force_once_the_scheduler_has_acknowledged_it(limited):
    node = limited(plugin=True)
    assert node.apply(Knobs(4, 990)) == Knobs(32, 990)
    window = node.measure(0.2)
    assert (window.knobs, window.limit_acknowledged) == (Knobs(4, 990), True)
    assert node.apply(Knobs(4, 990)) == Knobs(4, 990)


def test_without_the_plug_in_the_servers_capacity_is_in_force_and_it_is_said_what_to_do(limited, monkeypatch):
    monkeypatch.setattr("fuel_ray.live.vllm.in_force.PATIENCE_S", 1.0)
    loop = ControlLoop(limited(plugin=False), Energy(Slo(1.0), 0.2, 200.0, 400.0), interval_s=0.2)
    loop.reset(seed=0)
    record = loop.step(Knobs(4, 990))
    assert record.chosen == Knobs(4, 990)
    assert record.applied == record.metrics.knobs == Knobs(32, 990)
    assert record.metrics.limit_acknowledged is False
    with pytest.raises(ConfigError, match=r"batch limit 4 is not in force: no vLLM scheduler has read"):
        for _ in range(20):
            loop.step(Knobs(4, 990))


def test_a_scheduler_that_admits_above_the_limit_is_not_said_to_heed_it(limited):
    node = limited(plugin=True, admits=9)
    node.apply(Knobs(4, 990))
    window = node.measure(0.2)
    assert (window.knobs.batch_limit, window.limit_acknowledged) == (32, False)


def test_an_idle_server_need_not_acknowledge(stub, gpu, tmp_path):
    node = live_node(stub, limiter=BatchLimiter(tmp_path / "limit"), n=0)
    node.reset(seed=0)
    node.apply(Knobs(4, 990))
    window = node.measure(0.2)
    assert (window.knobs.batch_limit, window.limit_acknowledged) == (32, None)
    node.close()


def test_a_window_is_measured_without_the_cpu_where_rapl_has_gone(stub, gpu, tmp_path):
    _domain(tmp_path, "intel-rapl:0", name="package-0", energy_uj=7)
    spec = NodeSpec("live", "H100", ("GPU-0",), "tiny", 16, 300, (1, 32), (1980,))
    node = GpuNode(spec, Gpus(["GPU-0"]), MetricsClient(stub.url), cpu=CpuMeter(root=tmp_path))
    with contextlib.closing(node):
        node.reset(seed=0)
        (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
        window = node.measure(0.1)
    assert window.cpu_energy_j is None and window.cpu_util is None
    assert window.gpu_util == pytest.approx(0.9)


def test_windows_have_what_the_card_gives(stub, gpu):
    names = ("PowerUsage", "UtilizationRates", "ClockInfo")
    gpu.faults = {f"nvmlDeviceGet{name}": pynvml.NVML_ERROR_NOT_SUPPORTED for name in names}
    with contextlib.closing(live_node(stub)) as node:
        node.reset(seed=0)
        gpu.energy_mj += 7_000
        window = node.measure(0.1)
    assert window.energy_j == pytest.approx(7.0)
    assert window.gpu_util is None and window.gpu_mem_util is None and window.gpu_clock_mhz is None
