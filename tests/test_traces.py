"""Traces as people have them: other units, other blocks, other tools' tables."""

import bz2
import gzip
import json
import logging
import random
import re
from pathlib import Path

import numpy as np
import pytest

from fuel_ray.cli import main
from fuel_ray.config import SweepConfig, load_config
from fuel_ray.errors import ConfigError
from fuel_ray.live.load.prompts import DrawnLoad
from fuel_ray.record import read_json
from fuel_ray.sim import recorded as recorded_runs
from fuel_ray.sim.pack import load_pack
from fuel_ray.workload import formats
from fuel_ray.workload.spec import parse_workload

PAGE = (Path(__file__).parent.parent / "docs" / "workloads.md").read_text(encoding="utf-8")
EXAMPLE = re.compile(r"^```\w+ (\w+) ?([\d.]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PER_SECOND = {"s": 1, "ms": 1e3, "us": 1e6, "ns": 1e9}


def recorded(n=120, *, rate_rps=2.0, block=512, unit="ms", origin_s=0.0, seed=0, full_only=False, name=int):
    """A trace in which all prompts of four blocks or more share four."""
    rng, time_s, own, rows = random.Random(seed), origin_s, 10**5, []
    for _ in range(n):
        time_s += rng.expovariate(rate_rps)
        tokens = rng.randint(block + 1, block * 20)
        blocks = tokens // block if full_only else -(-tokens // block)
        ids = [*range(min(blocks, 4)), *range(own, own + max(0, blocks - 4))]
        own += blocks
        time = time_s * PER_SECOND[unit]
        rows.append(
            {
                "timestamp": time if unit == "s" else int(time),
                "input_length": tokens,
                "output_length": rng.randint(1, 300),
                "hash_ids": [name(block_id) for block_id in ids],
            }
        )
    return rows


def lines(rows):
    return "\n".join(map(json.dumps, rows)) + "\n"


def table(*, header="TIMESTAMP,ContextTokens,GeneratedTokens", n=20, cell=str, time=None, end=""):
    time = time or (lambda i: f"2024-05-10 00:00:{i:02d}.009930+00:00")
    return header + "\n" + "".join(f"{time(i)},{cell(100 + i)},{cell(5 + i)}{end}\n" for i in range(n))


@pytest.fixture
def read(tmp_path):
    """The workload of a format, of a file with this content."""

    def of(name, content, options="", *, file="trace"):
        path = tmp_path / file
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return parse_workload(f"{name}:path={path}{options}")

    return of


def share_of_prefixes(workload):
    return workload.requests.prefix_tokens.sum() / workload.requests.prompt_tokens.sum()


@pytest.mark.parametrize(("name", "rate_rps", "text"), EXAMPLE.findall(PAGE))
def test_the_examples_of_the_page_are_read(read, tmp_path, name, rate_rps, text):
    if name in ("sharegpt", "custom"):
        (tmp_path / "texts").write_text(text)
        requests, prompts = DrawnLoad(
            dataset_name=name, dataset_path=tmp_path / "texts", num_prompts=2
        ).draw()
        assert prompts[0].startswith("What is ") and requests.output_tokens[0] > 5
    else:
        assert read(name, text).mean_rate_rps == pytest.approx(float(rate_rps))


def test_every_format_is_on_the_page():
    assert {*formats.FORMATS, "speeds"} <= {name for name, _, _ in EXAMPLE.findall(PAGE)}


@pytest.mark.parametrize("spec", ["azure-conv", "azure-code", "azure-code:rate_scale=2"])
def test_shipped_traces_are_what_they_were(spec):
    digests = {"azure-conv": "64d4e8330a74", "azure-code": "f8c76139cdbe"}
    assert parse_workload(spec).digest() == digests.get(spec, "f59e182d9bfe")


@pytest.mark.parametrize("unit", ["s", "us", "ns"])
def test_times_in_another_unit_are_read_rightly_and_said_or_refused(read, caplog, unit):
    trace = lines(recorded(unit=unit, block=16))
    try:
        workload = read("mooncake", trace)
    except ConfigError as error:
        assert re.search(rf"one request in .* \(2\.\d+ req/s in {unit}\): unit=s\|ms\|us\|ns", str(error))
        workload = read("mooncake", trace, f",unit={unit}")
    else:
        assert (
            f"timestamps read as {unit}" in caplog.text and "unit=s|ms|us|ns sets it by hand" in caplog.text
        )
    assert workload.mean_rate_rps == pytest.approx(2.0, rel=0.3)
    assert 0.2 < share_of_prefixes(workload) < 0.6


@pytest.mark.parametrize("name", ["mooncake", "bailian"])
@pytest.mark.parametrize("unit", PER_SECOND)
def test_times_since_1970_tell_their_unit(read, name, unit):
    trace = lines(recorded(unit=unit, origin_s=1.7e9))
    assert read(name, trace).mean_rate_rps == pytest.approx(2.0, rel=0.3)


def test_rates_that_could_be_meant_are_refused_with_both_readings(read):
    with pytest.raises(
        ConfigError, match=r"would be one request in 4\d\d s \(2\.\d+ req/s in ms\): unit="
    ) as error:
        read("bailian", lines(recorded(block=16)))
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"would be 2\d\d req/s \(0\.\d+ req/s in s\)"):
        read("mooncake", lines(recorded(rate_rps=0.25, unit="s")))
    with pytest.raises(ConfigError, match=r"10,000 req/s \(no other unit is likelier\)"):
        read("vllm", json.dumps({"start_times": [1, 1.0001], "input_lens": [5, 5], "output_lens": [5, 5]}))


