"""The controller's own /metrics, the dashboard over it, and `fuel-ray watch`."""

import json
import math
import re
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from fuel_ray.cli import main
from fuel_ray.commands.watch import table
from fuel_ray.control import StepRecord
from fuel_ray.deploy.exporter import Exporter, Page, read_page
from fuel_ray.errors import ConfigError, GpuError, TelemetryError
from fuel_ray.guard import Verdict
from fuel_ray.live.vllm.server import free_port
from fuel_ray.types import Knobs, Slo
from tests.stub_vllm import Stub, serving
from tests.test_codec import WINDOW
from tests.test_histogram import window

ROOT = Path(__file__).parent.parent
LOW, HIGH = Knobs(8, 990), Knobs(32, 1980)


@pytest.fixture
def exporter():
    port, now_s = free_port(), [100.0]
    made = Exporter(
        port, Slo(1.0), host="127.0.0.1", info={"policy": "p", "mode": "control"}, clock=lambda: now_s[0]
    )
    made.url, made.now_s = f"http://127.0.0.1:{port}", now_s
    yield made
    made.close()


def record(**changes):
    return StepRecord(0, LOW, HIGH, replace(WINDOW, **changes), -450.0, Verdict(HIGH, ("wait",)))


def test_what_was_chosen_applied_and_measured_is_on_the_page(exporter):
    exporter.attached(None)
    for _ in range(2):
        exporter.measured(record(), decision_s=0.0001, saved_j=50.0)
    exporter.now_s[0] += 3.0
    page = read_page(exporter.url)
    assert page.info["policy"] == "p" and page.get("attached") == 1
    assert (page.get("gpu_clock_mhz", "chosen"), page.get("gpu_clock_mhz", "applied")) == (990, 1980)
    assert (page.get("batch_limit", "chosen"), page.get("batch_limit", "permitted")) == (8, 32)
    assert page.get("power_watts") == 450.0 and page.get("energy_joules_total") == 1800.0
    assert page.get("saved_joules") == 100.0
    assert page.labelled("overruled_total") == {"wait": 2.0} and page.get("window_age_seconds") == 3.0
    assert page.get("slo_attainment") == 0.75 and page.get("latency_seconds", "ttft") == pytest.approx(0.65)
    assert page.labelled("windows_total") == {"measured": 2.0}


