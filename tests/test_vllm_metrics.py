"""/metrics pages, good and bad, and the monitor against a real HTTP server."""

import dataclasses
import re
import time
from contextlib import closing

import pytest

from fuel_ray.errors import ConfigError, TelemetryError
from fuel_ray.live.vllm.kv_monitor import KVCacheMonitor, MetricsClient
from fuel_ray.live.vllm.metrics import difference, parse_metrics
from tests.stub_vllm import PAGE, Stub, serving


def _until(condition, timeout_s=5.0):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true"
        time.sleep(0.01)


def _set(page, name, value):
    return re.sub(rf"(?m)^({name}(?:{{.*}})?) \S+$", rf"\1 {value}", page)


def _second_engine(page):
    lines = [
        line.replace('engine="0"', 'engine="1"') for line in page.splitlines(True) if 'engine="0"' in line
    ]
    return page + "".join(lines)


def _error(url, **client):
    with pytest.raises(TelemetryError) as caught, closing(MetricsClient(url, **client)) as metrics:
        metrics.scrape()
    return str(caught.value)


def test_a_recorded_page_gives_its_figures():
    snapshot = parse_metrics(PAGE)
    assert (snapshot.running, snapshot.waiting) == (30, 10)
    assert snapshot.kv_usage == pytest.approx(108 / 299)
    assert (snapshot.prompt_tokens, snapshot.generation_tokens) == (79436, 33618)
    assert (snapshot.requests_succeeded, snapshot.preemptions) == (446, 0)
    assert (snapshot.prefix_queries, snapshot.prefix_hits) == (82033, 63488)
    assert (snapshot.cache_config.block_size, snapshot.cache_config.num_gpu_blocks) == (32, 300)
    assert snapshot.cache_config.used_blocks(snapshot.kv_usage) == 108
    assert (snapshot.ttft.count, snapshot.e2e.count) == (484, 446)


def test_engines_are_summed_and_their_usage_is_weighted_by_blocks():
    page = _second_engine(PAGE)
    page = page.replace('num_gpu_blocks="300"', 'num_gpu_blocks="100"', 1)
    page = re.sub(r'(?m)^(vllm:kv_cache_usage_perc\{engine="0".*\}) .*$', r"\1 0.0", page)
    snapshot = parse_metrics(page)
    assert (snapshot.running, snapshot.ttft.count, snapshot.requests_succeeded) == (60, 968, 892)
    assert snapshot.cache_config.num_gpu_blocks == 400
    assert snapshot.kv_usage == pytest.approx(0.75 * 108 / 299)


def test_older_names_are_understood():
    page = PAGE.replace("kv_cache_usage_perc", "gpu_cache_usage_perc").replace(
        "vllm:prefix_cache_", "vllm:gpu_prefix_cache_"
    )
    page = page.replace("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds")
    old, new = parse_metrics(page), parse_metrics(PAGE)
    assert old == new


def test_what_the_page_does_not_say_is_none():
    gone = ("prefix_cache", "num_preemptions", "time_to_first", "cache_config", "prompt_tokens_cached")
    page = "".join(line for line in PAGE.splitlines(True) if not any(name in line for name in gone))
    snapshot = parse_metrics(page)
    assert snapshot.prefix_hits is snapshot.preemptions is snapshot.ttft is snapshot.cache_config is None
    assert snapshot.prompt_tokens_cached is None
    assert difference(snapshot, snapshot, 1.0).preemptions is None


def test_a_counter_declared_without_samples_is_zero():
    page = "".join(
        line for line in PAGE.splitlines(True) if not line.startswith("vllm:request_success_total")
    )
    assert parse_metrics(page).requests_succeeded == 0


@pytest.mark.parametrize("name", ["num_requests_running", "kv_cache_usage_perc", "generation_tokens_total"])
def test_a_renamed_metric_is_named(name):
    with pytest.raises(TelemetryError, match=f"vllm:{name}"):
        parse_metrics(PAGE.replace(f"vllm:{name}", f"vllm:new_{name}"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vllm:num_requests_running", "NaN"),
        ("vllm:kv_cache_usage_perc", "36.1"),
        ("vllm:prompt_tokens_total", "-1"),
        ("vllm:generation_tokens_total", "NaN"),
        ("vllm:num_preemptions_total", "+Inf"),
    ],
)
def test_an_impossible_value_is_named(name, value):
    with pytest.raises(TelemetryError, match=name):
        parse_metrics(_set(PAGE, name, value))


@pytest.mark.parametrize("page", ["", "<html>\n<body>502</body></html>\n", "python_info 1.0\n"])
def test_a_page_without_vllm_says_so(page):
    with pytest.raises(TelemetryError, match="no metric of vLLM"):
        parse_metrics(page)


def test_a_page_cut_anywhere_is_an_error_or_complete():
    for end in range(len(PAGE) - 1, 200, -97):
        page = PAGE[:end]
        try:
            snapshot = parse_metrics(page)
        except TelemetryError:
            continue
        assert page.endswith("\n") and snapshot.running == 30


def test_a_malformed_line_is_an_error():
    with pytest.raises(TelemetryError, match="malformed"):
        parse_metrics(_set(PAGE, "vllm:num_requests_running", "thirty"))


