"""Onboarding: the twin stands for the server, and training and judging are as short as they can be."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from fuel_ray.cli import main
from fuel_ray.codec import ActionGrid
from fuel_ray.commands import deploy, profile, train
from fuel_ray.config import to_dict
from fuel_ray.errors import ConfigError, NodeError
from fuel_ray.live.vllm.metrics import parse_metrics
from fuel_ray.onboarding import load, policy, server, stages
from fuel_ray.onboarding.config import OnboardConfig, parse
from fuel_ray.onboarding.stages import STAGES, Stage
from fuel_ray.policies.learned import read_policy
from fuel_ray.record import new_folder
from fuel_ray.sim.loads import Server
from fuel_ray.sim.pack import load_pack
from fuel_ray.sim.points import CHANGE_S, Lengths, all_points, spread
from fuel_ray.sim.replay import BOUNDS
from fuel_ray.types import NodeSpec
from fuel_ray.workload.spec import parse_workload
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.policy_folders import write_policy
from tests.stub_vllm import PAGE, Stub, serving

SHORT = ["--node", "sim", "--workload", "steady:rate_rps=4", "--seeds", "2", "--validate-seconds", "30"]
SHORT += ["--batches", "1", "8", "32", "--contexts", "128", "512", "--prompts", "512", "--windows", "1"]
SHORT += ["--no-traces"]
ONE_CLOCK = ["--gpu-clocks-mhz", "1980"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A training that writes a policy by hand, and episodes of a minute."""

    def trained(config, around=None):
        pack, folder = load_pack(config.pack), new_folder(config.out, "train")
        write_policy(
            folder / "policies" / f"block_{config.block_sizes[0]}",
            grid=ActionGrid((config.max_num_seqs,), pack.gpu_clocks_mhz[:: len(pack.gpu_clocks_mhz) - 1]),
            sizes=config.block_sizes,
            model=pack.model,
            gpu_name=pack.gpu_name,
            engine=pack.engine,
            pack=pack.name,
            pack_sha256=pack.sha256,
        )

    judge = policy.recommend_config
    shorter = {"seconds": 60, "tuning_seeds": 1, "workers": 1}
    monkeypatch.setattr(train, "run", trained)
    monkeypatch.setattr(policy, "recommend_config", lambda *given: replace(judge(*given), **shorter))
    monkeypatch.setattr(policy, "EPISODE_S", 60)


def onboarded(tmp_path, *words, code=0):
    assert main(["onboard", *SHORT, "--out", str(tmp_path), *words]) == code
    (folder,) = tmp_path.glob("onboard-*")
    return folder


def journal(folder):
    return json.loads((folder / "onboard.json").read_text())["stages"]


def again(folder, *words):
    return main(["onboard", "--resume", str(folder), *words])


def test_one_command_leads_from_a_server_to_commands_that_deploy_takes(tmp_path, capsys):
    folder = onboarded(tmp_path, "--clocks-mhz", "1980", "1485", "990")
    assert [stage["state"] for stage in journal(folder).values()] == ["done"] * len(STAGES)
    left = ("pack.json", "validate.json", "traces", "profile", "train", "recommendation.json", "report.html")
    assert all((folder / name).exists() for name in left)
    lines = [line for line in (folder / "commands.sh").read_text().splitlines() if "fuel-ray deploy" in line]
    found = [deploy.parse(shlex.split(line)[2:], prog="fuel-ray deploy") for line in lines]
    assert [(config.shadow, config.canary) for config in found] == [(True, None), (False, 0.1), (False, None)]
    assert all(config.policy == str(folder / "policies" / "recommended") for config in found)
    page, said = (folder / "report.html").read_text(), capsys.readouterr().out
    for text in ("Modelled, not measured", "validate-1980", "about ", "predicted    simulated"):
        assert text in said
    assert f"wrote {folder / 'profile'}\n" in said and "measured: nothing; simulated: " in said
    assert "next: fuel-ray" not in said and "profile-2" not in said
    for text in ("How accurate is the twin?", "--canary 0.1", "simulated server, 1980 MHz"):
        assert text in page
    assert re.search(r"One run of \d+ requests at each clock\.", page)


