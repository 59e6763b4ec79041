"""From settings to objects: what a live node and its twin share."""

from dataclasses import replace

import pytest

from fuel_ray.build import build_codec, build_spec, twin_of, twinned
from fuel_ray.config import PRESETS, LiveConfig
from fuel_ray.errors import ConfigError
from tests.fake_nvml import FakeGpu, FakeNvml

LIVE = replace(PRESETS["default"], node="live", live=LiveConfig(model="m"))


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr("fuel_ray.live.nvml.Gpus.can_set_clocks", lambda self: True)
    monkeypatch.setattr("fuel_ray.live.nvml.pynvml", FakeNvml(FakeGpu()))


def test_a_live_node_and_its_twin_have_the_same_clocks_and_the_same_actions(gpu):
    config = twinned(LIVE)
    live, twin = build_spec(config, 16), build_spec(twin_of(config), 16)
    assert live.gpu_clocks_mhz == twin.gpu_clocks_mhz == tuple(range(990, 1981, 15))
    assert build_codec(config, live).grid == build_codec(twin_of(config), twin).grid


def test_a_pack_of_another_gpu_is_refused_and_said_what_to_do(gpu):
    with pytest.raises(ConfigError, match="fuel-ray calibrate"):
        twinned(replace(LIVE, pack="v100s-qwen7b-int4"))


def test_an_observe_only_node_has_one_clock_as_has_its_twin(monkeypatch):
    monkeypatch.setattr("fuel_ray.live.nvml.pynvml", FakeNvml(FakeGpu(), privileged=False))
    monkeypatch.setattr("fuel_ray.live.nvml.Gpus.can_set_clocks", lambda self: False)
    config = twinned(LIVE)
    assert build_spec(config, 16).gpu_clocks_mhz == build_spec(twin_of(config), 16).gpu_clocks_mhz == (1980,)


def test_a_simulated_node_is_its_own_twin():
    assert twinned(PRESETS["default"]) == PRESETS["default"] == twin_of(PRESETS["default"])
