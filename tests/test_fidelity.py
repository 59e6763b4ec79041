"""The packs, the replay of recorded traces and the calibration from a profile."""

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from fuel_ray.commands import calibrate, validate
from fuel_ray.commands.calibrate import CalibrateConfig
from fuel_ray.commands.validate import ValidateConfig
from fuel_ray.errors import ConfigError
from fuel_ray.sim.pack import load_pack, pack_names
from fuel_ray.sim.recorded import read_trace
from fuel_ray.sim.replay import FIGURES, measured_figures, predicted_figures, relative_errors

DATA = Path(__file__).parent / "data"
# Recorded on one H100 under vLLM 0.20.2; the second with a pool of 32,000 tokens, block size 64, 12 req/s
TRACES = [str(DATA / "h100_trace_16_open5.json"), str(DATA / "h100_trace_64_openkv12.json")]

PACKS = Path(str(resources.files("fuel_ray.sim"))) / "packs"


@pytest.mark.parametrize("path", TRACES)
def test_predicts_a_recorded_run(path: str) -> None:
    run = read_trace(path)
    errors = relative_errors(predicted_figures(run, load_pack("h100-qwen3-8b")), measured_figures(run))
    for name in ("energy", "mean_power", "tpot_mean", "tpot_p50", "e2e_mean", "e2e_p50"):
        assert abs(errors[name]) <= 0.05, name
    assert abs(errors["ttft_p50"]) <= 0.15


def test_measured_figures_follow_their_definitions() -> None:
    raw = json.loads(Path(TRACES[0]).read_text())
    measured = measured_figures(read_trace(TRACES[0]))
    tpots = [(r["e2e"] - r["ttft"]) / (r["n_out"] - 1) for r in raw["requests"] if r["n_out"] > 1]
    assert measured["energy"] == raw["info"]["energy_j"]
    assert measured["mean_power"] == pytest.approx(raw["info"]["energy_j"] / raw["info"]["secs"])
    assert measured["tpot_mean"] == pytest.approx(np.mean(tpots))
    assert measured["ttft_p99"] == pytest.approx(np.percentile([r["ttft"] for r in raw["requests"]], 99))


def test_a_lower_limit_makes_requests_wait_from_its_second_on(tmp_path: Path) -> None:
    raw = json.loads(Path(TRACES[0]).read_text())
    raw["info"]["limit_schedule"] = [[0, 128], [8, 2]]
    path = tmp_path / "limited.json"
    path.write_text(json.dumps(raw))
    pack = load_pack("h100-qwen3-8b")
    free, limited = (predicted_figures(read_trace(p), pack) for p in (TRACES[0], str(path)))
    assert limited["ttft_mean"] > 10 * free["ttft_mean"]
    assert limited["tpot_mean"] < free["tpot_mean"]
    assert limited["energy"] < free["energy"]


def test_validate_prints_one_json_object_per_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert validate.run(ValidateConfig(traces=tuple(TRACES), json=True)) == 0
    results = json.loads(capsys.readouterr().out)
    assert [result["trace"] for result in results] == TRACES
    for result in results:
        assert set(result) == {"trace", "source", "predicted", "measured", "errors", "beyond", "warnings"}
        for name in FIGURES:
            ratio = result["predicted"][name] / result["measured"][name]
            assert result["errors"][name] == pytest.approx(ratio - 1)


def test_validate_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert validate.run(ValidateConfig(traces=(TRACES[0],))) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (TRACES[0], "predicted", "measured", *FIGURES))


