"""Traces that benchmark and evaluate write, read back by validate: a real HTTP server, a fake NVML."""

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web

from fuel_ray.cli import main
from fuel_ray.commands import profile
from fuel_ray.errors import ConfigError
from fuel_ray.live.gpu.nvml import Gpus
from fuel_ray.live.load.loadgen import LoadGenerator
from fuel_ray.live.load.prompts import TokenPrompts
from fuel_ray.live.node import GpuNode
from fuel_ray.live.vllm.cache import CacheConfig
from fuel_ray.live.vllm.endpoint import Endpoint
from fuel_ray.live.vllm.facts import Cards, assumed, server_facts
from fuel_ray.live.vllm.kv_monitor import MetricsClient
from fuel_ray.sim.doubts import pack_doubts, run_doubts
from fuel_ray.sim.pack import load_pack
from fuel_ray.sim.recorded import read_trace, trace_text
from fuel_ray.sim.replay import BOUNDS, beyond_bounds, measured_figures, predicted_figures, relative_errors
from fuel_ray.types import NodeSpec, Requests
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.stub_vllm import serving
from tests.test_fidelity import TRACES
from tests.test_live_node import CountingStub

POWER_W = 400.0


@dataclass
class CountingGpu(FakeGpu):
    """Its counter rises by 400 W, and knows when it was read."""

    reads_s: list[float] = field(default_factory=list)

    def __getattribute__(self, name):
        if name != "energy_mj":
            return super().__getattribute__(name)
        self.reads_s.append(time.monotonic())
        return int(1e9 + self.reads_s[-1] * POWER_W * 1000)


@dataclass
class WatchedStub(CountingStub):
    """Counts requests too, of which some may be somebody else's, and notes when they came and ended."""

    foreign: int = 0
    refused: int = 0  # of the first requests
    came_s: list[float] = field(default_factory=list)
    ended_s: list[float] = field(default_factory=list)

    async def metrics(self, request):
        head, found, rest = self.page.partition(
            'vllm:request_success_total{engine="0",finished_reason="stop"'
        )
        labels, _, lines = rest.partition("} ")
        count = len(self.ended_s) + self.foreign * bool(self.ended_s)
        self.page = f"{head}{found}{labels}}} {count}\n{lines.partition(chr(10))[2]}"
        return await super().metrics(request)

    async def completions(self, request):
        self.came_s.append(time.monotonic())
        if len(self.came_s) <= self.refused:
            return web.json_response({"error": {"message": "no"}}, status=400)
        response = await super().completions(request)
        self.ended_s.append(time.monotonic())
        return response


@pytest.fixture
def stub():
    with serving(WatchedStub(token_delay_s=0.005)) as served:
        yield served


def benchmark(stub, folder, *flags):
    port = stub.url.rsplit(":", 1)[1]
    load = [
        "--num-prompts",
        "12",
        "--request-rate",
        "40",
        "--random-input-len",
        "8",
        "--random-output-len",
        "5",
    ]
    return main(["benchmark", "--model", "tiny", "--port", port, *load, "--result-dir", str(folder), *flags])


def the_trace(folder):
    (path,) = folder.glob("*-trace-*.json")
    return path, read_trace(str(path))


def test_a_benchmarks_trace_has_the_span_of_its_energy(stub, tmp_path, monkeypatch):
    gpu = CountingGpu()
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(gpu))
    monkeypatch.setattr("fuel_ray.live.monitors._elsewhere", lambda *args: time.sleep(0.3) or ())
    assert benchmark(stub, tmp_path, "--save-trace") == 0
    _, run = the_trace(tmp_path)
    begin_s = gpu.reads_s[-1] - run.duration_s  # the last reading is the end of the run
    first_s = min(gpu.reads_s, key=lambda read_s: abs(read_s - begin_s))
    assert first_s == pytest.approx(begin_s, abs=0.1)
    assert run.energy_j == pytest.approx(POWER_W * run.duration_s, abs=POWER_W * 0.1)
    assert sorted(stub.came_s) == pytest.approx((begin_s + run.requests.arrival_s).tolist(), abs=0.1)
    assert run.duration_s == pytest.approx(max(stub.ended_s) - begin_s, abs=0.1)
    assert (run.requests.output_tokens == 5).all() and (run.requests.prompt_tokens == 8).all()


