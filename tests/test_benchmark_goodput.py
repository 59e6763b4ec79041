"""What the benchmark has in the spelling of `vllm bench serve`: --base-url, --max-concurrency, --goodput."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from fuel_ray.cli import main
from fuel_ray.commands.benchmark import _goodput
from fuel_ray.live.load.loadgen import LoadResult
from fuel_ray.report.benchmark import _goodput_figures
from fuel_ray.types import RequestRecords
from tests.fake_nvml import FakeNvml
from tests.real_vllm import BIN
from tests.stub_vllm import serving
from tests.test_live_node import CountingStub


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(driver=False))
    with serving(CountingStub()) as served:
        yield served


def benchmark(stub, tmp_path, *flags):
    fixed = ["--model", "tiny", "--base-url", stub.url, "--num-prompts", "24"]
    lengths = ["--random-input-len", "8", "--random-output-len", "5"]
    code = main(["benchmark", *fixed, *lengths, "--save-result", "--result-dir", str(tmp_path), *flags])
    (path,) = tmp_path.glob("*.json")
    return code, json.loads(path.read_text(), parse_constant=pytest.fail)


def test_no_more_requests_are_in_flight_than_asked_and_the_others_wait_outside_the_latencies(stub, tmp_path):
    stub.token_delay_s = 0.01
    code, result = benchmark(stub, tmp_path, "--request-rate", "300", "--max-concurrency", "3")
    assert code == 0 and result["completed"] == 24 and result["max_concurrency"] == 3
    assert stub.most_in_flight == 3
    assert result["p99_client_queue_time_ms"] > 200  # 7 times 50 ms after the first three, less 80 ms
    assert 24 * result["mean_e2el_ms"] <= 3 * 1000 * result["duration"], (
        "three at a time, nothing of the queue"
    )
    assert result["mean_e2el_including_client_queue_ms"] == pytest.approx(
        result["mean_e2el_ms"] + result["mean_client_queue_time_ms"]
    )


def test_at_an_infinite_rate_a_server_always_has_as_many_as_may_be_in_flight(stub, tmp_path):
    code, result = benchmark(stub, tmp_path, "--request-rate", "inf", "--max-concurrency", "4")
    assert code == 0 and result["request_rate"] == "inf" and stub.most_in_flight == 4
    assert result["p99_client_queue_time_ms"] > 0
    assert "mean_e2el_including_client_queue_ms" not in result


def test_without_them_nothing_is_kept_back_and_there_is_no_goodput(stub, tmp_path, capsys):
    stub.token_delay_s = 0.1
    code, result = benchmark(stub, tmp_path, "--request-rate", "inf")
    assert code == 0 and result["max_concurrency"] is None and stub.most_in_flight == 24
    assert result["request_goodput"] is None and "goodput" not in capsys.readouterr().out
    assert not [key for key in result if "client_queue" in key]


@pytest.mark.parametrize(("limits", "share"), [(["ttft:60000", "tpot:60000"], 1), (["e2el:0"], 0)])
def test_goodput_is_what_is_within_all_limits_per_second(stub, tmp_path, capsys, limits, share):
    _, result = benchmark(stub, tmp_path, "--request-rate", "100", "--goodput", *limits)
    assert result["request_goodput"] == share * result["request_throughput"]
    assert f"goodput    {result['request_goodput']:.2f} requests/s" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["ttft", "ttft:", "ttft:x", "ttft:nan", "ttft:-1", "e2e:5", "itl:5"])
def test_a_wrong_limit_is_said_before_anything_is_sent(stub, words, capsys):
    assert main(["benchmark", "--model", "tiny", "--base-url", stub.url, "--goodput", words]) == 2
    assert f"--goodput {words}: " in capsys.readouterr().err and not stub.bodies


@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_a_wrong_concurrency_is_said(stub, value, capsys):
    assert main(["benchmark", "--model", "tiny", "--base-url", stub.url, f"--max-concurrency={value}"]) == 2
    assert "--max-concurrency" in capsys.readouterr().err and not stub.bodies


# TTFT, e2e and output tokens of requests; the last one failed
TTFTS_S, E2ES_S, TOKENS = (0.5, 1.0, 1.5, 0.5, 0.1), (1.5, 2.0, 2.5, 0.5, np.nan), (11, 21, 5, 1, 5)
LIMITS = [
    (["ttft:1000"], 3),  # the limit itself is within
    (["ttft:1000", "tpot:60"], 2),  # 0.1, 0.05 and 0.25 s per token, and none of one token
    (["ttft:2000", "tpot:300", "e2el:2000"], 3),
    (["tpot:0"], 1),
]


def load_result():
    n = len(TTFTS_S)
    arrival_s = np.zeros(n)
    records = RequestRecords(
        arrival_s,
        np.full(n, np.nan),
        np.array(TTFTS_S),
        np.array(E2ES_S),
        np.ones(n, int),
        np.array(TOKENS),
        np.zeros(n, int),
    )
    errors = (*[None] * (n - 1), "refused")
    return LoadResult(records, TOKENS, ((),) * n, errors, 0, duration_s=2.0, held_s=(0.0,) * n)


@pytest.mark.parametrize(("limits", "good"), LIMITS)
def test_a_request_is_good_if_it_is_within_every_limit(limits, good):
    assert _goodput_figures(load_result(), _goodput(limits)) == {"request_goodput": good / 2.0}


THEIRS = """
import argparse, json, sys
from vllm.benchmarks.serve import calculate_metrics, check_goodput_args
from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
ttfts, e2es, tokens, limits = json.loads(sys.argv[1])
outputs = [
    RequestFuncOutput(success=e is not None, latency=e or 0.0, output_tokens=n, ttft=t, prompt_len=1)
    for t, e, n in zip(ttfts, e2es, tokens)
]
for own in limits:
    goodput = check_goodput_args(argparse.Namespace(goodput=own))
    metrics, _ = calculate_metrics([], outputs, 2.0, None, [99.0], goodput)
    print("goodput", metrics.request_goodput)
"""


@pytest.mark.vllm
@pytest.mark.skipif(not BIN, reason="FUEL_RAY_VLLM is not set")
def test_vllm_itself_counts_the_same():
    known = [None if np.isnan(e2e_s) else e2e_s for e2e_s in E2ES_S]
    given = json.dumps([TTFTS_S, known, TOKENS, [limits for limits, _ in LIMITS]])
    done = subprocess.run(
        [Path(BIN) / "python", "-c", THEIRS, given], capture_output=True, text=True, check=True
    )
    theirs = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("goodput")]
    assert theirs == [good / 2.0 for _, good in LIMITS]