def test_the_column_of_a_twins_trace_is_called_simulated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = json.loads(Path(TRACES[0]).read_text())
    raw["info"]["origin"] = "modelled, pack h100-qwen3-8b"
    (tmp_path / "twin.json").write_text(json.dumps(raw))
    assert validate.run(ValidateConfig(traces=(str(tmp_path / "twin.json"),))) == 0
    out = capsys.readouterr().out
    assert "predicted    simulated" in out and "measured" not in out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"info": None}, "info"),
        ({"requests": []}, "requests"),
        ({"requests": [{"start": 1, "n_in": 1}]}, "n_out"),
        ({"requests": [{"n_in": 1, "n_out": 0, "start": 0, "ttft": 1, "e2e": 1}]}, "n_out"),
        ({"requests": [{"n_in": 1, "n_out": "many", "start": 0, "ttft": 1, "e2e": 1}]}, "many"),
        ({"requests": [{"n_in": 10**6, "n_out": 2, "start": 0, "ttft": 1, "e2e": 2}]}, "KV cache of"),
        ({"info.num_kv_blocks": None}, "num_kv_blocks"),
        ({"info.block_size": 0}, "block_size"),
        ({"info.secs": float("nan")}, "secs"),
        ({"info.limit_schedule": [[0, 0]]}, "limit_schedule"),
        ({"info.limit_schedule": 8}, "limit_schedule"),
    ],
)
def test_a_malformed_trace_is_named(tmp_path: Path, change: dict[str, object], named: str) -> None:
    raw = json.loads(Path(TRACES[0]).read_text())
    for key, value in change.items():
        where, leaf = (raw["info"], key[5:]) if key.startswith("info.") else (raw, key)
        if value is None:
            del where[leaf]
        else:
            where[leaf] = value
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=named) as caught:
        read_trace(str(path))
    assert "bad.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", "null"])
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.json"):
        read_trace(str(path))


def test_a_missing_trace_is_refused() -> None:
    with pytest.raises(ConfigError, match="no such file"):
        validate.run(ValidateConfig(traces=("nowhere.json",)))


def test_every_pack_of_a_server_that_we_measured_says_how_far_off_it_is() -> None:
    hopper = [name for name in pack_names() if name.startswith(("h100", "h200"))]
    assert set(pack_names()) - set(hopper) == {"a100-llama31-8b", "v100s-qwen7b-int4"}
    for pack in map(load_pack, hopper):
        assert pack.fidelity and "our own measurement" in Path(f"{PACKS}/{pack.name}.json").read_text()


@pytest.mark.parametrize("name", pack_names())
@pytest.mark.parametrize("seqs", [1, 8, 32])
@pytest.mark.parametrize("prefill", [0, 100, 4000])
def test_a_pack_is_physically_sane(name: str, seqs: int, prefill: int) -> None:
    pack = load_pack(name)
    perf = pack.perf
    costs = [
        perf.step_cost(seqs, seqs * 500.0, prefill, clock, prefill * prefill / 2)
        for clock in pack.gpu_clocks_mhz
    ]
    times, powers, clocks = (np.array(column) for column in zip(*costs, strict=True))
    m = perf.constants
    uncapped = powers < m.power_cap_w
    assert (np.diff(times[uncapped]) <= 0).all()
    assert (powers <= m.power_cap_w).all()
    assert (powers > [perf.at(mhz).idle_w for mhz in pack.gpu_clocks_mhz]).all()
    assert (np.diff(powers) >= -1e-9).all()
    assert (clocks <= np.array(pack.gpu_clocks_mhz) + 1e-9).all()
    more_times = perf.step_cost(seqs + 1, (seqs + 1) * 500.0, prefill, m.max_clock_mhz)[0]
    assert more_times >= perf.step_cost(seqs, seqs * 500.0, prefill, m.max_clock_mhz)[0]


def _energies(name: str, seqs: int) -> dict[int, float]:
    pack = load_pack(name)
    costs = {mhz: pack.perf.step_cost(seqs, seqs * 500.0, 0, mhz) for mhz in pack.gpu_clocks_mhz}
    return {mhz: time_s * power_w for mhz, (time_s, power_w, _) in costs.items()}


def test_the_a100s_energy_optimum_is_near_900_mhz() -> None:
    energies = _energies("a100-llama31-8b", 32)
    assert 810 <= min(energies, key=energies.__getitem__) <= 1005
    assert energies[900] / energies[1410] == pytest.approx(0.613, abs=0.07)  # of the published table


def test_the_a100s_power_bends_near_1120_mhz() -> None:
    perf = load_pack("a100-llama31-8b").perf
    power_w = [perf.step_cost(32, 0.0, 0, mhz)[1] for mhz in (900, 1000, 1300, 1400)]
    assert power_w[3] - power_w[2] > 3 * (power_w[1] - power_w[0])


def test_the_v100ss_energy_optimum_is_within_its_clocks() -> None:
    energies = _energies("v100s-qwen7b-int4", 32)
    assert 757 <= min(energies, key=energies.__getitem__) <= 1117


