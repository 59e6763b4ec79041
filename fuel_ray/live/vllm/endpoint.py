"""How a server is spoken to: its URLs, its key and its certificate, and what to do if it refuses."""

import base64
import http.client
import os
import ssl
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from fuel_ray.address import (
    VLLM_KEY,
    Access,
    beside,
    check_variable,
    login_variable,
    page_url,
    server_url,
    shown,
)
from fuel_ray.errors import ConfigError, NodeError

KEY_VARIABLES = (VLLM_KEY, "OPENAI_API_KEY")  # looked at in this order
REDIRECTS = (301, 302, 303, 307, 308)

_NO_SUCH_PAGE = (403, 404, 405, 410, 501)
_CA_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
_ANOTHER_NAME = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
_OUT_OF_TIME = (9, 10)  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")  # answers that are none
_WORDS = 200  # of a server's own that are repeated


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server's addresses, and where its secrets are: it has none itself, so it may be printed and sent.

    They are read from the environment of the process that speaks to the server.
    """

    url: str
    metrics_url: str
    api_key_env: str | None = None  # variable with the key; None: the first of KEY_VARIABLES; "": no key
    ca_file: Path | None = None
    checks_host: bool = True  # whether the certificate has to name the host
    flag: str = "--server"  # what names the server

    @classmethod
    def of(
        cls, server: "str | Endpoint", access: Access | None = None, *, flag: str = "--server"
    ) -> "Endpoint":
        """The server that is named, and what it takes to speak to it.

        Raises:
            ConfigError: the address is none, or the key's variable or the CA's file is not there.
        """
        if isinstance(server, Endpoint):
            return server
        access = access or Access()
        check_variable(access.api_key_env, flag=beside(flag, "api-key-env"))
        url = server_url(server, flag=flag)
        metrics = f"{url}/metrics"
        if access.metrics_url is not None:
            metrics = page_url(access.metrics_url, flag=beside(flag, "metrics-url"))
        if access.api_key_env and login_variable(url) in os.environ:
            raise ConfigError(
                f"{flag} has a login, and {beside(flag, 'api-key-env')} gives a key: give only one of them"
            )
        made = cls(url, metrics, access.api_key_env, access.ca_file, flag=flag)
        made.headers(url)
        made.context(url)
        return made

    def showing(self, certificate: Path) -> "Endpoint":
        """The same server where its own certificate is known: no CA and no host name has to vouch for it."""
        return replace(self, ca_file=certificate, checks_host=False)

    def setting(self, name: str) -> str:
        """The flag of a setting that stands beside the one that names the server."""
        return beside(self.flag, name)

    def headers(self, url: str) -> dict[str, str]:
        """What goes with every request. A key is sent to the server that was named, and nowhere else.

        Raises:
            ConfigError: the key's variable is not set, or its value cannot be sent.
        """
        found = self._authorization(url)
        return {"Accept-Encoding": "identity"} | ({} if found is None else {"Authorization": found})

    def context(self, url: str) -> ssl.SSLContext | None:
        """Whose certificates are believed; None where ``url`` is not https.

        Raises:
            ConfigError: the file of the CA cannot be read.
        """
        if urlsplit(url).scheme != "https":
            return None
        named = {name: Path(value) for name in _CA_VARIABLES if (value := os.environ.get(name))}
        if self.ca_file is not None:
            named = {self.setting("ca-file"): self.ca_file}
        name, path = next(iter(named.items()), (None, None))
        try:
            folder = path if path is not None and path.is_dir() else None
            context = ssl.create_default_context(cafile=None if folder else path, capath=folder)
        except OSError as error:  # ssl's own among them
            raise ConfigError(
                f"{name} {path}: {error.strerror or error}; it must be a PEM file of certificates"
            ) from error
        context.check_hostname = self.checks_host
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # a server's own certificate will do
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # from Python 3.13 on; own CAs are seldom so exact
        return context

    def connection(self, url: str, timeout_s: float) -> http.client.HTTPConnection:
        """A connection that is opened when it is used; no proxy stands between."""
        parts, context = urlsplit(url), self.context(url)
        host = parts.hostname or ""
        if context is None:
            return http.client.HTTPConnection(host, parts.port, timeout=timeout_s)
        return http.client.HTTPSConnection(host, parts.port, timeout=timeout_s, context=context)

    def refusal(self, url: str, status: int, *, location: str | None = None, words: str = "") -> str:
        """What a status other than 200 means, in the server's words, and which setting to give."""
        if status in REDIRECTS:
            return f"HTTP {status}: {self._elsewhere(url, location)}"
        shown_words = "" if words.lstrip().startswith("<") else words  # a web page says nothing here
        said = " ".join(self.without_secrets(shown_words).split())[:_WORDS]
        advice = self._key_advice() if status in (401, 403) else None
        if status == 404 and "model" not in said.lower():  # of a model that is not there the words are enough
            advice = self._path_advice(url)
        return f"HTTP {status}" + "".join(f": {part}" for part in (said, advice) if part)

    def trouble(self, url: str, error: BaseException) -> str:
        """Why there was no answer, and which setting to give where one helps."""
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted: {error.verify_message}; {self._tls_advice(error)}"
        if isinstance(error, ssl.SSLError):
            reason: str = getattr(error, "reason", None) or str(error)  # not every one has it
            if "CERTIFICATE_REQUIRED" in reason:
                return f"{reason}: it requires client certificates, which fuel_ray does not support"
            return f"TLS failed: {reason}" + ("; does it serve http:// there?" if reason in _NO_TLS else "")
        if isinstance(error, ConnectionRefusedError):
            text = f"{error.strerror or 'connection refused'}: is the server running?"
        else:
            text = self.without_secrets(str(error) or type(error).__name__)
        if isinstance(error, http.client.BadStatusLine) and urlsplit(url).scheme == "http":
            return f"{text}; does it serve https:// there?"
        proxied = [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]
        if proxied and isinstance(error, OSError) and not _is_here(url):
            return f"{text} (fuel_ray connects directly and ignores {proxied[0]})"
        return text

    def without_secrets(self, text: str) -> str:
        """A server's words without what was sent to it."""
        for secret in sorted(self._secrets(), key=len, reverse=True):
            text = text.replace(secret, "***")
        return text

    def _authorization(self, url: str) -> str | None:
        if login := os.environ.get(login_variable(url)):
            return f"Basic {login}"
        key = self._key() if _origin(url) == _origin(self.url) else None
        return key if key is None or key.lower().startswith(("bearer ", "basic ")) else f"Bearer {key}"

    def _key(self) -> str | None:
        names = KEY_VARIABLES if self.api_key_env is None else (self.api_key_env,) if self.api_key_env else ()
        name = next((name for name in names if os.environ.get(name, "").strip()), "")
        key = os.environ[name].strip() if name else None
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ConfigError(f"{name}: the key in it has characters that cannot be sent in an HTTP header")
        return key

    def _secrets(self) -> set[str]:
        found = {
            part
            for url in (self.url, self.metrics_url)
            for part in (self._authorization(url) or "").split()[1:]
        }
        for url in (self.url, self.metrics_url):
            if login := os.environ.get(login_variable(url)):
                text = base64.b64decode(login).decode(errors="replace")
                found |= {text, text.partition(":")[2]}
        return found - {""}

    def _key_advice(self) -> str:
        setting = self.setting("api-key-env")
        if self._authorization(self.url) is None:
            looked = "" if self.api_key_env == "" else f"; {' and '.join(KEY_VARIABLES)} are not set"
            return f"put its key into an environment variable and give its name with {setting}{looked}"
        if login_variable(self.url) in os.environ:
            return f"it does not accept the login in {self.flag}"
        names = KEY_VARIABLES if self.api_key_env is None else (self.api_key_env,)
        variable = next(name for name in names if os.environ.get(name or "", "").strip())
        return f"it does not accept the key in {variable}; give the variable of another key with {setting}"

    def _path_advice(self, url: str) -> str:
        advice = f"if a gateway or --root-path adds a path, include it in {self.flag}"
        if url == self.metrics_url:
            advice += f"; if its /metrics has another address, give that with {self.setting('metrics-url')}"
        return advice

    def _elsewhere(self, url: str, location: str | None) -> str:
        if (target := _target(url, location)) is None:
            return "it redirects to an invalid address"
        place, page = shown(target).rstrip("/"), url.removeprefix(self.url).rstrip("/")
        if page == url and place.rpartition("/")[2] == url.rpartition("/")[2]:
            return f"it has moved; give {self.setting('metrics-url')} {place}"
        if place.endswith(page):
            return f"it has moved; give {self.flag} {place.removesuffix(page)}"
        advice = f"if the server is there, give {self.flag} {place}; if that is a login, {self._key_advice()}"
        return f"it redirects to {place}: {advice}"

    def _tls_advice(self, error: ssl.SSLCertVerificationError) -> str:
        if error.verify_code in _ANOTHER_NAME:
            return f"use the host name of its certificate in {self.flag}"
        if error.verify_code in _OUT_OF_TIME:
            return "renew it, or correct this host's clock"
        return f"give the certificate of its CA, or its own if self-signed, with {self.setting('ca-file')}"


