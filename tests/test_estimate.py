"""The modelled saving against the simulator that runs by the same pack."""

from dataclasses import replace

import pytest

from fuel_ray.build.nodes import build_node
from fuel_ray.config import PRESETS
from fuel_ray.deploy.estimate import SavingEstimate
from fuel_ray.sim.pack import load_pack
from fuel_ray.types import Knobs
from tests.test_codec import SPEC, WINDOW

PACK = load_pack("h100-qwen3-8b")
MOST = SPEC.max_performance


@pytest.fixture(scope="module")
def episodes():
    """Windows and energy of the same arrivals at three clocks."""
    found = {}
    for clock_mhz in (1980, 1500, 1200):
        config = replace(PRESETS["default"], workload="steady:rate_rps=5")
        node = build_node(config, 16, horizon_s=120.0)
        node.reset(seed=1)
        node.apply(Knobs(128, clock_mhz))
        windows = [node.measure(1.0) for _ in range(120)]
        found[clock_mhz] = node.spec, windows, sum(window.energy_j for window in windows)
    return found


@pytest.mark.parametrize("clock_mhz", [1500, 1200])
def test_the_saving_is_that_of_the_simulator_to_within_a_few_points(episodes, clock_mhz):
    spec, windows, most_j = episodes[1980]
    estimate = SavingEstimate(PACK.perf, spec)
    shadow_j = sum(
        estimate.saved_j(window, Knobs(128, clock_mhz), reference=spec.max_performance) for window in windows
    )
    real = 1 - episodes[clock_mhz][2] / most_j
    assert real > 0.1 and shadow_j / most_j == pytest.approx(real, abs=0.05)


def test_what_a_controlled_server_saved_is_the_same_seen_from_the_other_side(episodes):
    spec, windows, energy_j = episodes[1200]
    estimate = SavingEstimate(PACK.perf, spec)
    saved_j = sum(
        estimate.saved_j(window, Knobs(128, 1200), reference=spec.max_performance) for window in windows
    )
    assert saved_j / (energy_j + saved_j) == pytest.approx(1 - energy_j / episodes[1980][2], abs=0.05)


def test_nothing_is_saved_by_the_same_clock_and_idle_power_by_a_lower_one():
    estimate = SavingEstimate(PACK.perf, SPEC)
    window = replace(WINDOW, knobs=MOST)
    assert estimate.saved_j(window, MOST, reference=MOST) == 0.0
    idle = replace(window, running=0, waiting=0, output_tokens=0, prompt_tokens=0)
    share = PACK.perf.at(990).idle_w / PACK.perf.at(MOST.gpu_clock_mhz).idle_w
    assert estimate.saved_j(idle, Knobs(8, 990), reference=MOST) == pytest.approx(idle.energy_j * (1 - share))
