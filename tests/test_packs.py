"""Packs as they are listed and chosen, and under a setting of the server that changes idle power."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fuel_ray.arena.config import EvaluateConfig
from fuel_ray.build.nodes import build_loop
from fuel_ray.cli import main
from fuel_ray.errors import ConfigError
from fuel_ray.sim import nearest
from fuel_ray.sim.pack import load_pack, pack_names
from fuel_ray.types import Knobs

PACK = load_pack("h100-qwen3-8b")
PACK_FILE = Path(nearest.__file__).parent / "packs" / "h100-qwen3-8b.json"
SETTING = "CUDA_DISABLE_PERF_BOOST=1"
ROWS = [
    dict(trace="a.json", requests=90, left_out=False, energy=0.2, tpot_mean=0.0, e2e_mean=0.0, ttft_p50=0.0),
    dict(
        trace="b.json",
        requests=80,
        left_out=True,
        energy=-0.021,
        tpot_mean=0.03,
        e2e_mean=None,
        ttft_p50=0.11,
    ),
]


def edited(tmp_path: Path, **changes: object) -> str:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(json.loads(PACK_FILE.read_text()) | {"name": "mine"} | changes))
    return str(path)


# The verb


def test_the_shipped_packs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["packs"]) == 0
    heads = [part.splitlines()[0] for part in capsys.readouterr().out.split("\n\n")]
    assert [head.partition(":")[0] for head in heads] == list(pack_names())
    assert "h100-qwen3-8b: Qwen3-8B on NVIDIA H100 80GB HBM3, vLLM 0.20.2" in heads


def test_a_pack_in_full_has_its_fidelity_by_trace_and_its_constants(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["packs", edited(tmp_path, fidelity=ROWS, clock_axis_from="h100-qwen3-8b")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "1 trace not seen by the fit: energy within 2.1%, mean TPOT within 3.0%, median" in text
    assert "b.json 80 -2.1% +3.0% unknown +11.0% left out of the fit" in text and "a.json 90 +20.0%" in text
    assert "idle_w 133" in text and "taken from h100-qwen3-8b" in text and PACK.measured in text
    assert f"--pack mine:{SETTING} 80 W when idle; 53 W less" in text


def test_a_pack_without_a_table_says_that_its_fidelity_is_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["packs", edited(tmp_path, fidelity=[])]) == 0
    assert "unknown (no table in the file)" in capsys.readouterr().out


def test_machines_get_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["packs", "--json"]) == 0
    shipped = json.loads(capsys.readouterr().out)
    assert [pack["name"] for pack in shipped] == list(pack_names())
    assert main(["packs", "--json", edited(tmp_path, fidelity=ROWS)]) == 0
    (mine,) = json.loads(capsys.readouterr().out)
    assert mine["fidelity"] == ROWS and mine["perf"]["idle_w"] == 133 and "sha256" in mine
    assert mine["clock_axes"][0] == "nominal" and mine["settings"][0]["rest_w"] == 80


def test_a_fidelity_table_of_other_columns_is_malformed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a calibration pack"):
        load_pack(edited(tmp_path, fidelity=[{"trace": "a"}]))


@pytest.mark.parametrize(
    "change",
    [
        {"fidelity": [ROWS[0] | {"energy": "x"}]},
        {"fidelity": [ROWS[0] | {"requests": None}]},
        {"settings": {"A=1": {"rest_w": None, "source": "x"}}},
    ],
)
def test_a_pack_whose_tables_have_no_numbers_is_malformed(
    change: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["packs", edited(tmp_path, **change)]) == 2
    assert "not a calibration pack" in capsys.readouterr().err


# The choice


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several Hopper packs, all of H200 with the axis of the one of H100."""
    models = {"qwen3-14b": "Qwen3-14B", "qwen3-1.7b": "Qwen3-1.7B", "qwen3-8b": "Qwen3-8B"}
    packs = {
        f"h200-{name}": replace(
            PACK, name=f"h200-{name}", gpu_name="NVIDIA H200", model=model, clock_axis_from=PACK.name
        )
        for name, model in models.items()
    }
    packs |= {"h200-qwen3-14b-tp2": replace(packs["h200-qwen3-14b"], name="h200-qwen3-14b-tp2")}
    packs |= {PACK.name: PACK, "a100-llama31-8b": load_pack("a100-llama31-8b")}
    packs["a-hopper"] = replace(PACK, name="a-hopper", gpu_name="NVIDIA GH200 480GB")
    monkeypatch.setattr(nearest, "pack_names", lambda: tuple(sorted(packs)))
    monkeypatch.setattr(nearest, "load_pack", packs.__getitem__)


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize(
    ("gpu", "axis_of"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-qwen3-8b"),
        ("NVIDIA H100 PCIe", "h100-qwen3-8b"),
        ("NVIDIA GH200 480GB", "a-hopper"),
        ("NVIDIA H200", "a-hopper"),  # not of a pack of H200, whose axis is another one's: the first by name
        ("NVIDIA A10", "a100-llama31-8b"),
    ],
)
def test_the_clock_axis_is_of_a_pack_that_has_one_of_its_own(gpu: str, axis_of: str) -> None:
    assert nearest.same_architecture(gpu) == axis_of


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize(
    ("gpu", "model", "pack"),
    [
        ("NVIDIA H200", "Qwen/Qwen3-8B", "h200-qwen3-8b"),
        ("NVIDIA H200", "/models/qwen2.5-1.5b-instruct", "h200-qwen3-1.7b"),
        ("NVIDIA H200", "meta-llama/Llama-3.3-70B", "h200-qwen3-14b"),
        ("NVIDIA H200 NVL", "Qwen3-14B", "h200-qwen3-14b"),
        ("NVIDIA H100 80GB HBM3", "Qwen3-14B", "h100-qwen3-8b"),
        ("NVIDIA H100 PCIe", "Qwen3-14B", "h100-qwen3-8b"),
        ("NVIDIA H20", "Qwen3-14B", "h200-qwen3-14b"),
        ("NVIDIA A10", "Qwen3-14B", "a100-llama31-8b"),
        ("NVIDIA B200", "Qwen3-14B", "given"),
    ],
)
def test_a_calibration_begins_with_the_pack_nearest_by_gpu_and_then_by_size(
    gpu: str, model: str, pack: str
) -> None:
    assert nearest.nearest_pack(gpu, model, default="given") == pack


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen/Qwen3-8B", 8),
        ("Qwen3-1.7B-FP8", 1.7),
        ("Qwen-7B-Chat-Int4", 7),
        ("HuggingFaceTB/SmolLM2-135M", 0.135),
        ("mistralai/Mixtral-8x7B-v0.1", 56),
        ("Qwen3-30B-A3B", 30),
        ("/srv/8b/mine", None),
        ("unknown", None),
    ],
)
def test_the_name_of_a_model_tells_its_size(name: str, billions: float | None) -> None:
    assert nearest.parameters(name) == billions


