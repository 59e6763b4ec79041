"""Whatever preset a policy was trained by: a shift of its load is seen, its own load is none."""

from dataclasses import replace
from functools import cache

import pytest

from fuel_ray.build.codec import build_codec, build_manifest
from fuel_ray.build.nodes import build_loop
from fuel_ray.config import PRESETS
from fuel_ray.control import run_policy
from fuel_ray.drift import DriftDetector
from fuel_ray.policies.static import Static
from fuel_ray.types import Knobs

SLOW, FAST = Knobs(64, 1200), Knobs(256, 1980)
SHIFTS = {  # of the default load, 512/220 tokens at 1 to 12 req/s
    "rate": "steady:rate_rps=20",
    "prompt length": "steady:rate_rps=5,prompt_mean=1500",
    "output length": "steady:rate_rps=5,output_mean=450",
    "prefix sharing": "steady:rate_rps=5,prompt_mean=112,prefixes=8,prefix_tokens=500,prefix_share=0.8",
}
FAR_SHIFTS = {  # of the generalist's, which has seen those above
    "rate": "steady:rate_rps=100",
    "prompt length": "steady:rate_rps=3,prompt_mean=3500,max_prompt_tokens=8000",
    "output length": "steady:rate_rps=3,output_mean=900,max_output_tokens=2048",
    "prefix sharing": "steady:rate_rps=5,prompt_mean=30,prefixes=8,prefix_tokens=600,prefix_share=1",
}
CASES = [(name, shift) for name in PRESETS for shift in SHIFTS]


@cache
def trained(name):
    """The settings, codec and ranges of a policy of this preset."""
    config = PRESETS[name]
    spec = build_loop(config, 16, horizon_s=1.0).node.spec
    return (
        config,
        spec,
        build_codec(config, spec),
        build_manifest(config, spec, block_sizes=(16,), engine="e").feature_ranges,
    )


def detector(name):
    _, spec, codec, ranges = trained(name)
    return DriftDetector(codec, spec, ranges=ranges)


def drifts(drift, config, workload, *, knobs, seed, steps):
    loop = build_loop(config, 16, horizon_s=float(steps + 1), workload=workload)
    records = run_policy(loop, Static(knobs), seed=seed, steps=steps)
    return [drift.update(record.metrics) for record in records]


@pytest.mark.parametrize(("name", "shift"), CASES)
def test_a_shift_of_the_load_is_seen_within_two_minutes(name, shift):
    config, drift = trained(name)[0], detector(name)
    own = drifts(drift, config, "steady:rate_rps=5", knobs=SLOW, seed=1, steps=120)
    workload = (FAR_SHIFTS if config.mode == "generalist" else SHIFTS)[shift]
    shifted = drifts(drift, config, workload, knobs=SLOW, seed=2, steps=120)
    assert not any(own) and shifted[-1], shifted


@pytest.mark.parametrize("knobs", [SLOW, FAST], ids=["slow", "fast"])
@pytest.mark.parametrize("name", PRESETS)
def test_the_load_of_the_training_is_no_drift(name, knobs):
    config = trained(name)[0]
    for seed in range(2_000_000_000, 2_000_000_004):
        workload = "mixed:high_rps=14" if config.mode == "generalist" else config.workload
        found = drifts(detector(name), config, workload, knobs=knobs, seed=seed, steps=1200)
        assert not any(found), (seed, found.index(True))


def test_requests_that_became_three_times_as_long_are_drift():
    """Of the default preset's features, only the arrival rate's was once watched."""
    config, drift = trained("default")[0], detector("default")
    long = "steady:rate_rps=5,prompt_mean=1500,output_mean=450"
    found = drifts(drift, config, long, knobs=SLOW, seed=1, steps=200)
    assert sum(found) > 100


def test_a_range_that_the_policy_folder_lacks_is_what_the_feature_can_express():
    config, spec, codec, _ = trained("default")
    drift = DriftDetector(codec, spec, ranges={"arrival_rate_ewma": (0.0, 0.65)})
    long = "steady:rate_rps=5,prompt_mean=1500,output_mean=450"
    assert not any(drifts(drift, config, long, knobs=SLOW, seed=1, steps=200))


def test_a_range_of_a_feature_that_is_no_longer_watched_still_counts():
    config, spec, codec, ranges = trained("plain")
    drift = DriftDetector(codec, spec, ranges={**ranges, "running": (0.0, 0.01)})
    assert any(drifts(drift, replace(config), "steady:rate_rps=5", knobs=SLOW, seed=1, steps=120))
