"""From settings to objects: what a live node and its twin share."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from fuel_ray.build import cluster as build_cluster
from fuel_ray.build import live as build_live
from fuel_ray.build.codec import build_codec
from fuel_ray.build.nodes import build_loop, build_node, build_spec, twin_of, twinned
from fuel_ray.cli import main
from fuel_ray.codec import GREENDLS_GRID, SEED_GRID
from fuel_ray.config import PRESETS, LiveConfig
from fuel_ray.errors import ConfigError
from fuel_ray.policies.anchor import Anchor
from fuel_ray.policies.models import every
from fuel_ray.policies.static import LoadTable
from fuel_ray.training import envs
from fuel_ray.training.envs import build_env
from fuel_ray.tuning.runs import Runs
from fuel_ray.tuning.search import TABLE_STRIDE, tune_static
from fuel_ray.types import Knobs
from fuel_ray.workload.spec import parse_workload
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.stub_vllm import Stub, serving

LIVE = replace(PRESETS["default"], node="live", live=LiveConfig(model="m"))


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.Gpus.can_set_clocks", lambda self: True)
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu()))


def test_a_live_node_and_its_twin_have_the_same_clocks_and_the_same_actions(gpu):
    config = twinned(LIVE, [build_spec(LIVE, 16)])
    live, twin = build_spec(config, 16), build_spec(twin_of(config), 16)
    assert live.gpu_clocks_mhz == twin.gpu_clocks_mhz == tuple(range(900, 1981, 15))
    assert build_codec(config, live).grid == build_codec(twin_of(config), twin).grid


def test_everything_that_chooses_clocks_on_hopper_reaches_900_mhz():
    config = replace(PRESETS["default"], block_sizes=(16,))
    spec = build_spec(config, 16)
    grids = [build_codec(config, spec).grid.gpu_clocks_mhz, spec.gpu_clocks_mhz]
    grids += [every(spec.gpu_clocks_mhz, stride) for stride in (TABLE_STRIDE, 8)]  # tables, frontier, rules
    assert {clocks[0] for clocks in grids} == {900}
    runs = Runs(build_loop(config, 16, horizon_s=30.0), seeds=[1], seconds=30.0, slos={"a": config.slo})
    assert tune_static(partial(runs.score, slo="a", share=0.9), spec, share=0.9, limits=[48]) == Knobs(
        48, 900
    )


@pytest.mark.parametrize("grid", [SEED_GRID, GREENDLS_GRID])
def test_clocks_of_a_published_grid_below_those_of_the_node_act_as_its_lowest(grid):
    node = build_node(PRESETS["default"], 16, horizon_s=1.0)
    applied = {node.apply(Knobs(8, clock_mhz)).gpu_clock_mhz for clock_mhz in grid.gpu_clocks_mhz}
    assert min(grid.gpu_clocks_mhz) < 900 == min(applied)


def test_a_server_without_its_limit_file_has_one_batch_limit_to_choose(gpu, capsys, tmp_path):
    attached = replace(LIVE, live=LiveConfig(model="m", server="http://127.0.0.1:1"), max_num_seqs=64)
    spec = build_spec(attached, 16)
    assert spec.batch_limits == (64, 64) and build_codec(attached, spec).grid.batch_limits == (64,)
    with pytest.raises(ConfigError, match=r"--grid seed has several batch limits, .*--live.limit-file"):
        build_codec(replace(attached, grid="seed"), spec)
    named = replace(attached, live=replace(attached.live, limit_file=tmp_path / "limit"))
    assert build_spec(named, 16).batch_limits == (1, 64)
    flags = [
        "--node",
        "live",
        "--live.model",
        "m",
        "--live.server",
        "http://127.0.0.1:1",
        "--block-sizes",
        "16",
    ]
    assert main(["evaluate", *flags, "--static", "max", "8"]) == 2
    assert (
        "--static 8: the batch limit of this node is 128 and cannot be set; give the server's"
        in capsys.readouterr().err
    )


def test_block_sizes_keep_their_order_whichever_server_is_up_first(monkeypatch):
    class Found(dict):
        def __init__(self, actors, **options):
            super().__init__({key: (None, "engine") for key in reversed(actors)})

    monkeypatch.setattr(build_cluster, "require_nodes", lambda *args, **options: None)
    monkeypatch.setattr(build_cluster, "node_actor", lambda *args, **options: None)
    monkeypatch.setattr(build_cluster, "end_actors", lambda actors: None)
    monkeypatch.setattr(build_cluster, "facts_of", Found)
    config = replace(LIVE, node="ray", backend="live")
    with build_cluster.kept_servers(config, run="r", at_once=3, nodes_each=1) as (_, answers):
        assert list(answers) == [8, 16, 32]


def test_a_pack_of_another_gpu_is_refused_and_said_what_to_do(gpu):
    with pytest.raises(ConfigError, match="fuel-ray calibrate"):
        twinned(replace(LIVE, pack="v100s-qwen7b-int4"), [build_spec(LIVE, 16)])


def test_an_observe_only_node_has_one_clock_as_has_its_twin(monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu(), privileged=False))
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.Gpus.can_set_clocks", lambda self: False)
    config = twinned(LIVE, [build_spec(LIVE, 16)])
    assert build_spec(config, 16).gpu_clocks_mhz == build_spec(twin_of(config), 16).gpu_clocks_mhz == (1980,)


def test_episodes_of_one_seed_have_the_same_lengths_and_no_tokens_in_common(gpu):
    """Else the prefix cache serves a policy what its predecessor paid for."""
    workload = parse_workload("steady:rate_rps=20,output_mean=4")
    prompts = []
    with serving(Stub()) as stub:
        start_load = build_live._loads(LIVE.live, stub.url, workload, 1.0, random_start=False)
        for _ in range(2):
            stub.bodies.clear()
            load = start_load(3)
            load.start()
            assert load.wait(30.0)
            prompts.append([body["prompt"] for body in stub.bodies])
    first, second = (sorted(map(len, episode)) for episode in prompts)
    assert first == second and len(first) > 10
    starts = [{tuple(prompt[:16]) for prompt in episode} for episode in prompts]
    assert not starts[0] & starts[1]


def test_a_simulated_node_is_its_own_twin():
    assert twin_of(PRESETS["default"]) == PRESETS["default"]


@pytest.mark.parametrize(("kind", "nodes"), [("sim", 2), ("ray", 1), ("live", 1)])
def test_only_a_simulated_node_has_its_load_table_beside_it(monkeypatch, kind, nodes):
    """A live one would start a second server, one of a cluster wait for a second host."""
    made = []

    def simulated(config, *args, **kwargs):
        made.append(build_node(twin_of(config), *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(envs, "build_node", simulated)
    monkeypatch.setattr("fuel_ray.build.nodes.build_node", simulated)
    anchor = Anchor(LoadTable([], [Knobs(32, 1500)]), 0.03)
    env = build_env(replace(PRESETS["default"], node=kind), [16], anchor=anchor)
    env.reset(seed=0)
    assert np.isfinite(env.step(np.int64(5))[1])
    assert len(made) == nodes
