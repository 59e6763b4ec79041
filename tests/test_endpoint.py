"""Other people's servers: keys, logins, prefixes, TLS, redirects, and pages as gateways send them."""

import gzip
import os
import pickle
import ssl
import zlib
from contextlib import closing

import numpy as np
import pytest
from aiohttp import web

from fuel_ray.address import Access, concealed, key_of_flags, server_url, shown
from fuel_ray.errors import ConfigError, NodeError
from fuel_ray.live.load.loadgen import LoadGenerator
from fuel_ray.live.vllm.endpoint import Endpoint, with_other_slash
from fuel_ray.live.vllm.kv_monitor import KVCacheMonitor, MetricsClient
from fuel_ray.live.vllm.metrics import parse_metrics
from fuel_ray.live.vllm.server import served_model, server_version
from fuel_ray.types import Requests
from tests.gateways import answering, certificates, demands, redirects, shows
from tests.stub_vllm import PAGE, Stub, serving

KEY = "sk-hidden-0123456789"


@pytest.fixture(autouse=True)
def no_secrets(monkeypatch):
    for name in ("VLLM_API_KEY", "OPENAI_API_KEY", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def logins():
    """Forgets the logins that a test leaves in the environment."""
    yield
    for name in [name for name in os.environ if name.startswith("FUEL_RAY_LOGIN_")]:
        del os.environ[name]


def running(server):
    with closing(MetricsClient(server)) as client:
        return client.scrape().running


def wrong(server, ask=running):
    with pytest.raises((NodeError, ConfigError)) as caught:
        ask(server)
    return str(caught.value)


def errors(server):
    """What two requests of a load say."""
    work = Requests(np.zeros(2), np.full(2, 4), np.full(2, 3), np.full(2, -1), np.zeros(2, np.int64))
    load = LoadGenerator(server, work, prompts=["a", "b"], model="tiny")
    load.start()
    assert load.wait(20.0)
    return set(load.result().errors)


ADDRESSES = {
    "localhost": "http://localhost:8000",
    "gpu1:9000": "http://gpu1:9000",
    "::1": "http://[::1]:8000",
    "fd00::2": "http://[fd00::2]:8000",
    "[::1]:9000": "http://[::1]:9000",
    "http://[fe80::1%25eth0]:9000": "http://[fe80::1%eth0]:9000",
    "http://[::1]:9000/": "http://[::1]:9000",
    " HTTP://host:1 ": "http://host:1",
    "https://gw/team/llm": "https://gw/team/llm",
    "https://gw/team/llm/v1/": "https://gw/team/llm",
    "http://host:1/v1/chat/completions": "http://host:1",
    "http://host:1/metrics": "http://host:1",
    "gw/team": "http://gw:8000/team",
    "http://host/v1beta": "http://host/v1beta",
    "http://host/münchen": "http://host/m%C3%BCnchen",
}


@pytest.mark.parametrize("given", ADDRESSES)
def test_an_address_is_read_as_people_write_it(given):
    assert server_url(given, flag="--server") == ADDRESSES[given]
    assert server_url(ADDRESSES[given], flag="--server") == ADDRESSES[given]


@pytest.mark.parametrize(
    "given",
    [
        *("", "http://", "ftp://x", "unix:///run/vllm.sock", "http://h:99999", "http://h:0", "http://h:port"),
        *("host:", "http:/host", "http://::1:8000", "[::1", "http://a b", "actor:x"),
        *("http://h/?token=TOPSECRET", "h:1#TOPSECRET", "http://u:TOPSECRET/x@h", "u:TOPSECRET@h:port"),
    ],
)
def test_what_is_no_address_is_refused_without_its_secrets(given):
    with pytest.raises(ConfigError, match="--server") as caught:
        server_url(given, flag="--server")
    assert "TOPSECRET" not in str(caught.value)


def test_a_command_line_is_written_down_without_its_secrets():
    given = [
        *("--server", "u:secret@h:1", "--static", "48@1350", "--urls", "http://a:secret@c", "d:secret@f"),
        *("--live.flags=--api-key secret --dtype half", "--live.flags", "--api_key='sec ret' --x"),
    ]
    written = " ".join(concealed(given))
    assert "secret" not in written and "sec ret" not in written
    assert "--static 48@1350" in written and "***@h:1" in written and "--dtype half" in written
    assert shown("https://a:b@h/x?y") == "https://***@h/x"


def test_the_key_among_flags_of_vllm_is_taken_out_and_several_are_refused():
    assert key_of_flags(["--a", "1", "--api_key", "k", "--b"]) == (["--a", "1", "--b"], "k")
    assert key_of_flags(["--api-key=k"]) == ([], "k")
    with pytest.raises(ConfigError, match="one key") as caught:
        key_of_flags(["--api-key", "secret1", "secret2"])
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("variable", ["VLLM_API_KEY", "OPENAI_API_KEY", "MY_KEY"])
def test_a_server_behind_a_key_is_read_and_asked(variable, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    monkeypatch.setenv(variable, f"{KEY}\n")  # as files of secrets have it
    seen = []
    access = Access(api_key_env="MY_KEY" if variable == "MY_KEY" else None)
    with serving(Stub(middlewares=[demands(f"Bearer {KEY}", seen=seen)])) as stub:
        server = Endpoint.of(f"{stub.url}/v1/", access)
        assert running(server) == 30 and served_model(server).name == "tiny"
        assert server_version(server) == "0.32.0" and errors(server) == {None}
        with KVCacheMonitor(server, 0.05) as monitor:
            assert monitor.get_current_state()["num_requests_running"] == 30
    assert set(seen) == {f"Bearer {KEY}"}
    assert KEY not in repr(server) and KEY.encode() not in pickle.dumps(server)


def test_a_header_of_another_kind_is_sent_as_it_is(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "Basic dTpw")
    with serving(Stub(middlewares=[demands("Basic dTpw")])) as stub:
        assert running(stub.url) == 30


def test_a_login_in_the_url_is_sent_and_nowhere_seen(logins):
    with serving(Stub(middlewares=[demands("Basic dXNlcjpwQHNz")])) as stub:
        server = Endpoint.of(stub.url.replace("//", "//user:p%40ss@"))
        assert running(server) == 30 and errors(server) == {None}
        assert "p@ss" not in repr(server) and "p%40ss" not in repr(server) and server.url == stub.url


def test_a_missing_and_a_wrong_key_say_which_setting_to_give(monkeypatch):
    with serving(Stub(middlewares=[demands(f"Bearer {KEY}")])) as stub:
        for ask in (running, served_model, server_version):
            text = wrong(stub.url, ask)
            assert "HTTP 401" in text and "--api-key-env" in text and "VLLM_API_KEY" in text, text
        assert all("HTTP 401" in text and "--api-key-env" in text for text in errors(stub.url))
        monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
        live = Endpoint.of(stub.url, flag="--live.server")
        texts = [wrong(live), wrong(live, served_model), *errors(live)]
    for text in texts:
        assert "does not accept the key in OPENAI_API_KEY" in text and "--live.api-key-env" in text
        assert "sk-mine" not in text and "Unauthorized: Bearer ***" in text


def test_what_names_no_key_is_refused_without_it(monkeypatch):
    for name in ("sk-123 4", "sk-123", "perhaps_a_key"):
        text = wrong(None, lambda _, name=name: Endpoint.of("h", Access(api_key_env=name)))
        assert "--api-key-env" in text and name not in text
    assert "NOT_SET: this environment variable is not set" in wrong(
        None, lambda _: Endpoint.of("h", Access(api_key_env="NOT_SET"))
    )
    monkeypatch.setenv("VLLM_API_KEY", "sk-1\r\nX: y")
    text = wrong(None, lambda _: Endpoint.of("h"))
    assert "VLLM_API_KEY" in text and "sk-1" not in text
    assert "Authorization" not in Endpoint.of("h", Access(api_key_env="")).headers("http://h:8000")


def test_a_prefix_is_part_of_the_address_and_its_lack_is_said():
    with serving(Stub(prefix="/team/llm")) as stub:
        assert running(stub.url) == 30 and served_model(f"{stub.url}/v1").name == "tiny"
        assert errors(stub.url) == {None}
        bare = stub.url.removesuffix("/team/llm")
        for text in (wrong(bare), wrong(bare, served_model), *errors(bare)):
            assert "HTTP 404" in text and "include it in --server" in text, text
        assert "--metrics-url" in wrong(bare) and "--metrics-url" not in wrong(bare, served_model)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_says_the_address_to_give_and_takes_no_key_along(status, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    seen = []
    with serving(Stub(middlewares=[demands("nobody", seen=seen)])) as other:
        gateway = Stub(middlewares=[redirects(lambda path: f"{other.url}/team{path}", status=status)])
        with serving(gateway) as stub:
            texts = [wrong(stub.url), wrong(stub.url, served_model), *errors(stub.url)]
    for text in texts:
        assert f"HTTP {status}" in text and f"give --server {other.url}/team" in text, text
    assert seen == []


def test_a_redirect_to_a_login_page_is_no_address():
    with serving(Stub(middlewares=[redirects(lambda path: f"/login?next={path}&t=TOPSECRET")])) as stub:
        text = wrong(stub.url)
    assert (
        "/login: if the server is there, give" in text and "--api-key-env" in text and "TOPSECRET" not in text
    )


@pytest.mark.parametrize("location", ["/metrics/", "http://internal:8000/metrics/", "metrics/"])
def test_a_redirect_to_the_same_page_with_a_slash_is_followed_where_it_was_asked(location):
    async def slash(request, handler):
        if request.path.endswith("/metrics"):
            return web.Response(status=307, headers={"Location": location})
        return await handler(request)

    with serving(Stub(prefix="/x", middlewares=[web.middleware(slash)])) as stub:
        with closing(MetricsClient(stub.url)) as client:
            assert client.scrape().running == client.scrape().running == 30
            assert client.scrape(filtered=True).ttft is None
        assert stub.metrics_paths[:2] == ["/x/metrics/"] * 2


def test_two_slashes_that_send_to_each_other_end():
    async def back_and_forth(request, handler):
        path = request.path
        return web.Response(status=308, headers={"Location": path.rstrip("/") + "/" * (path[-1] != "/")})

    with serving(Stub(middlewares=[web.middleware(back_and_forth)])) as stub:
        assert "HTTP 308" in wrong(stub.url) and "HTTP 308" in wrong(stub.url, served_model)


def test_a_certificate_of_an_own_ca_is_believed_once_the_ca_is_named(tmp_path, monkeypatch):
    ca, own, key = certificates(tmp_path)
    with serving(Stub(tls=shows(own, key))) as stub:
        for text in (wrong(stub.url), wrong(stub.url, served_model), *errors(stub.url)):
            assert "certificate is not trusted" in text and "--ca-file" in text, text
        for trusted in (ca, own):
            server = Endpoint.of(stub.url, Access(ca_file=trusted))
            assert running(server) == 30 and served_model(server).name == "tiny" and errors(server) == {None}
        for variable in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
            monkeypatch.setenv(variable, str(ca))
            assert running(stub.url) == 30 and errors(stub.url) == {None}
            monkeypatch.setenv(variable, str(tmp_path / "nowhere.pem"))
            assert f"{variable} {tmp_path}/nowhere.pem" in wrong(stub.url)
            monkeypatch.delenv(variable)
        plain = stub.url.replace("https", "http")
        assert "https://" in wrong(plain) and "https://" in wrong(plain, served_model)
    (tmp_path / "no.pem").write_text("no certificate")
    for name in ("no.pem", "nowhere.pem"):
        access = Access(ca_file=tmp_path / name)
        text = wrong(None, lambda _, access=access: Endpoint.of("https://h", access, flag="--live.server"))
        assert "--live.ca-file" in text and name in text


def test_a_certificate_for_another_name_and_a_server_without_tls_are_said(tmp_path):
    ca, own, key = certificates(tmp_path, name="gateway.example")
    with serving(Stub(tls=shows(own, key))) as stub:
        server = Endpoint.of(stub.url, Access(ca_file=ca))
        for text in (wrong(server), *errors(server)):
            assert "use the host name of its certificate in --server" in text, text
        assert running(server.showing(own)) == 30
    with serving(Stub()) as stub:
        assert "does it serve http:// there?" in wrong(stub.url.replace("http", "https"))


def test_a_server_on_ipv6_is_spoken_to(monkeypatch):
    with serving(Stub(host="::1")) as stub:
        port = stub.url.rpartition(":")[2]
        for given in (stub.url, f"[::1]:{port}"):
            assert running(given) == 30 and served_model(given).name == "tiny" and errors(given) == {None}


def test_proxies_are_not_used(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with serving(Stub()) as stub:
        assert (
            running(stub.url) == 30 and served_model(stub.url).name == "tiny" and errors(stub.url) == {None}
        )
    assert "ignores http_proxy" in wrong("http://no-such-host.invalid:1")


def models(*entries):
    return [{"id": name, "root": root, "parent": parent} for name, root, parent in entries]


def test_the_model_is_the_one_that_is_meant():
    served = models(("qwen", "/m/Qwen3-8B", None), ("q", "/m/Qwen3-8B", None), ("sql", "/lora/sql", "qwen"))
    with serving(Stub(models_list=served)) as stub:
        assert served_model(stub.url).name == "qwen"  # second names and adapters are no other models
        assert (
            served_model(stub.url, name="sql").name == "sql" and served_model(stub.url, like="q").name == "q"
        )
        assert "--served-model none" in wrong(stub.url, lambda url: served_model(url, name="none"))
        stub.models_list = models(("llama", "llama", None), *[tuple(entry.values()) for entry in served])
        assert served_model(stub.url, like="/m/Qwen3-8B").name == "qwen"
        assert served_model(stub.url, like="Qwen/Qwen3-8B").name == "qwen"
        text = wrong(Endpoint.of(stub.url, flag="--live.server"), served_model)
        assert "serves several models (llama, qwen, q, sql): choose one with --live.served-model" in text
        stub.models_list = [{"id": "bare"}]
        assert served_model(stub.url).name == "bare"
        stub.models_list = [{"name": "ollama"}]
        assert "does not answer like a vLLM server" in wrong(stub.url, served_model)


@pytest.mark.parametrize("status", [404, 403, 405])
def test_a_gateway_without_a_version_leaves_it_unknown(status):
    @web.middleware
    async def hides(request, handler):
        return web.Response(status=status) if request.path == "/version" else await handler(request)

    with serving(Stub(middlewares=[hides])) as stub:
        assert server_version(stub.url) is None


def test_metrics_may_be_elsewhere_where_the_key_is_not_sent(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    seen = []
    gateway = Stub(status=404, middlewares=[demands(f"Bearer {KEY}")])
    with serving(gateway) as stub, serving(Stub(middlewares=[demands(None, seen=seen)])) as other:
        for given in (other.url, f"{other.url}/metrics"):
            server = Endpoint.of(stub.url, Access(metrics_url=given))
            assert running(server) == 30 and served_model(server).name == "tiny"
        server = Endpoint.of(stub.url, Access(metrics_url=f"{other.url}/prom/page"))
        assert f"{other.url}/prom/page: HTTP 404" in wrong(server)
    assert seen == [None] * 3


BODY = PAGE.encode()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"


def chunked(data, *, size=9999):
    parts = [data[i : i + size] for i in range(0, len(data), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


def compressed(data):
    return HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(data) + data


WHOLE = {
    "length": HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY,
    "no newline, length": HEAD + b"Content-Length: %d\r\n\r\n" % (len(BODY) - 1) + BODY[:-1],
    "no newline, chunked": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(BODY[:-1]) + b"0\r\n\r\n",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\n\r\n" + BODY,
    "closed": HEAD + b"Connection: close\r\n\r\n" + BODY,
    "CRLF": HEAD + b"\r\n" + BODY.replace(b"\n", b"\r\n"),
    "gzip": compressed(gzip.compress(BODY)),
    "gzip in pieces": compressed(gzip.compress(BODY[:30000]) + gzip.compress(BODY[30000:])),
    "deflate": compressed(zlib.compress(BODY)).replace(b"gzip", b"deflate"),
    "OpenMetrics without a newline": HEAD.replace(b"text/plain", b"application/openmetrics-text")
    + b"\r\n"
    + BODY
    + b"# EOF",
    "20 MiB": HEAD + b"\r\n" + b"# a comment of a page that is large\n" * 600_000 + BODY,
}
CUT = {
    "length": WHOLE["length"][:-100],
    "length, at a line": WHOLE["length"][: WHOLE["length"].rindex(b"\n", 0, -100) + 1],
    "chunked": WHOLE["no newline, chunked"][:-400],
    "chunked, without its end": WHOLE["no newline, chunked"][:-5],
    "HTTP/1.0": WHOLE["HTTP/1.0"][:-1],
    "gzip": compressed(gzip.compress(BODY)[:-50]),
    "OpenMetrics, at a line": WHOLE["OpenMetrics without a newline"][:-5],
    "OpenMetrics, framed again": HEAD.replace(b"text/plain", b"application/openmetrics-text")
    + b"Content-Length: %d\r\n\r\n" % len(BODY)
    + BODY,
}


@pytest.mark.parametrize("how", WHOLE)
def test_a_whole_page_is_read_however_it_ends(how):
    with answering(WHOLE[how]) as url, closing(MetricsClient(url, timeout_s=10.0)) as client:
        assert client.scrape() == parse_metrics(PAGE)


@pytest.mark.parametrize("how", CUT)
def test_a_page_that_is_cut_off_is_not_believed(how):
    with answering(CUT[how]) as url:
        assert wrong(url).startswith(f"{url}/metrics: ")


def test_an_encoding_that_cannot_be_undone_is_named():
    with answering(compressed(BODY).replace(b"gzip", b"br")) as url:
        assert "compressed by br" in wrong(url)
    with answering(compressed(BODY)) as url:
        assert "damaged" in wrong(url)


def test_a_load_follows_a_slash_too():
    @web.middleware
    async def slash(request, handler):
        if request.path.endswith("/v1/completions/"):
            return await stub.completions(request)
        if request.path.endswith("/v1/completions"):
            return web.Response(status=307, headers={"Location": f"{request.path}/"})
        return await handler(request)

    with serving(Stub(middlewares=[slash])) as stub:
        assert errors(stub.url) == {None}


def test_a_login_and_a_key_are_not_both_taken(logins, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    text = wrong(None, lambda _: Endpoint.of("http://u:secret@h", Access(api_key_env="MY_KEY")))
    assert "give only one of them" in text and "secret" not in text


def test_a_model_that_is_not_there_is_not_blamed_on_a_path():
    words = '{"error": {"message": "The model `x` does not exist."}}'
    assert Endpoint.of("h").refusal("http://h:8000/v1/completions", 404, words=words) == f"HTTP 404: {words}"


def test_a_server_that_wants_a_certificate_of_its_clients_is_said():
    error = ssl.SSLError(1, "[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 alert certificate required")
    assert "requires client certificates" in Endpoint.of("h").trouble("https://h", error)


@pytest.mark.parametrize("location", ["http://[", "", None])
def test_a_redirect_to_no_address_is_told_as_such(location):
    server = Endpoint.of("http://gateway:80")
    url = "http://gateway:80/v1/models"
    assert with_other_slash(url, 307, location) is None
    assert server.refusal(url, 307, location=location) == "HTTP 307: it redirects to an invalid address"
