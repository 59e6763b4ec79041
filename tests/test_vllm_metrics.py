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
    with pytest.raises(TelemetryError, match="no metrics of vLLM"):
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
        ({"page": "<html>no</html>"}, "no metrics of vLLM"),
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


def _page(*lines, without=()):
    """The recorded page with these series in place of its own of the same names."""
    names = tuple({line.split("{")[0].split()[0] for line in lines} | set(without))
    kept = [line for line in PAGE.splitlines(True) if not line.startswith(names)]
    return "".join(kept) + "".join(f"{line}\n" for line in lines)


def _usage(*labels_values, name="vllm:kv_cache_usage_perc"):
    return [f'{name}{{{labels},model_name="tiny"}} {value}' for labels, value in labels_values]


def _info(block_size="16", num_gpu_blocks="1000", engine="0", value=1.0, **labels):
    labels = {"block_size": block_size, "num_gpu_blocks": num_gpu_blocks, "engine": engine, **labels}
    shown = ",".join(f'{name}="{text}"' for name, text in labels.items() if text is not None)
    return f"vllm:cache_config_info{{{shown}}} {value}"


USAGES = [
    ([('engine="0",pid="277"', 0.0), ('engine="0",pid="273"', 0.65), ('engine="0",pid="274"', 0.0)], 0.65),
    ([('engine="0"', 0.6), ('engine="1"', 0.2)], 0.4),
    ([('engine_index="0"', 0.6), ('engine_index="1"', 0.0)], 0.3),
    (
        [(f'engine="{e}",pid="{p}"', v) for e, p, v in [(0, 1, 0.6), (0, 2, 0.0), (1, 1, 0.0), (1, 2, 0.2)]],
        0.4,
    ),
    ([('engine="0",pid="1"', 0.0), ('engine="0",pid="2"', 0.0)], 0.0),
]


@pytest.mark.parametrize(("series", "usage"), USAGES)
def test_usage_is_the_mean_of_engines_and_never_of_processes(series, usage):
    assert parse_metrics(_page(*_usage(*series))).kv_usage == pytest.approx(usage)


@pytest.mark.parametrize(("today", "older", "usage"), [(0.0, 0.5, 0.5), (0.5, 0.0, 0.5), (0.3, 0.9, 0.3)])
def test_of_two_names_of_the_usage_the_one_that_is_set_is_believed(today, older, usage):
    series = _usage(('engine="0"', today)) + _usage(('engine="0"', older), name="vllm:gpu_cache_usage_perc")
    assert parse_metrics(_page(*series)).kv_usage == pytest.approx(usage)


def test_states_of_one_engine_that_several_processes_show_are_not_summed():
    lines = [
        f'vllm:num_requests_running{{engine="0",pid="{pid}"}} {n}' for pid, n in [(1, 7), (2, 0), (3, 6)]
    ]
    lines += ['vllm:num_requests_running{engine="1",pid="1"} 2']
    assert parse_metrics(_page(*lines)).running == 9


def test_counters_are_summed_over_engines_and_models_and_counted_once():
    name = "vllm:generation_tokens_total"
    of_engines = [
        f'{name}{{engine="{e}",model_name="{m}"}} {n}' for e, m, n in [(0, "a", 5), (0, "b", 7), (1, "a", 11)]
    ]
    assert parse_metrics(_page(*of_engines)).generation_tokens == 23
    twice = [*of_engines, f'{name}{{engine="1",model_name="a"}} 12']
    assert parse_metrics(_page(*twice)).generation_tokens == 24
    per_process = [*of_engines, *(f'{name}{{engine="1",model_name="a",pid="{pid}"}} 6' for pid in (1, 2))]
    assert parse_metrics(_page(*per_process)).generation_tokens == 23
    only_processes = [f'{name}{{engine="0",pid="{pid}"}} {n}' for pid, n in [(1, 6), (2, 9)]]
    assert parse_metrics(_page(*only_processes)).generation_tokens == 15


def test_a_counter_under_two_names_is_the_one_that_counts():
    lines = [
        'vllm:prefix_cache_queries_total{engine="0"} 0',
        'vllm:gpu_prefix_cache_queries_total{engine="0"} 90',
    ]
    assert parse_metrics(_page(*lines)).prefix_queries == 90


