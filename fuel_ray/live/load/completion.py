"""One streamed /v1/completions request, from its sending to its last token."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import aiohttp

from fuel_ray.live.vllm.endpoint import Endpoint, with_other_slash

_DONE = "[DONE]"
_NO_ANSWER = (ValueError, TypeError, OverflowError, RecursionError)  # what came is no JSON of vLLM's


@dataclass(slots=True)
class Attempt:
    """What has happened to one request so far; times in s since the load began."""

    index: int  # in the load's requests
    arrival_s: float  # when it had to be sent
    prompt_tokens: int  # asked for; as the server counted them once it has said
    output_tokens: int  # asked for
    held_s: float = 0.0  # for which it waited before arrival_s, as too many others were in flight
    sent_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None  # its last token; None if it failed
    received_tokens: int | None = None  # as the server counted them
    itls_s: list[float] = field(default_factory=list)  # gaps between chunks, which may hold several tokens
    error: str | None = None


class Completions:
    """The completions endpoint of one server, over a shared session."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        server: Endpoint,
        *,
        model: str,
        timeout_s: float,
        start_s: float,
    ) -> None:
        self._session, self._server = session, server
        self._url = f"{server.url}/v1/completions"
        self._headers = {"Content-Type": "application/json"} | server.headers(self._url)
        self._model = model
        self._timeout_s = timeout_s
        self._start_s = start_s  # monotonic

    def body(self, prompt: str | Sequence[int], output_tokens: int) -> bytes:
        """The request for exactly ``output_tokens`` tokens."""
        wanted = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "min_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},  # chunks are not tokens
        }
        return json.dumps(wanted, separators=(",", ":")).encode()

    def now_s(self) -> float:
        """Seconds since the load began."""
        return time.monotonic() - self._start_s

    async def fetch(self, attempt: Attempt, body: bytes) -> None:
        """Send, follow the stream, and note times or the error in ``attempt``."""
        attempt.sent_s = self.now_s()
        try:
            async with asyncio.timeout(self._timeout_s), await self._post(body) as response:
                last_token_s = await self._follow(response, attempt)
            attempt.error = _shortfall(attempt)
            attempt.finished_s = last_token_s if attempt.error is None else None
        except TimeoutError:
            attempt.error = f"timed out after {self._timeout_s} s"
        except (aiohttp.ClientError, OSError, *_NO_ANSWER) as error:
            attempt.error = f"{type(error).__name__}: {self._server.trouble(self._url, _cause(error))}"

    async def _post(self, body: bytes) -> aiohttp.ClientResponse:
        url = self._url
        response = await self._post_to(url, body)
        other = with_other_slash(url, response.status, response.headers.get("Location"))
        if other is None or url.endswith("/"):
            return response
        response.release()
        self._url = other
        return await self._post_to(other, body)

    async def _post_to(self, url: str, body: bytes) -> aiohttp.ClientResponse:
        post = partial(self._session.post, url, data=body, headers=self._headers, allow_redirects=False)
        try:
            return await post()
        except aiohttp.ClientConnectorError:
            raise
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            # the server drops idle connections after 5 s, perhaps while we send on one
            return await post()

    async def _follow(self, response: aiohttp.ClientResponse, attempt: Attempt) -> float | None:
        if response.status != 200 or response.content_type != "text/event-stream":
            raise ValueError(await self._refusal(response))
        last_token_s: float | None = None
        done = False
        async for line in response.content:
            if not line.startswith(b"data:"):
                continue
            data = line[len(b"data:") :].strip().decode()
            if data == _DONE:
                done = True  # and read on: a connection is only kept if its answer was read to the end
            elif _note_event(attempt, data):
                now_s = self.now_s()
                if last_token_s is None:
                    attempt.first_token_s = now_s
                else:
                    attempt.itls_s.append(now_s - last_token_s)
                last_token_s = now_s
        if not done:
            raise ValueError("the stream ended before its end mark")
        return last_token_s

    async def _refusal(self, response: aiohttp.ClientResponse) -> str:
        words = (await response.content.read(2000)).decode(errors="replace")
        if response.status == 200:
            return f"HTTP 200, {response.content_type}: {self._server.without_secrets(words)[:300]}"
        location = response.headers.get("Location")
        return self._server.refusal(self._url, response.status, location=location, words=words)


def _cause(error: Exception) -> BaseException:
    """What is below an error of aiohttp's own."""
    return getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error


def _note_event(attempt: Attempt, data: str) -> bool:
    """Note usage; True if the event brought tokens."""
    event = json.loads(data)
    if not isinstance(event, dict) or "error" in event:
        raise ValueError(f"the server sent {data[:300]}")
    if isinstance(usage := event.get("usage"), dict):
        attempt.prompt_tokens = int(usage.get("prompt_tokens", attempt.prompt_tokens))
        attempt.received_tokens = int(usage["completion_tokens"]) if "completion_tokens" in usage else None
    return bool(event.get("choices"))


def _shortfall(attempt: Attempt) -> str | None:
    if attempt.received_tokens is None:
        return "the server reported no usage"
    if attempt.received_tokens != attempt.output_tokens:
        return f"{attempt.received_tokens} tokens came, {attempt.output_tokens} were asked for"
    return None
