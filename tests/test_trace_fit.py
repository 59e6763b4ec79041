"""The fit to a profile and recorded runs together, on servers that are known because they are simulated."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fuel_ray.commands import calibrate
from fuel_ray.commands.calibrate import CalibrateConfig
from fuel_ray.errors import ConfigError
from fuel_ray.sim import trace_fit
from fuel_ray.sim.calibrate import DecodePoint, PrefillPoint, Profile, decode_step, fit
from fuel_ray.sim.fit_residuals import run_residuals
from fuel_ray.sim.pack import PerfModel, load_pack
from fuel_ray.sim.perf_model import HOST_STEPS, launch_cost
from fuel_ray.sim.recorded import RecordedRun, read_trace
from fuel_ray.sim.replay import figures, measured_figures, predicted_latencies, relative_errors
from fuel_ray.types import Requests

DATA = Path(__file__).parent / "data"
PREDICTED = (
    11012.346174837665,
    4.382141956835467,
    180.9278608871621,
)  # of the first trace, by commit 30c72b8
TRACES = tuple(str(DATA / name) for name in ("h100_trace_16_open5.json", "h100_trace_64_openkv12.json"))


def small_model() -> PerfModel:
    """A server whose small batches wait for the host: its GPU would take 1.5 ms where the host takes 2."""
    return load_pack("h100-qwen3-8b").perf.replace(
        frontend_in_s=3e-3, launch_graph_s=2e-3, launch_pieces_s=12e-3, launch_eager_s=24e-3, stall_w=190.0,
        decode_s=1.5e-3, decode_seq_s=8e-6, decode_ctx_s=2.4e-8, stream_s=0.75e-3, clock_s=0.5e-3,
        mixed_token_s=4e-6, prefill_token_s=6e-6, prefill_attention_s=2e-10,
        graph_w=700.0, graph_j=-0.25, graph_seq_j=0.003, prefill_token_j=0.0042, idle_w=125.0,
    )  # fmt: skip


def run_of(perf: PerfModel, rate_rps: float, *, seed: int, seconds: float = 12.0) -> RecordedRun:
    rng = np.random.default_rng(seed)
    arrival_s = np.cumsum(rng.exponential(1 / rate_rps, round(rate_rps * seconds)))
    n = len(arrival_s)
    lengths = [np.clip(rng.lognormal(np.log(mean), 0.7, n), 16, 4000).astype(int) for mean in (400, 150)]
    requests = Requests(arrival_s, *lengths, np.full(n, -1), np.zeros(n, np.int64))
    shape = read_trace(TRACES[0])
    run = replace(shape, requests=requests, duration_s=float(arrival_s[-1]) + 1, limit_schedule=())
    energy_j, ttft_s, e2e_s = predicted_latencies(run, perf, first_step=seed * 7919)
    return replace(run, energy_j=energy_j, ttft_s=ttft_s, e2e_s=e2e_s)


def profile_of(perf: PerfModel) -> Profile:
    mhz, decode = perf.constants.max_clock_mhz, []
    for seqs in (1, 4, 16, 32, 64, 128):
        for context in (400.0, 1500.0):
            step_s, power_w = decode_step(perf, DecodePoint(seqs, context, 1.0, 1.0, mhz))
            decode.append(DecodePoint(seqs, context, step_s, power_w, mhz))
    single = [PrefillPoint(n, 1, s, mhz) for n, s in ((128, 0.0152), (512, 0.0272), (4096, 0.0313))]
    step_s, power_w, _ = perf.step_cost(2, 8192, 8192, mhz, 4096**2)
    waiting = PrefillPoint(4096, 64, 0.0035 + 16.5 * step_s, mhz, step_s * power_w / 8192)
    return Profile(tuple(decode), (*single, waiting), ((mhz, 125.0),))


def errors(run: RecordedRun, perf: PerfModel) -> dict[str, float]:
    return relative_errors(figures(run, *predicted_latencies(run, perf)), measured_figures(run))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_fit, "_ROUNDS", 1)
    monkeypatch.setattr(trace_fit, "_ITERATIONS", 1)
    monkeypatch.setattr(trace_fit, "_DRAWS", (1, 1, 1))


def test_a_server_that_waits_for_its_host_is_recovered_at_rates_that_were_not_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trace_fit, "_ROUNDS", 1)
    monkeypatch.setattr(trace_fit, "_ITERATIONS", 5)
    monkeypatch.setattr(trace_fit, "_DRAWS", (1, 1, 1))
    truth = small_model()
    profile, seen = profile_of(truth), [run_of(truth, 3, seed=1), run_of(truth, 8, seed=2)]
    of_profile = fit(profile, base=load_pack("h100-qwen3-8b").perf)
    found = trace_fit.refine(profile, seen, start=of_profile).perf
    assert found.constants.launch_graph_s == pytest.approx(2e-3, rel=0.05)
    assert found.constants.decode_s < 1.75e-3
    limits = {"energy": 0.03, "tpot_mean": 0.05, "e2e_mean": 0.05, "ttft_p50": 0.15}
    for rate_rps in (1.5, 22):
        error = errors(run_of(truth, rate_rps, seed=5), found)
        assert {name for name, limit in limits.items() if abs(error[name]) > limit} == set()


def test_a_host_that_is_slow_for_some_of_the_time_shows_in_a_run() -> None:
    truth = small_model()
    slow = truth.replace(host_slow=0.5, host_slow_share=0.5)
    assert trace_fit.wander(run_of(slow, 8, seed=3, seconds=30.0), truth) > 0.1
    assert trace_fit.wander(run_of(truth, 8, seed=3, seconds=30.0), truth) < 0.03


def test_a_slow_host_launches_later_for_a_thousand_steps() -> None:
    m = small_model().replace(host_slow=0.5, host_slow_share=0.5).constants
    each = [launch_cost(m, 4.0, 0.0, thousand * HOST_STEPS + 5) for thousand in range(100)]
    assert set(np.round(each, 9)) == {0.002, 0.003}
    assert each.count(max(each)) == pytest.approx(50, abs=2)
    assert launch_cost(m, 4.0, 0.0, 5) == launch_cost(m, 4.0, 0.0, HOST_STEPS - 1)


def test_tokens_of_a_step_leave_one_by_one() -> None:
    run = run_of(small_model(), 8, seed=4)
    _, before_s, _ = predicted_latencies(run, small_model())
    _, after_s, _ = predicted_latencies(run, small_model().replace(frontend_seq_s=1e-4))
    assert (after_s >= before_s + 0.99e-4).all()
    assert (after_s - before_s).max() > 3e-4


def test_a_burst_without_outputs_has_residuals() -> None:
    run = run_of(small_model(), 8, seed=4)
    at_once = replace(run.requests, arrival_s=run.requests.arrival_s * 0, output_tokens=np.ones(96, np.int64))
    burst = replace(run, requests=at_once)
    assert np.isfinite(run_residuals(burst, draws=1)(small_model())).all()


def test_packs_without_a_slow_host_predict_what_they_did() -> None:
    perf = load_pack("h100-qwen3-8b").perf
    assert (perf.constants.host_slow, perf.constants.host_slow_share) == (0.0, 0.0)
    energy_j, ttft_s, e2e_s = predicted_latencies(read_trace(TRACES[0]), perf)
    assert (energy_j, float(ttft_s.sum()), float(e2e_s.sum())) == PREDICTED


def write_profile(path: Path, perf: PerfModel) -> str:
    profile = profile_of(perf)
    rows: list[dict[str, object]] = [
        {"phase": "decode", "b": p.seqs, "ctx_mid": p.context_tokens, "itl": p.step_s, "power_w": p.power_w,
         "clock_mhz": p.clock_mhz} for p in profile.decode
    ]  # fmt: skip
    rows += [{"phase": "prefill", "n_in": p.prompt_tokens, "ttft_p50": p.ttft_s} for p in profile.prefill[:3]]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.usefixtures("quick")
def test_calibrate_with_traces_takes_the_server_from_them_and_keeps_their_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = json.loads(Path(TRACES[0]).read_text())
    raw["info"] |= {"gpu_name": "NVIDIA H100 80GB HBM3", "model": "Qwen3-8B shape", "power_cap_w": 650.0}
    (tmp_path / "named.json").write_text(json.dumps(raw))
    profile = write_profile(tmp_path / "p.jsonl", load_pack("h100-qwen3-8b").perf)
    out = tmp_path / "mine.json"
    traces = (str(tmp_path / "named.json"), TRACES[1])
    calibrate.run(CalibrateConfig(profile=(profile,), traces=traces, name="mine", out=str(out)))
    pack = load_pack(str(out))
    assert (pack.gpu_name, pack.model) == ("NVIDIA H100 80GB HBM3", "Qwen3-8B shape")
    assert pack.perf.constants.power_cap_w == 650.0
    assert pack.kv_tokens == raw["info"]["num_kv_blocks"] * raw["info"]["block_size"]
    assert [(row.trace, row.left_out) for row in pack.fidelity] == [
        (name, left_out) for left_out in (False, True) for name in ("named", "h100_trace_64_openkv12")
    ]
    assert all(abs(row.tpot_mean) < 0.2 and row.requests > 100 for row in pack.fidelity)
    assert "2 traces" in pack.measured and "mixed steps" not in pack.transferred
    assert "left out of the fit" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_held_out_traces_are_predicted_only_and_probes_are_not_left_out(tmp_path: Path) -> None:
    raw = json.loads(Path(TRACES[0]).read_text())
    gpu = {"gpu_name": "NVIDIA H100 80GB HBM3"}
    for name, more in (("load", {}), ("probe", {"workload": "listed:requests=0.1@16/4"}), ("other", {})):
        info = raw["info"] | gpu | more | {"engine": "VLLM 1" if name == "other" else "vllm 1"}
        (tmp_path / f"{name}.json").write_text(json.dumps(raw | {"info": info}))
    load, probe, other = (str(tmp_path / f"{name}.json") for name in ("load", "probe", "other"))
    out, profile = tmp_path / "mine.json", write_profile(tmp_path / "p.jsonl", small_model())
    config = CalibrateConfig(profile=(profile,), traces=(load, probe), name="mine", out=str(out))
    calibrate.run(replace(config, held_out=(other,)))
    pack = load_pack(str(out))
    rows = [("load", False), ("probe", False), ("load", True), ("other", True)]
    assert [(row.trace, row.left_out) for row in pack.fidelity] == rows
    assert "2 traces" in pack.measured and "other" not in pack.measured
    with pytest.raises(ConfigError, match="twice"):
        calibrate.run(replace(config, held_out=(load,)))


def test_a_probe_weighs_less_than_a_load_in_ttft_only() -> None:
    load = run_of(small_model(), 8, seed=4)
    slower = small_model().replace(frontend_in_s=10e-3)
    probe = replace(load, info={"workload": "burst:count=96"})
    of_load, of_probe = (run_residuals(run, draws=1)(slower) for run in (load, probe))
    ratio = of_load[3:5] / of_probe[3:5]  # mean and median TTFT
    assert ratio == pytest.approx(3)
    assert of_load[:3] == pytest.approx(of_probe[:3])


def test_without_a_name_of_the_gpu_calibrate_asks_for_it(tmp_path: Path) -> None:
    profile = write_profile(tmp_path / "p.jsonl", small_model())
    with pytest.raises(ConfigError, match="--gpu"):
        calibrate.run(CalibrateConfig(profile=(profile,), name="mine", out=str(tmp_path / "mine.json")))


@pytest.mark.parametrize(("key", "other"), [("gpu_name", "NVIDIA H200"), ("origin", "modelled, pack x")])
def test_traces_of_several_servers_are_refused(tmp_path: Path, key: str, other: str) -> None:
    raw, paths = json.loads(Path(TRACES[0]).read_text()), []
    for value in ("NVIDIA H100" if key == "gpu_name" else "measured", other):
        paths.append(tmp_path / f"{len(paths)}.json")
        paths[-1].write_text(json.dumps(raw | {"info": raw["info"] | {key: value}}))
    config = CalibrateConfig(
        profile=("none",), traces=tuple(map(str, paths)), name="mine", out=str(tmp_path / "mine.json")
    )
    with pytest.raises(ConfigError, match=f"different values of {key} .*{other}"):
        calibrate.run(config)


def test_a_power_cap_that_is_no_number_is_refused(tmp_path: Path) -> None:
    raw, path = json.loads(Path(TRACES[0]).read_text()), tmp_path / "bad.json"
    path.write_text(json.dumps(raw | {"info": raw["info"] | {"power_cap_w": "much"}}))
    config = CalibrateConfig(profile=("none",), traces=(str(path),), gpu="H100", name="mine", out="mine.json")
    with pytest.raises(ConfigError, match="power_cap_w is much"):
        calibrate.run(config)


def test_errors_of_a_pack_that_say_something_else_are_refused(tmp_path: Path) -> None:
    source = Path(calibrate.__file__).parents[1] / "sim" / "packs" / "h100-qwen3-8b.json"
    path = tmp_path / "pack.json"
    path.write_text(json.dumps(json.loads(source.read_text()) | {"fidelity": [{"trace": "x"}]}))
    with pytest.raises(ConfigError, match="not a calibration pack"):
        load_pack(str(path))