def test_a_rule_that_is_recommended_can_be_deployed_and_never_leaves_its_knobs(tmp_path):
    folder = onboarded(tmp_path, "--clocks-mhz", "1980", "1485", "990")
    found = json.loads((folder / "recommendation.json").read_text())
    assert found["best"] == "tuned_static"
    made = read_policy(folder / "policies" / "recommended")
    assert made.manifest.anchor.rule.knobs == (made.manifest.tuned_static,)
    assert f"at {made.manifest.tuned_static.gpu_clock_mhz} MHz" in found["how"]


def test_without_the_privilege_the_saving_is_modelled_and_what_is_missing_is_said(tmp_path, capsys):
    folder = onboarded(tmp_path, *ONE_CLOCK)
    said = capsys.readouterr().out
    assert said.count("clock-helper") >= 2 and "Nothing can be saved without the privilege" in said
    found = json.loads((folder / "recommendation.json").read_text())
    assert max(row["against_max"] for row in found["rows"]) == 1.0 > found["rows"][0]["against_max"]
    assert any("not measured here" in note for note in found["notes"])


def test_a_card_without_a_clock_axis_gets_a_twin_and_no_saving(tmp_path, capsys):
    raw = json.loads(Path("fuel_ray/sim/packs/h100-qwen3-8b.json").read_text()) | {"gpu_name": "NVIDIA L4"}
    (tmp_path / "l4.json").write_text(json.dumps(raw))
    folder = onboarded(tmp_path, *ONE_CLOCK, "--pack", str(tmp_path / "l4.json"))
    assert "no saving can be modelled" in capsys.readouterr().out
    assert list(journal(folder))[-1] == "validate" and not (folder / "commands.sh").exists()
    assert ">No saving can be modelled: fuel_ray cannot set" in (folder / "report.html").read_text()


def test_an_slo_that_cannot_be_met_is_said_with_one_that_can(tmp_path, capsys):
    folder = onboarded(tmp_path, *ONE_CLOCK, "--slo-tpot-s", "0.004", code=2)
    said = capsys.readouterr().err
    assert "cannot meet TTFT 1 s, TPOT 4 ms for 95 % of requests" in said
    assert journal(folder)["slo"]["state"] == "stopped" and "train" not in journal(folder)
    assert "Stopped in stage slo" in (folder / "report.html").read_text()
    offered = re.search(r"--slo-ttft-s \S+ --slo-tpot-s \S+", said).group().split()
    assert again(folder, *offered) == 0
    assert again(folder, "--slo-tpot-s", "0.05") == 2  # there is a policy for the other
    assert "this one has slo_tpot_s" in capsys.readouterr().err


def test_a_twin_that_is_far_off_ends_it_until_that_is_accepted(tmp_path, monkeypatch, capsys):
    for name in BOUNDS:
        monkeypatch.setitem(BOUNDS, name, 1e-9)
    folder = onboarded(tmp_path, *ONE_CLOCK, code=2)
    assert "the twin in mean e2e, energy, mean TPOT and median TTFT is more" in capsys.readouterr().err
    assert journal(folder)["validate"]["found"]["poor"]
    assert again(folder) == 2
    assert again(folder, "--accept-fidelity") == 0


@pytest.mark.parametrize("at", range(len(STAGES)))
def test_it_goes_on_with_the_stage_that_was_killed(tmp_path, monkeypatch, capsys, at):
    ran = []

    def made(number):
        def run(state):
            ran.append(number)
            if number == at and ran.count(at) == 1:
                raise KeyboardInterrupt
            return {}

        return replace(STAGES[number], run=run)

    monkeypatch.setattr(stages, "STAGES", tuple(map(made, range(len(STAGES)))))
    folder = onboarded(tmp_path, code=130)
    assert f"--resume {folder}" in capsys.readouterr().out
    assert again(folder, "--seeds", "2") == 0
    assert ran == [*range(at + 1), *range(at, len(STAGES))]


