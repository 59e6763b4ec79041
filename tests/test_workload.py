import json
import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuel_ray.errors import ConfigError
from fuel_ray.tuning.episodes import HELD_OUT_SEED, held_out_episodes
from fuel_ray.types import Requests
from fuel_ray.workload.spec import drawn, parse_workload
from fuel_ray.workload.stretches import Stretches, different

SYNTHETIC = ("steady", "gamma", "piecewise", "diurnal", "mmpp", "chat-prefix")
BUILT_IN = (*SYNTHETIC, "azure-conv", "azure-code", "diurnal:lengths=azure-code", "steady:lengths=fixed")
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def generate(spec: str, duration_s: float, *, seed: int = 0, start_s: float = 0.0) -> Requests:
    return parse_workload(spec).generate(duration_s, rng=np.random.default_rng(seed), start_s=start_s)


def as_bytes(requests: Requests) -> bytes:
    return b"".join(getattr(requests, column).tobytes() for column in Requests.__slots__)


def written(path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return f"path={path}"


def mooncake(path, *prompts: list[int], tokens: int = 10_000) -> str:
    rows = [
        {"timestamp": 1000 * n, "input_length": tokens, "output_length": 5, "hash_ids": prompt}
        for n, prompt in enumerate(prompts)
    ]
    return "mooncake:" + written(path, "\n".join(map(json.dumps, rows)))


def check_columns(requests: Requests, duration_s: float) -> None:
    assert requests.arrival_s.dtype == np.float64
    assert np.all(np.diff(requests.arrival_s) >= 0)
    assert np.all((requests.arrival_s >= 0) & (requests.arrival_s < duration_s))
    for column in ("prompt_tokens", "output_tokens", "prefix_id", "prefix_tokens"):
        assert getattr(requests, column).dtype == np.int64
        assert len(getattr(requests, column)) == len(requests)
    assert np.all(requests.prompt_tokens >= 1) and np.all(requests.output_tokens >= 1)
    assert np.all(requests.prefix_tokens <= requests.prompt_tokens)
    assert np.array_equal(requests.prefix_id >= 0, requests.prefix_tokens > 0)
    ids = np.unique(requests.prefix_id[requests.prefix_id >= 0])
    assert np.array_equal(ids, np.arange(len(ids)))


@settings(deadline=None, max_examples=60)
@given(
    spec=st.sampled_from(BUILT_IN),
    duration_s=st.floats(0, 200),
    start_s=st.floats(0, 5000),
    seed=st.integers(0, 2**32),
)
def test_every_span_of_every_workload_is_well_formed(spec, duration_s, start_s, seed):
    check_columns(generate(spec, duration_s, seed=seed, start_s=start_s), duration_s)


@pytest.mark.parametrize("spec", SYNTHETIC)
def test_mean_rate_is_the_one_stated(spec):
    duration_s = 120_000.0
    stated = parse_workload(spec).mean_rate_rps
    assert len(generate(spec, duration_s)) / duration_s == pytest.approx(stated, rel=0.03)


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gamma_gaps_are_as_bursty_as_asked(cv):
    gaps_s = np.diff(generate(f"gamma:rate_rps=5,cv={cv}", 20_000).arrival_s)
    assert gaps_s.mean() == pytest.approx(0.2, rel=0.03)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.03)


def test_gamma_arrivals_are_stationary_from_the_first_second():
    workload = parse_workload("gamma:rate_rps=5,cv=3")
    counts = [len(workload.generate(1, rng=np.random.default_rng(seed))) for seed in range(5000)]
    assert np.mean(counts) == pytest.approx(5, rel=0.05)


def test_steady_arrivals_are_poisson():
    counts = np.histogram(generate("steady:rate_rps=5", 20_000).arrival_s, bins=20_000)[0]
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.05)


def test_mmpp_counts_vary_more_than_poisson_and_keep_to_two_rates():
    counts = np.histogram(generate("mmpp:low_rps=2,high_rps=20,dwell_s=600", 60_000).arrival_s, bins=2000)[0]
    low, high = counts[counts < 300] / 30, counts[counts >= 300] / 30
    assert counts.var() / counts.mean() > 20
    assert np.median(low) == pytest.approx(2, rel=0.1) and np.median(high) == pytest.approx(20, rel=0.1)