@pytest.fixture
def profile(tmp_path: Path) -> str:
    """What the A100 pack would measure, with context as a cost of its own."""
    perf = load_pack("a100-llama31-8b").perf.replace(decode_ctx_s=1e-7)
    m = perf.constants
    rows: list[dict[str, object]] = [{"phase": "idle", "power_w": m.idle_w}, {"phase": "other"}]
    for clock in (705, 900, 1110, 1200, 1305, 1410):
        for b in (1, 2, 8, 16, 32, 64):
            for ctx in (128.0, 1000.0):
                time_s, power_w, _ = perf.step_cost(b, b * ctx, 0, clock)
                row = {"phase": "decode", "b": b, "ctx_mid": ctx, "itl": time_s, "power_w": power_w}
                rows.append({**row, "clock_mhz": clock})
    frontend_s = m.frontend_in_s + m.frontend_out_s
    for tokens in (128, 512, 2048, 4096, 8000):
        launch_s = m.launch_pieces_s if tokens < 256 else m.launch_eager_s
        work_s = m.prefill_token_s * tokens + m.prefill_attention_s * tokens**2 / 2
        ttft_s = frontend_s + max(launch_s, work_s if tokens > 600 else 0)
        rows.append({"phase": "prefill", "c": 1, "n_in": tokens, "ttft_p50": ttft_s, "sm_mhz": 1200})
    path = tmp_path / "profile.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_calibrate_recovers_a_known_server(
    profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "mine.json")
    config = CalibrateConfig(profile=(profile,), name="mine", gpu="A100", out=out, power_cap_w=250.0)
    assert calibrate.run(config) == 0
    assert "705 MHz" in capsys.readouterr().out
    known, found = load_pack("a100-llama31-8b").perf, load_pack(out).perf
    m = found.constants
    for name in ("decode_s", "decode_seq_s", "launch_pieces_s", "launch_eager_s", "prefill_token_s"):
        assert getattr(m, name) == pytest.approx(getattr(known.constants, name), rel=0.05), name
    assert m.decode_ctx_s == pytest.approx(1e-7, rel=0.05)
    assert m.prefill_attention_s == pytest.approx(known.constants.prefill_attention_s, rel=0.2)
    truth = known.replace(decode_ctx_s=1e-7)
    for clock in (705, 1005, 1410):
        for b in (1, 20, 64):
            expected, actual = (perf.step_cost(b, b * 500.0, 0, clock) for perf in (truth, found))
            assert actual[:2] == pytest.approx(expected[:2], rel=0.05)


def test_one_profiled_clock_takes_the_clock_axis_from_another_pack(profile: str, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(profile).read_text().splitlines()]
    one = tmp_path / "one.jsonl"
    one.write_text("\n".join(json.dumps(row) for row in rows if row.get("clock_mhz") in (None, 1410)))
    out = str(tmp_path / "mine.json")
    calibrate.run(CalibrateConfig(profile=(str(one),), name="mine", gpu="A100", out=out, power_cap_w=250.0))
    pack, shape = load_pack(out), load_pack("a100-llama31-8b")
    assert "a100-llama31-8b" in pack.transferred
    assert pack.perf.axis == shape.perf.axis
    assert pack.gpu_clocks_mhz[-1] == 1410
    slow, fast = (pack.perf.step_cost(8, 4000.0, 0, mhz)[0] for mhz in (900, 1410))
    assert slow > 1.05 * fast


def test_a_row_that_fits_nothing_is_dropped(
    profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {"phase": "decode", "b": 64, "ctx_mid": 128.0, "itl": 0.2, "power_w": 200.0, "clock_mhz": 1410}
    extra = tmp_path / "extra.jsonl"
    extra.write_text(json.dumps(wrong))
    out = str(tmp_path / "mine.json")
    calibrate.run(CalibrateConfig(profile=(profile, str(extra)), name="mine", gpu="A100", out=out))
    assert "any fit: 64 requests with 128 tokens each at 1410 MHz (200 ms per step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "not JSON"),
        ("[]", "object"),
        ('{"phase": "idle", "power_w": 100}', "no row with phase decode"),
        ('{"phase": "decode", "b": 1}', "ctx_mid"),
        (
            '{"phase": "decode", "b": 1, "ctx_mid": 1, "itl": 0.1, "power_w": 9, "sm_mhz": 1410}',
            "a fit needs at least 4",
        ),
    ],
)
def test_a_malformed_profile_is_refused(tmp_path: Path, line: str, named: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line)
    out = tmp_path / "mine.json"
    with pytest.raises(ConfigError, match=named):
        calibrate.run(CalibrateConfig(profile=(str(path),), name="mine", gpu="A100", out=str(out)))
    assert not out.exists()
