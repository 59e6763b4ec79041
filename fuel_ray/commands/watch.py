"""fuel-ray watch: what a deployment does, in a terminal."""

import time
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from fuel_ray.address import Access, server_url
from fuel_ray.deploy.exporter import Page, read_page
from fuel_ray.errors import ConfigError, TelemetryError
from fuel_ray.live.vllm.endpoint import Endpoint
from fuel_ray.report.wording import percent

_COLUMNS = (  # of numbers; each fits beside an address on a terminal of 80 columns
    "clock\nMHz",
    "limit",
    "W",
    "run/\nwait",
    "mean\nTTFT\nms",
    "mean\nTPOT\nms",
    "SLO",
    "overruled",
)
_CAPTION = "A number in parentheses is the policy's choice; the number above it is in force."
PORT = 9464  # of a controller's /metrics, where an address has none


@dataclass(frozen=True)
class WatchConfig:
    """Show clock, batch limit, power, queue, latency and overrules of running deployments until stopped."""

    urls: tuple[str, ...] = ("http://127.0.0.1:9464",)
    """Controllers to watch, by the address of `fuel-ray deploy --metrics-port`."""
    api_key_env: str = ""
    """Environment variable with the API key of a gateway in front of them. By default no key is sent."""
    ca_file: Path | None = None
    """PEM file with the certificate of their CA. None: SSL_CERT_FILE, REQUESTS_CA_BUNDLE or the system's."""
    interval_s: float = 1.0
    """Seconds between two updates."""
    once: bool = False
    """Print the table once and exit."""


def run(config: WatchConfig) -> int:
    """Show a table that is renewed once per interval; with ``once``, 2 if a controller does not answer."""
    if not config.urls:
        raise ConfigError("--urls is empty: give at least one address, such as http://127.0.0.1:9464")
    console = Console()
    access = Access(api_key_env=config.api_key_env, ca_file=config.ca_file)
    urls = [server_url(url, flag="--urls", port=PORT) for url in config.urls]
    controllers = [Endpoint.of(url, access, flag="--urls") for url in urls]
    if config.once:
        found = [(controller.url, _look(controller)) for controller in controllers]
        console.print(table(found), soft_wrap=True)  # a line of text stays whole, to be searched for
        return 2 if any(isinstance(page, str) for _, page in found) else 0
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(
                table([(controller.url, _look(controller)) for controller in controllers]), refresh=True
            )
            time.sleep(config.interval_s)


def _look(controller: Endpoint) -> Page | str:
    try:
        return read_page(controller)
    except TelemetryError as error:
        return str(error)


def table(found: list[tuple[str, Page | str]]) -> Group:
    """One row per controller, and below them what is wrong with those that do not answer."""
    columns = (Column("controller", overflow="fold"), *(Column(name, no_wrap=True) for name in _COLUMNS))
    shown = Table(*columns, box=SIMPLE_HEAD, padding=0, show_edge=False)
    errors = []
    for url, page in found:
        if isinstance(page, str):
            errors.append(Text(page, style="red"))
        else:
            shown.add_row(*_row(url, page))
    return Group(shown, Text(_CAPTION, style="dim"), *errors) if shown.row_count else Group(*errors)


def _row(url: str, page: Page) -> tuple[Text | str, ...]:
    age_s, attached = page.get("window_age_seconds"), page.get("attached")
    fresh = attached == 1 and age_s is not None and age_s < 5.0
    state = "" if fresh else " (not under control)" if attached != 1 else _age(age_s)
    mode = "shadow " if page.info.get("mode") == "shadow" else ""
    return (
        Text(f"{_server(url)}\n{mode}{page.info.get('policy', '')}{state}", style="" if fresh else "yellow"),
        f"{_knob(page, 'gpu_clock_mhz')}",
        f"{_knob(page, 'batch_limit')}",
        _number(page.get("power_watts"), 0),
        f"{_number(page.get('requests', 'running'), 0)}/{_number(page.get('requests', 'waiting'), 0)}",
        _number(page.get("latency_seconds", "ttft"), 0, scale=1e3),
        _number(page.get("latency_seconds", "tpot"), 1, scale=1e3),
        _attainment(page),
        "\n".join(f"{reason} {count:.0f}" for reason, count in page.labelled("overruled_total").items())
        or "-",
    )


def _server(url: str) -> str:
    """What tells a controller from others, in as few letters as that takes."""
    return url.removeprefix("http://")


def _age(seconds: float | None) -> str:
    return " (no window yet)" if seconds is None else f" ({seconds:.0f} s old)"


def _attainment(page: Page) -> str:
    """What is certain of it, where that is not one number."""
    lowest, highest = (_percent(page.get("slo_attainment_bounds", which)) for which in ("lowest", "highest"))
    return lowest if lowest == highest and lowest != "-" else _estimate(page, lowest, highest)


def _estimate(page: Page, lowest: str, highest: str) -> str:
    attainment = _percent(page.get("slo_attainment"))
    return attainment if "-" in (lowest, highest) else f"{lowest.removesuffix(' %')} to\n{highest}"


def _knob(page: Page, name: str) -> str:
    """In force, and what the policy chose where that is another value."""
    applied, chosen = page.get(name, "applied"), page.get(name, "chosen")
    return _number(applied, 0) + ("" if applied == chosen else f"\n({_number(chosen, 0)})")


def _percent(share: float | None) -> str:
    return "-" if share is None else percent(share)


def _number(value: float | None, digits: int, *, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"