def test_a_trace_lies_beside_the_result_and_validate_reads_it(stub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(CountingGpu()))
    seqs = ("--max-num-seqs", "128", "--max-num-batched-tokens", "8192")
    assert benchmark(stub, tmp_path, "--save-trace", "--save-result", *seqs) == 0
    path, run = the_trace(tmp_path)
    assert (tmp_path / path.name.replace("-trace-", "-benchmark-")).exists()
    assert (run.max_num_seqs, run.max_num_batched_tokens) == (128, 8192)
    assert run.info["said_by"]["max_num_seqs"] == "--max-num-seqs" and run.info["assumed"] == []
    assert run.info["engine"] == "vLLM 0.32.0" and run.info["gpus"] == 1
    assert (run.kv_block_size, run.num_kv_blocks, run.prefix_caching) == (32, 300, True)
    capsys.readouterr()
    assert main(["validate", str(path), TRACES[0]]) == 0
    out = capsys.readouterr().out
    assert (
        "verdict: beyond the bounds: " in out
        and "warning: the model is tiny, and that of the pack Qwen3-8B" in out
    )
    assert "mean of 2 traces" in out and "verdict: 1 of 2 traces within the bounds" in out


def test_without_nvml_a_trace_has_no_energy_and_validate_says_so(stub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(driver=False))
    assert benchmark(stub, tmp_path, "--save-trace") == 0
    path, run = the_trace(tmp_path)
    assert run.energy_j is None and json.loads(path.read_text())["info"]["energy_j"] is None
    out = capsys.readouterr().out
    assert "max_num_seqs 128 (vLLM's default on a CPU" in out
    assert main(["validate", str(path)]) == 0
    assert "energy not measured" in capsys.readouterr().out
    assert main(["validate", str(path), "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["measured"]["energy"] is None is result["errors"]["energy"]
    assert "no energy was measured" in result["warnings"]


def test_what_speaks_against_a_benchmark_is_in_its_trace(stub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(driver=False))
    monkeypatch.setattr("fuel_ray.live.load.loadgen.LATE_S", -1.0)
    stub.refused = 2
    assert benchmark(stub, tmp_path, "--save-trace") == 0
    _, run = the_trace(tmp_path)
    assert run.info["failed"] == 2 and len(run.requests) == 10
    assert run.info["late_sends"] == 12
    doubts = list(run_doubts(run))
    assert "2 of 12 requests (16.7%) failed or did not finish; the replay does not include them" in doubts
    assert any("12 of 12 requests were sent late" in line for line in doubts)
    assert f"trace      {doubts[0]}" in capsys.readouterr().out


def test_requests_of_somebody_else_are_counted(stub, tmp_path, monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(driver=False))
    stub.foreign = 3
    assert benchmark(stub, tmp_path, "--save-trace") == 0
    _, run = the_trace(tmp_path)
    assert run.info["foreign_requests"] == 3
    assert any("at least 3 requests of other clients" in line for line in run_doubts(run))


def test_a_benchmark_that_nobody_could_replay_writes_no_trace(stub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(driver=False))
    assert benchmark(stub, tmp_path, "--save-trace", "--random-output-len", "1") == 0
    assert "no trace   was written: a trace needs at least one finished request" in capsys.readouterr().out
    stub.page = stub.page.replace("vllm:cache_config_info", "vllm:other_info")
    n = len(stub.came_s)
    assert benchmark(stub, tmp_path, "--save-trace") == 2 and len(stub.came_s) == n
    assert "--save-trace: the server's /metrics does not report its KV block size" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def evaluate(folder, *flags):
    load = "steady:rate_rps=20,lengths=fixed,prompt_mean=8,output_mean=5"
    fixed = [
        "--block-sizes",
        "32",
        "--workload",
        load,
        "--seconds",
        "2",
        "--seeds",
        "1",
        "--out",
        str(folder),
    ]
    assert main(["evaluate", *fixed, *flags]) == 0
    return sorted(folder.glob("evaluate-*/traces/*.json"))


def test_a_live_evaluation_writes_a_trace_per_episode(stub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(CountingGpu()))
    stub.foreign = 2
    server = ["--live.server", stub.url, "--live.model", "tiny", "--max-num-seqs", "32"]
    (path,) = evaluate(tmp_path, "--node", "live", *server, "--live.max-num-batched-tokens", "2048")
    assert path.name == "block32-max_performance-seed0.json"
    run = read_trace(str(path))
    assert run.energy_j == pytest.approx(POWER_W * run.duration_s, abs=POWER_W * 0.1)
    assert len(run.requests) == len(stub.came_s) and run.duration_s >= run.requests.arrival_s[-1]
    assert (run.max_num_seqs, run.max_num_batched_tokens) == (32, 2048)
    assert run.limit_schedule == () and run.clock_schedule == ((0.0, 1980),)  # the limit was not ours
    assert run.info["origin"] == "measured" and run.info["foreign_requests"] == 2
    assert "at least 2 requests of other clients" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "tokens"), [([], 2000), (["--max-num-batched-tokens", "4096"], 4096)])