def test_a_terminal_has_one_bar_over_all_stages(tmp_path, monkeypatch, capsys):
    seen = []

    def noted(stage):
        return replace(stage, run=lambda state: seen.append((state.bar, state.bar.done)) or {})

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(stages, "STAGES", tuple(map(noted, STAGES)))
    onboarded(tmp_path)
    shares = [done for _, done in seen]
    assert len({bar for bar, _ in seen}) == 1 and shares == sorted(shares) and shares[0] == 0.0 < shares[-1]
    said = capsys.readouterr().out
    assert "[3/9] profile" in said and " left" in said


def test_a_resumed_onboarding_keeps_its_settings(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages, "STAGES", ())
    folder = onboarded(tmp_path)
    assert again(folder, "--validate-seconds", "31") == 2
    assert "this one has validate_seconds = 30, not 31" in capsys.readouterr().err
    assert main(["onboard", "--resume", str(tmp_path)]) == 2
    assert "no onboard.json in it" in capsys.readouterr().err


def test_a_load_that_is_changed_before_the_training_is_taken(tmp_path, monkeypatch):
    ran = []

    def noted(stage):
        return replace(stage, run=lambda state: ran.append(stage.name) or {})

    monkeypatch.setattr(stages, "STAGES", tuple(map(noted, STAGES[:6])))
    folder = onboarded(tmp_path)
    assert again(folder, "--workload", "steady:rate_rps=2") == 0
    assert ran == [*(stage.name for stage in STAGES[:6]), "load", "slo"]
    assert again(folder, "--slo-tpot-s", "0.1") == 0
    assert ran[8:] == ["slo"]


def test_a_training_that_was_killed_is_gone_on_with(tmp_path, monkeypatch):
    given, trained = [], train.run

    def killed(config, around=None):
        given.append(config.resume)
        if config.resume is None:
            new_folder(config.out, "train")
            raise KeyboardInterrupt
        trained(config)
        (made,) = set(config.out.glob("train-*")) - {config.resume}
        (made / "policies").rename(config.resume / "policies")

    monkeypatch.setattr(train, "run", killed)
    folder = onboarded(tmp_path, *ONE_CLOCK, code=130)
    assert again(folder) == 0
    assert given[0] is None and given[1].parent == folder


def test_a_profile_that_is_interrupted_is_gone_on_with_by_onboard(tmp_path, monkeypatch, capsys):
    measured = profile.probe

    def stopped(config, point, *given, **named):
        if point.phase == "decode" and "512" in point.name:
            raise KeyboardInterrupt
        return measured(config, point, *given, **named)

    monkeypatch.setattr(profile, "probe", stopped)
    folder = onboarded(tmp_path, *ONE_CLOCK, code=130)
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if "--resume" in line] == [
        f"interrupted; to continue: fuel-ray onboard --resume {folder}"
    ]


def test_a_server_that_is_gone_in_mid_profile_is_said_and_its_profile_gone_on_with(
    tmp_path, monkeypatch, capsys
):
    measured, seen = profile.probe, []

    def gone(config, point, *given, **named):
        if len(seen) == 4:
            seen.append("gone")
            raise NodeError("the server does not answer")
        seen.append(point.name)
        return measured(config, point, *given, **named)

    monkeypatch.setattr(profile, "probe", gone)
    monkeypatch.setattr(stages, "STAGES", STAGES[:3])
    folder = onboarded(tmp_path, *ONE_CLOCK, code=2)
    assert f"does not answer. Then continue: fuel-ray onboard --resume {folder}" in capsys.readouterr().err
    assert journal(folder)["profile"]["state"] == "stopped"
    assert again(folder) == 0
    again_from = seen.index("gone") + 1
    assert not {*seen[1 : again_from - 1]} & {*seen[again_from + 1 :]}  # but the warm-up