CACHES = [
    ([_info()], (16, 1000)),
    ([_info("4", effective_attention_block_size="256", kv_cache_size_tokens="70000")], (256, 1000)),
    ([_info("16", effective_attention_block_size="528")], (528, 1000)),
    ([_info("16", effective_attention_block_size="None")], (16, 1000)),
    ([_info("None", effective_attention_block_size="32")], (32, 1000)),
    # context parallelism over two ranks
    ([_info("16", effective_attention_block_size="32", kv_cache_size_tokens="32000")], (16, 1000)),
    # engines with their own, and under the labels of each the sum of two, as vLLM's front end has it
    ([_info(num_gpu_blocks="1000"), _info(num_gpu_blocks="400", engine="1")], (16, 1400)),
    ([_info(engine=e, kv_cache_size_tokens="16000") for e in "01"], (16, 2000)),
    ([_info(engine=e, kv_cache_size_tokens="8000") for e in "01"], (16, 1000)),
    ([_info(engine=e) for e in "01"], (16, 1000)),
    # what is older, or not yet whole, stays beside it
    ([_info(num_gpu_blocks="None"), _info()], (16, 1000)),
    ([_info(), _info(num_gpu_blocks="None")], (16, 1000)),
    ([_info("32", "777", value=0.0), _info()], (16, 1000)),
    ([_info(), _info("32", "777", value=0.0)], (16, 1000)),
    ([_info(num_gpu_blocks="900"), _info()], (16, 1000)),
    ([_info(num_gpu_blocks="None", num_gpu_blocks_override="300")], (16, 300)),
    ([_info(engine=None)], (16, 1000)),
]


@pytest.mark.parametrize(("series", "found"), CACHES)
def test_the_cache_is_what_its_engines_say_together(series, found):
    snapshot = parse_metrics(_page(*series))
    cache = snapshot.cache_config
    assert (cache.block_size, cache.num_gpu_blocks) == found and snapshot.cache_unknown is None


UNKNOWN = [
    ([_info(num_gpu_blocks="None")], r'its number of KV blocks .* num_gpu_blocks="None"'),
    ([_info(num_gpu_blocks="")], r'its number of KV blocks .* num_gpu_blocks=""'),
    ([_info(num_gpu_blocks="0")], r'its number of KV blocks .* num_gpu_blocks="0"'),
    ([_info(num_gpu_blocks=None)], r'its number of KV blocks .* num_gpu_blocks=""'),
    ([_info(), _info(num_gpu_blocks="None", engine="1")], r'num_gpu_blocks="1000" and num_gpu_blocks="None"'),
    ([_info("None")], r'KV block size .* block_size="None"'),
    ([_info(), _info("32", engine="1")], r'one KV block size .* block_size="16" and block_size="32"'),
]


@pytest.mark.parametrize(("series", "words"), UNKNOWN)
def test_what_is_not_known_of_the_cache_is_named(series, words):
    snapshot = parse_metrics(_page(*series))
    assert snapshot.cache_config is None and re.search(words, snapshot.cache_unknown)
    if "num_gpu_blocks" in words:
        assert "block size" not in snapshot.cache_unknown


def test_a_page_without_the_cache_says_so():
    snapshot = parse_metrics(_page(without=["vllm:cache_config_info"]))
    assert "vllm:cache_config_info is not on the page" in snapshot.cache_unknown


def test_a_hybrid_models_page_without_the_attentions_block_size_contradicts_no_one():
    """vLLM issue 51163: block_size 4 for --block-size 256; blocks times that are not the tokens."""
    cache = parse_metrics(_page(_info("4", kv_cache_size_tokens="200000"))).cache_config
    assert cache.uncertain and cache.may_have(256)
    assert not parse_metrics(_page(_info("16"))).cache_config.may_have(32)
    assert parse_metrics(_page(_info("4", effective_attention_block_size="256"))).cache_config.may_have(256)


def test_sums_of_histograms_are_read_over_engines_and_may_be_missing():
    assert parse_metrics(PAGE).tpot.mean_s == pytest.approx(3.2016265451334296 / 446)
    assert parse_metrics(_second_engine(PAGE)).tpot.sum_s == pytest.approx(2 * 3.2016265451334296)
    gone = "".join(line for line in PAGE.splitlines(True) if "_seconds_sum" not in line)
    snapshot = parse_metrics(gone)
    assert snapshot.tpot.count == 446 and snapshot.tpot.sum_s is None and snapshot.tpot.mean_s is None


def test_a_histogram_that_is_declared_without_samples_has_no_requests_yet():
    name = "vllm:request_time_per_output_token_seconds"
    fresh = parse_metrics("".join(line for line in PAGE.splitlines(True) if not line.startswith(name)))
    assert fresh.tpot.count == 0 and fresh.tpot.samples_s() == ()
    delta = difference(fresh, parse_metrics(PAGE), 1.0)
    assert delta.tpot.count == 446 and delta.tpot.mean_s is not None
    gone = parse_metrics("".join(line for line in PAGE.splitlines(True) if name not in line))
    assert gone.tpot is None


def test_engines_whose_histograms_have_other_bounds_are_added_at_those_that_they_share():
    name = "vllm:request_time_per_output_token_seconds_bucket"
    other = [f'{name}{{engine="1",le="{le}"}} {n}' for le, n in [("0.025", 1), ("0.03", 2), ("+Inf", 4)]]
    summed = parse_metrics(PAGE + "".join(f"{line}\n" for line in other)).tpot
    assert summed.upper_bounds_s[0] == 0.025 and summed.cumulative_counts == (444, 450)