def test_a_profile_has_the_servers_tokens_per_step_and_not_its_packs(flags, tokens, stub, monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu()))
    monkeypatch.setattr(
        "fuel_ray.live.vllm.facts.server_flags", lambda port: ("--max-num-batched-tokens=2k",)
    )
    live = ["--node", "live", "--live.server", stub.url, "--live.model", "tiny", "--block-sizes", "32"]
    spec, engine, _ = profile._server(profile.parse([*live, *flags], prog="fuel-ray profile"))
    assert spec.server.max_num_batched_tokens == tokens
    assert engine == spec.server.engine  # as a benchmark's trace has it


def test_a_live_nodes_load_begins_with_its_energy(stub, monkeypatch):
    gpu = CountingGpu()
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(gpu))
    work = Requests(np.array([0.2]), *(np.array([n]) for n in (8, 5, -1, 0)))

    def start_load(seed):
        time.sleep(0.3)
        prompts = TokenPrompts(work, vocab_size=9, rng=np.random.default_rng(seed))
        return LoadGenerator(stub.url, work, prompts=prompts, model="tiny")

    spec = NodeSpec("n", "gpu", ("GPU-0",), "tiny", 32, 100, (32, 32), (1980,))
    node = GpuNode(spec, Gpus(["GPU-0"]), MetricsClient(stub.url), start_load=start_load)
    try:
        node.reset(seed=0)
        node.measure(0.5)
        assert stub.came_s[0] - gpu.reads_s[-2] == pytest.approx(0.2, abs=0.1)
    finally:
        node.close()


def test_a_simulated_evaluation_writes_traces_if_asked_and_its_pack_predicts_them(tmp_path):
    assert evaluate(tmp_path / "none", "--node", "sim") == []
    (path,) = evaluate(tmp_path / "some", "--save-traces", "--static", "16@1350", "--seconds", "20")
    assert path.name == "block32-static-16@1350-seed0.json"
    run = read_trace(str(path))
    predicted, measured = predicted_figures(run, load_pack("h100-qwen3-8b")), measured_figures(run)
    errors = relative_errors(predicted, measured)
    assert all(abs(errors[name]) < 0.02 for name in BOUNDS), errors
    assert run.clock_schedule == ((0.0, 1980), (1.0, 1350)) and run.limit_schedule == ((0.0, 128), (1.0, 16))
    assert run.info["origin"].startswith("modelled, pack h100-qwen3-8b")