def test_a_profile_with_too_few_rows_ends_there_and_its_rest_is_measured_later(tmp_path, monkeypatch, capsys):
    measured = profile.probe

    def noisy(config, point, *given, **named):
        if point.phase == "decode" and "512" in point.name:
            return profile.Probe(refused="there was no window")
        return measured(config, point, *given, **named)

    monkeypatch.setattr(profile, "probe", noisy)
    monkeypatch.setattr(stages, "STAGES", STAGES[:4])
    folder = onboarded(tmp_path, *ONE_CLOCK, code=2)
    said = capsys.readouterr().err
    assert "decode rows with 3 different pairs of batch and context" in said and f"--resume {folder}" in said
    assert "Not measured: decode-1x512 at 1980 MHz, decode-8x512 at" in said and said.count("\n") == 1
    assert journal(folder)["profile"]["state"] == "stopped" and "calibrate" not in journal(folder)
    monkeypatch.setattr(profile, "probe", measured)
    assert again(folder) == 0
    assert journal(folder)["profile"]["found"]["decode"] == 6


def test_a_load_whose_requests_the_server_refuses_is_said_before_it_is_profiled(tmp_path, capsys):
    raw = json.loads(Path("fuel_ray/sim/packs/h100-qwen3-8b.json").read_text()) | {"max_model_len": 1024}
    (tmp_path / "short.json").write_text(json.dumps(raw))
    folder = onboarded(tmp_path, *ONE_CLOCK, "--pack", str(tmp_path / "short.json"), code=2)
    assert "the server accepts 1024 in total (max_model_len)" in capsys.readouterr().err
    assert [*journal(folder)] == ["server", "load"]


def test_a_default_load_and_an_slo_that_leaves_room_are_said(tmp_path, capsys):
    folder = onboarded(tmp_path, *ONE_CLOCK)
    page, said = (folder / "report.html").read_text(), capsys.readouterr().out
    default, room = "the default; set your own with --slo-ttft-s", "a policy has nothing to choose"
    for text in (default, room, "requests/s on average"):
        assert text in said and text in page
    assert "0.0" in page and "−0.0" not in page
    assert ">predictive<" in page and "learned: predictive" not in page  # a rule, which nobody trained


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --server URL"),
        (["--node", "sim", "--observe-minutes", "1"], "there is no traffic to watch"),
        (["--server", "h", "--observe-minutes", "1", "--workload", "steady"], "exclude each other"),
        (["--node", "sim", "--workload", "stedy"], "stedy"),
        (["--node", "sim", "--block-sizes", "8", "16"], "exactly one block size"),
        (["--node", "ray", "--server", "h"], "on the server's host"),
        (["--node", "sim", "--slo-share", "2"], "--slo-share"),
        (
            ["--node", "sim", "--batches", "1", "2", "--contexts", "128"],
            "too few for a twin; give at least 4",
        ),
        (["--node", "live"], "--live.model"),
        (["--node", "sim", "--server", "h"], "^--server: --node sim is a rehearsal without a server"),
    ],
)
def test_wrong_settings_are_named(words, said):
    with pytest.raises(ConfigError, match=said):
        parse(words, prog="fuel-ray onboard")


def test_the_short_names_are_those_of_the_live_settings():
    words = ["--server", "h:1", "--gpu-ids", "0", "1", "--limit-file", "/run/limit"]
    live = parse(words, prog="fuel-ray onboard").live
    assert (live.server, live.gpu_ids, live.limit_file) == ("http://h:1", ("0", "1"), Path("/run/limit"))
    assert parse(["--model", "m"], prog="fuel-ray onboard").live.model == "m"


