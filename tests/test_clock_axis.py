"""The clock axis: its tables, variants in packs, fit and transfer."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fuel_ray.cli import main
from fuel_ray.errors import ConfigError
from fuel_ray.sim import scheduler as rules
from fuel_ray.sim.calibrate import DecodePoint, Profile, fit
from fuel_ray.sim.clock_axis import AtClock, ClockAxis
from fuel_ray.sim.nearest import same_architecture
from fuel_ray.sim.pack import PerfModel, load_pack, pack_fields, pack_names
from fuel_ray.sim.recorded import read_trace
from fuel_ray.sim.replay import predicted_figures
from fuel_ray.sim.scheduler import Engine, advance, new_state
from fuel_ray.types import Requests

PACK = load_pack("h100-qwen3-8b")
PACK_FILE = Path(rules.__file__).parent / "packs" / "h100-qwen3-8b.json"
TRACE = Path(__file__).parent / "data" / "h100_trace_16_open5.json"
VARIANTS = [(name, axis) for name in pack_names() for axis in load_pack(name).clock_axes]
STEPS = [(1, 0), (8, 0), (64, 0), (128, 0), (8, 200), (1, 4000), (32, 8000)]  # (sequences, prompt tokens)


def cost(perf: PerfModel, seqs: int, prefill: int, clock_mhz: float) -> tuple[float, float, float]:
    return perf.step_cost(seqs, seqs * 500.0, prefill, clock_mhz, prefill**2 / 2)


def edited(tmp_path: Path, **changes: object) -> str:
    """A pack file with entries changed, or left out where they are None."""
    raw = {k: v for k, v in (json.loads(PACK_FILE.read_text()) | changes).items() if v is not None}
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(raw))
    return str(path)


# Tables


def test_between_its_clocks_an_axis_is_linear_and_beyond_them_flat() -> None:
    axis = ClockAxis((1000.0, 2000.0), (1.4, 1.0), (0.5, 1.0), (0.6, 1.0))
    assert axis.read(1250) == pytest.approx((1.3, 0.625, 0.7))
    assert axis.read(1000) == axis.read(300) == (1.4, 0.5, 0.6)
    assert axis.read(2000) == axis.read(5000) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"switched": [0.5, 1.0]}, "as many entries"),
        ({"clocks_mhz": [900, 1080, 1380, 1830, 1680, 1980]}, "must ascend"),
        ({"clocks_mhz": [900, 1080, 1080, 1680, 1830, 1980]}, "must ascend"),
        ({"idle": [0, 0.6, 0.7, 0.8, 0.9, 1.0]}, "above 0"),
        ({name: [] for name in ("clocks_mhz", "streaming", "switched", "idle")}, "at least one"),
    ],
)
def test_a_pack_whose_clock_axis_cannot_be_is_malformed(
    tmp_path: Path, changes: dict[str, list[float]], named: str
) -> None:
    axis = json.loads(PACK_FILE.read_text())["clock_axis"] | changes
    with pytest.raises(ConfigError, match=f"not a calibration pack.*{named}"):
        load_pack(edited(tmp_path, clock_axis=axis))


def test_a_variant_that_cannot_be_is_malformed_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a calibration pack.*as many entries"):
        load_pack(edited(tmp_path, clock_axis_variants={"odd": {"clock_axis": {"idle": [1.0]}}}))


@pytest.mark.parametrize(
    ("version", "named"),
    [(None, "has no format"), (1, "has format 1"), (99, "has format 99")],
)
def test_a_pack_of_another_format_is_refused_with_how_to_make_it_again(
    tmp_path: Path, version: int | None, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = edited(tmp_path, format=version)
    with pytest.raises(ConfigError, match=rf"{named}.*fuel-ray calibrate"):
        load_pack(path)
    assert main(["evaluate", "--pack", path, "--static", "max"]) == 2
    assert named in capsys.readouterr().err


# Packs and their variants


@pytest.mark.parametrize(("name", "axis"), VARIANTS)
@pytest.mark.parametrize(("seqs", "prefill"), STEPS)
def test_the_highest_clock_is_that_of_the_fit_whatever_the_axis(
    name: str, axis: str, seqs: int, prefill: int
) -> None:
    perf = load_pack(name, axis).perf
    m, context = perf.constants, seqs * 500.0
    attention_s = m.prefill_attention_s * prefill**2 / 2
    decode_s = m.decode_s + m.decode_seq_s * seqs + m.decode_ctx_s * context
    duration_s = max(
        decode_s + m.mixed_token_s * prefill, decode_s - m.decode_s + m.prefill_token_s * prefill
    )
    energy_j = m.graph_w * (decode_s + attention_s) + m.graph_j + m.graph_seq_j * seqs
    energy_j += m.prefill_token_j * prefill
    duration_s = max(duration_s + attention_s, energy_j / m.power_cap_w)
    time_s, power_w, _ = cost(perf, seqs, prefill, m.max_clock_mhz)
    assert time_s == pytest.approx(duration_s, rel=1e-9)
    assert power_w == pytest.approx(energy_j / duration_s, rel=1e-9)


@pytest.mark.parametrize("axis", PACK.clock_axes[1:])
def test_no_axis_moves_a_run_that_was_recorded_at_the_highest_clock(axis: str) -> None:
    run = read_trace(str(TRACE))
    nominal = predicted_figures(run, PACK)
    assert predicted_figures(run, PACK.with_axis(axis)) == pytest.approx(nominal, rel=1e-12)


@pytest.mark.parametrize(("name", "axis"), VARIANTS)
@pytest.mark.parametrize(("seqs", "prefill"), STEPS)
def test_every_variant_is_physically_sane(name: str, axis: str, seqs: int, prefill: int) -> None:
    pack = load_pack(name, axis)
    costs = [cost(pack.perf, seqs, prefill, mhz) for mhz in pack.gpu_clocks_mhz]
    time_s, power_w, clock_mhz = np.array(costs).T
    at = [pack.perf.at(mhz) for mhz in pack.gpu_clocks_mhz]
    idle_w, stall_w = (np.array([getattr(a, name) for a in at]) for name in ("idle_w", "stall_w"))
    below_cap = power_w < pack.perf.constants.power_cap_w
    assert (np.diff(time_s[below_cap]) <= 1e-15).all()
    assert (np.diff(power_w) >= -1e-9).all()
    assert (np.diff(idle_w) >= 0).all() and (idle_w <= stall_w).all() and (idle_w < power_w).all()
    assert (power_w <= pack.perf.constants.power_cap_w).all() and (clock_mhz <= pack.gpu_clocks_mhz).all()


def test_the_nominal_axis_lies_between_low_and_high() -> None:
    saved = {}
    for axis in ("low", "nominal", "high"):
        at = [np.prod(cost(PACK.with_axis(axis).perf, 16, 0, mhz)[:2]) for mhz in (1380, 1980)]
        saved[axis] = 1 - at[0] / at[1]
    assert saved["low"] < saved["nominal"] - 0.01 < saved["nominal"] < saved["high"] - 0.03


def test_an_unknown_axis_names_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"h100-qwen3-8b has nominal, .*high, .*low"):
        PACK.with_axis("steep")
    with pytest.raises(ConfigError, match=r"a100-llama31-8b has nominal$"):
        load_pack("a100-llama31-8b", "low")


def test_another_axis_and_back_is_the_pack() -> None:
    low = PACK.with_axis("low")
    assert low.clock_axes == PACK.clock_axes and low.perf != PACK.perf
    assert low.with_axis("nominal").perf == PACK.perf and low.with_axis("nominal").clock_axis == "nominal"


def test_evaluation_under_another_axis_says_so_and_gives_other_energies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--static", "max", "128@1380", "--seconds", "40", "--seeds", "1", "--block-sizes", "16"]
    energies = {}
    for axis in ("low", "nominal", "high"):
        out = tmp_path / axis
        code = main(["evaluate", *flags, "--workload", "steady:rate_rps=5", "--out", str(out),
                     "--clock-axis", axis])  # fmt: skip
        said = capsys.readouterr().out
        assert code == 0 and (f"clock axis {axis}" in said) == (axis != "nominal")
        energies[axis] = pd.read_csv(next(out.rglob("summary.csv"))).energy_j_per_request.tolist()
    assert energies["low"][0] == energies["nominal"][0] == energies["high"][0]  # at the highest clock
    assert min(energies["low"][1], energies["nominal"][1]) > 1.02 * energies["high"][1]
    assert main(["evaluate", *flags, "--clock-axis", "steep"]) == 2
    assert "has nominal" in capsys.readouterr().err


# The node


def test_idle_power_follows_the_clock() -> None:
    engine = Engine(16, 2000, 32, 256, False)
    none = np.array([100.0]), np.array([9]), np.array([9]), np.array([-1]), np.array([0])
    for clock_mhz in (990, 1380, 1980):
        state = new_state(Requests(*none), engine)
        advance(state, engine, PACK.perf.constants, PACK.perf.at(clock_mhz), 10.0, 32)
        share = PACK.perf.axis.read(clock_mhz)[2]
        assert state.clock[rules.ENERGY] == pytest.approx(10 * 133 * share)


@pytest.mark.parametrize(
    ("launch", "seconds", "tokens"), [("launch_graph_s", 0.1, 200), ("launch_pieces_s", 10.0, 1)]
)
def test_power_while_the_gpu_waits_for_launches_follows_the_clock(
    launch: str, seconds: float, tokens: int
) -> None:
    """Twice the launch time adds stalls alone, between steps or before the first, at the clock's power."""
    engine, one = Engine(16, 2000, 32, 256, False), np.array([1])
    requests = Requests(np.array([0.1]), 32 * one, tokens * one, -one, 0 * one)
    for clock_mhz in (990, 1980):
        used = []
        for launch_s in (seconds, 2 * seconds):
            m = PACK.perf.replace(**{launch: launch_s}).constants
            state, energy_j = new_state(requests, engine), 0.0
            while state.count[rules.FINISHED] == 0:
                advance(state, engine, m, PACK.perf.at(clock_mhz), state.clock[rules.NOW] + 0.01, 32)
                energy_j += state.clock[rules.ENERGY]
            used.append((state.clock[rules.NOW], energy_j))
        (before_s, before_j), (after_s, after_j) = used
        assert after_s > before_s + 5
        stall_w = PACK.perf.at(clock_mhz).stall_w
        assert (after_j - before_j) / (after_s - before_s) == pytest.approx(stall_w, rel=0.01)
    assert PACK.perf.at(990).stall_w < 0.6 * PACK.perf.at(1980).stall_w