def test_a_given_unit_is_taken_and_an_unlikely_rate_said(read, caplog):
    assert read("mooncake", lines(recorded(rate_rps=500)), ",unit=ms").mean_rate_rps == pytest.approx(
        500, rel=0.3
    )
    assert "with timestamps in ms it is" in caplog.text
    with pytest.raises(ConfigError, match="leave unit=s out"):
        read("azure", table(), ",unit=s")
    with pytest.raises(ConfigError, match="one of s, ms, us, ns"):
        read("azure", table(), ",unit=min")


@pytest.mark.parametrize("header", ["timestamp_ms", "Timestamp (ms)", "TIMESTAMP [milliseconds]"])
def test_a_column_may_name_its_unit(read, header):
    text = table(header=f"{header},ContextTokens,GeneratedTokens", time=lambda i: i * 500)
    assert read("azure", text).mean_rate_rps == pytest.approx(2.0)


@pytest.mark.parametrize("header", ["Timestamp (min)", "timestamp_hours", "timestamp_end"])
def test_a_column_in_another_unit_or_of_another_time_is_not_the_wanted_one(read, header):
    with pytest.raises(ConfigError, match="no column 'TIMESTAMP'"):
        read("azure", table(header=f"{header},ContextTokens,GeneratedTokens", time=str))
    with pytest.raises(ConfigError, match="no column 'ContextTokens'"):
        read("azure", table(header="TIMESTAMP,ContextTokens (k),GeneratedTokens"))


@pytest.mark.parametrize("whole", [0, 12])
@pytest.mark.parametrize("delimiter", [",", ";"])
def test_a_comma_of_decimals_in_times_is_not_taken_for_one_of_thousands(read, whole, delimiter):
    text = table(time=lambda i: f'"{whole}.{50 * i:03d}"').replace(",", delimiter).replace(".", ",")
    with pytest.raises(ConfigError, match=r":2: .*(comma|not a number)"):
        read("azure", text)
    assert read("azure", table(time=lambda i: f'"1,234,{i:03d}.5"')).mean_rate_rps == 1


@pytest.mark.parametrize("full_only", [False, True])
@pytest.mark.parametrize("block", [16, 32, 48, 64, 128, 256, 512, 1024])
def test_blocks_of_any_size_are_told_from_the_prompts(read, caplog, block, full_only):
    workload = read("mooncake", lines(recorded(block=block, full_only=full_only)))
    assert max(workload.requests.prefix_tokens) == 4 * block
    assert (f"blocks of {block} tokens" in caplog.text) == (block != 512)


def test_a_block_size_that_contradicts_the_prompts_is_refused(read):
    with pytest.raises(
        ConfigError, match=r"blocks of 512 tokens match \d % of prompt lengths; 16 match 100 %: block=16"
    ):
        read("mooncake", lines(recorded(block=16)), ",block=512")
    with pytest.raises(ConfigError, match="block=512"):
        read("mooncake", lines(recorded()), ",block=16")
    with pytest.raises(ConfigError, match="block=N says their size"):
        rows = [row | {"hash_ids": list(range(30 + 7 * n))} for n, row in enumerate(recorded(20))]
        read("mooncake", lines(rows))
    with pytest.raises(ConfigError, match="unknown key block"):
        read("azure", table(), ",block=16")