def with_other_slash(url: str, status: int, location: str | None) -> str | None:
    """The same URL with or without a slash at its end where a redirect asks for no more than that.

    A gateway's back end may call its host and path by other names; they stay those that were asked.
    """
    if status not in REDIRECTS or (target := _target(url, location)) is None:
        return None
    asked, there = urlsplit(url).path, urlsplit(target).path
    is_same = bool(there.strip("/")) and asked.rstrip("/").endswith(there.rstrip("/"))
    if not is_same or asked.endswith("/") == there.endswith("/"):
        return None
    return url.rstrip("/") if asked.endswith("/") else f"{url}/"


def ask(endpoint: Endpoint, path: str, *, timeout_s: float) -> bytes:
    """The page at a path of the server.

    Raises:
        NodeError: there is no such page; the message says which setting to give.
    """
    url: str | None = endpoint.url + path
    while url is not None:
        asked = url
        status, location, body = _answer(endpoint, asked, timeout_s)
        url = with_other_slash(asked, status, location) if not asked.endswith("/") else None
    if status != http.client.OK:
        why = endpoint.refusal(
            endpoint.url + path, status, location=location, words=body.decode(errors="replace")
        )
        kind = PageError if status in _NO_SUCH_PAGE else NodeError
        raise kind(f"{asked}: {why}")
    return body