# A setting of the server


def power_w(pack: str, *, rate: float) -> float:
    """Mean power of a twin over a minute at the highest clock."""
    config = EvaluateConfig(pack=pack, workload=f"steady:rate_rps={rate}")
    loop = build_loop(config, 16, horizon_s=60.0)
    loop.reset(seed=0)
    windows = [loop.step(Knobs(128, 1980)).metrics for _ in range(60)]
    return sum(window.energy_j for window in windows) / 60


def test_a_setting_saves_while_no_request_is_there_and_nothing_under_load() -> None:
    under = f"{PACK.name}:{SETTING}"
    little, much = (power_w(PACK.name, rate=rate) - power_w(under, rate=rate) for rate in (0.1, 8.0))
    assert 30 < little < 53 and 0 <= much < 2


@pytest.mark.parametrize("axis", ["nominal", "idle-falls-less"])
def test_under_a_setting_all_axes_rest_at_one_power_and_steps_cost_the_same(axis: str) -> None:
    plain = load_pack(PACK.name, axis).perf
    under = load_pack(f"{PACK.name}:{SETTING}", axis).perf
    assert (plain.at(1980).rest_w, under.at(1980).rest_w) == (133, 80)
    assert under.at(1080).rest_w == min(80, plain.at(1080).idle_w)
    assert under.at(1980)._replace(rest_w=133) == plain.at(1980)
    assert under.step_cost(8, 4000, 0, 1500) == plain.step_cost(8, 4000, 0, 1500)


def test_a_setting_is_no_clock_axis_and_is_said_to_be_transferred() -> None:
    under = load_pack(f"{PACK.name}:{SETTING}")
    assert under.clock_axes == PACK.clock_axes and under.sha256 == PACK.sha256
    assert "80 W when idle: 53 W less" in under.transferred


def test_a_setting_that_a_pack_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"unknown setting; the pack has {SETTING}"):
        load_pack(f"{edited(tmp_path)}:OTHER=1")
    with pytest.raises(ConfigError, match="unknown setting; the pack has none"):
        load_pack(f"a100-llama31-8b:{SETTING}")
    with pytest.raises(ConfigError, match=r"not a calibration pack.*source"):
        load_pack(edited(tmp_path, settings={SETTING: {"rest_w": 80.0}}))


def test_what_is_said_of_a_pack_may_be_corrected_and_its_figures_identify_it(tmp_path):
    raw = json.loads(PACK_FILE.read_text())

    def digest(**entries):
        (tmp_path / "p.json").write_text(json.dumps(raw | entries))
        return load_pack(str(tmp_path / "p.json")).sha256

    assert digest(measured="in other words", clock_axis_notes="") == digest() == PACK.sha256
    assert digest(perf=raw["perf"] | {"idle_w": 134.0}) != PACK.sha256