def test_what_is_unknown_is_no_number(exporter, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    exporter.attached(None)
    assert read_page(exporter.url).get("slo_attainment") is None
    assert main(["watch", "--once", "--urls", exporter.url]) == 0
    assert "no window yet" in capsys.readouterr().out
    exporter.measured(record(), decision_s=0.0001, saved_j=50.0)
    assert read_page(exporter.url).get("slo_attainment_bounds", "lowest") == 0.75
    unknown = replace(record(histograms={}, ttfts_s=(), tpots_s=(), e2es_s=()), reward=None)
    exporter.measured(unknown, decision_s=0.0001, saved_j=50.0)
    page = read_page(exporter.url)
    for name, label in [("slo_attainment", ""), ("slo_attainment_bounds", "highest"), ("reward", "")]:
        assert page.get(name, label) is None
    assert page.get("latency_seconds", "ttft") is None and page.get("power_watts") == 450.0
    assert main(["watch", "--once", "--urls", exporter.url]) == 0
    assert "nan" not in capsys.readouterr().out


def test_means_are_exact_and_attainment_has_its_bounds(exporter, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    seen = window("ttft", [0.9] * 8, (0.5, 1.25, math.inf))
    exporter.attached(None)
    exporter.measured(replace(record(), metrics=seen), decision_s=0.0001, saved_j=50.0)
    page = read_page(exporter.url)
    assert page.get("latency_seconds", "ttft") == pytest.approx(0.9)
    bounds = page.labelled("slo_attainment_bounds")
    assert bounds == {"lowest": 0.25, "highest": 1.0} and page.get("slo_attainment") == 1.0
    assert main(["watch", "--once", "--urls", exporter.url]) == 0
    assert re.search(r" 25\.0 to .*\n.* 100\.0 %", capsys.readouterr().out)


def test_lost_windows_and_errors_are_counted_by_class(exporter):
    exporter.lost(3, LOW, TelemetryError("x"))
    exporter.detached(GpuError("y"))
    page = read_page(exporter.url)
    assert page.get("attached") == 0 and page.labelled("windows_total") == {"lost": 1.0}
    assert page.labelled("errors_total") == {"TelemetryError": 1.0, "GpuError": 1.0}


def test_a_port_that_is_taken_is_named(exporter):
    with pytest.raises(ConfigError, match=r"--metrics-port \d+"):
        Exporter(int(exporter.url.rpartition(":")[2]), Slo(1.0), host="127.0.0.1", info={"policy": "p"})


def full_page(exporter):
    """Every sample of a page on which everything has happened."""
    exporter.attached(None)
    exporter.measured(replace(record(), metrics=window("ttft", [0.9] * 8)), decision_s=0.0001, saved_j=50.0)
    exporter.measured(record(), decision_s=0.0001, saved_j=50.0)
    exporter.lost(1, LOW, TelemetryError("x"))
    page = urllib.request.urlopen(f"{exporter.url}/metrics", timeout=5).read().decode()
    return [sample for family in text_string_to_metric_families(page) for sample in family.samples]


def rules():
    groups = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def asked(text):
    """Metrics of an expression, and the labels that each is asked for by."""
    return [
        (name, dict(re.findall(r'(\w+)(?:=~?)"([^"$]+)"', labels)))
        for name, labels in re.findall(r"\b(fuel_ray_\w+)(?:\{([^}]*)\})?", text)
    ]


def test_the_dashboard_and_the_alerts_ask_only_for_what_the_page_has(exporter):
    page = full_page(exporter)
    dashboard = json.loads((ROOT / "deploy/grafana/fuel-ray.json").read_text())
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    alerts = [rule["expr"] for rule in rules()]
    for text, least in ((" ".join(panels), 15), (" ".join(alerts), 9)):
        names = {name for name, _ in asked(text)}
        assert len(names) >= least
        for name, labels in asked(text):
            there = [sample.labels for sample in page if sample.name == name]
            assert there, name
            for label, values in labels.items():
                known = {own.get(label) for own in there} | ({"e2e"} if label == "limit" else set())
                assert label == "reason" or set(values.split("|")) <= known, (name, label)


def test_the_page_on_deploying_names_what_there_is(exporter):
    names = {sample.name for sample in full_page(exporter)}
    text = (ROOT / "docs/deploy.md").read_text()
    (table,) = re.findall(r"(?ms)^\| metrics, `fuel_ray_` before each .*?\n\n", text)
    shown = {name for row in table.split("\n")[2:-2] for name in re.findall(r"`(\w+)", row.split("|")[1])}
    histograms = {"ttft_seconds", "tpot_seconds", "e2e_seconds"}
    families = {name.removeprefix("fuel_ray_") for name in names if not name.endswith("_created")}
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in families}
    assert histograms < shown and shown == families
    assert {name for name, _ in asked(text)} <= names


def test_an_alert_says_how_bad_it_is_and_what_to_do_and_uses_only_rates_that_are_recorded():
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len(alerts) >= 8 and len({rule["alert"] for rule in alerts}) == len(alerts)
    for rule in alerts:
        assert set(re.findall(r"fuel_ray:[\w:]+", rule["expr"])) <= recorded
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert (
            "{{ $labels.instance }}" in rule["annotations"]["summary"] and rule["annotations"]["description"]
        )


def test_every_panel_of_the_dashboard_has_a_unit():
    panels = json.loads((ROOT / "deploy/grafana/fuel-ray.json").read_text())["panels"]
    assert [panel["title"] for panel in panels if not panel["fieldConfig"]["defaults"].get("unit")] == []
    assert len({panel["id"] for panel in panels}) == len(panels) >= 21


def test_a_clusters_gauges_have_the_names_of_a_deployments(exporter):
    from fuel_ray.cluster.gauges import _GAUGES

    page = full_page(exporter)
    for name, labels, *_ in _GAUGES:
        there = [sample.labels for sample in page if sample.name == f"fuel_ray_{name}"]
        assert labels in there, name


def total(page, limit, result):
    (found,) = (
        sample.value
        for sample in page
        if sample.name == "fuel_ray_slo_requests_total"
        and (sample.labels["limit"], sample.labels["result"]) == (limit, result)
    )
    return found


def by_limit(exporter, limit="tpot"):
    page = urllib.request.urlopen(f"{exporter.url}/metrics", timeout=5).read().decode()
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    return [total(samples, limit, result) for result in ("within", "outside", "unsure")]


@pytest.mark.parametrize(
    ("tpot_s", "values_s", "expected"),
    [
        (0.025, [0.008] * 3 + [0.03] * 5, [3, 5, 0]),  # a bucket's bound: exact
        (0.02, [0.008] * 3 + [0.03] * 5, [3, 5, 0]),  # nobody in its bucket
        (0.02, [0.0249] * 8, [0, 8, 0]),  # the mean leaves no other possibility
        (0.02, [0.016] * 8, [4, 0, 4]),  # it leaves several
    ],
)
def test_requests_are_counted_as_within_or_outside_only_where_that_is_certain(tpot_s, values_s, expected):
    port = free_port()
    exporter = Exporter(port, Slo(1.0, tpot_s), host="127.0.0.1", info={"policy": "p"})
    exporter.url = f"http://127.0.0.1:{port}"
    try:
        assert by_limit(exporter) == [0, 0, 0]
        for _ in range(2):
            seen = window("tpot", values_s)
            exporter.measured(replace(record(), metrics=seen), decision_s=0.0001, saved_j=None)
        assert by_limit(exporter) == [2 * n for n in expected]
        assert by_limit(exporter, "ttft") == [2 * len(values_s), 0, 0]
        lacking = replace(seen, histograms={}, ttfts_s=(), tpots_s=(), e2es_s=())
        exporter.measured(replace(record(), metrics=lacking), decision_s=0.0001, saved_j=None)
        assert by_limit(exporter) == [2 * n for n in expected]
    finally:
        exporter.close()


def test_the_engines_histograms_are_added_up_over_the_windows(exporter):
    for _ in range(3):
        seen = window("ttft", [0.9] * 8 + [3.0] * 2, (0.5, 1.25, math.inf))
        exporter.measured(replace(record(), metrics=seen), decision_s=0.0001, saved_j=None)
    page = read_page(exporter.url)
    assert page.labelled("ttft_seconds_bucket") == {"0.5": 0.0, "1.25": 24.0, "+Inf": 30.0}
    assert page.get("ttft_seconds_count") == 30 and page.get("ttft_seconds_sum") == pytest.approx(39.6)
    assert page.get("tpot_seconds_count") == 30
    assert page.get("slo_limit_seconds", "ttft") == 1.0 and page.get("slo_share") == 0.95


def test_watch_shows_a_row_per_controller_and_what_is_wrong_with_it(exporter, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    exporter.attached(None)
    exporter.measured(record(), decision_s=0.0001, saved_j=50.0)
    assert main(["watch", "--once", "--urls", exporter.url]) == 0
    shown = capsys.readouterr().out
    assert re.search(r" 1980 +32 +450 .* 75\.0 % +wait 1 *\n.* \(990\) +\(8\)", shown)
    assert "in parentheses is the policy's choice" in shown
    with serving(Stub()) as stub:
        assert main(["watch", "--once", "--urls", exporter.url, stub.url, "http://127.0.0.1:9"]) == 2
    shown = capsys.readouterr().out
    assert f"{stub.url}/metrics is not a controller of fuel_ray" in shown
    assert (
        "\nno controller at http://127.0.0.1:9 (connection refused): start fuel-ray deploy with "
        "--metrics-port 9\n" in shown
    )


def test_a_terminal_of_80_columns_tells_servers_apart(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    urls = [f"http://gpu-node-{k}.serving.local:9464" for k in (1, 2)]
    page = Page({}, {"mode": "control", "policy": "results/sweep-20261127-120000/policies/block_16"})
    Console().print(table([(url, page) for url in urls]))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for name in ("gpu-node-1.serving.local:9464", "gpu-node-2.serving.local:9464"):
        assert sum(name in line for line in lines) == 1


def test_a_terminal_of_80_columns_has_room_for_all_headers_over_large_numbers(exporter, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    exporter.attached(None)
    calm = window("ttft", [0.9] * 8, (0.5, 1.25, math.inf))
    seen = replace(calm, running=112, waiting=14, energy_j=5612.3)
    for reason in ("latency", "drift") * 600:
        made = replace(record(), metrics=seen, verdict=Verdict(HIGH, (reason,)))
        exporter.measured(made, decision_s=0.0001, saved_j=50.0)
    Console().print(table([("http://gpu-node-1.serving.local:9464", read_page(exporter.url))]))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    (headers,) = (line.split() for line in lines if "controller" in line)
    assert headers == ["controller", "MHz", "limit", "W", "wait", "ms", "ms", "SLO", "overruled"]


@pytest.mark.parametrize("flags", ["--interval-s 0", "--interval-s nan", "--urls", "--nonsense"])
def test_a_wrong_watch_is_said_in_one_line(flags, capsys):
    assert main(["watch", *flags.split()]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