def test_bailian_is_read_as_itself(read, caplog):
    assert read("bailian", lines(recorded(unit="s", block=16))).mean_rate_rps == pytest.approx(2, rel=0.3)
    assert not caplog.records


@pytest.mark.parametrize("name", [hex, lambda i: 2**64 - 1 - i, lambda i: -1 - i, float, str])
def test_hash_ids_are_names(read, name):
    plain, named = (read("mooncake", lines(recorded(name=by))) for by in (int, name))
    assert plain.digest() == named.digest()


def test_ids_of_a_blocks_content_alone_share_only_from_the_start(read):
    rows = [
        row | {"hash_ids": ids, "input_length": 1536}
        for row, ids in zip(recorded(3), ([1, 7, 8], [2, 7, 9], [1, 7, 9]), strict=True)
    ]
    assert list(read("mooncake", lines(rows)).requests.prefix_tokens) == [1024, 0, 1024]


def test_prompts_without_hash_ids_share_nothing(read):
    rows = recorded(90)
    for n, row in enumerate(rows):
        if n % 3 == 0:
            row["hash_ids"] = None
        elif n % 3 == 1:
            del row["hash_ids"]
    prefix_id = read("mooncake", lines(rows)).requests.prefix_id
    assert set(prefix_id[0::3]) == set(prefix_id[1::3]) == {-1} and set(prefix_id[2::3]) == {0}


@pytest.mark.parametrize("ids", [[[1, 2]], [None], "[1, 2]", 3, [True], {"a": 1}])
def test_other_hash_ids_are_refused_with_their_line(read, ids):
    rows = recorded(3)
    rows[1]["hash_ids"] = ids
    with pytest.raises(ConfigError, match=r"trace:2: .*hash_ids"):
        read("mooncake", lines(rows))


def test_rows_out_of_order_are_sorted_and_said(read, caplog):
    rows = recorded()
    shuffled = random.Random(0).sample(rows, len(rows))
    late = [*rows[1:50], rows[0], *rows[50:]]
    for other in (shuffled, rows[::-1], late):
        caplog.clear()
        assert read("mooncake", lines(other)).digest() == read("mooncake", lines(rows)).digest()
        assert "before their predecessor in the file; sorted by time" in caplog.text


def test_a_clock_that_begins_anew_is_refused(read):
    with pytest.raises(
        ConfigError, match=r"goes back from \d+ to \d+ at request 121, as in traces put one after"
    ):
        read("mooncake", lines(recorded() + recorded(seed=1)))
    days = recorded(origin_s=1.7e9 + 100) + recorded(origin_s=1.7e9)
    assert len(read("mooncake", lines(days)).requests) == 240


def test_json_comes_in_many_coats(read):
    rows = recorded(30)
    text, expected = lines(rows), read("mooncake", lines(rows)).digest()
    coats = (
        text.encode("utf-8-sig"),
        text.encode("utf-16"),
        text.encode("utf-16-le"),
        text.replace("\n", "\r\n"),
        text.replace("\n", "\n\n"),
        text.replace("\n", ",\n"),
        gzip.compress(text.encode()),
        bz2.compress(text.encode("utf-8-sig")),
        json.dumps(rows),
        json.dumps(rows, indent=2),
        "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n",
        lines([{key: float(x) if key.endswith("length") else x for key, x in row.items()} for row in rows]),
        lines([{key.title().replace("_", " "): x for key, x in row.items()} | {"other": 1} for row in rows]),
    )
    for coat in coats:
        assert read("mooncake", coat).digest() == expected, coat[:40]


def test_csv_comes_in_many_coats(read):
    text, expected = table(), read("azure", table()).digest()
    coats = (
        text.replace(",", ";"),
        text.replace(",", "\t"),
        "sep=;\n" + text.replace(",", ";"),
        text.replace("\n", "\r\n"),
        text.replace("\n", "\n\n"),
        text.replace("\n", "\n,,\n"),
        text.encode("utf-8-sig"),
        text.encode("utf-16"),
        gzip.compress(text.encode()),
        table(header=" timestamp,CONTEXT_TOKENS , Generated Tokens"),
        table(header="TIMESTAMP,ContextTokens,GeneratedTokens,Model,", end=",a,"),
        table(end=","),
        table(cell=lambda tokens: f"{tokens}.0"),
        table(cell=lambda tokens: f'"{tokens}"'),
        "\n" + table(cell=lambda tokens: f" {tokens} "),
    )
    for coat in coats:
        assert read("azure", coat).digest() == expected, coat[:80]
    thousands = read("azure", table(cell=lambda tokens: f'"{1000 * tokens:,}"')).requests
    assert thousands.prompt_tokens[0] == 100_000


