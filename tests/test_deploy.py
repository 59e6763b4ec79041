"""fuel-ray deploy against a stub server and fake GPUs."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pynvml
import pytest

from fuel_ray.cli import main
from fuel_ray.codec import ActionGrid
from fuel_ray.control import StepRecord
from fuel_ray.deploy.recorder import Recorder
from fuel_ray.deploy.status import Status
from fuel_ray.errors import GpuError
from fuel_ray.guard import Verdict
from fuel_ray.live.vllm.server import free_port
from fuel_ray.policies.anchor import Anchor
from fuel_ray.policies.learned import read_manifest, save_rule
from fuel_ray.policies.static import LoadTable
from fuel_ray.types import Knobs, Slo
from fuel_ray.vllm_plugin import read_file
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.policy_folders import SLO, write_policy
from tests.stub_vllm import serving
from tests.test_codec import WINDOW
from tests.test_lease import FAKE_PYNVML, until
from tests.test_rules import KINDS
from tests.test_rules import SPEC as TWIN
from tests.traffic_stub import TrafficStub

ROOT = Path(__file__).parent.parent
HEAVY = ("ray", "torch", "gymnasium", "numba", "pandas", "matplotlib")


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeGpu(uuid="GPU-0")
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(fake))
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.holds_sys_admin", lambda proc: True)
    return fake


@pytest.fixture
def stub():
    with serving(TrafficStub()) as served:
        yield served


@pytest.fixture
def policy(tmp_path):
    return write_policy(tmp_path / "policy", best=Knobs(4, 990))


def deploy(stub, policy, tmp_path, *flags):
    code = main(
        [
            *("deploy", "--policy", str(policy), "--server", stub.url, "--out", str(tmp_path / "out")),
            *("--interval", "0.1", "--max-steps", "4", *flags),
        ]
    )
    (folder,) = (tmp_path / "out").glob("deploy-*")
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return code, lines, json.loads((folder / "run.json").read_text())


def test_a_policy_controls_a_running_server_and_gives_everything_back(stub, gpu, policy, tmp_path):
    limit_file = stub.limit_file = tmp_path / "limit"
    code, lines, run = deploy(stub, policy, tmp_path, "--limit-file", str(limit_file))
    assert code == 0 and [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all(
        line["chosen"] == {"batch_limit": 4, "gpu_clock_mhz": 990} == line["applied"] for line in lines
    )
    assert all(line["limit_acknowledged"] for line in lines)
    assert sum(line["completed"] for line in lines) == pytest.approx(20 * 0.4, abs=3)
    assert gpu.locked_mhz is None and "reset" in gpu.calls and not limit_file.exists()
    summary = run["summary"]
    assert (summary["windows"], summary["lost_windows"], summary["lost_lines"]) == (4, 0, 0)
    assert 0.04 < summary["ttft"]["p50_s"] < 0.06 and 0.01 < summary["tpot"]["p50_s"] < 0.025
    assert run["spec"]["kv_block_size"] == 16 and run["policy"]["model"] == "tiny"


@pytest.mark.parametrize("kind", ["trimmed table", "trimmed prediction"])
def test_a_simple_rule_rules_as_a_folder_does(kind, stub, gpu, tmp_path):
    rule, made = replace(KINDS[kind], batch_limit=24), read_manifest(write_policy(tmp_path / "p"))
    save_rule(tmp_path / "rule", rule, made, slo=SLO, clock_mhz=1980)
    code, lines, run = deploy(stub, tmp_path / "rule", tmp_path)
    assert code == 0 and run["policy"]["anchor"]["rule"]["batch_limit"] == 24
    assert {line["chosen"]["batch_limit"] for line in lines} == {24} and len(lines) == 4
    assert all(line["chosen"]["gpu_clock_mhz"] in TWIN.gpu_clocks_mhz for line in lines)


def test_a_deployment_whose_limit_is_never_acknowledged_gives_clocks_back_and_says_what_to_do(
    stub, gpu, policy, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("fuel_ray.live.vllm.in_force.PATIENCE_S", 0.5)
    limit_file = tmp_path / "limit"
    code, lines, _ = deploy(stub, policy, tmp_path, "--limit-file", str(limit_file), "--max-steps", "99")
    assert code == 2 and gpu.locked_mhz is None and "reset" in gpu.calls and not limit_file.exists()
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fuel-ray: ")]
    assert len(err) == 1 and f"no vLLM scheduler has read {limit_file} in " in err[0]
    assert 3 <= len(lines) <= 6
    assert all(line["applied"] == {"batch_limit": 32, "gpu_clock_mhz": 990} for line in lines)
    assert {line["limit_acknowledged"] for line in lines} == {False}


def test_shadow_mode_sets_nothing(stub, gpu, policy, tmp_path):
    limit_file = tmp_path / "limit"
    code, lines, _ = deploy(stub, policy, tmp_path, "--limit-file", str(limit_file), "--shadow")
    assert code == 0 and not limit_file.exists() and gpu.calls.count("reset") == 0 and gpu.locked_mhz is None
    assert lines[-1]["chosen"] == {"batch_limit": 4, "gpu_clock_mhz": 990}
    assert lines[-1]["applied"] == {"batch_limit": 32, "gpu_clock_mhz": 1980}


@pytest.mark.parametrize(
    ("flags", "begins", "ends"),
    [
        (["--shadow"], "shadow: recording to", "; Ctrl-C ends it"),
        ([], "control: recording to", "; Ctrl-C ends it and gives clock and batch limit back"),
        (["--canary", "0.1"], "canary, 10 % of the time: recording to", "clock and batch limit back"),
    ],
)
def test_a_deployment_says_what_it_begins_and_does(
    flags, begins, ends, stub, gpu, policy, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("fuel_ray.deploy.status.EVERY_S", 0.0)
    port = str(free_port())
    deploy(stub, policy, tmp_path, "--max-steps", "1", "--metrics-port", port, *flags)
    (folder,) = (tmp_path / "out").glob("deploy-*")
    first, *others = capsys.readouterr().out.splitlines()
    assert any(line.startswith("deploy  1 windows, ") for line in others)
    assert first.startswith(f"deploy  {begins} {folder}") and f"{ends}; `fuel-ray watch --urls" in first
    assert first.endswith(f"http://127.0.0.1:{port}` shows it")


def test_a_line_a_minute_says_what_a_deployment_did_in_it(capsys):
    clock_s = [0.0]
    status, of = Status(Slo(1.0), clock=lambda: clock_s[0]), Knobs(8, 990)
    status.attached(None)
    for step in range(60):
        clock_s[0] += 2.0
        reasons = ("wait",) if step < 3 else ()
        calm = replace(WINDOW, knobs=of, ttfts_s=() if step % 10 else (2.0,))
        status.measured(
            StepRecord(step, of, of, calm, None, Verdict(of, reasons)), decision_s=0.0, saved_j=None
        )
        if step == 30:
            status.lost(step, of, GpuError("x"))
    first, second = capsys.readouterr().out.splitlines()
    assert first == (
        "deploy  30 windows, 27000 J, SLO attainment 90.0 %, policy overruled 3 times, mean clock 990 MHz"
    )
    assert second.startswith("deploy  30 windows, 1 lost, 27000 J, SLO") and "overruled 0 times" in second


RULES = [("clipper", []), ("eais", ["--pack", "h100-qwen3-8b"]), ("tests.test_deploy:Lowest", [])]


@pytest.mark.parametrize(("rule", "flags"), RULES)
def test_a_rule_is_watched_and_sets_nothing(rule, flags, stub, gpu, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    slo = ["--slo-ttft-s", "1", "--slo-tpot-s", "0.05", "--max-num-seqs", "32"]
    code, lines, run = deploy(stub, rule, tmp_path, "--shadow", *slo, *flags)
    assert code == 0 and len(lines) == 4 and gpu.calls.count("reset") == 0 and gpu.locked_mhz is None
    assert run["policy"] == {"rule": rule} and run["slo"]["ttft_s"] == 1.0
    assert rule != "tests.test_deploy:Lowest" or lines[-1]["chosen"]["gpu_clock_mhz"] == 345
    assert (run["summary"]["saved_j_modelled"] is None) == (not flags)


class Lowest:
    """A policy from outside."""

    def __init__(self, spec, slo):
        self._knobs = Knobs(1, spec.gpu_clocks_mhz[0])

    def reset(self):
        pass

    def decide(self, window):
        return self._knobs


def test_without_clock_control_the_policy_chooses_among_limits_at_the_highest_clock(
    stub, gpu, policy, tmp_path
):
    flags = ("--limit-file", str(tmp_path / "limit"), "--clock-control", "off", "--max-num-seqs", "32")
    _, lines, _ = deploy(stub, policy, tmp_path, *flags)
    assert {line["chosen"]["gpu_clock_mhz"] for line in lines} == {1980} and gpu.locked_mhz is None
    assert "reset" not in gpu.calls


def test_a_deployment_that_can_set_nothing_says_so(stub, gpu, policy, tmp_path, caplog):
    _, lines, _ = deploy(stub, policy, tmp_path, "--clock-control", "off")
    assert "so the policy has no effect" in caplog.text
    assert {line["applied"]["batch_limit"] for line in lines} == {32}


def test_a_canary_reports_the_measured_difference(stub, gpu, policy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fuel_ray.deploy.canary.WASHOUT_S", 0.0)
    flags = ["--canary", "0.5", "--canary-block-s", "1", "--max-steps", "42"]
    gpu.energy_mj = None
    code, lines, run = deploy(stub, policy, tmp_path, *flags)
    assert code == 0 and sum(run["summary"]["canary"]["blocks"]) == 4
    clocks = [line["chosen"]["gpu_clock_mhz"] for line in lines]
    assert 10 <= clocks.count(990) <= 32 and clocks.count(990) + clocks.count(1980) == 42
    assert "2 blocks with the policy, 2 at maximum performance; energy per" in capsys.readouterr().out


PROBE = """
import sys
from fuel_ray.cli import main
from tests.fake_nvml import FakeGpu, FakeNvml
import fuel_ray.live.gpu.nvml
fuel_ray.live.gpu.nvml.pynvml = FakeNvml(FakeGpu(uuid="GPU-0"))
code = main(sys.argv[1:])
heavy = set({heavy!r}) & set(sys.modules)
rss_mb = int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
assert not heavy, heavy
assert rss_mb < 200, rss_mb
sys.exit(code)
"""


def test_deploying_imports_nothing_heavy_and_stays_below_200_mb(stub, policy, tmp_path):
    arguments = ["deploy", "--policy", str(policy), "--server", stub.url, "--out", str(tmp_path)]
    code = PROBE.replace("{heavy!r}", repr(HEAVY))
    subprocess.run(
        [sys.executable, "-c", code, *arguments, "--interval", "0.05", "--max-steps", "3"],
        cwd=ROOT,
        check=True,
        timeout=60,
    )


CONTROLLER = """
import sys
import fuel_ray.live.gpu.nvml
from fuel_ray.cli import main
fuel_ray.live.gpu.nvml.holds_sys_admin = lambda proc: True
sys.exit(main(sys.argv[1:]))
"""


class Controller:
    """``fuel-ray deploy`` in a process of its own, whose NVML writes down who sets clocks."""

    def __init__(self, stub, policy, folder, *flags, state=None):
        (folder / "lib").mkdir(parents=True)
        (folder / "lib/pynvml.py").write_text(FAKE_PYNVML)
        self.log, self.limit_file = folder / "nvml.log", folder / "limit"
        self.state = state or folder / "state"
        self.log.touch()
        env = {
            "PYTHONPATH": f"{folder / 'lib'}:{ROOT}",
            "FAKE_NVML_LOG": str(self.log),
            "FUEL_RAY_STATE_DIR": str(self.state),
        }
        arguments = ["deploy", "--policy", str(policy), "--server", stub.url, "--out", str(folder / "out")]
        self.process = subprocess.Popen(
            [sys.executable, "-c", CONTROLLER, *arguments, "--interval", "0.1", *flags],
            env=os.environ | env,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def locked(self):
        """Whether the last of the calls to GPU-0 locked its clock."""
        calls = [line.split()[2] for line in self.log.read_text().splitlines() if line.endswith("GPU-0")]
        return bool(calls) and calls[-1] == "set"

    def limit(self):
        content = read_file(str(self.limit_file)) if self.limit_file.exists() else None
        return content[0] if content else None


@pytest.fixture
def controller(stub, policy, tmp_path):
    made = []

    def start(*flags, **options):
        one = Controller(stub, policy, tmp_path / f"c{len(made)}", *flags, **options)
        made.append(one)
        return one

    yield start
    for one in made:
        one.process.kill()
        one.process.communicate()


def under_control(controller):
    until(lambda: controller.locked() and controller.limit() == 4, within_s=20.0)


def start_with_limit(controller, stub, tmp_path):
    stub.limit_file = tmp_path / "c0" / "limit"
    one = controller("--limit-file", str(stub.limit_file), "--max-num-seqs", "32")
    under_control(one)
    return one


def test_a_killed_deployments_clock_and_limit_are_given_back_within_2_s(controller, stub, tmp_path):
    killed = start_with_limit(controller, stub, tmp_path)
    killed.process.kill()
    until(lambda: not killed.locked() and killed.limit() is None, within_s=2.0)
    until(lambda: not list(killed.state.glob("*.json")), within_s=2.0)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_a_deployment_that_is_told_to_end_gives_back_and_writes_what_it_did(
    controller, stub, tmp_path, number, code
):
    ended = start_with_limit(controller, stub, tmp_path)
    lines = "out/deploy-*/steps.jsonl"
    until(lambda: any(path.stat().st_size for path in (tmp_path / "c0").glob(lines)), within_s=5.0)
    ended.process.send_signal(number)
    out, _ = ended.process.communicate(timeout=20)
    assert ended.process.returncode == code and "windows, 0 lost" in out
    assert not ended.locked() and not ended.limit_file.exists() and not list(ended.state.glob("*.json"))
    (run,) = (tmp_path / "c0" / "out").glob("deploy-*/run.json")
    assert json.loads(run.read_text())["summary"]["windows"] > 0


def test_a_second_deployment_on_the_gpu_is_refused_by_the_firsts_pid(controller, stub, tmp_path):
    first = start_with_limit(controller, stub, tmp_path)
    second = controller(state=first.state)
    _, err = second.process.communicate(timeout=20)
    assert second.process.returncode == 2 and len(err.splitlines()) == 1
    assert f"GPU GPU-0 is controlled by pid {first.process.pid} (" in err
    assert first.locked()


WRONG = [
    "--policy nowhere",
    "--policy {tmp}",
    "--policy {policy} --interval 0",
    "--policy {policy} --interval nan",
    "--policy {policy} --max-steps 0",
    "--policy {policy} --server ftp://x",
    "--policy {policy} --server http://127.0.0.1:9",
    "--policy {policy} --gpu-ids 7",
    "--policy {policy} --guard.fallback 4@1234",
    "--policy {policy} --guard.fallback 4@1500 --guard.dwell-s -1",
    "--policy {policy} --limit-file {tmp}/no/such/folder/limit",
    "--policy {policy} --limit-file {tmp}/no/such/folder/limit --shadow",
    "--policy {policy} --limit-file {tmp} --shadow",
    "--policy {policy} --out /proc/nowhere",
    "--policy {policy} --nonsense",
    "--shadow",
    "--policy clipper",
    "--policy clipper --slo-ttft-s 1 --max-num-seqs 8",
    "--policy {policy} --slo-ttft-s 0.5",
    "--policy {policy} --pack h100-qwen3-8b --shadow",
    "--policy clipper --slo-ttft-s 0 --max-num-seqs 8 --shadow",
    "--policy clipper --slo-ttft-s 1 --shadow",
    "--policy eais --slo-ttft-s 1 --max-num-seqs 8 --shadow",
    "--policy tuned_static --slo-ttft-s 1 --max-num-seqs 8 --shadow",
    "--policy fuel_ray.types:Nobody --slo-ttft-s 1 --max-num-seqs 8 --shadow",
]


@pytest.mark.parametrize("flags", WRONG)
def test_what_is_wrong_is_said_in_one_line_before_anything_is_set(flags, stub, gpu, policy, tmp_path, capsys):
    words = flags.format(tmp=tmp_path, policy=policy).split()
    defaults = [("--server", stub.url), ("--max-steps", "2"), ("--out", str(tmp_path / "out"))]
    for flag, value in defaults:
        words += [] if flag in words else [flag, value]
    assert main(["deploy", *words]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("fuel-ray: ") and len(printed.err.splitlines()) == 1
    assert gpu.locked_mhz is None and not (tmp_path / "out").exists()


def near(knobs):
    return Anchor(LoadTable([], [knobs]), 0.1)


MISFITS = [
    ({"sizes": (32,)}, "trained for KV block size 32, and the server has 16"),
    ({"model": "Llama"}, "trained for model Llama, and the server has tiny"),
    ({"gpu_name": "NVIDIA A100"}, "trained for GPU NVIDIA A100, and this is NVIDIA H100"),
    ({"pack": "h100-qwen3-8b"}, "it was trained on an older version of calibration pack h100-qwen3-8b"),
    (
        {"engine": "Hugging Face transformers"},
        "trained for Hugging Face transformers, and the server is vLLM",
    ),
    ({"grid": ActionGrid((4,), (990, 1007))}, "the GPU does not support its clocks of 1007 MHz"),
    ({"grid": ActionGrid((4, 64), (990,))}, "its highest batch limit is 64, and the server's is 32"),
    ({"anchor": near(Knobs(4, 1007))}, "the GPU does not support its clocks of 1007 MHz"),
    ({"anchor": near(Knobs(64, 990))}, "its highest batch limit is 64, and the server's is 32"),
]


@pytest.mark.parametrize(("made_for", "message"), MISFITS, ids=lambda value: str(value)[:20])
def test_a_policy_for_something_else_is_refused_unless_that_is_harmless_and_allowed(
    stub, gpu, tmp_path, capsys, made_for, message
):
    folder = write_policy(tmp_path / "other", **made_for)
    flags = ["--max-num-seqs", "32", "--server", stub.url, "--max-steps", "1", "--interval", "0.1"]
    arguments = ["deploy", "--policy", str(folder), *flags, "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert main([*arguments, "--allow-mismatch"]) == (2 if "block size" in message else 0)


@pytest.mark.parametrize(
    ("trained_for", "serves", "said"),
    [
        ("vLLM 0.32.0", "0.32.0", ()),
        ("vLLM 0.20.2", "0.32.0", ("trained for vLLM 0.20.2, and the server is vLLM 0.32.0",)),
        (
            "vLLM 0.11",
            "0.9.1",
            ("trained for vLLM 0.11", "vLLM 0.9.1 is not supported; fuel_ray supports 0.20 to 0.33"),
        ),
    ],
)
def test_another_version_of_vllm_is_said_and_taken(
    stub, gpu, tmp_path, caplog, capsys, trained_for, serves, said
):
    stub.version = serves
    folder = write_policy(tmp_path / "p", engine=trained_for)
    assert deploy(stub, folder, tmp_path, "--max-num-seqs", "32")[0] == 0, capsys.readouterr().err
    assert all(words in caplog.text for words in said)
    assert caplog.text.count(str(folder)) == len(said)


def test_run_json_is_there_from_the_start_and_has_the_summary_at_the_end(
    stub, gpu, policy, tmp_path, monkeypatch
):
    seen = []
    measured = Recorder.measured

    def look(recorder, record, **facts):
        seen.append(json.loads((recorder._run_dir / "run.json").read_text()))
        measured(recorder, record, **facts)

    monkeypatch.setattr(Recorder, "measured", look)
    _, _, run = deploy(stub, policy, tmp_path)
    assert len(seen) == 4 and all("summary" not in each for each in seen)
    assert seen[0] == {key: value for key, value in run.items() if key != "summary"}
    assert seen[0]["spec"]["kv_block_size"] == 16 and seen[0]["slo"]["ttft_s"] == 1.0


HISTOGRAMS = {
    "TTFT": "vllm:time_to_first_token_seconds",
    "TPOT": "vllm:request_time_per_output_token_seconds",
}


@pytest.mark.parametrize("limited", HISTOGRAMS)
def test_a_server_by_which_the_slo_cannot_be_judged_is_refused_and_told_why(
    stub, gpu, policy, tmp_path, capsys, limited
):
    stub.lacks = (HISTOGRAMS[limited],)
    words = ["deploy", "--policy", str(policy), "--server", stub.url, "--out", str(tmp_path / "out")]
    assert main([*words, "--max-steps", "1"]) == 2
    error = capsys.readouterr().err
    assert f"has no {HISTOGRAMS[limited]}, which is needed for the SLO's limit on {limited}: " in error
    assert len(error.splitlines()) == 1 and gpu.locked_mhz is None


def test_a_server_without_a_histogram_that_no_limit_needs_is_taken(stub, gpu, policy, tmp_path):
    stub.lacks = ("vllm:e2e_request_latency_seconds",)
    code, lines, run = deploy(stub, policy, tmp_path)
    assert code == 0 and all(line["slo_attainment"] == 1.0 for line in lines)
    assert run["summary"]["e2e"] == {"mean_s": None, "p50_s": None, "p99_s": None}


def test_a_fresh_server_whose_histograms_are_empty_is_taken(stub, gpu, policy, tmp_path, capsys):
    stub.lacks = tuple(
        f"{name}_{what}{{" for name in HISTOGRAMS.values() for what in ("bucket", "sum", "count")
    )
    code, lines, _ = deploy(stub, policy, tmp_path)
    assert code == 0 and lines[-1]["slo_attainment"] == 1.0
    assert (
        "SLO limit TPOT 50 ms: attainment is known once the server has served a request"
        in capsys.readouterr().out
    )


def test_a_histogram_that_goes_away_makes_attainment_unknown_and_the_fallback_rule(
    stub, gpu, policy, tmp_path
):
    stub.at(3, lacks=(HISTOGRAMS["TPOT"],))
    _, lines, _ = deploy(stub, policy, tmp_path, "--guard.fallback", "16@1500")
    assert lines[-1]["slo_attainment"] is None and lines[-1]["slo_attainment_bounds"] is None
    assert lines[-1]["reward"] is None and lines[-1]["overruled"] == ["stale"]
    assert lines[-1]["applied"]["gpu_clock_mhz"] == 1500


TIGHT = ("--shadow", "--max-num-seqs", "32", "--slo-ttft-s", "1", "--slo-tpot-s", "0.02")


@pytest.mark.parametrize(
    ("tpot_s", "overruled", "bounds"), [(0.016, False, [0.375, 1.0]), (0.0249, True, [0.0, 0.0])]
)
def test_a_tight_limit_is_judged_by_what_is_certain(
    stub, gpu, tmp_path, capsys, monkeypatch, tpot_s, overruled, bounds
):
    monkeypatch.chdir(ROOT)
    stub.tpot_s, stub.rate_rps = tpot_s, 100.0
    code, lines, run = deploy(stub, "clipper", tmp_path, *TIGHT, "--max-steps", "12")
    out = capsys.readouterr().out
    assert code == 0 and any("latency" in line["overruled"] for line in lines) == overruled
    lowest, highest = lines[-1]["slo_attainment_bounds"]
    assert lowest == pytest.approx(bounds[0], abs=0.15) and highest == bounds[1]
    assert "SLO limit TTFT 1 s: attainment is exact" in out
    assert (
        "SLO limit TPOT 20 ms: attainment is known within bounds, because requests between 10 ms and 25 ms"
        in out
    )
    assert "25 ms would be exact" in out
    assert f"TPOT mean {tpot_s * 1000:.3g} ms, p50 10 to 25 ms, p99 10 to 25 ms" in out
    assert run["summary"]["tpot"]["mean_s"] == pytest.approx(tpot_s)
    assert run["summary"]["tpot"]["p50_bounds_s"] == [0.01, 0.025]


def test_a_percentile_in_the_first_bucket_is_said_to_be_at_most_its_bound(
    stub, gpu, policy, tmp_path, capsys
):
    stub.tpot_s = 0.0085
    deploy(stub, policy, tmp_path)
    assert "TPOT mean 8.5 ms, p50 <= 10 ms, p99 <= 10 ms" in capsys.readouterr().out


@pytest.mark.parametrize("blocks", ["None", "", "0"])
def test_blocks_that_are_not_known_are_not_blamed_on_the_block_size(
    stub, gpu, policy, tmp_path, capsys, blocks
):
    stub.blocks, stub.lacks = blocks, ()
    stub.page_override = stub.now().replace('num_gpu_blocks_override="300"', 'num_gpu_blocks_override="None"')
    assert (
        main(["deploy", "--policy", str(policy), "--server", stub.url, "--out", str(tmp_path / "out")]) == 2
    )
    error = capsys.readouterr().err
    assert (
        f'does not report its number of KV blocks (vllm:cache_config_info has num_gpu_blocks="{blocks}")'
        in error
    )
    assert "block size" not in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("effective", "tokens", "code", "words"),
    [
        ("256", "70000", 0, ""),
        (
            "None",
            "70000",
            2,
            "the server reports 4, which for a hybrid model may be another than that of its attention",
        ),
        ("None", "1200", 2, "trained for KV block size 256, and the server has 4"),
    ],
)
def test_a_hybrid_models_block_size_is_its_attentions(
    stub, gpu, tmp_path, capsys, effective, tokens, code, words
):
    stub.block_size = 4
    page = stub.now().replace(
        'effective_attention_block_size="32"', f'effective_attention_block_size="{effective}"'
    )
    stub.page_override = page.replace('kv_cache_size_tokens="9600"', f'kv_cache_size_tokens="{tokens}"')
    folder = write_policy(tmp_path / "hybrid", best=Knobs(4, 990), sizes=(256,))
    flags = ["--max-num-seqs", "32", "--server", stub.url, "--max-steps", "2", "--interval", "0.1"]
    arguments = ["deploy", "--policy", str(folder), *flags, "--out", str(tmp_path / "out")]
    assert main(arguments) == code and words in capsys.readouterr().err
    assert main([*arguments, "--allow-mismatch"]) == (2 if tokens == "1200" else 0)
    assert tokens == "1200" or "KV blocks of 256" in capsys.readouterr().out


def test_a_server_on_another_card_is_warned_of_and_refused_with_strict(
    stub, policy, tmp_path, monkeypatch, caplog, capsys
):
    cards = FakeGpu("GPU-a", pids=(1,)), FakeGpu("GPU-b", pids=(os.getpid(),))
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(*cards))
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.holds_sys_admin", lambda proc: True)
    flags = ["--server", stub.url, "--out", str(tmp_path / "strict"), "--max-steps", "1", "--strict"]
    assert main(["deploy", "--policy", str(policy), *flags, "--gpu-ids", "0"]) == 2
    error = capsys.readouterr().err
    assert "the server runs on GPU GPU-b, but GPU GPU-a would be measured: give --gpu-ids GPU-b" in error
    assert len(error.splitlines()) == 1 and cards[0].calls.count("reset") == 0
    assert deploy(stub, policy, tmp_path, "--gpu-ids", "0")[0] == 0
    assert "would be measured" in caplog.text
    caplog.clear()
    assert main(["deploy", "--policy", str(policy), *flags, "--gpu-ids", "GPU-b"]) == 0
    assert "would be measured" not in caplog.text and cards[1].calls.count("reset") == 1


def test_the_gpu_that_is_visible_is_the_one_that_is_controlled(stub, policy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu("GPU-a"), FakeGpu("GPU-b"), FakeGpu("GPU-c"))
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    assert deploy(stub, policy, tmp_path)[2]["spec"]["gpu_uuids"] == ["GPU-c"]
    arguments = ["--policy", str(policy), "--server", stub.url, "--out", str(tmp_path / "out")]
    assert main(["deploy", *arguments, "--gpu-ids", "0"]) == 2
    assert "GPU 0 (GPU-a) is excluded by CUDA_VISIBLE_DEVICES=2,1" in capsys.readouterr().err


def test_a_card_whose_energy_cannot_be_had_is_refused_before_anything_is_set(
    stub, gpu, policy, tmp_path, capsys
):
    gpu.energy_mj, gpu.faults = None, {"nvmlDeviceGetPowerUsage": pynvml.NVML_ERROR_NOT_SUPPORTED}
    arguments = ["--policy", str(policy), "--server", stub.url, "--out", str(tmp_path / "out")]
    assert main(["deploy", *arguments]) == 2
    assert "cannot be measured: no energy counter on GPU GPU-0" in capsys.readouterr().err
    assert gpu.locked_mhz is None


def test_without_a_driver_a_deployment_says_where_it_runs_and_what_runs_here(
    stub, policy, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(driver=False))
    arguments = ["--policy", str(policy), "--server", stub.url, "--out", str(tmp_path / "out")]
    assert main(["deploy", *arguments, "--shadow"]) == 2
    error = capsys.readouterr().err
    assert (
        "no NVIDIA driver on this host (a container needs `--gpus all`); deploy runs on the machine" in error
    )
    assert "`fuel-ray evaluate --policies example` needs no GPU" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("error", [pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_UNKNOWN])
def test_readings_that_are_not_needed_may_be_missing(stub, gpu, policy, tmp_path, error):
    names = ("PowerUsage", "UtilizationRates", "ClockInfo", "MaxMigDeviceCount", "ComputeRunningProcesses")
    gpu.faults = {f"nvmlDeviceGet{name}": error for name in names}
    code, lines, run = deploy(stub, policy, tmp_path)
    assert code == 0 and run["summary"]["lost_windows"] == 0 and len(lines) == 4
