"""A page in a headless Chromium, driven by the DevTools protocol."""

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0")
_START_S = 60.0


@dataclass
class Page:
    """A tab of a browser, driven by DevTools commands."""

    socket: aiohttp.ClientWebSocketResponse
    sent: int = 0

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self.sent += 1
        await self.socket.send_json({"id": self.sent, "method": method, "params": params})
        while (answer := await self.socket.receive_json(timeout=_START_S)).get("id") != self.sent:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    async def look(self, *, width: int, dark: bool = False, media: str = "screen", height: int = 900) -> None:
        """Lay the page out as a window of this width shows it."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])

    async def value(self, script: str) -> Any:
        """What an expression is in the page."""
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def picture(self, path: Path, *, whole: bool = True) -> None:
        """Write a PNG of the page."""
        answer = await self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    async def print(self) -> bytes:
        """The page as a PDF, on the paper that it asks for, of somebody who prefers dark pages."""
        dark = {"name": "prefers-color-scheme", "value": "dark"}
        await self.call("Emulation.clearDeviceMetricsOverride")
        await self.call("Emulation.setEmulatedMedia", media="", features=[dark])
        answer = await self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
        return base64.b64decode(answer["data"])


@contextlib.asynccontextmanager
async def opened(file: Path, profile: Path):
    """A page of a browser of its own, whose profile is in a new folder."""
    command = [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, start_new_session=True, **quiet) as process:
        try:
            port = await asyncio.wait_for(_port(profile), _START_S)
            async with aiohttp.ClientSession() as session:
                url = await _tab(session, port)
                async with session.ws_connect(url, max_msg_size=0) as socket:
                    page = Page(socket)
                    await page.call("Page.navigate", url=file.resolve().as_uri())
                    while await page.value("document.readyState + location.protocol") != "completefile:":
                        await asyncio.sleep(0.02)
                    yield page
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # of its own session: what it started ends with it


async def _port(profile: Path) -> int:
    told = profile / "DevToolsActivePort"
    while not (told.exists() and "\n" in told.read_text()):
        await asyncio.sleep(0.02)
    return int(told.read_text().split()[0])


async def _tab(session: aiohttp.ClientSession, port: int) -> str:
    async with session.get(f"http://127.0.0.1:{port}/json") as answer:
        tabs = json.loads(await answer.text())
    return next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