def test_piecewise_rates_follow_the_steps_and_repeat():
    arrival_s = generate("piecewise:rates=0@60+10@30", 9000).arrival_s % 90
    assert np.all(arrival_s >= 60)
    assert len(arrival_s) == pytest.approx(100 * 300, rel=0.02)
    assert parse_workload("piecewise:rates=0@60+10@30").period_s == 90


def test_diurnal_load_starts_low_and_peaks_after_half_a_period():
    phase_s = generate("diurnal", 120_000).arrival_s % 1200
    rate_rps = np.histogram(phase_s, bins=60, range=(0, 1200))[0] / (100 * 20)
    assert rate_rps[[0, 29, 59]] == pytest.approx([1, 12, 1], abs=0.25)
    assert rate_rps[14] == pytest.approx(6.5, abs=0.5)


@pytest.mark.parametrize(("spec", "start_s"), [("diurnal", 600), ("piecewise:rates=1@600+12@600", 600)])
def test_a_start_moves_the_workloads_own_time(spec, start_s):
    assert len(generate(spec, 100, start_s=start_s)) > 5 * len(generate(spec, 100))


def test_stationary_workloads_have_no_period_and_ignore_the_start():
    for spec in ("steady", "gamma", "mmpp"):
        assert parse_workload(spec).period_s is None
        assert as_bytes(generate(spec, 50, start_s=7)) == as_bytes(generate(spec, 50))


@pytest.mark.parametrize(
    ("spec", "prompt_mean", "output_mean"),
    [
        ("steady", 512, 220),
        ("chat-prefix", 512, 220),
        ("steady:lengths=sharegpt", 161, 338),
        ("steady:prompt_mean=2000,output_mean=500", 2000, 500),
        ("steady:lengths=azure-code", 2008, 28.9),
    ],
)
def test_mean_lengths_are_the_ones_asked_for(spec, prompt_mean, output_mean):
    requests = generate(spec, 10_000)
    assert requests.prompt_tokens.mean() == pytest.approx(prompt_mean, rel=0.03)
    assert requests.output_tokens.mean() == pytest.approx(output_mean, rel=0.06)


def test_lengths_stay_within_their_limits():
    requests = generate("steady:max_prompt_tokens=1024,max_output_tokens=512", 5000)
    assert (requests.prompt_tokens.max(), requests.output_tokens.max()) == (1024, 512)
    assert requests.prompt_tokens.mean() == pytest.approx(512, rel=0.03)


def test_listed_requests_come_as_they_are_written_and_once():
    requests = generate("listed:requests=2.5@1024/4+0@128/500*2", 60)
    assert list(requests.arrival_s) == [0, 0, 2.5] and list(requests.prompt_tokens) == [128, 128, 1024]
    assert (
        list(requests.output_tokens) == [500, 500, 4] and len(generate("listed:requests=0@1/1+3@1/1", 3)) == 1
    )


def test_fixed_lengths_are_all_equal():
    requests = generate("steady:lengths=fixed,prompt_mean=100,output_mean=7", 20)
    assert set(requests.prompt_tokens) == {100} and set(requests.output_tokens) == {7}


def test_shared_prefixes_go_in_front_of_the_prompt():
    requests = generate(
        "steady:lengths=fixed,prompt_mean=100,prefixes=4,prefix_tokens=64,prefix_share=0.7", 5000
    )
    shares = requests.prefix_id >= 0
    assert shares.mean() == pytest.approx(0.7, abs=0.02)
    assert set(requests.prompt_tokens[shares]) == {164} and set(requests.prompt_tokens[~shares]) == {100}
    popularity = np.bincount(requests.prefix_id[shares])
    assert popularity / popularity.max() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4], abs=0.03)


@pytest.mark.parametrize("spec", BUILT_IN)
def test_a_seed_gives_the_same_bytes_also_after_pickling(spec):
    workload = parse_workload(spec)
    copy = pickle.loads(pickle.dumps(workload))
    first, again = (w.generate(100, rng=np.random.default_rng(3), start_s=5) for w in (workload, copy))
    assert as_bytes(first) == as_bytes(again)
    assert workload.digest() == copy.digest()


def test_seeds_differ():
    assert as_bytes(generate("diurnal", 100, seed=1)) != as_bytes(generate("diurnal", 100, seed=2))


def test_changing_what_was_generated_does_not_change_the_workload():
    workload = parse_workload("azure-conv")
    first = workload.generate(60, rng=np.random.default_rng())
    before = as_bytes(first)
    first.prompt_tokens[:] = 1
    assert as_bytes(workload.generate(60, rng=np.random.default_rng())) == before