def test_failed_requests_as_pandas_writes_them_are_left_out(read):
    header = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    rows = "5.0,a,472.0,18.0,490.0,x\n6.0,a,9.0,NaN,NaN,x\n7.0,a,,,,\nNaN,,,,,\n8.0,a,9.0,,,x\n"
    rows += "45.0,a,1087.0,230.0,,x\n"
    requests = read("burstgpt", header + rows).requests
    assert list(requests.prompt_tokens) == [472, 1087] and list(requests.arrival_s) == [0, 40]
    rows = [row | {"output_length": None if n % 2 else float("nan")} for n, row in enumerate(recorded(4))]
    assert len(read("mooncake", lines(rows + recorded(5, seed=1))).requests) == 5


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("azure", table(cell=lambda tokens: str(tokens - 110)), ":2: "),
        (
            "azure",
            table(cell=lambda tokens: "NaN" if tokens == 107 else str(tokens)),
            ":9: .*without prompt tokens",
        ),
        (
            "azure",
            table(time=lambda i: f"5/10/2024 0:{i:02d}"),
            ":2: .*not a number, nor a date such as 2024-",
        ),
        ("azure", table().split("\n", 1)[1], ":1: no column 'TIMESTAMP'; needs .*; has 2024-05-10"),
        ("azure", table(cell=lambda tokens: f"{tokens * 100:,}"), ":2: .*4 cells under a header of 3"),
        ("azure", table(cell=lambda tokens: "" if tokens == 107 else str(tokens)), ":9: .*without prompt"),
        ("azure", table() + "2024-05-10 00:01:00,1", ":22: .*2 cells under a header of 3"),
        ("azure", table() + table(), ":22: 'TIMESTAMP"),
        ("azure", table().replace(" 00:00:07", '" 00:00:07'), "trace"),
        ("azure", '"' + table(n=60) * 100, ":1: .*a quote that is not closed"),
        ("azure", table(time=lambda i: 1e307 * (i - 9)), ":2: .*not a time"),
        ("azure", table(time=lambda i: 20240510000000 + i), "a date written as a number"),
        ("azure", table(end=",é").encode("latin-1"), "not UTF-8"),
        ("azure", gzip.compress(table().encode(), mtime=0)[:60], "ended before"),
        ("azure", b"PK\x03\x04", "zip archive or a workbook"),
        ("azure", b"PAR1", "Parquet"),
        ("azure", b"\x28\xb5\x2f\xfd", "zstd"),
        ("mooncake", table(), ":1: 'TIMESTAMP.* is not JSON"),
        ("mooncake", lines(recorded(3)) + "{", ":4: '{' is not JSON"),
        ("mooncake", 2 * f"[\n{json.dumps(recorded(1)[0])}\n]\n", r":4: '\[.* follows the end of the array"),
        (
            "mooncake",
            lines([row | {"input_length": -1} for row in recorded(2)]),
            ":1: .*-1 is not a whole number",
        ),
        (
            "mooncake",
            lines([row | {"timestamp": "12"} for row in recorded(2)]),
            ":1: .*neither a number nor a date",
        ),
        ("mooncake", json.dumps([*recorded(2), 3], indent=1).replace("\n", " \n"), r":\d+: '3'"),
        ("vllm", "{}", "no list 'start_times'.*--save-detailed"),
        ("vllm", '{"start_times": [1], "input_lens": [], "output_lens": []}', "not equally long"),
        ("vllm", "[]", "no JSON object"),
        ("speeds", "speed\n1\n", ":1: 'speed'"),
        ("speeds", "1 nan", ":1: "),
        ("speeds", "1 5000000", ":1: .*10,000"),
        ("speeds", "10000 " * 10_001, "more than 100,000,000 requests"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(read, name, content, part):
    with pytest.raises(ConfigError, match=part) as error:
        read(name, content)
    assert "\n" not in str(error.value)


def test_a_folder_is_refused_with_what_is_in_it(tmp_path):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ConfigError, match=r"a folder: give a file; in it are a\.jsonl"):
        parse_workload(f"mooncake:path={tmp_path}")