# Its fit to a profile, and its transfer


def known() -> PerfModel:
    """A server of which nothing but how streaming depends on the clock is the shipped pack's."""
    clocks_mhz = (1080.0, 1500.0, 1980.0)
    streaming = tuple(PACK.perf.axis.read(mhz)[0] for mhz in clocks_mhz)
    axis = ClockAxis(clocks_mhz, streaming, (0.4, 0.62, 1.0), (0.7, 0.8, 1.0))
    return PerfModel(PACK.perf.constants, axis).replace(idle_w=110.0, clock_s=0.0016, clock_seq_s=8e-6)


def rows_of(perf: PerfModel, clocks_mhz: tuple[int, ...]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for mhz in clocks_mhz:
        rows.append({"phase": "idle", "power_w": perf.at(mhz).idle_w, "clock_mhz": mhz})
        for b in (1, 4, 16, 48):
            for ctx in (200.0, 1000.0):
                time_s, power_w, _ = perf.step_cost(b, b * ctx, 0, mhz)
                row = {"phase": "decode", "b": b, "ctx_mid": ctx, "itl": time_s, "power_w": power_w}
                rows.append({**row, "clock_mhz": mhz})
    return rows


def calibrated(tmp_path: Path, clocks_mhz: tuple[int, ...], *flags: str, rows: int | None = None) -> int:
    profile = tmp_path / "profile.jsonl"
    profile.write_text("\n".join(json.dumps(row) for row in rows_of(known(), clocks_mhz)[:rows]))
    out = str(tmp_path / "mine.json")
    return main(["calibrate", "--profile", str(profile), "--name", "mine", "--out", out, *flags])


def test_three_clocks_tell_the_clock_axis(tmp_path: Path) -> None:
    assert calibrated(tmp_path, (1080, 1500, 1980), "--gpu", "NVIDIA H100 80GB HBM3") == 0
    pack, truth = load_pack(str(tmp_path / "mine.json")), known()
    for mhz in (1080, 1290, 1500, 1740, 1980):
        for b in (2, 8, 32):
            expected = truth.step_cost(b, b * 600.0, 0, mhz)[:2]
            assert pack.perf.step_cost(b, b * 600.0, 0, mhz)[:2] == pytest.approx(expected, rel=0.05)
        assert pack.perf.at(mhz).idle_w == pytest.approx(truth.at(mhz).idle_w, rel=1e-3)
    m = pack.perf.constants
    assert (m.clock_s, m.clock_seq_s) == pytest.approx((0.0016, 8e-6), rel=0.05)
    assert "streaming by clock, from h100-qwen3-8b" in pack.transferred
    assert "clock axis, all of it" not in pack.transferred


def test_four_decode_rows_are_enough_and_fewer_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--gpu", "NVIDIA H100 80GB HBM3")
    assert calibrated(tmp_path, (1980,), *flags, rows=5) == 0  # the first is idle
    assert "the errors are unknown, because the fit needs every row" in capsys.readouterr().out
    assert calibrated(tmp_path, (1980,), *flags, rows=4) == 2
    assert "decode rows with 3 different pairs of batch and context" in capsys.readouterr().err


def test_as_many_rows_are_kept_as_a_fit_needs_and_how_far_off_they_are_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "noisy.jsonl"
    rows = [row for row in rows_of(known(), (1980,)) if row["phase"] == "decode"][:5]
    noisy = [{**row, "itl": 0.01 * 6 ** (k % 2)} for k, row in enumerate(rows)]
    profile.write_text("\n".join(map(json.dumps, noisy)))
    flags = ["--gpu", "NVIDIA H100", "--name", "mine", "--out", str(tmp_path / "mine.json")]
    assert main(["calibrate", "--profile", str(profile), *flags]) == 0
    assert re.search(
        r"warning: a decode row is \d\d+% off the fit, but the fit needs it", capsys.readouterr().out
    )


@pytest.mark.parametrize("clocks_mhz", [(1980,), (1380, 1980)])
@pytest.mark.parametrize(
    ("gpu", "of"),
    [
        ("NVIDIA H200", "h100-qwen3-8b"),
        ("NVIDIA A10", "a100-llama31-8b"),
        ("NVIDIA A100-SXM4-40GB", "a100-llama31-8b"),
        ("Tesla V100-SXM2-16GB", "v100s-qwen7b-int4"),
    ],
)
def test_fewer_clocks_take_the_axis_of_the_same_architecture(
    tmp_path: Path, clocks_mhz: tuple[int, ...], gpu: str, of: str
) -> None:
    assert calibrated(tmp_path, clocks_mhz, "--gpu", gpu) == 0
    pack, shape = load_pack(str(tmp_path / "mine.json")), load_pack(of)
    assert f"modelled: the clock axis, from {of}" in pack.transferred
    assert pack.architecture == shape.architecture
    top_mhz = shape.perf.constants.max_clock_mhz
    for share in (0.6, 0.8, 1.0):
        ours, theirs = pack.perf.axis.read(1980 * share), shape.perf.axis.read(top_mhz * share)
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert pack.clock_axes == shape.clock_axes


def test_axes_that_are_taken_along_say_of_the_own_step_what_they_say_of_their_own(tmp_path: Path) -> None:
    assert calibrated(tmp_path, (1980,), "--gpu", "NVIDIA H200") == 0
    pack, shape = load_pack(str(tmp_path / "mine.json")), load_pack("h100-qwen3-8b")
    assert pack.clock_axis_notes == shape.clock_axis_notes
    for name in ("clocked", "streaming-more", "high", "prefill-0.65"):
        ours, theirs = (of.with_axis(name).perf.constants for of in (pack, shape))
        assert ours.stream_s / ours.decode_s == pytest.approx(theirs.stream_s / theirs.decode_s, rel=1e-3)
        assert ours.clock_s / ours.decode_s == pytest.approx(theirs.clock_s / theirs.decode_s, rel=1e-3)
        assert ours.prefill_clock_share == theirs.prefill_clock_share
        assert ours.decode_s == pack.perf.constants.decode_s
    assert calibrated(tmp_path, (1080, 1500, 1980), "--gpu", "NVIDIA H200") == 0
    assert load_pack(str(tmp_path / "mine.json")).clock_axes == ("nominal",)


def test_the_axis_of_a_pack_that_is_named_is_taken(tmp_path: Path) -> None:
    flags = ("--gpu", "NVIDIA B200", "--clock-axis-from", "a100-llama31-8b")
    assert calibrated(tmp_path, (1980,), *flags) == 0
    pack = load_pack(str(tmp_path / "mine.json"))
    assert "from a100-llama31-8b" in pack.transferred
    assert pack.perf.axis.switched == load_pack("a100-llama31-8b").perf.axis.switched


@pytest.mark.parametrize("gpu", ["NVIDIA L4", "NVIDIA B200", "NVIDIA L40S", "unknown"])
def test_an_architecture_of_which_no_pack_is_gets_advice(
    tmp_path: Path, gpu: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrated(tmp_path, (1080, 1500, 1980), "--gpu", gpu) == 2
    said = capsys.readouterr().err
    assert "three clocks" in said and "--clock-axis-from" in said and "Hopper" in said
    with pytest.raises(ConfigError, match=gpu):
        same_architecture(gpu)


def test_idle_power_at_two_clocks_does_not_make_an_axis() -> None:
    truth = known()
    costs = [
        (b, mhz, truth.step_cost(b, b * 500.0, 0, mhz)) for b in (1, 2, 4, 8) for mhz in (1080, 1500, 1980)
    ]
    decode = tuple(DecodePoint(b, 500.0, c[0], c[1], float(mhz)) for b, mhz, c in costs)
    profile = Profile(decode, idle=((1080.0, 50.0), (1980.0, 120.0)))
    found = fit(profile, base=PACK.perf)
    assert found.at(1080).idle_w == pytest.approx(120 * PACK.perf.axis.read(1080)[2])
    three = replace(profile, idle=((1080.0, 50.0), (1500.0, 60.0), (1980.0, 120.0)))
    assert fit(three, base=PACK.perf).at(1080).idle_w == pytest.approx(50.0)


@pytest.mark.parametrize("clocks_mhz", [(1080, 1530, 1980), (1380, 1680, 1980), (1380, 1980)])
def test_streaming_by_clock_is_taken_over_at_every_clock(clocks_mhz: tuple[int, ...]) -> None:
    """Also between and below the clocks that were profiled, where those alone would make it flat."""
    costs = [
        (b, ctx, mhz, PACK.perf.step_cost(b, b * ctx, 0, mhz)[:2])
        for b in (1, 4, 16, 48)
        for ctx in (200.0, 1000.0)
        for mhz in clocks_mhz
    ]
    idle = tuple((float(mhz), PACK.perf.at(mhz).idle_w) for mhz in (1380, 1680, 1980))
    decode = tuple(DecodePoint(b, ctx, *cost, float(mhz)) for b, ctx, mhz, cost in costs)
    found = fit(Profile(decode, idle=idle), base=PACK.perf)
    for mhz in (900, 1080, 1230, 1380, 1530, 1980):
        assert found.axis.read(mhz)[0] == pytest.approx(PACK.perf.axis.read(mhz)[0])
        ours, truth = (perf.step_cost(8, 4000.0, 0, mhz)[:2] for perf in (found, PACK.perf))
        assert ours == pytest.approx(truth, rel=0.03), mhz


def test_a_model_is_the_same_after_its_file() -> None:
    fields = pack_fields(PACK.perf)
    raw = json.loads(PACK_FILE.read_text())
    assert fields["clock_axis"] == raw["clock_axis"] and fields["format"] == raw["format"]


def test_what_a_clock_makes_of_the_constants_compiles_the_engine_once() -> None:
    """Other types than float, of one clock alone, would be another engine to compile: 7 s each."""
    types = {tuple(map(type, PACK.perf.at(clock_mhz))) for clock_mhz in PACK.gpu_clocks_mhz}
    assert types == {(float,) * len(AtClock._fields)}
