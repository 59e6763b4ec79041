"""Every verb that speaks to a server, before one with a key, a prefix, a login or TLS: no secret is seen."""

import json
import os
import subprocess
import sys

import pytest

from fuel_ray.cli import main
from fuel_ray.types import Knobs
from tests.conftest import RAY_SETTINGS
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.gateways import certificates, demands, shows
from tests.policy_folders import write_policy
from tests.stub_vllm import Stub, serving
from tests.test_lease import FAKE_PYNVML, ROOT
from tests.test_live_node import CountingStub
from tests.traffic_stub import TrafficStub

KEY, PASSWORD = "sk-hidden-0123456789", "pass-hidden-0123"
SECRETS = (KEY, PASSWORD, "dXNlcjpwYXNzLWhpZGRlbi0wMTIz")
LOAD = ("--num-prompts", "10", "--request-rate", "20", "--random-input-len", "8", "--random-output-len", "4")
VLLM = f"{sys.executable} {ROOT / 'tests/tools/stub_vllm.py'}"
LIVE = [
    *("--node", "live", "--live.model", "tiny", "--live.clock-control", "off", "--block-sizes", "32"),
    *("--workload", "steady:rate_rps=4,lengths=fixed,prompt_mean=32,output_mean=16", "--max-num-seqs", "32"),
]
EVALUATE = ["evaluate", *LIVE, "--seconds", "2", "--seeds", "1", "--static", "max"]


