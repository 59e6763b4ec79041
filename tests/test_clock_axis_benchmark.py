"""The benchmark of the clock axis: constants it recovers, rows it predicts, input it refuses."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import clock_axis as benchmark

CLOCKS = (1080, 1380, 1680, 1830)
TIME_MS = {"fixed": 2.5, "clocked": 4.0, "fixed_seq": 0.025, "clocked_seq": 0.02}
ENERGY_J = {"hbm": 10.0, "weight": 8.0, "step": 0.3, "seq": 0.19}
STREAMING, SWITCHED, IDLE_W = (1.15, 1.0, 1.0, 1.0), (0.55, 0.74, 0.95, 1.0), (96.0, 109.0, 139.0, 155.0)


def grid(folder: Path, tps: tuple[int, ...], *, clocks: tuple[int, ...] = CLOCKS, seed: int = 0) -> Path:
    """Rows of the form itself, with noise of 1 %; the form is written here a second time on purpose."""
    rng, rows = np.random.default_rng(seed), []
    streaming, switched, idle_w = (np.interp(clocks, CLOCKS, t) for t in (STREAMING, SWITCHED, IDLE_W))
    t, e = TIME_MS, ENERGY_J
    for i, mhz in enumerate(clocks):
        for tp in tps:
            for b in (1, 4, 16, 64, 128):
                over_x = 1830 / mhz
                ms = t["fixed"] + t["clocked"] * over_x + (t["fixed_seq"] + t["clocked_seq"] * over_x) * b
                seconds = (ms + streaming[i] * 141.1 / 3.35 / tp) / 1e3
                joules = e["hbm"] / tp + ((e["weight"] + e["seq"] * b) / tp + e["step"]) * switched[i]
                power_w = idle_w[i] + joules / seconds
                noise = 1 + 0.01 * rng.standard_normal(2)
                rows.append((tp, b, mhz, seconds * noise[0], power_w * noise[1]))
    folder.mkdir(exist_ok=True)
    columns = ["tp", "batch", "clock_mhz", "latency_s", "power_w_per_gpu"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "decode_grid.csv", index=False)
    idle = pd.DataFrame({"clock_mhz": CLOCKS, "idle_power_w_per_gpu": IDLE_W})
    idle.to_csv(folder / "h100_idle_power_by_clock.csv", index=False)
    return folder


def change(folder: Path, edit: object, *, name: str = "decode_grid.csv") -> None:
    rows = edit(pd.read_csv(folder / name))  # type: ignore[operator]
    rows.to_csv(folder / name, index=False)


def table_of(text: str) -> dict[tuple[str, str], dict[str, float]]:
    """(TP, MHz) -> mean absolute error by column, in %."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:2] == ["TP", "MHz"])
    names = re.findall(r"(?:time|power|energy)(?: ratio)?", lines[start])
    found = {}
    for tp, mhz, cells in (line.split(maxsplit=2) for line in lines[start + 1 :]):
        means = re.findall(r"([\d.]+)% \(\S+\)|-(?:\s|$)", cells)
        found[tp, mhz] = {name: float(mean or "nan") for name, mean in zip(names, means, strict=True)}
    return found