def test_a_server_that_does_not_answer_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu()))
    assert main(["onboard", "--server", "http://127.0.0.1:9", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "http://127.0.0.1:9" in said and "--resume" in said


def test_a_host_without_a_gpu_is_told_how_to_rehearse(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(driver=False))
    assert main(["onboard", "--server", "http://127.0.0.1:9", "--out", str(tmp_path)]) == 2
    assert "or rehearse without a GPU: fuel-ray onboard --node sim" in capsys.readouterr().err


def test_a_server_with_other_traffic_is_not_profiled(monkeypatch):
    monkeypatch.setattr(server, "LISTEN_S", 0.05)
    with serving(Stub()) as stub:
        config = parse(["--server", stub.url], prog="fuel-ray onboard")
        with pytest.raises(NodeError, match="30 running, 10 waiting"):
            server.require_alone(config)
        stub.page = re.sub(r"(?m)^(vllm:num_requests_(?:running|waiting)\b.*) \S+$", r"\1 0.0", PAGE)
        server.require_alone(config)


def test_counters_become_a_load_with_its_rates_and_lengths():
    begin = replace(parse_metrics(PAGE), running=0, waiting=0)
    pages = [(0.0, begin)]
    for at_s, ended, running in ((30.0, 30, 10), (60.0, 100, 0)):
        counted = {"requests_succeeded": begin.requests_succeeded + ended}
        counted |= {"prompt_tokens": begin.prompt_tokens + 300 * (ended + running)}
        counted |= {"generation_tokens": begin.generation_tokens + 120 * ended}
        pages.append((at_s, replace(begin, **counted, running=running)))
    found = load.summary(pages)
    assert found.rates == ((40 / 30, 30.0), (2.0, 30.0)) and found.requests == 100
    assert (found.prompt_mean, found.output_mean) == (300, 120)
    assert parse_workload(found.spec()).mean_rate_rps == pytest.approx(100 / 60, rel=0.01)
    longer = replace(found, prompt_mean=9000.0, output_mean=3000.0)
    prompt, output, *_ = load.mean_lengths(parse_workload(longer.spec()))
    assert prompt > 5000 and output > 2000
    with pytest.raises(ConfigError, match="no request arrived"):
        load.summary([pages[0], pages[0][:1] + pages[0][1:] and (30.0, begin)])


def test_traffic_is_read_before_anything_is_sent(tmp_path, monkeypatch, capsys):
    """From pages of the server, which is then found to be busy."""
    pages = iter([(0.0, 0), (30.0, 60)])
    begin = parse_metrics(PAGE)

    def read(config):
        for at_s, ended in pages:
            yield at_s, replace(begin, requests_succeeded=begin.requests_succeeded + ended)

    order = []
    monkeypatch.setattr(load, "_pages", read)
    profile = Stage("profile", "measure", lambda c: 0.0, lambda state: order.append(state.workload) or {})
    monkeypatch.setattr(stages, "STAGES", (STAGES[1], profile))
    words = ["onboard", "--server", "http://h:1", "--observe-minutes", "1", "--out", str(tmp_path)]
    assert main(words) == 0
    assert order == ["piecewise:rates=2@30,prompt_mean=8,output_mean=4"]
    assert "watching the traffic of http://h:1 for 1 min" in capsys.readouterr().out
    (path,) = tmp_path.glob("onboard-*/observed.json")
    assert json.loads(path.read_text())["rates"] == [[2.0, 30.0]]


@pytest.mark.parametrize("clock_control", ["on", "off"])
@pytest.mark.parametrize("traces", [[], ["--no-traces"]])
def test_the_time_of_a_profile_is_expected_to_be_that_of_its_points(clock_control, traces):
    words = ["--server", "h", "--live.clock-control", clock_control, *traces]
    config, pack = parse(words, prog="fuel-ray onboard"), load_pack("h100-qwen3-8b")
    clocks = spread(pack.gpu_clocks_mhz) if clock_control == "on" else pack.gpu_clocks_mhz[-1:]
    lengths = Lengths(config.batches, config.contexts, config.prompts, config.output_tokens, config.windows)
    there = Server(clocks, max_num_seqs=128, max_model_len=8192, kv_tokens=pack.kv_tokens)
    points = all_points(clocks, lengths, server=there, token_s=4e-5, traces=config.traces)
    expected_s = STAGES[2].seconds(config)
    assert expected_s == pytest.approx(sum(point.expected_s + CHANGE_S for point in points), rel=0.2)


def test_the_twin_of_a_server_without_a_limit_file_has_its_capacity_alone():
    from fuel_ray.build.nodes import build_spec

    config = replace(OnboardConfig(), node="sim", limit_control="off")
    assert build_spec(config, 16).batch_limits == (128, 128)
    assert to_dict(config)["limit_control"] == "off"
    assert isinstance(build_spec(config, 16), NodeSpec)
