"""Addresses of servers as people give them, and the secrets in them, which no setting keeps."""

import base64
import ipaddress
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from fuel_ray.errors import ConfigError

DEFAULT_PORT = 8000  # of `vllm serve`, where an address has neither scheme nor port
VLLM_KEY = "VLLM_API_KEY"  # vLLM itself demands the key that it has

_PATHS = re.compile(r"(/v1(/(chat/)?completions|/models)?|/metrics|/health)?/*$")  # not part of the address
_SAFE = "/%:@!$&'()*+,;=~-._"  # what may stand in a path; a percent sign is of something quoted already
_LOGIN = re.compile(r"//[^/\s]*@")
_ADDRESS_FLAGS = re.compile(r"--([\w.-]+[.-])?(server|url|urls|host)$")
_KEY_FLAG = re.compile(r"--(live\.)?(api-?key|(bearer-?|auth-?|access-?)?token|password)", re.IGNORECASE)
_KEY_IN_TEXT = re.compile(r"(--(?:api[-_]key|hf[-_]token))(\s+|=)(\"[^\"]*\"|'[^']*'|[^\s\"']+)")


@dataclass(frozen=True, kw_only=True)
class Access:
    """What a server wants before it answers, other than its address."""

    api_key_env: str | None = None
    """Environment variable with the server's API key. None: VLLM_API_KEY, else OPENAI_API_KEY. "": no key is
    sent."""
    ca_file: Path | None = None
    """PEM file with the certificate of the server's CA. None: SSL_CERT_FILE, REQUESTS_CA_BUNDLE or the
    system's."""
    metrics_url: str | None = None
    """URL of the server's /metrics, for a gateway that forwards /v1 only. None: that of the server's URL."""


def page_url(text: str, *, flag: str) -> str:
    """The URL of a /metrics page, which may have another name; otherwise as ``server_url``."""
    url, path = _url(text, flag=flag, port=DEFAULT_PORT)
    return url + (path.rstrip("/") or "/metrics")


def server_url(text: str, *, flag: str, port: int = DEFAULT_PORT) -> str:
    """The URL of a server without login, /v1 and slashes at its end.

    Takes ``host``, on ``port`` then, ``host:port``, ``::1``, ``[::1]:port`` and full URLs. A login,
    ``user:password@``, is put into this process's environment under ``login_variable``, and only there.

    Raises:
        ConfigError: it is not an address; the message has neither its login nor its query.
    """
    url, path = _url(text, flag=flag, port=port)
    return url + _PATHS.sub("", path).rstrip("/")


def login_variable(url: str) -> str:
    """Where the login of the server at ``url`` is found, as Basic authentication has it."""
    return "FUEL_RAY_LOGIN_" + re.sub(r"\W", "_", urlsplit(url).netloc).upper()


def check_no_key(words: Sequence[str]) -> None:
    """Check that a command line has no key, which other users of the host would see.

    Raises:
        ConfigError: it has one; the message has it not.
    """
    for word in words:
        flag, name = word.partition("=")[0], flag_name(word)
        if _KEY_FLAG.fullmatch(name):
            raise ConfigError(
                f"{flag}: other users can read a key on the command line; put it into an environment "
                f"variable and give the variable's name with {beside(flag, 'api-key-env')}"
            )


def beside(flag: str, name: str) -> str:
    """The flag of a setting that stands beside another: --live.ca-file beside --live.server."""
    stem, dot, _ = flag.rpartition(".")
    return f"{stem}{dot}{name}" if dot else f"--{name}"


def check_variable(name: str | None, *, flag: str, is_here: bool = True) -> None:
    """Check the name of a key's variable, which is set here unless other hosts have it.

    Raises:
        ConfigError: it is not; what may be the key itself is not in the message.
    """
    if not name or os.environ.get(name, "").strip():
        return
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        raise ConfigError(f"{flag} takes the name of an environment variable that has the key, not the key")
    if is_here:
        there = "; on Ray's nodes set it for `ray start`" if flag.startswith("--live") else ""
        raise ConfigError(f"{flag} {name}: this environment variable is not set{there}")