def test_the_benchmark_recovers_the_constants_and_predicts_another_tp(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = grid(tmp_path / "a", (4, 8)), grid(tmp_path / "b", (2,), seed=1)
    found = benchmark.fitted(
        benchmark.read(first, 900, None), benchmark.read_idle(first), weights_s=141.1 / 3350
    )
    model = {name: 1e3 * value for name, value in found.time_s.items()}
    assert model["fixed"] + model["clocked"] == pytest.approx(6.5, rel=0.05)
    assert model["clocked"] == pytest.approx(4.0, rel=0.2)
    assert found.axis.switched == pytest.approx(SWITCHED, rel=0.08)
    assert found.axis.idle == pytest.approx([w / 155 for w in IDLE_W])
    assert benchmark.main([str(first), str(second)]) == 0
    said = capsys.readouterr().out
    assert "ratios are to 1830 MHz" in said and "not fitted" not in said
    errors = table_of(said)
    assert set(errors) == {(tp, mhz) for tp in ("2", "all") for mhz in map(str, CLOCKS)} | {("all", "all")}
    assert all(value < 8 for row in errors.values() for value in row.values() if value == value)
    assert errors["2", "1080"]["energy ratio"] < 5


def test_the_benchmark_sees_a_form_that_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = grid(tmp_path / "a", (4, 8)), grid(tmp_path / "b", (4, 8), seed=1)
    change(second, lambda d: d.assign(power_w_per_gpu=d.power_w_per_gpu.where(d.clock_mhz != 1380, 400)))
    assert benchmark.main([str(first), str(second)]) == 0
    errors = table_of(capsys.readouterr().out)
    assert errors["all", "1380"]["power"] > 10 > 5 > errors["all", "1080"]["power"]
    assert errors["all", "1380"]["time"] < 3


def test_the_benchmark_tells_a_wrong_scale_from_a_wrong_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = grid(tmp_path / "a", (4, 8)), grid(tmp_path / "b", (4, 8), seed=1)
    change(second, lambda d: d.assign(latency_s=1.5 * d.latency_s))
    assert benchmark.main([str(first), str(second)]) == 0
    row = table_of(capsys.readouterr().out)["all", "1380"]
    assert row["time"] > 25 and row["energy"] > 25 and row["time ratio"] < 4 and row["energy ratio"] < 4


def test_the_benchmark_predicts_clocks_that_were_not_fitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = grid(tmp_path / "a", (4, 8))
    second = grid(tmp_path / "b", (4,), clocks=(930, 1230, 1530, 1755), seed=1)
    assert benchmark.main([str(first), str(second), "--fit-tp", "4", "--test-tp", "4"]) == 0
    said = capsys.readouterr().out
    assert "linear between its neighbours: 1230, 1530, 1755 MHz" in said
    assert "beyond 1080 to 1830: tables are flat: 930 MHz" in said
    assert "to its highest clock: 1755 MHz (5 of them)" in said
    errors = table_of(said)
    assert errors["4", "1230"]["time"] < 4 and errors["4", "1530"]["power"] < 4
    assert np.isnan(errors["4", "1755"]["time ratio"]) and errors["4", "1230"]["energy ratio"] < 4


@pytest.mark.parametrize(
    ("dropped", "left"),
    [("power_w_per_gpu", {"time", "time ratio"}), ("latency_s", {"power", "power ratio"})],
)
def test_the_benchmark_judges_what_was_measured(
    tmp_path: Path, dropped: str, left: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = grid(tmp_path / "a", (4, 8)), grid(tmp_path / "b", (2,))
    change(second, lambda d: d.drop(columns=dropped))
    (second / "h100_idle_power_by_clock.csv").unlink()
    assert benchmark.main([str(first), str(second)]) == 0
    assert set(table_of(capsys.readouterr().out)["2", "1380"]) == left


def test_rows_without_a_power_tell_their_times_still(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = grid(tmp_path / "a", (4, 8)), grid(tmp_path / "b", (4,))
    change(second, lambda d: d.assign(power_w_per_gpu=d.power_w_per_gpu.where(d.clock_mhz != 1080)))
    assert benchmark.main([str(first), str(second)]) == 0
    row = table_of(capsys.readouterr().out)["4", "1080"]
    assert row["time"] < 4 and np.isnan(row["power"]) and np.isnan(row["energy ratio"])


def prefills(folder: Path, *, share: float = 0.725) -> Path:
    """Prefills alone and beside decoding requests, of the form itself; all are bound by arithmetic."""
    for name, batches in (("prefill_grid.csv", (0,)), ("mixed_grid.csv", (16, 64))):
        rows = []
        for i, mhz in enumerate(CLOCKS):
            for tp in (4, 8):
                for b in batches:
                    for tokens in (1024, 4096):
                        top_s = 1e-4 * tokens + b * 45e-6
                        seconds = top_s * (1 + share * (1830 / mhz - 1))
                        hbm, e = ENERGY_J["hbm"] / tp, ENERGY_J
                        decode_s = (6.5 + 141.1 / 3.35 / tp) / 1e3 + b * 45e-6
                        joules = hbm + (e["weight"] + e["seq"] * b) / tp + e["step"] + 0.05 * tokens
                        joules += IDLE_W[-1] * (decode_s - top_s)
                        power_w = IDLE_W[i] + (hbm + (joules - hbm) * SWITCHED[i]) / seconds
                        rows.append((tp, b, tokens, mhz, seconds, power_w))
        table = pd.DataFrame(
            rows,
            columns=["tp", "decode_batch", "prefill_tokens", "clock_mhz", "latency_s", "power_w_per_gpu"],
        )
        if name == "prefill_grid.csv":
            tree = table.power_w_per_gpu.where(table.tp == 8)
            table = table.assign(
                latency_s_tree=table.latency_s,
                power_w_per_gpu_tree=tree,
                power_w_per_gpu_measured_table=table.power_w_per_gpu.where(table.tp == 4),
            ).drop(columns=["decode_batch", "latency_s", "power_w_per_gpu"])
        table.to_csv(folder / name, index=False)
    return folder


@pytest.mark.parametrize(("share", "off"), [(0.725, False), (0.3, True)])
def test_the_benchmark_judges_prefill_and_mixed_steps(
    tmp_path: Path, share: float, off: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prefills(grid(tmp_path / "a", (4, 8)), share=share)
    assert benchmark.main([str(folder), str(folder), "--prefill"]) == 0
    _, *said = re.split(r"(?=prefill_grid.csv,|mixed_grid.csv,)", capsys.readouterr().out)
    assert [text.split(",")[0] for text in said] == ["prefill_grid.csv", "mixed_grid.csv"]
    for text in said:
        row = table_of(text.split("\n\n", 2)[1])["all", "1080"]
        assert (row["time ratio"] > 15) == off and (row["time"] > 15) == off
        if not off:
            assert max(row.values()) < 4, row


def test_prefill_that_is_not_there_is_said_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prefills(grid(tmp_path / "a", (4, 8)))
    change(folder, lambda d: d[d.prefill_tokens < 1], name="prefill_grid.csv")
    assert benchmark.main([str(folder), str(folder), "--prefill"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "prefill_grid.csv" in said
    (folder / "prefill_grid.csv").unlink()
    assert benchmark.main([str(folder), str(folder), "--prefill"]) == 2


FAULTS = {
    "no file": (lambda f: (f / "decode_grid.csv").unlink(), (), "No such file"),
    "empty": (lambda f: (f / "decode_grid.csv").write_text(""), (), "No columns"),
    "no idle file": (lambda f: (f / "h100_idle_power_by_clock.csv").unlink(), (), "h100_idle_power_by_clock"),
    "no column": (lambda f: change(f, lambda d: d.drop(columns="batch")), (), "no column batch"),
    "nothing measured": (
        lambda f: change(f, lambda d: d[["tp", "batch", "clock_mhz"]]), (), "neither of the columns"),
    "no power to fit": (
        lambda f: change(f, lambda d: d.drop(columns="power_w_per_gpu")), (), "to fit takes latency_s"),
    "one clock": (lambda f: change(f, lambda d: d[d.clock_mhz == 1830]), (), r"clocks found: 1 \(1830\)"),
    "words": (lambda f: change(f, lambda d: d.assign(latency_s="fast")), (), "fast"),
    "zero": (lambda f: change(f, lambda d: d.assign(latency_s=0.0)), (), "not a number above 0"),
    "that TP": (lambda f: None, ("--fit-tp", "16"), "no row of these TP.* it has TP 4, 8"),
    "that TP of the test": (lambda f: None, ("--test-tp", "2"), "no row of these TP"),
    "too high": (lambda f: None, ("--lowest-mhz", "2000"), "from 2000 MHz on"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_the_benchmark_cannot_use_is_said_in_a_line(
    tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, flags, named = FAULTS[fault]
    folder = grid(tmp_path / "a", (4, 8))
    spoil(folder)
    assert benchmark.main([str(folder), str(folder), *flags]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("error: ") and re.search(named, said.err)


def test_the_benchmark_says_what_it_leaves_aside(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--help"])
    assert "prefill_grid.csv and mixed_grid.csv" in capsys.readouterr().out
