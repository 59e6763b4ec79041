"""The load generator against a real HTTP server that streams, stalls and dies."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest

from fuel_ray.errors import ConfigError, TelemetryError
from fuel_ray.live.load.loadgen import LoadGenerator
from fuel_ray.live.load.prompts import TokenPrompts, load_sharegpt
from fuel_ray.types import Requests
from tests.stub_vllm import Stub, serving


def _requests(n=5, gap_s=0.0, output_tokens=4, prefix=False):
    return Requests(
        arrival_s=np.arange(n) * gap_s,
        prompt_tokens=np.arange(n, dtype=np.int64) + 6,
        output_tokens=np.full(n, output_tokens, np.int64),
        prefix_id=np.where(np.arange(n) % 2 == 0, 0, -1) if prefix else np.full(n, -1, np.int64),
        prefix_tokens=np.where(np.arange(n) % 2 == 0, 5, 0) if prefix else np.zeros(n, np.int64),
    )


def _prompts(requests, seed=0):
    return TokenPrompts(requests, vocab_size=100, rng=np.random.default_rng(seed))


def _load(stub, requests, **options):
    load = LoadGenerator(stub.url, requests, prompts=_prompts(requests), model="tiny", **options)
    load.start()
    assert load.wait(20.0)
    return load.result()


def test_every_request_is_answered_with_as_many_tokens_as_asked():
    requests = _requests(5, gap_s=0.01)
    with serving(Stub()) as stub:
        result = _load(stub, requests)
    records = result.records
    assert result.errors == (None,) * 5 and result.received_tokens == (4,) * 5
    order = np.argsort(records.arrival_s)
    assert records.prompt_tokens[order].tolist() == requests.prompt_tokens.tolist()
    assert (records.ttft_s > 0).all() and (records.finished_s >= records.first_token_s).all()
    assert np.isnan(records.admitted_s).all()
    assert [len(gaps) for gaps in result.itls_s] == [3] * 5
    assert (records.first_token_s > records.arrival_s).all()
    body = next(body for body in stub.bodies if len(body["prompt"]) == 6)
    assert body["max_tokens"] == body["min_tokens"] == 4 and body["ignore_eos"] is True
    assert body["stream_options"] == {"include_usage": True}


def test_arrivals_do_not_wait_for_answers():
    with serving(Stub(token_delay_s=0.1)) as stub:
        result = _load(stub, _requests(30, output_tokens=2))
    assert stub.most_in_flight == 30
    assert result.duration_s < 2.0


def test_merged_chunks_are_counted_as_tokens():
    with serving(Stub(completion="merged")) as stub:
        result = _load(stub, _requests(1))
    assert result.received_tokens == (4,) and result.itls_s == ((),) and result.errors == (None,)


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ("html", "text/html"),
        ("refuse", "too long"),
        ("die", "Error"),
        ("short", "3 tokens came, 4"),
        ("nousage", "no usage"),
        ("infinite", "OverflowError"),
        ("error", "engine died"),
        ("silent", "timed out"),
    ],
)
def test_a_failure_is_noted_per_request(completion, message):
    with serving(Stub(completion=completion)) as stub:
        result = _load(stub, _requests(2), timeout_s=0.3)
    assert all(message in error for error in result.errors) and len(result.errors) == 2
    assert np.isnan(result.records.finished_s).all()


def test_a_server_that_is_not_there_is_an_error_per_request():
    stub = Stub(url="http://127.0.0.1:1")
    assert all("ClientConnectorError" in error for error in _load(stub, _requests(2)).errors)


@pytest.mark.parametrize(("drops", "failed"), [(1, 0), (2, 1)])
def test_a_connection_dropped_before_the_first_byte_is_tried_once_more(drops, failed):
    with serving(Stub(drop_first=drops)) as stub:
        result = _load(stub, _requests(1))
    assert sum(error is not None for error in result.errors) == failed


def test_the_client_says_what_it_costs_while_it_runs_and_afterwards():
    requests = _requests(4, output_tokens=30)
    with serving(Stub()) as stub:
        load = LoadGenerator(stub.url, requests, prompts=_prompts(requests), model="tiny")
        assert load.busy_s == 0.0
        load.start()
        while not load.take().ended:
            time.sleep(0.01)
        running_s = load.busy_s
        assert load.wait(20.0)
    assert 0.0 < running_s <= load.busy_s < load.result().duration_s


def test_late_sends_are_counted():
    with serving(Stub()) as stub:
        requests = _requests(3, gap_s=0.001)
        result = _load(stub, replace(requests, arrival_s=requests.arrival_s - 0.5))
        punctual = _load(stub, _requests(3, gap_s=0.02))
    assert result.late_sends == 3
    assert punctual.late_sends < 3


def test_records_are_taken_while_the_load_runs_each_once():
    requests = _requests(20, gap_s=0.02)
    with serving(Stub()) as stub:
        load = LoadGenerator(stub.url, requests, prompts=_prompts(requests), model="m")
        load.start()
        time.sleep(0.15)
        early = load.take().ended
        assert load.wait(5.0)
        late = load.take().ended
        assert 0 < len(early) < 20 and len(early) + len(late) == 20
        assert len(load.take().ended) == 0
        assert len(load.result().records) == 20
        load.stop()


def test_what_is_in_flight_can_be_looked_at():
    with serving(Stub(completion="silent")) as stub:
        load = LoadGenerator(stub.url, _requests(3), prompts=["a", "b", "c"], model="m")
        load.start()
        time.sleep(0.1)
        progress = load.take()
        assert progress.sent == 3 and len(progress.in_flight) == 3 and not progress.ended
        assert all(progress.now_s - attempt.arrival_s > 0.05 for attempt in progress.in_flight)
        load.stop()
        load.stop()
        assert load.result().errors == ("cancelled",) * 3


def test_a_load_stopped_early_keeps_its_partial_result():
    requests = _requests(1000, gap_s=0.01)
    with serving(Stub()) as stub:
        load = LoadGenerator(stub.url, requests, prompts=_prompts(requests), model="m")
        load.start()
        time.sleep(0.2)
        load.stop()
        result = load.result()
    assert 0 < len(result.records) < 1000 and result.duration_s < 2.0


def test_a_generator_that_never_started_can_be_stopped():
    LoadGenerator("http://x", _requests(1), prompts=["a"], model="m").stop()


def test_a_fault_of_the_generator_is_raised_to_its_owner():
    with serving(Stub()) as stub:
        load = LoadGenerator(stub.url, _requests(3), prompts=["one only"], model="m")
        load.start()
        assert load.wait(5.0)
        with pytest.raises(TelemetryError, match="IndexError"):
            load.result()


def test_an_empty_load_is_over_at_once():
    with serving(Stub()) as stub:
        assert len(_load(stub, _requests(0)).records) == 0


def test_prompts_have_exact_lengths_and_share_their_prefixes():
    requests = _requests(6, prefix=True)
    prompts = _prompts(requests)
    lists = [prompts[index] for index in range(6)]
    assert [len(ids) for ids in lists] == requests.prompt_tokens.tolist()
    assert lists[0][:5] == lists[2][:5] == lists[4][:5] != lists[1][:5]
    assert lists[2][5:7] != lists[4][5:7]
    assert all(0 <= token < 100 for ids in lists for token in ids)
    assert [_prompts(requests)[index] for index in (5, 3)] == [lists[5], lists[3]]
    assert _prompts(requests, seed=1)[0] != lists[0]


def _sharegpt(path, *pairs):
    items = [{"conversations": [{"value": question}, {"value": answer}]} for question, answer in pairs]
    path.write_text(json.dumps([*items, {"conversations": []}, {}, {"conversations": [1, 2]}]))
    return path


def test_sharegpt_gives_questions_and_answer_lengths(tmp_path):
    path = _sharegpt(tmp_path / "s.json", ("q" * 40, "a" * 80), ("hi", "a" * 80), ("q" * 9000, "a" * 80))
    texts, lengths = load_sharegpt(path, 3, np.random.default_rng(0))
    assert texts == ["q" * 40] * 3 and lengths.tolist() == [20] * 3


@pytest.mark.parametrize("text", ["{", "{}", "[]", '[{"conversations": [{"value": "a"}, {"value": "b"}]}]'])
def test_a_file_that_is_not_sharegpt_is_a_config_error(tmp_path, text):
    path = tmp_path / "s.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"s\.json"):
        load_sharegpt(path, 1, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="No such file"):
        load_sharegpt(tmp_path / "missing", 1, np.random.default_rng(0))