@pytest.fixture(autouse=True)
def around(monkeypatch):
    monkeypatch.setattr("fuel_ray.live.gpu.nvml.pynvml", FakeNvml(FakeGpu(uuid="GPU-0")))
    for name in ("VLLM_API_KEY", "OPENAI_API_KEY", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    yield
    for name in [name for name in os.environ if name.startswith(("FUEL_RAY_LOGIN_", "VLLM_API_KEY"))]:
        del os.environ[name]


def unseen(folder, *texts):
    """Check that no file below a folder and no text has a secret."""
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".secret":
            found = [secret for secret in SECRETS if secret.encode() in path.read_bytes()]
            assert not found, (path, found)
    assert not [secret for secret in SECRETS for text in texts if secret in text]


@pytest.fixture(params=["key", "login"])
def guarded(request, tmp_path, monkeypatch):
    """What a stub needs to be behind TLS, a prefix and a key or a login, and how its URL is given."""
    ca, own, key = certificates(tmp_path)
    wanted = f"Bearer {KEY}" if request.param == "key" else f"Basic {SECRETS[2]}"
    if request.param == "key":
        monkeypatch.setenv("MY_KEY", KEY)
    stub = {"tls": shows(own, key), "prefix": "/team/llm", "middlewares": [demands(wanted)]}
    login = "" if request.param == "key" else f"user:{PASSWORD}@"

    def flags(name, url, stem="--"):
        access = (f"{stem}api-key-env", "MY_KEY") if request.param == "key" else ()
        return [name, f"{url.replace('//', '//' + login)}/v1/", f"{stem}ca-file", str(ca), *access]

    return stub, flags


def test_a_benchmark_behind_all_of_it(guarded, tmp_path, capfd):
    options, flags = guarded
    with serving(CountingStub(**options)) as stub:
        code = main(
            [
                *("benchmark", "--model", "tiny", *LOAD, *flags("--base-url", stub.url), "--save-result"),
                *("--enable-kv-trace", "--kv-monitor-interval", "0.1", "--result-dir", str(tmp_path / "r")),
            ]
        )
        assert code == 0
        missing = [main(["benchmark", "--model", "tiny", "--base-url", stub.url])]
    assert missing == [2]
    out, err = capfd.readouterr()
    assert "--ca-file" in err
    (result,) = (tmp_path / "r").glob("*.json")
    assert json.loads(result.read_text())["completed"] == 10
    unseen(tmp_path, out, err)


def test_a_deployment_behind_all_of_it(guarded, tmp_path, capfd, monkeypatch):
    options, flags = guarded
    policy = write_policy(tmp_path / "policy", best=Knobs(4, 1980))
    with serving(TrafficStub(**options)) as stub:
        given = [
            "deploy",
            "--policy",
            str(policy),
            *flags("--server", stub.url),
            "--out",
            str(tmp_path / "out"),
        ]
        given += ["--interval", "0.1", "--max-steps", "3", "--shadow"]
        monkeypatch.setattr(sys, "argv", ["fuel-ray", *given])  # which is written into run.json
        assert main(given) == 0
    (folder,) = (tmp_path / "out").glob("deploy-*")
    run = json.loads((folder / "run.json").read_text())
    assert run["summary"]["windows"] == 3 and run["config"]["server"] == stub.url
    unseen(tmp_path, *capfd.readouterr())


def test_an_evaluation_on_a_server_behind_all_of_it(guarded, tmp_path, capfd, monkeypatch):
    options, flags = guarded
    with serving(CountingStub(**options)) as stub:
        given = [*EVALUATE, *flags("--live.server", stub.url, "--live."), "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["fuel-ray", *given])
        assert main(given) == 0
    (folder,) = (tmp_path / "out").glob("evaluate-*")
    run = json.loads((folder / "run.json").read_text())
    assert run["config"]["live"]["server"] == stub.url and not run["partial"]
    assert main([*EVALUATE, "--config", str(folder / "run.json"), "--out", str(tmp_path)]) == 2  # it is gone
    unseen(tmp_path, *capfd.readouterr())


@pytest.mark.parametrize("how", ["environment", "flags", "named", "named and tls"])
def test_a_server_that_is_started_with_a_key_is_asked_with_it(how, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("STUB_STARTS", str(tmp_path / "starts"))
    monkeypatch.setenv("STUB_ARGUMENTS", str(tmp_path / "arguments"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")
    given = [*EVALUATE, "--live.vllm", VLLM, "--out", str(tmp_path / "out")]
    if how == "environment":
        monkeypatch.setenv("VLLM_API_KEY", KEY)
    elif how == "flags":
        given.append(f"--live.flags=--dtype half --api-key {KEY}")
    else:
        monkeypatch.setenv("MY_KEY", KEY)
        given += ["--live.api-key-env", "MY_KEY"]
    if how == "named and tls":
        _, own, key = certificates(tmp_path, name="gpu1.example")
        given.append(f"--live.flags=--ssl-keyfile {key} --ssl-certfile={own}")
    monkeypatch.setattr(sys, "argv", ["fuel-ray", *given])
    assert main(given) == 0
    (folder,) = (tmp_path / "out").glob("evaluate-*")
    assert len((folder / "summary.csv").read_text().splitlines()) == 2
    arguments = (tmp_path / "arguments").read_bytes()
    assert (how == "flags") == (b"half" in arguments) and b"asks for a key" in arguments
    unseen(tmp_path, *capfd.readouterr())


def test_a_key_on_the_command_line_is_refused_without_it(tmp_path, capsys, monkeypatch):
    flags = [f"--live.flags=--api-key {KEY} --api-key {KEY}2"]
    assert main([*EVALUATE, *flags, "--out", str(tmp_path)]) == 2
    for verb in (["benchmark", "--model", "m"], ["deploy", "--policy", "p"], EVALUATE):
        for given in (["--api-key", KEY], [f"--api_key={KEY}"], [f"--live.api-key={KEY}"], ["--token", KEY]):
            assert main([*verb, *given]) == 2
    assert main([*EVALUATE, f"--live.flags=--hf-token {KEY}"]) == 2
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert main([*EVALUATE, f"--live.flags=--api-key {KEY}"]) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 15 and "VLLM_API_KEY for `ray start`" in err
    assert err.count("-env") == 12
    unseen(tmp_path, out, err)


def test_a_deployment_that_lacks_the_key_says_so_in_one_line(tmp_path, capsys):
    policy = write_policy(tmp_path / "policy", best=Knobs(4, 1980))
    with serving(TrafficStub(middlewares=[demands(f"Bearer {KEY}", prefixes=("/v1",))])) as stub:
        given = ["deploy", "--policy", str(policy), "--server", stub.url, "--out", str(tmp_path / "out")]
        assert main(given) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "HTTP 401" in err and "--api-key-env" in err


def test_a_policy_for_a_server_of_unknown_version_is_deployed_with_a_warning(tmp_path, caplog):
    from aiohttp import web

    @web.middleware
    async def hides(request, handler):
        return web.Response(status=404) if request.path == "/version" else await handler(request)

    policy = write_policy(tmp_path / "policy", best=Knobs(4, 1980))
    with serving(TrafficStub(middlewares=[hides])) as stub:
        given = ["deploy", "--policy", str(policy), "--server", stub.url, "--out", str(tmp_path / "out")]
        given += ["--interval", "0.1", "--max-steps", "2", "--clock-control", "off"]
        assert main(given) == 0
        assert "the server's version is unknown" in caplog.text


@pytest.mark.parametrize("host", ["::1", "[::1]", "url", "host:port"])
def test_a_benchmark_takes_a_host_as_people_write_it(host, tmp_path):
    with serving(CountingStub(host="::1" if "::" in host else "127.0.0.1")) as stub:
        port = stub.url.rpartition(":")[2]
        given = {"url": ["--host", stub.url], "host:port": ["--host", f"127.0.0.1:{port}"]}
        flags = given.get(host, ["--host", host, "--port", port])
        assert main(["benchmark", "--model", "tiny", *LOAD, *flags]) == 0


def test_a_model_that_is_named_by_its_folder_is_asked_for_by_its_name():
    with serving(
        CountingStub(models_list=[{"id": "tiny", "root": "/models/tiny-8b", "parent": None}])
    ) as stub:
        assert main(["benchmark", "--model", "/models/tiny-8b", *LOAD, "--base-url", stub.url]) == 0
        assert {body["model"] for body in stub.bodies} == {"tiny"}


def test_a_policy_fits_a_server_by_what_it_was_started_from(tmp_path, capsys):
    policy = write_policy(tmp_path / "policy", best=Knobs(4, 1980), model="Qwen/Qwen3-8B")
    adapter = {"id": "sql", "root": "/lora", "parent": "prod"}
    with serving(TrafficStub(models_list=[adapter, {"id": "prod", "root": "/m/Qwen3-8B"}])) as stub:
        given = ["deploy", "--policy", str(policy), "--server", stub.url, "--out", str(tmp_path / "out")]
        given += ["--interval", "0.1", "--max-steps", "2", "--clock-control", "off"]
        assert main(given) == 0
        assert ": prod on" in capsys.readouterr().out
        stub.models_list = [{"id": "a"}, {"id": "b"}]
        assert main(given) == 2
        assert "serves several models (a, b): choose one with --served-model" in capsys.readouterr().err


def test_watch_takes_addresses_too(capsys):
    with serving(Stub()) as stub:
        assert main(["watch", "--once", "--urls", stub.url.removeprefix("http://")]) == 2
        assert "not a controller of fuel_ray" in capsys.readouterr().out
    assert main(["watch", "--once", "--urls", f"ftp://u:{PASSWORD}@h"]) == 2
    assert PASSWORD not in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_leaves_no_key_in_its_files_nor_in_those_of_tune(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "pynvml.py").write_text(FAKE_PYNVML)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'lib'}:{ROOT}")
    variables = {"FAKE_NVML_LOG": "nvml.log", "STUB_STARTS": "starts", "STUB_ARGUMENTS": "arguments"}
    for name, file in variables.items():
        monkeypatch.setenv(name, str(tmp_path / file))
    for name, value in RAY_SETTINGS.items():
        monkeypatch.setenv(name, value)
    command = [
        *(sys.executable, "-m", "fuel_ray", "sweep", *LIVE, "--live.vllm", VLLM),
        *("--grid-batch-limits", "4", "16", "--steps", "24", "--train.iterations", "2"),
        *("--train.episode-steps", "8", "--train.fragment-steps", "5", "--train.batch-size", "4"),
        *("--control-workload", "None", "--seeds", "1", "--live-seconds", "3"),
        *(f"--live.flags=--api-key {KEY}", "--out", str(tmp_path / "out")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "out").rglob("*.pkl"))) > 0
    assert b"asks for a key" in (tmp_path / "arguments").read_bytes()
    unseen(tmp_path, done.stdout, done.stderr)
