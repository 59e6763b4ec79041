"""What a policy sees and may choose."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuel_ray.averages import TokenGaps
from fuel_ray.codec import (
    FEATURES,
    GREENDLS_FEATURES,
    GREENDLS_GRID,
    PLAIN_FEATURES,
    SEED_FEATURES,
    SEED_GRID,
    Codec,
    Encoder,
    RunningScale,
    node_grid,
)
from fuel_ray.errors import ConfigError
from fuel_ray.policies.rules import see
from fuel_ray.sim.program import GAP_S, SIGHT, SLOW_GAP_S
from fuel_ray.types import Knobs, NodeSpec, Slo, WindowMetrics

SPEC = NodeSpec("n", "gpu", ("GPU-0",), "model", 16, 1000, (1, 128), tuple(range(990, 1981, 15)))
WINDOW = WindowMetrics(
    duration_s=2.0,
    energy_j=900.0,
    cpu_energy_j=100.0,
    gpu_util=0.855,
    gpu_mem_util=0.452,
    cpu_util=0.25,
    arrivals=12,
    completed=10,
    prompt_tokens=3000,
    output_tokens=1800,
    running=20,
    waiting=5,
    preemptions=0,
    kv_usage=0.425,
    prefix_hit_rate=0.717,
    oldest_wait_s=0.5,
    ttfts_s=(0.1, 0.2, 2.0, 0.3),
    tpots_s=(0.01, 0.02),
    e2es_s=(4.0, 6.0),
    knobs=Knobs(64, 990),
)


def encode(*features, slo=Slo(1.0, 0.05), window=WINDOW):  # noqa: B008  (frozen)
    return Encoder(Codec(features, SEED_GRID, slo), SPEC).encode(window).tolist()


def test_the_ten_features_in_order_and_scale():
    expected = [0.45, 0.855, 0.452, 0.25, 0.25, 0.4, 0.1, 0.425, 0.25, 0.45]
    assert encode(*SEED_FEATURES) == pytest.approx(expected, abs=1e-6)
    assert len(SEED_FEATURES) == 10


def test_features_are_clipped_to_their_range():
    crowded = replace(WINDOW, energy_j=9000.0, running=400, waiting=400, output_tokens=90_000, completed=900)
    seen = dict(zip(SEED_FEATURES, encode(*SEED_FEATURES, window=crowded), strict=True))
    for name in ("gpu_power", "running", "waiting", "request_throughput", "token_throughput"):
        assert seen[name] == 1.0


def test_optional_features_by_name():
    names = ("prefix_cache_hit_rate", "slo_attainment", "kv_free_share", "kv_block_size", "gpu_clock")
    assert encode(*names) == pytest.approx([0.717, 0.75, 0.575, 0.25, 0.5], abs=1e-6)
    assert encode("batch_limit", "arrival_rate", "oldest_wait") == pytest.approx([0.5, 0.3, 0.5], abs=1e-6)


def test_greendls_sees_four_features_times_ten():
    seen = encode(*GREENDLS_FEATURES, slo=Slo(e2e_s=10.0))
    assert seen == pytest.approx([10 * 450 / 250, 10 * 0.05, 10 * 0.5, 10 * 0.6], abs=1e-3)


def test_what_is_unknown_reads_as_zero():
    unknown = replace(WINDOW, cpu_energy_j=None, gpu_util=None, prefix_hit_rate=None)
    assert encode("cpu_power", "gpu_util", "prefix_cache_hit_rate", window=unknown) == [0.0, 0.0, 0.0]


def test_times_between_tokens_are_averaged_over_seconds_as_the_compiled_loop_has_them():
    rng, gaps, sight = np.random.default_rng(0), TokenGaps(), np.zeros(SIGHT)
    unknown = replace(WINDOW, duration_s=1.0, output_tokens=0)
    assert gaps.update(unknown) == gaps.update(replace(unknown, output_tokens=5, running=0)) == (0.0, 0.0)
    for _ in range(50):
        running, tokens = int(rng.integers(4)) * 10, int(rng.integers(3)) * 300
        window = replace(WINDOW, duration_s=1.0, running=running, output_tokens=tokens)
        see(sight, window)
        assert gaps.update(window) == pytest.approx((sight[GAP_S], sight[SLOW_GAP_S]), rel=1e-12)
    assert 0.0 < sight[GAP_S] != sight[SLOW_GAP_S] > 0.0


def test_a_gap_of_before_fades_over_three_and_eight_seconds():
    encoder = Encoder(Codec(("token_gap_3s", "token_gap_8s"), SEED_GRID, Slo(1.0, 0.05)), SPEC)
    quick = replace(WINDOW, duration_s=1.0, running=20, output_tokens=800)
    slow = replace(quick, output_tokens=400)
    assert encoder.encode(quick).tolist() == pytest.approx([0.25, 0.25])
    for _ in range(3):
        seen = encoder.encode(slow)
    assert seen.tolist() == pytest.approx([0.5 - 0.25 * np.exp(-1.0), 0.5 - 0.25 * np.exp(-3 / 8)], rel=1e-5)
    encoder.reset()
    assert encoder.encode(slow).tolist() == pytest.approx([0.5, 0.5])


def test_the_arrival_rate_is_averaged_over_ten_seconds_and_forgotten_on_reset():
    encoder = Encoder(Codec(("arrival_rate_ewma",), SEED_GRID, Slo(1.0)), SPEC)
    busy, quiet = replace(WINDOW, duration_s=1.0, arrivals=20), replace(WINDOW, duration_s=1.0, arrivals=0)
    assert encoder.encode(busy)[0] == pytest.approx(1.0)
    for _ in range(10):
        rate = encoder.encode(quiet)[0]
    assert rate == pytest.approx(np.exp(-1.0), rel=1e-5)
    encoder.reset()
    assert encoder.encode(quiet)[0] == 0.0


def test_rates_beyond_twenty_are_seen_but_not_by_policies_that_were_trained_without():
    names = ("arrival_rate_ewma", "arrival_rate_10s", "arrival_rate_4s")
    crowd = replace(WINDOW, duration_s=1.0, arrivals=50)
    assert encode(*names, window=crowd) == pytest.approx([1.0, 2.5, 2.5])


def test_the_fast_average_sees_a_change_of_the_load_sooner():
    encoder = Encoder(Codec(("arrival_rate_10s", "arrival_rate_4s"), SEED_GRID, Slo(1.0)), SPEC)
    encoder.encode(replace(WINDOW, duration_s=1.0, arrivals=0))
    for _ in range(4):
        slow, fast = encoder.encode(replace(WINDOW, duration_s=1.0, arrivals=20))
    assert (slow, fast) == pytest.approx((1 - np.exp(-0.4), 1 - np.exp(-1.0)), rel=1e-5)


def test_long_prompts_are_seen_as_they_come():
    encoder = Encoder(Codec(("prompt_tokens_per_arrival",), SEED_GRID, Slo(1.0)), SPEC)
    assert encoder.encode(replace(WINDOW, arrivals=0, prompt_tokens=9_000))[0] * 2000 == pytest.approx(512)
    first = encoder.encode(replace(WINDOW, arrivals=2, prompt_tokens=100_000))[0]
    assert first * 2000 == pytest.approx(0.95 * 512 + 0.05 * 4000)
    encoder.reset()
    least = encoder.encode(replace(WINDOW, arrivals=2, prompt_tokens=0))[0]
    assert least * 2000 == pytest.approx(0.95 * 512 + 0.05 * 16)


def test_an_unknown_feature_is_named():
    with pytest.raises(ConfigError, match="nonsense"):
        Codec(("nonsense",), SEED_GRID, Slo(1.0))


def test_the_seed_grid_has_187_actions_and_greendls_198():
    assert len(SEED_GRID) == 187 and SEED_GRID.gpu_clocks_mhz == tuple(range(540, 1501, 60))
    assert len(GREENDLS_GRID) == 198 and GREENDLS_GRID.gpu_clocks_mhz[:2] == (517, 577)
    assert SEED_GRID.decode(0) == Knobs(1, 540)
    assert SEED_GRID.decode(16) == Knobs(1, 1500)
    assert SEED_GRID.decode(17) == Knobs(2, 540)
    assert SEED_GRID.decode(186) == Knobs(36, 1500)
    assert GREENDLS_GRID.decode(18 * 3 + 4) == Knobs(8, 517 + 4 * 60)


@given(st.sampled_from([SEED_GRID, GREENDLS_GRID]), st.integers(0, 186))
def test_encoding_a_decoded_action_gives_it_back(grid, index):
    assert grid.encode(grid.decode(index)) == index


def test_knobs_outside_the_grid_are_refused():
    with pytest.raises(ConfigError):
        SEED_GRID.encode(Knobs(3, 540))


@given(st.integers(1, 400), st.floats(0.3, 1.0), st.lists(st.integers(1, 300), max_size=5))
def test_a_node_grid_holds_the_maximum_and_only_supported_clocks(step, share, limits):
    grid = node_grid(SPEC, clock_step_mhz=step, lowest_clock_share=share, batch_limits=limits)
    assert grid.gpu_clocks_mhz[-1] == 1980 and grid.batch_limits[-1] == 128
    assert set(grid.gpu_clocks_mhz) <= set(SPEC.gpu_clocks_mhz)
    assert all(np.diff(grid.gpu_clocks_mhz) >= step)
    assert grid.gpu_clocks_mhz[0] >= share * 1980


def test_running_scale_is_the_sample_mean_and_spread():
    rng = np.random.default_rng(0)
    values = rng.normal(3.0, 2.0, (500, 2))
    scale = RunningScale()
    for row in values:
        scale.update(row.tolist())
    expected = (values[-1] - values.mean(0)) / values.std(0, ddof=1)
    assert scale.apply(values[-1].tolist()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scale", [None, RunningScale(2, [1.0] * 13, [0.5] * 13)])
def test_a_codec_survives_json(scale):
    codec = Codec(PLAIN_FEATURES, SEED_GRID, Slo(1.0, 0.05), scale)
    assert Codec.from_dict(json.loads(json.dumps(codec.to_dict()))) == codec


def test_a_stored_running_scale_is_used_as_it_was_learned():
    learner = Codec(("running", "waiting"), SEED_GRID, Slo(1.0), RunningScale())
    learning = Encoder(learner, SPEC, learn_scale=True)
    for running in (10, 20, 30):
        learning.encode(replace(WINDOW, running=running))
    stored = Codec.from_dict(json.loads(json.dumps(learner.to_dict())))
    acting = Encoder(stored, SPEC)
    seen = acting.encode(replace(WINDOW, running=30))
    assert seen[0] == pytest.approx(1.0, abs=1e-3)  # mean 20, standard deviation 10
    assert seen[1] == 0.0
    acting.encode(replace(WINDOW, running=0))
    assert stored.running_scale == learner.running_scale  # acting does not learn


@pytest.mark.parametrize("grid", [SEED_GRID, GREENDLS_GRID], ids=len)
def test_the_index_is_the_limits_times_the_clocks_as_the_seed_has_it(grid):
    for index in range(len(grid)):
        limit, clock = index // len(grid.gpu_clocks_mhz), index % len(grid.gpu_clocks_mhz)
        knobs = Knobs(grid.batch_limits[limit], grid.gpu_clocks_mhz[clock])
        assert grid.decode(index) == knobs and grid.encode(knobs) == index
    assert grid.batch_limits == (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36)


def test_observations_are_within_the_codecs_bounds():
    codec = Codec(tuple(FEATURES), SEED_GRID, Slo(1.0, 0.05))
    seen = Encoder(codec, SPEC).encode(replace(WINDOW, energy_j=1e6, oldest_wait_s=1e3))
    assert (seen >= codec.low).all() and (seen <= codec.high).all()