def test_requests_that_had_not_ended_are_counted(tmp_path):
    load = "steady:rate_rps=40,lengths=fixed,prompt_mean=8,output_mean=900"
    (path,) = evaluate(tmp_path, "--save-traces", "--static", "1", "--workload", load)
    run = read_trace(str(path))
    unfinished = run.info["unfinished"]
    assert unfinished > 0 == run.info["failed"] and run.duration_s > 120
    n = unfinished + len(run.requests)
    assert any(f"{unfinished} of {n} requests" in line for line in run_doubts(run))
    assert not any("not measured" in line for line in run_doubts(run))


def test_a_trace_is_read_as_it_was_written(tmp_path):
    run = replace(read_trace(TRACES[0]), clock_schedule=((0.0, 1980), (3.0, 1350)), prefix_caching=False)
    path = tmp_path / "again.json"
    path.write_text(trace_text(run, seed=7))
    again = read_trace(str(path))
    assert again.clock_schedule == run.clock_schedule and not again.prefix_caching
    assert again.info == dict(run.info) | {"seed": 7}
    for name in ("arrival_s", "prompt_tokens", "output_tokens"):
        assert np.array_equal(getattr(again.requests, name), getattr(run.requests, name))
    assert np.array_equal(again.e2e_s, run.e2e_s) and again.energy_j == run.energy_j
    with pytest.raises(ConfigError, match="number of KV blocks"):
        trace_text(replace(run, num_kv_blocks=0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gpu_name": "NVIDIA H200"}, "the GPU is NVIDIA H200, and that of the pack NVIDIA H100 80GB HBM3"),
        ({"model": "/models/Qwen3-14B"}, "the model is /models/Qwen3-14B, and that of the pack Qwen3-8B"),
        ({"model": "Qwen/Qwen3-8B-FP8"}, None),
        ({"highest_sm_clock_mhz": 1755.0}, "clocks were not set and reached 1755 MHz"),
        ({"highest_sm_clock_mhz": 1965.0}, None),
    ],
)
def test_a_trace_of_another_server_than_the_packs_is_said(change, said):
    doubts = list(pack_doubts(replace(read_trace(TRACES[0]), info=change), load_pack("h100-qwen3-8b")))
    assert doubts == [] if said is None else [line for line in doubts if line.startswith(said)] == doubts


def test_a_trace_under_a_clock_that_the_pack_lacks_is_said():
    run = replace(read_trace(TRACES[0]), clock_schedule=((0.0, 2100),), max_num_seqs=256, info={})
    doubts = list(pack_doubts(run, load_pack("h100-qwen3-8b")))
    assert any(line.startswith("measured at 2100 MHz, and the pack has") for line in doubts)
    assert "max_num_seqs is 256, and that of the pack 128" in doubts