def test_digests_name_the_definition_and_not_its_spelling():
    specs = (
        *BUILT_IN,
        "steady:rate_rps=6",
        "diurnal:prefixes=2",
        "diurnal:sigma=0.5",
        "azure-code:rate_scale=2",
    )
    assert len({parse_workload(spec).digest() for spec in specs}) == len(specs)
    assert parse_workload("diurnal:period_s=1200,low_rps=1").digest() == parse_workload("diurnal").digest()


def test_digests_are_stable_over_runs():
    assert parse_workload("diurnal").digest() == "a81ec97336b8"


def test_a_trace_digest_follows_the_content_and_not_the_path(tmp_path):
    def digest(file: str, text: str) -> str:
        return parse_workload("speeds:" + written(tmp_path / file, text)).digest()

    assert digest("a", "1 2 3") == digest("b", "[1,\n2, 3]") != digest("a", "1 2 4")


def test_the_halves_of_a_trace_are_the_trace():
    whole = parse_workload("azure-conv:rate_scale=2")
    halves = whole.halves
    assert [half.period_s for half in halves] == [whole.period_s / 2] * 2
    rng = np.random.default_rng(0)
    first, second = (half.generate(half.period_s, rng=rng) for half in halves)
    both = whole.generate(whole.period_s, rng=rng)
    arrival_s = [*first.arrival_s, *(second.arrival_s + whole.period_s / 2)]
    assert arrival_s == pytest.approx(both.arrival_s)
    assert [*first.output_tokens, *second.output_tokens] == both.output_tokens.tolist()
    assert parse_workload("diurnal").halves is None and parse_workload("mixed").halves is None


def test_held_out_episodes_of_a_recorded_trace_share_no_request():
    second = parse_workload("azure-code:rate_scale=0.3").halves[1]
    seeds, seconds = different(second, seeds=10, seconds=1200)
    assert (seeds, seconds) == (4, 1200)
    cut, spans = Stretches(second), []
    for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + seeds):
        begin_s = cut.start_s(seconds, seed=seed)
        spans.append((begin_s, begin_s + seconds))
        requests = drawn(cut, seconds, seed=seed, random_start=True)
        there = (second.requests.arrival_s >= begin_s) & (second.requests.arrival_s < begin_s + seconds)
        assert requests.arrival_s == pytest.approx(second.requests.arrival_s[there] - begin_s)
    spans.sort()
    assert all(end_s <= next_s for (_, end_s), (next_s, _) in pairwise(spans))
    assert spans[0][0] >= 0.0 and spans[-1][1] <= second.period_s


@pytest.mark.parametrize(
    ("text", "seeds", "expected"),
    [
        ("azure-conv", 10, (3, 583)),  # half an hour: three shorter ones
        ("azure-conv", 1, (1, 1200)),
        ("azure-conv:rate_scale=3", 10, (1, 1200)),  # not even three of four minutes
        ("diurnal", 10, (10, 1200)),
        ("listed:requests=0@128/5", 10, (10, 1200)),
    ],
)
def test_as_many_held_out_episodes_as_there_are_different_ones(text, seeds, expected):
    assert held_out_episodes(text, seeds, 1200) == expected


def test_azure_rows_become_requests(tmp_path):
    rows = "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9305900,396,109\n"
    requests = generate("azure:" + written(tmp_path / "t.csv", AZURE + rows), 8)
    assert requests.arrival_s == pytest.approx([0, 4.25])
    assert [requests[1].prompt_tokens, requests[1].output_tokens] == [396, 109]
    assert requests[1].prefix_id is None


def test_azure_timestamps_with_a_time_zone_are_read(tmp_path):
    rows = "2024-05-10 00:00:00.5+00:00,1,1\n2024-05-10 02:00:01.5+02:00,1,1\n"
    assert generate("azure:" + written(tmp_path / "t.csv", AZURE + rows), 1.5).arrival_s == pytest.approx(
        [0, 1]
    )


def test_burstgpt_failures_are_skipped(tmp_path):
    rows = "5,ChatGPT,472,18,490,Conversation log\n6,GPT-4,9,0,9,API log\n45,ChatGPT,1087,230,1317,API log\n"
    requests = generate("burstgpt:" + written(tmp_path / "t.csv", BURSTGPT + rows), 60)
    assert list(requests.arrival_s) == [0, 40]
    assert list(requests.prompt_tokens) == [472, 1087]