def _later(page=PAGE):
    page = _set(page, "vllm:generation_tokens_total", 33818)
    page = _set(page, "vllm:prefix_cache_queries_total", 82133)
    page = _set(page, "vllm:prefix_cache_hits_total", 63538)
    return parse_metrics(page)


def test_rates_come_from_differences():
    delta = difference(parse_metrics(PAGE), _later(), 2.0)
    assert not delta.restarted
    assert delta.generation_tokens_per_s == 100.0
    assert delta.requests_per_s == 0.0
    assert delta.prefix_hit_rate == 0.5
    assert delta.ttft.count == 0
    assert difference(parse_metrics(PAGE), parse_metrics(PAGE), 1.0).prefix_hit_rate is None
    with pytest.raises(TelemetryError):
        difference(parse_metrics(PAGE), _later(), 0.0)


@pytest.mark.parametrize("name", ["vllm:generation_tokens_total", "process_start_time_seconds"])
def test_a_restart_is_seen_and_counts_begin_anew(name):
    after = parse_metrics(_set(PAGE, name, 200))
    delta = difference(parse_metrics(PAGE), after, 1.0)
    assert delta.restarted
    assert delta.prompt_tokens == 79436
    assert delta.generation_tokens == after.generation_tokens
    assert (delta.prefix_hits, delta.ttft) == (63488, after.ttft)


def test_the_state_has_the_keys_of_the_seed_and_usage_is_a_share():
    with serving(Stub()) as stub:
        monitor = KVCacheMonitor(base_url=stub.url, interval=0.05)
        monitor.start()
        try:
            first = monitor.get_current_state()
            assert "token_throughput" not in first  # unknown, not 0
            _until(lambda: len(monitor.trace()) >= 3)
            stub.page = _set(stub.page, "vllm:generation_tokens_total", 33718)
            _until(lambda: monitor.get_current_state()["token_throughput"] > 0)
            state = monitor.get_current_state()
        finally:
            monitor.stop()
    assert state["kv_cache_usage"] == state["cache_usage_perc"] == pytest.approx(108 / 299)
    assert state["kv_blocks_used_ratio"] == pytest.approx(108 / 299)
    assert (state["num_requests_running"], state["num_requests_waiting"]) == (30, 10)
    assert (state["used_blocks"], state["free_blocks"], state["used_tokens"]) == (108, 191, 108 * 32)
    assert all("/metrics/?name[]=vllm:" in path.replace("%3A", ":") for path in stub.metrics_paths)
    times = [time_s for time_s, _ in monitor.trace()]
    assert times == sorted(times)
    with pytest.raises(TelemetryError, match="not running"):
        monitor.get_current_state()


def test_a_server_that_cannot_filter_is_read_in_full():
    with serving(Stub(filters=False)) as stub, KVCacheMonitor(stub.url, 0.05) as monitor:
        _until(lambda: len(monitor.trace()) >= 3)
        assert monitor.trace()[-1][1].ttft.count == 484
        assert stub.metrics_paths[-1] == "/metrics"
        assert sum("name" in path for path in stub.metrics_paths) == 1


def test_a_dead_server_is_an_error_and_not_an_old_value():
    with serving(Stub()) as stub, KVCacheMonitor(stub.url, 0.05, timeout_s=0.3) as monitor:
        assert monitor.get_current_state()["num_requests_running"] == 30
        stub.stop()
        time.sleep(0.5)  # two intervals and the time-out
        count = len(monitor.trace())
        with pytest.raises(TelemetryError, match=re.escape(stub.url)):
            monitor.get_current_state()
        assert len(monitor.trace()) == count


def test_a_hanging_server_is_an_error():
    with serving(Stub(metrics_delay_s=3.0)) as stub:
        assert "timed out" in _error(stub.url, timeout_s=0.1)


def test_the_trace_is_bounded():
    with serving(Stub()) as stub, KVCacheMonitor(stub.url, 0.05, max_samples=2) as monitor:
        _until(lambda: len(stub.metrics_paths) >= 4)
        assert len(monitor.trace()) == 2


def test_an_idle_connection_that_was_dropped_is_reopened():
    with serving(Stub()) as stub:
        client = MetricsClient(stub.url)
        client.scrape()
        client._connection.sock.shutdown(2)
        assert client.scrape().running == 30
        client.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": 503}, "HTTP 503"),
        ({"page": "<html>no</html>"}, "no metric of vLLM"),
        ({"truncate": True}, "cut off"),
        ({"page": PAGE[:-3]}, "cut off"),
    ],
)
def test_a_bad_answer_is_an_error_with_the_url(change, message):
    with serving(dataclasses.replace(Stub(), **change)) as stub:
        text = _error(stub.url)
    assert message in text and stub.url in text


def test_a_wrong_url_is_named():
    assert "127.0.0.1:1" in _error("http://127.0.0.1:1")
    for url in ("localhost:8000", "ftp://x", "http://", "http://host:port"):
        assert url in _error(url)


@pytest.mark.parametrize("interval", [0.01, 0.0, float("nan"), float("inf")])
def test_an_interval_below_50_ms_is_refused(interval):
    with pytest.raises(ConfigError, match="interval"):
        KVCacheMonitor("http://localhost:8000", interval)
