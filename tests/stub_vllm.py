"""A real HTTP server on 127.0.0.1 that answers as vLLM does, or fails as told."""

import asyncio
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from fuel_ray.vllm_plugin import SchedulerLimit

PAGE = (Path(__file__).parent / "data" / "vllm_metrics_0.32.txt").read_text()


class StubScheduler:
    """As much of vLLM's scheduler as the plug-in uses; the stub says how many requests run."""

    def __init__(self, capacity):
        self.max_num_running_reqs = self.max_num_active_reqs = capacity
        self.running, self.waiting = [], []

    def get_request_counts(self):
        return len(self.running), len(self.waiting)


@dataclass
class Stub:
    page: str = PAGE
    status: int = 200
    filters: bool = True
    truncate: bool = False  # announce more bytes than are sent
    metrics_delay_s: float = 0.0
    token_delay_s: float = 0.001
    completion: str = "good"  # good, html, refuse, die, short, nousage, silent, error, merged
    drop_first: int = 0  # requests whose connection is closed without an answer
    metrics_paths: list[str] = field(default_factory=list)
    bodies: list[dict] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    model: str = "tiny"
    version: str = "0.32.0"
    host: str = "127.0.0.1"
    prefix: str = ""  # of all paths
    tls: object = None  # an SSL context
    middlewares: list = field(default_factory=list)
    models_list: list[dict] | None = None
    url: str = ""
    stop: object = None
    limit_file: Path | None = None  # where there is the plug-in, which makes a step before each page
    capacity: int = 32
    admits: int = 0  # requests that the step lets in, whatever the limit
    plugin: SchedulerLimit | None = None
    scheduler: StubScheduler | None = None

    def step(self):
        if self.plugin is None:
            self.scheduler = StubScheduler(self.capacity)
            self.plugin = SchedulerLimit(str(self.limit_file), self.scheduler)
        self.plugin.apply(self.scheduler)
        self.scheduler.running += [None] * self.admits
        self.plugin.publish(self.scheduler)

    async def metrics(self, request):
        self.metrics_paths.append(request.raw_path)
        if self.limit_file is not None:
            self.step()
        await asyncio.sleep(self.metrics_delay_s)
        names = request.query.getall("name[]", [])
        if names and not self.filters:
            return web.Response(status=404, text="not found")
        if self.truncate:
            response = web.StreamResponse(headers={"Content-Length": str(len(self.page) + 100)})
            await response.prepare(request)
            await response.write(self.page.encode())
            request.transport.close()
            return response
        text = self.page if not names else _filtered(self.page, names)
        return web.Response(status=self.status, text=text)

    async def models(self, request):
        return web.json_response({"data": self.models_list or [{"id": self.model}]})

    async def version_page(self, request):
        return web.json_response({"version": self.version})

    async def completions(self, request):
        if self.drop_first:
            self.drop_first -= 1
            request.transport.close()
            return web.Response()
        body = await request.json()
        self.bodies.append(body)
        if self.completion == "html":
            return web.Response(text="<html>hello</html>", content_type="text/html")
        if self.completion == "refuse":
            return web.json_response({"error": {"message": "too long"}}, status=400)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._stream(request, body)
        finally:
            self.in_flight -= 1

    async def _stream(self, request, body):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if self.completion == "silent":
            await asyncio.sleep(60)
        tokens = body["max_tokens"] - (self.completion == "short")
        chunks = 1 if self.completion == "merged" else tokens
        for index in range(chunks):
            if self.completion == "die" and index == 1:
                request.transport.close()
                return response
            if self.completion == "error" and index == 1:
                await _event(response, {"error": {"message": "engine died"}})
            await asyncio.sleep(self.token_delay_s)
            await _event(response, {"choices": [{"text": "x"}], "usage": None})
        prompt = body["prompt"]
        usage = {"prompt_tokens": len(prompt), "completion_tokens": tokens}
        if self.completion == "infinite":
            usage["completion_tokens"] = float("inf")
        if self.completion != "nousage":
            await _event(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response


async def _event(response, data):
    await response.write(f"data: {json.dumps(data)}\n\n".encode())


def _filtered(page, names):
    def named(line):
        return (line.split()[2] if line.startswith("#") else line).startswith(tuple(names))

    return "".join(line for line in page.splitlines(True) if named(line))


@contextmanager
def serving(stub, *, port=0):
    """Serve from a thread until the block ends or ``stub.stop()``."""
    ready, loop = threading.Event(), asyncio.new_event_loop()
    finish = asyncio.Event()

    async def main():
        app = web.Application(middlewares=stub.middlewares)
        app.router.add_get(f"{stub.prefix}/metrics", stub.metrics)
        app.router.add_get(f"{stub.prefix}/metrics/", stub.metrics)
        app.router.add_get(f"{stub.prefix}/v1/models", stub.models)
        app.router.add_get(f"{stub.prefix}/version", stub.version_page)
        app.router.add_get(f"{stub.prefix}/health", stub.version_page)
        app.router.add_post(f"{stub.prefix}/v1/completions", stub.completions)
        runner = web.AppRunner(app, shutdown_timeout=0.05, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, stub.host, port, ssl_context=stub.tls)
        await site.start()
        host = f"[{stub.host}]" if ":" in stub.host else stub.host
        stub.url = f"{'https' if stub.tls else 'http'}://{host}:{runner.addresses[0][1]}{stub.prefix}"
        ready.set()
        await finish.wait()
        await runner.cleanup()
        await asyncio.sleep(0.01)  # what was closed last is gone before the loop is

    def run():
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(main())

    def stop():
        if thread.is_alive():
            loop.call_soon_threadsafe(finish.set)
            thread.join(5.0)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    stub.stop = stop
    assert ready.wait(5.0)
    try:
        yield stub
    finally:
        stop()