def shown(text: str) -> str:
    """An address as it may be printed: without login, query and fragment."""
    scheme, separator, rest = text.rpartition("://")
    rest = re.split(r"[?#]", rest)[0]
    return f"{scheme}{separator}" + (f"***@{rest.rpartition('@')[2]}" if "@" in rest else rest)


def concealed(words: Sequence[str]) -> list[str]:
    """The words of a command line as they may be written down."""
    return list(_concealed(words))


def key_of_flags(words: Sequence[str]) -> tuple[list[str], str | None]:
    """The words of `vllm serve` without --api-key, and its key.

    Raises:
        ConfigError: there are several keys.
    """
    kept: list[str] = []
    keys: list[str] = []
    taking = False
    for word in words:
        if word.startswith("-"):
            name, is_given, value = word.partition("=")
            taking = flag_name(name) == "--api-key"
            keys += [value] if taking and is_given else []
        elif taking:
            keys.append(word)
        if not taking:
            kept.append(word)
    if len(keys) > 1:
        raise ConfigError(f"--api-key: give one key, which vLLM receives as {VLLM_KEY}, not {len(keys)}")
    return kept, keys[0] if keys else None


def flag_name(word: str) -> str:
    """The flag of `vllm serve` that a word begins with, which it also takes with underscores."""
    return word.partition("=")[0].replace("_", "-")


def flag_value(words: Sequence[str], flag: str) -> str | None:
    """What the words of `vllm serve` give to a flag; the last one counts, as there."""
    found = None
    for word, following in pairwise((*words, "")):
        if flag_name(word) == flag:
            found = word.partition("=")[2] if "=" in word else following
    return found


def _url(text: str, *, flag: str, port: int) -> tuple[str, str]:
    """The URL of a server's root, and the path that is asked for."""
    given = text.strip()
    try:
        parts = urlsplit(_with_scheme(given, port))
        host, own_port = parts.hostname or "", parts.port
        if parts.scheme not in ("http", "https"):
            raise ValueError("it is neither http nor https")
        if not host or own_port == 0 or re.search(r"[\s\\<>\"{}|^`]", given):
            raise ValueError("it has no valid host and port")
    except ValueError as error:
        why = str(error) if "@" not in given else "it cannot be read"  # urlsplit's words have a part of it
        example = "http://localhost:8000, host:8000, [::1]:8000 or https://gateway/prefix"
        raise ConfigError(f"{flag} {shown(given)!r} is not an address like {example}: {why}") from None
    if parts.query or parts.fragment:
        raise ConfigError(f"{flag} {shown(given)}: give the address without its query (?) or fragment (#)")
    name = f"[{host.replace('%25', '%')}]" if ":" in host else host  # of a zone, RFC 6874
    authority = name if own_port is None else f"{name}:{own_port}"
    url = f"{parts.scheme}://{authority}"
    if "@" in parts.netloc:
        login = unquote(parts.netloc.rpartition("@")[0])
        os.environ[login_variable(url)] = base64.b64encode(login.encode()).decode()
    return url, quote(parts.path, safe=_SAFE)


def _concealed(words: Sequence[str]) -> Iterator[str]:
    flag = ""
    for word in words:
        name, is_given, value = word.partition("=") if word.startswith("--") else ("", "", word)
        flag = name or flag
        if _ADDRESS_FLAGS.match(flag) and "@" in value:
            yield f"{name}{is_given}{shown(value)}"
        else:
            yield _KEY_IN_TEXT.sub(r"\1\2***", _LOGIN.sub("//***@", word))


def _with_scheme(text: str, port: int) -> str:
    if "://" in text:
        return text
    head, separator, path = text.partition("/")
    login, at, host = head.rpartition("@")
    if _is_ipv6(host):
        host = f"[{host}]"
    if host.endswith(":"):
        raise ValueError("it has no port after its colon")
    own_port = "" if not host or ":" in host.rpartition("]")[2] else f":{port}"
    return f"http://{login}{at}{host}{own_port}{separator}{path}"


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False