@pytest.mark.parametrize(
    "change",
    [
        {"secs": 1e300},
        {"begin": -1e18},
        {"max_num_seqs": 10**12},
        {"num_kv_blocks": 10**18},
        {"max_num_batched_tokens": 10**30},
        {"limit_schedule": [[0, 10**30]]},
        {"limit_schedule": [["nan", 3]]},
        {"clock_schedule": [[0, 10**30]]},
    ],
)
def test_a_trace_of_absurd_numbers_is_refused(change, tmp_path, capsys):
    raw = json.loads(Path(TRACES[0]).read_text())
    (tmp_path / "t.json").write_text(json.dumps(raw | {"info": raw["info"] | change}))
    assert main(["validate", str(tmp_path / "t.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("at_once", "said"),
    [(30, []), (0, ["at least 20 of 40 requests were sent late, because the client had too little CPU"])],
)
def test_requests_that_are_due_at_once_are_no_late_sends_of_a_slow_client(at_once, said):
    run = read_trace(TRACES[0])
    requests = run.requests.part(slice(40))
    arrival_s = np.maximum(np.arange(40.0), at_once)
    run = replace(run, requests=replace(requests, arrival_s=arrival_s), info={"late_sends": 20})
    assert [line.partition(":")[0] for line in run_doubts(run)] == said


@pytest.mark.parametrize(("gpus", "said"), [(1, 1), (2, 0), (4, 0)])
def test_energy_of_some_of_the_servers_gpus_is_said(gpus, said):
    run = replace(read_trace(TRACES[0]), info={"gpus": gpus, "tensor_parallel_size": 2})
    assert sum("energy is of 1 GPU(s)" in line for line in run_doubts(run)) == said


def test_an_error_is_beyond_its_bound_on_either_side_and_an_unknown_one_is_not():
    errors = {"energy": None, "tpot_mean": -0.06, "e2e_mean": 0.05, "ttft_p50": 0.2}
    assert beyond_bounds(errors) == {"tpot_mean": -0.06, "ttft_p50": 0.2}


SILENT = Endpoint.of("http://192.0.2.1:9")  # of another host, so that no process here is looked at


@pytest.fixture
def silent(monkeypatch):
    monkeypatch.setattr("fuel_ray.live.vllm.facts._version", lambda server: "0.32.0")
    monkeypatch.setattr("fuel_ray.live.vllm.facts._of_config", lambda server: {})


@pytest.mark.parametrize(
    ("cards", "seqs", "tokens"),
    [
        (Cards("NVIDIA H100 80GB HBM3", 1, 80 * 2**30), 1024, 8192),
        (Cards("NVIDIA A100-SXM4-80GB", 1, 80 * 2**30), 256, 2048),
        (Cards("NVIDIA B200", 1, 179 * 2**30), 1024, 16384),
        (Cards("NVIDIA L4", 2, 22 * 2**30), 256, 2048),
        (None, 128, 2048),
    ],
)
def test_what_nobody_says_is_vllms_default_and_is_called_assumed(silent, cards, seqs, tokens):
    facts = server_facts(SILENT, None, cards, said={})
    assert (facts.max_num_seqs, facts.max_num_batched_tokens) == (seqs, tokens)
    text = ", ".join(assumed(facts))
    assert f"max_num_seqs {seqs} (vLLM's default" in text and f"max_num_batched_tokens {tokens}" in text


def test_an_older_vllm_has_no_larger_default_for_the_largest_gpus(silent, monkeypatch):
    monkeypatch.setattr("fuel_ray.live.vllm.facts._version", lambda server: "0.20.2")
    facts = server_facts(SILENT, None, Cards("NVIDIA B200", 1, 179 * 2**30), said={})
    assert (facts.engine, facts.max_num_batched_tokens) == ("vLLM 0.20.2", 8192)


def test_flags_say_it_and_what_the_user_says_comes_first(silent):
    flags = ["m", "--max_num_seqs=64", "--max-num-batched-tokens", "4K", "-tp", "2", "--no-async-scheduling"]
    cache = CacheConfig(16, 100, prefix_caching=True)
    flags += ["--no-enable-prefix-caching", "--enable-chunked-prefill"]
    facts = server_facts(SILENT, cache, None, said={"max_num_seqs": (48, "--max-num-seqs")}, flags=flags)
    assert (facts.max_num_seqs, facts.max_num_batched_tokens, facts.tensor_parallel_size) == (48, 4096, 2)
    assert (facts.async_scheduling, facts.chunked_prefill, facts.prefix_caching) == (False, True, True)
    assert assumed(facts) == []


def test_a_server_in_development_mode_says_it(stub, monkeypatch):
    config = {
        "scheduler_config": {"max_num_seqs": 40, "max_num_batched_tokens": 3000, "async_scheduling": True},
        "cache_config": {"enable_prefix_caching": False},
        "parallel_config": {"tensor_parallel_size": 2},
    }
    asked = []
    answer = json.dumps({"vllm_config": config}).encode()
    monkeypatch.setattr(
        "fuel_ray.live.vllm.facts.ask", lambda server, path, **_: asked.append(path) or answer
    )
    facts = server_facts(Endpoint.of(stub.url), None, None, said={})
    assert (facts.max_num_seqs, facts.max_num_batched_tokens) == (40, 3000)
    assert (facts.async_scheduling, facts.prefix_caching, facts.tensor_parallel_size) == (True, False, 2)
    assert facts.chunked_prefill is None and asked == ["/server_info?config_format=json"]
