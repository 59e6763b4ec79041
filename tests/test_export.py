"""RLlib checkpoints become policy folders; a pickle in them may hold arrays and nothing else."""

import json
import pickle
from collections import OrderedDict

import numpy as np
import pytest

from fuel_ray.build.codec import build_codec
from fuel_ray.build.nodes import build_spec
from fuel_ray.cli import main
from fuel_ray.config import PRESETS, to_dict
from fuel_ray.errors import PolicyError
from fuel_ray.policies.learned import load_policy, read_policy
from fuel_ray.training.checkpoint import MODULE_STATE, q_network
from fuel_ray.training.envs import learning_settings
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.stub_vllm import serving
from tests.traffic_stub import TrafficStub

CONFIG = PRESETS["default"]


@pytest.fixture
def checkpoint(tmp_path):
    """As Tune leaves it in a run's folder: additive head, no hidden layer."""
    codec = build_codec(CONFIG, build_spec(CONFIG, 16))
    n = len(codec.features)
    rng = np.random.default_rng(0)
    outputs = {
        "value": 1,
        "limit_advantage": len(codec.grid.batch_limits),
        "clock_advantage": len(codec.grid.gpu_clocks_mhz),
    }
    state = OrderedDict()
    for head, size in outputs.items():
        state[f"q.{head}.weight"] = rng.normal(size=(size, n)).astype(np.float32)
        state[f"q.{head}.bias"] = rng.normal(size=size).astype(np.float32)
    state |= {f"_target_{name}": array / 2 for name, array in state.items()}
    folder = tmp_path / "sweep-1" / "tune" / "trial" / "checkpoint_000001"
    (folder / MODULE_STATE).parent.mkdir(parents=True)
    (folder / MODULE_STATE).write_bytes(pickle.dumps(state))
    (folder.parent / "params.json").write_text(
        json.dumps({"env_config": {"block_sizes": [16], "config": learning_settings(CONFIG)}})
    )
    facts = {"config": {**to_dict(CONFIG), "episodes": 3}, "engine": "vLLM 0.20.2"}  # of `train`
    (tmp_path / "sweep-1" / "run.json").write_text(json.dumps(facts))
    return folder


def test_a_checkpoint_becomes_a_policy_folder(checkpoint, tmp_path):
    assert main(["export", "--checkpoint", str(checkpoint)]) == 0
    found = read_policy(checkpoint / "policy")
    assert found.manifest.kv_block_sizes == (16,) and found.manifest.engine == "vLLM 0.20.2"
    low, high = found.manifest.feature_ranges["arrival_rate_ewma"]
    assert 0.0 <= low < 0.1 and 0.5 < high < 1.2, "the default load has 1 to 12 req/s"
    state = pickle.loads((checkpoint / MODULE_STATE).read_bytes())
    for name, array in q_network(checkpoint).items():
        np.testing.assert_array_equal(found.arrays[name], array)
        np.testing.assert_array_equal(array, state[f"_target_q.{name}"])
    load_policy(checkpoint / "policy", build_spec(CONFIG, 16))


def test_a_checkpoint_of_a_run_on_another_file_of_the_pack_says_so(checkpoint, tmp_path):
    run_json = tmp_path / "sweep-1" / "run.json"
    run_json.write_text(json.dumps({**json.loads(run_json.read_text()), "pack": {"sha256": "0" * 64}}))
    assert main(["export", "--checkpoint", str(checkpoint)]) == 0
    assert read_policy(checkpoint / "policy").manifest.pack_sha256 == "0" * 64


def test_a_deployment_takes_a_checkpoint(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu(uuid="GPU-0")))
    flags = ["--allow-mismatch", "--max-steps", "2", "--interval", "0.1", "--clock-control", "off"]
    with serving(TrafficStub(model="Qwen/Qwen3-8B", version="0.20.2")) as stub:
        arguments = ["--policy", str(checkpoint), "--server", stub.url, "--out", str(tmp_path / "out")]
        assert main(["deploy", *arguments, *flags]) == 0
    assert "2 windows, 0 lost" in capsys.readouterr().out


class Hostile:
    def __reduce__(self):
        return (eval, ("__import__('pathlib').Path('/tmp/pwned').touch()",))


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"q.value.bias": Hostile()}),
        pickle.dumps({"q.value.bias": pickle.loads}),
        pickle.dumps({"q.value.bias": np.array([object()], object)}),
        pickle.dumps({"other": np.zeros(1)}),
        pickle.dumps([1]),
        pickle.dumps({"q.value.bias": np.zeros(1, np.float32)})[:-20],
        b"",
        b"\x00" * 100,
    ],
    ids=["code", "function", "object", "no network", "list", "truncated", "empty", "zeros"],
)
def test_a_pickle_with_more_or_less_than_weights_is_refused(checkpoint, content, capsys):
    (checkpoint / MODULE_STATE).write_bytes(content)
    with pytest.raises(PolicyError):
        q_network(checkpoint)
    assert main(["export", "--checkpoint", str(checkpoint)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_what_is_wrong_is_said_in_one_line(checkpoint, tmp_path, capsys):
    moved = tmp_path / "moved"
    (moved / MODULE_STATE).parent.mkdir(parents=True)
    (moved / MODULE_STATE).write_bytes((checkpoint / MODULE_STATE).read_bytes())
    for arguments in (["nowhere"], [str(tmp_path)], [str(moved)], [str(checkpoint), "--out", "/proc/x"], []):
        assert main(["export", *(["--checkpoint"] if arguments else []), *arguments]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