@pytest.mark.parametrize("file", ["a,b.csv", "a, b,,c.csv", "a=b.csv", "x:y.csv", "it's.csv", "a,rate=2.csv"])
def test_a_path_may_have_commas(tmp_path, read, file):
    expected = read("azure", table(), ",rate_scale=2", file="plain").digest()
    (tmp_path / file).write_text(table())
    path = tmp_path / file
    specs = [f'azure:path="{path}",rate_scale=2', f'azure:rate_scale=2,path="{path}"']
    if "rate=" not in file:
        specs += [f"azure:path={path},rate_scale=2", f"azure:rate_scale=2,path={path}"]
    assert {parse_workload(spec).digest() for spec in specs} == {expected}
    if "rate=" in file:
        with pytest.raises(ConfigError, match="put a path with a comma in quotes"):
            parse_workload(f"azure:path={path}")


def test_speeds_may_be_floats_and_have_a_byte_order_mark(read):
    assert read("speeds", "[2.0, 0.0,\r\n4.0]".encode("utf-8-sig")).mean_rate_rps == 2


def test_a_trace_is_read_once_while_it_does_not_change(read, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    trace = lines(recorded(unit="s"))
    read("mooncake", trace)
    for _ in range(3):
        parse_workload(f"mooncake:path={tmp_path / 'trace'}")
    assert len(caplog.records) == 1


@pytest.mark.parametrize("date_last", [True, False])
def test_numbers_and_dates_in_one_column_are_refused(read, monkeypatch, date_last):
    monkeypatch.setattr("fuel_ray.workload.table._PIECE", 3)
    date = "2024-05-10 00:00:00"
    with pytest.raises(ConfigError, match=r":13: .*not a (number|date)"):
        read("azure", table(time=lambda i: date if (i > 10) == date_last else i))


def test_dates_may_have_slashes_and_name_utc(read):
    plain, other = (
        read("azure", table(time=form.format))
        for form in ("2024-05-10 00:00:{:02d}", "2024/05/10 00:00:{:02d} UTC")
    )
    assert plain.digest() == other.digest()


def test_pieces_of_a_long_table_are_one(read, monkeypatch):
    whole = read("azure", table()).digest()
    monkeypatch.setattr("fuel_ray.workload.table._PIECE", 3)
    assert read("azure", table() + "\n").digest() == whole


def test_a_long_trace_makes_only_the_span_that_is_asked_for(read):
    workload = read("burstgpt", "Timestamp,Request tokens,Response tokens\n0,1,1\n10,2,1\n30,3,1\n")
    for start_s in (0, 7, 20, 44.5, 45 * 1000 + 20):
        got = workload.generate(100, rng=np.random.default_rng(), start_s=start_s)
        times = sorted(45 * n + t for n in range(1100) for t in (0, 10, 30))
        assert list(got.arrival_s) == [t - start_s for t in times if 0 <= t - start_s < 100]


def test_settings_packs_and_recorded_runs_may_have_a_byte_order_mark(tmp_path):
    def marked(source):
        (tmp_path / source.name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8-sig")
        return tmp_path / source.name

    (tmp_path / "c.json").write_text('{"steps": 7}', encoding="utf-8-sig")
    assert load_config(tmp_path / "c.json", base=SweepConfig()).steps == 7
    pack = Path(recorded_runs.__file__).parent / "packs" / "h100-qwen3-8b.json"
    assert load_pack(str(marked(pack))).sha256 == load_pack("h100-qwen3-8b").sha256
    run = Path(__file__).parent / "data" / "h100_trace_16_open5.json"
    assert recorded_runs.read_trace(str(marked(run))).energy_j == recorded_runs.read_trace(str(run)).energy_j
    assert read_json(tmp_path / "c.json") == {"steps": 7}


@pytest.mark.parametrize("path", ["~nobody-of-that-name/t", "a" * 5000])
def test_a_path_that_there_cannot_be_is_refused_as_any_other(path):
    with pytest.raises(ConfigError, match=r"No such file|File name too long"):
        parse_workload(f"mooncake:path={path}")


def test_evaluate_refuses_a_trace_in_one_line_with_exit_code_2(tmp_path, capsys):
    (tmp_path / "t.jsonl").write_text(lines(recorded(block=16)))
    spec = f"mooncake:path={tmp_path / 't.jsonl'},block=512"
    assert (
        main(["evaluate", "--workload", spec, "--out", str(tmp_path), "--static", "max", "--seconds", "20"])
        == 2
    )
    assert capsys.readouterr().err.startswith("fuel-ray: ")
