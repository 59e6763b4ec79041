"""A stub of vLLM whose counters are those of the requests that it is sent."""

import asyncio
from dataclasses import dataclass, field

from aiohttp import web

from tests.stub_vllm import _event
from tests.traffic_stub import TrafficStub


@dataclass
class ServingStub(TrafficStub):
    """Serves what comes, a token each ``token_delay_s``; ``foreign`` requests of somebody else run too."""

    rate_rps: float = 0.0
    waiting: int = 0
    blocks: int = 4000
    max_model_len: int = 2048
    foreign: int = 0
    prefix_hits: int = 0
    dies_after: int | None = None  # requests
    prompts: int = 0
    generated: int = 0
    served: int = 0
    models_list: list | None = field(default_factory=lambda: [])

    async def models(self, request):
        data = [{"id": self.model, "root": self.model, "max_model_len": self.max_model_len}]
        return web.json_response({"data": data})

    async def metrics(self, request):
        if self.dies_after is not None and self.served >= self.dies_after:
            request.transport.close()
            return web.Response()
        return await super().metrics(request)

    async def _stream(self, request, body):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self.prompts += len(body["prompt"])
        for _ in range(body["max_tokens"]):
            await asyncio.sleep(self.token_delay_s)
            self.generated += 1
            await _event(response, {"choices": [{"text": "x"}], "usage": None})
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        self.served += 1
        await _event(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    def _value(self, name, labels):
        counted = {
            "vllm:prompt_tokens_total": self.prompts,
            "vllm:generation_tokens_total": self.generated,
            "vllm:num_requests_running": self.in_flight + self.foreign,
            "vllm:prefix_cache_queries_total": self.prompts,
            "vllm:prefix_cache_hits_total": self.prefix_hits,
        }
        if name == "vllm:request_success_total":
            return self.served if 'finished_reason="length"' in labels else 0
        return counted[name] if name in counted else super()._value(name, labels)