def test_mooncake_prompts_that_begin_alike_share_a_prefix(tmp_path):
    spec = mooncake(tmp_path / "t.jsonl", [0, 1, 2], [0, 1, 2, 3, 4], [0, 9], [0, 1, 2, 3, 4, 5], [7, 8])
    requests = generate(spec, 5)
    assert list(requests.arrival_s) == [0, 1, 2, 3, 4]
    assert list(requests.prefix_id) == [0, 0, 0, 0, -1]
    assert list(requests.prefix_tokens // 512) == [3, 5, 1, 5, 0]


def test_mooncake_branches_get_prefixes_of_their_own(tmp_path):
    spec = mooncake(tmp_path / "t.jsonl", [0, 1], [0, 1], [0, 1], [0, 2, 3], [0, 2, 3, 4])
    requests = generate(spec, 5)
    assert len(set(requests.prefix_id[:3])) == len(set(requests.prefix_id[3:])) == 1
    assert requests.prefix_id[0] != requests.prefix_id[3]
    assert list(requests.prefix_tokens // 512) == [2, 2, 2, 3, 3]


@given(prompts=st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=2, max_size=12))
@settings(deadline=None, max_examples=60)
def test_mooncake_prompts_with_one_prefix_id_share_what_it_says(tmp_path_factory, prompts):
    names = {}  # as in the traces, an id stands for a block and all before it
    hashed = [[names.setdefault(tuple(p[: n + 1]), len(names)) for n in range(len(p))] for p in prompts]
    path = tmp_path_factory.mktemp("mooncake") / "t.jsonl"
    requests = generate(mooncake(path, *hashed), len(prompts))
    check_columns(requests, len(prompts))
    for prefix in range(requests.prefix_id.max() + 1):
        members = np.flatnonzero(requests.prefix_id == prefix)
        assert len(members) > 1
        for a in members:
            for b in members:
                blocks = min(requests.prefix_tokens[[a, b]]) // 512
                assert hashed[a][:blocks] == hashed[b][:blocks]


def test_a_partly_filled_last_block_counts_only_its_tokens(tmp_path):
    assert set(generate(mooncake(tmp_path / "t", [1, 2], [1, 2], tokens=700), 2).prefix_tokens) == {700}


@pytest.mark.parametrize("text", ["2 0 4", "[2, 0,\n 4]", "2\n0\n\n4\n", "2,0,4"])
def test_speeds_are_evenly_spaced_within_their_second(tmp_path, text):
    spec = "speeds:lengths=fixed," + written(tmp_path / "speeds", text)
    assert list(generate(spec, 3).arrival_s) == [0, 0.5, 2, 2.25, 2.5, 2.75]
    assert list(generate(spec, 2, start_s=2.5).arrival_s) == [0, 0.25, 0.5, 1.0]
    assert parse_workload(spec).mean_rate_rps == 2


def test_a_replay_wraps_around_and_starts_anywhere(tmp_path):
    rows = "0,m,1,1\n10,m,2,1\n30,m,3,1\n"  # the last gap is the mean gap, 15 s
    spec = "burstgpt:" + written(tmp_path / "t.csv", BURSTGPT + rows)
    assert parse_workload(spec).period_s == 45
    requests = generate(spec, 100, start_s=20)
    assert list(requests.arrival_s) == [10, 25, 35, 55, 70, 80]
    assert list(requests.prompt_tokens) == [3, 1, 2, 3, 1, 2]
    assert as_bytes(generate(spec, 100, start_s=20 + 45 * 1000)) == as_bytes(requests)


def test_neighbouring_spans_of_a_replay_cover_it_once():
    whole = generate("azure-conv", 2000)
    parts = [generate("azure-conv", 100, start_s=100.0 * n) for n in range(20)]
    assert np.array_equal(np.concatenate([p.prompt_tokens for p in parts]), whole.prompt_tokens)


def test_a_rate_scale_compresses_time():
    slow, fast = (parse_workload(f"azure-code:rate_scale={scale}") for scale in (1, 2))
    assert fast.mean_rate_rps == pytest.approx(2 * slow.mean_rate_rps)
    assert fast.period_s == pytest.approx(slow.period_s / 2)


def test_a_replay_caps_prompts_and_their_prefixes(tmp_path):
    spec = mooncake(tmp_path / "t.jsonl", [0, 1], [0, 1]) + ",max_prompt_tokens=600"
    requests = generate(spec, 2)
    assert set(requests.prompt_tokens) == set(requests.prefix_tokens) == {600}


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("nightly", "choose from steady, gamma"),
        ("", "unknown"),
        ("diurnal:hihg_rps=3", "did you mean high_rps? The keys are high_rps, low_rps, period_s"),
        ("diurnal:high_rps", "key=value"),
        ("diurnal:low_rps=1,low_rps=2", "each key once"),
        ("diurnal:low_rps=20", "from 0 to 12"),
        ("steady:rate_rps=-1", "rate_rps"),
        ("steady:rate_rps=nan", "rate_rps"),
        ("steady:rate_rps=inf", "rate_rps"),
        ("steady:rate_rps=five", "'five'"),
        ("steady:prefixes=1.5", "whole number"),
        ("steady:prefixes=2,prefix_share=1.5", "from 0 to 1"),
        ("steady:lengths=short", "lognormal, sharegpt, fixed"),
        ("steady:lengths=fixed,sigma=1", "unknown key sigma"),
        ("steady:prompt_mean=4000", "from 8 to 2048"),
        ("piecewise:rates=2@60+x@30", "'x@30'"),
        ("piecewise:rates=2", "'2'"),
        ("piecewise:rates=0@60", "all rates are 0"),
        ("listed:requests=0@5/0", "requests has '0@5/0'"),
        ("listed", "SECOND@PROMPT_TOKENS"),
        ("azure", "path=FILE"),
        ("azure:path=/no/such/file", "/no/such/file"),
        ("azure-conv:lengths=fixed", "the keys are rate_scale, max_prompt_tokens"),
        ("azure-conv:rate_scale=0", "rate_scale"),
    ],
)
def test_a_wrong_spec_is_refused_in_one_line_that_says_what_is_allowed(spec, part):
    with pytest.raises(ConfigError) as refused:
        parse_workload(spec)
    assert part in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("azure", "", ":1: no column 'TIMESTAMP'"),
        ("azure", "TIMESTAMP,ContextTokens\n", ":1: no column 'GeneratedTokens'"),
        ("azure", AZURE, "no two requests"),
        ("azure", AZURE + "2023-11-16 18:00:00,1,1\n2023-11-16 18:00:00,1,1\n", "no two requests"),
        ("azure", AZURE + "2023-11-16 18:00:00,1,1\n\nyesterday,1,1\n", ":4: 'yesterday"),
        ("azure", AZURE + "2023-11-16 18:00:00,1\n", ":2: "),
        ("azure", AZURE + "2023-11-16 18:00:00,-1,1\n", ":2: "),
        ("burstgpt", BURSTGPT + "nan,m,1,1\n", ":2: "),
        ("burstgpt", BURSTGPT + "1,m,1.5,1\n", ":2: "),
        ("mooncake", '{"timestamp": 1}\n', ":1: "),
        ("mooncake", "{'timestamp'}\n", ":1: "),
        ("mooncake", "[1, 2]\n", ":1: "),
        ("mooncake", '{"timestamp": "1", "input_length": 1, "output_length": 1}\n', ":1: "),
        ("mooncake", '{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": 3}\n', ":1: "),
        ("speeds", "1 2\n3 x\n", ":2: '3 x'"),
        ("speeds", "1 -2", ":1: "),
        ("speeds", "1.5", ":1: "),
        ("speeds", "0 0", "no second with a request"),
        ("speeds", "", "no second with a request"),
    ],
)
def test_a_malformed_trace_is_refused_in_one_line_with_its_place(tmp_path, name, text, part):
    path = tmp_path / "trace"
    with pytest.raises(ConfigError) as refused:
        parse_workload(f"{name}:{written(path, text)}")
    message = str(refused.value)
    assert message.startswith(str(path)) and part in message and "\n" not in message


def test_a_binary_file_is_refused(tmp_path):
    (tmp_path / "t").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ConfigError, match="not UTF-8"):
        parse_workload(f"speeds:path={tmp_path / 't'}")


def test_a_block_repeated_within_one_prompt_is_not_shared(tmp_path):
    assert set(generate(mooncake(tmp_path / "t", [5, 5], [7]), 2).prefix_id) == {-1}