class PageError(NodeError):
    """A server, or the gateway before it, has no such page."""


def _answer(endpoint: Endpoint, url: str, timeout_s: float) -> tuple[int, str | None, bytes]:
    connection = endpoint.connection(url, timeout_s)
    try:
        parts = urlsplit(url)
        page = f"{parts.path}?{parts.query}" if parts.query else parts.path
        connection.request("GET", page, headers=endpoint.headers(url))
        response = connection.getresponse()
        body = response.read(2**24)
        if response.length:
            raise OSError(f"the answer is cut off or too long, {response.length} bytes are missing")
        body = decoded(body, response.getheader("Content-Encoding"))
        return response.status, response.getheader("Location"), body
    except (OSError, http.client.HTTPException) as error:
        raise NodeError(f"{url}: {endpoint.trouble(url, error)}") from error
    finally:
        connection.close()


def decoded(body: bytes, encoding: str | None, *, most_bytes: int = 2**26) -> bytes:
    """A body as it was before a gateway compressed it; OSError if that cannot be undone."""
    kind = (encoding or "identity").strip().lower()
    if kind == "identity" or not body:
        return body
    if kind not in ("gzip", "x-gzip", "deflate"):
        raise OSError(f"the answer is compressed by {kind}, which was not asked for")
    try:
        found = b""
        while body:  # may be in several pieces
            undo = zlib.decompressobj(zlib.MAX_WBITS | 32)  # either header
            found += undo.decompress(body, max(1, most_bytes - len(found)))
            if not undo.eof:
                raise OSError("the compressed answer is cut off, or too large")
            body = undo.unused_data
    except zlib.error as error:
        raise OSError(f"the compressed answer is damaged: {error}") from error
    return found


def _target(url: str, location: str | None) -> str | None:
    """Where a redirect sends to; None if it does not say, or says no address."""
    try:
        return urljoin(url, location) if location else None
    except ValueError:
        return None


def _origin(url: str) -> tuple[str, str | None, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _is_here(url: str) -> bool:
    return (urlsplit(url).hostname or "") in ("localhost", "127.0.0.1", "::1")
