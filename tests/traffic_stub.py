"""A stub of vLLM whose counters move with time as if somebody else's requests were served."""

import re
import time
from dataclasses import dataclass, field

from tests.stub_vllm import PAGE, Stub

_LINE = re.compile(r"^([a-z_:0-9]+)(\{.*\})? (\S+)$")
_LE = re.compile(r'le="([^"]+)"')


@dataclass
class TrafficStub(Stub):
    """``rate_rps`` requests per second of equal length and latency; all at once when it is asked."""

    rate_rps: float = 20.0
    prompt_tokens: int = 100
    output_tokens: int = 50
    ttft_s: float = 0.055
    tpot_s: float = 0.02
    e2e_s: float = 1.2
    running: int = 7
    waiting: int = 0
    block_size: int = 16
    blocks: int = 300
    kv_usage: float = 0.25
    began_s: float = field(default_factory=time.monotonic)
    page_override: str = ""
    lacks: tuple[str, ...] = ()  # lines that have one of these in them are left out
    pages: int = 0
    script: dict = field(default_factory=dict)  # what to do before the n-th page

    def at(self, page: int, **changes) -> None:
        """Change these attributes before the n-th page from here on."""
        self.script.setdefault(self.pages + page, []).append(lambda: self.__dict__.update(changes))

    def restart(self) -> None:
        self.began_s = time.monotonic()

    async def metrics(self, request):
        self.pages += 1
        for action in self.script.pop(self.pages, ()):
            action()
        self.page = self.page_override or self.now()
        return await super().metrics(request)

    def now(self) -> str:
        lines = [line for line in PAGE.splitlines(keepends=True) if not any(x in line for x in self.lacks)]
        return "".join(map(self._line, lines))

    def _line(self, line: str) -> str:
        found = _LINE.match(line)
        if not found:
            return line
        name, labels = found.group(1), found.group(2) or ""
        if name == "vllm:cache_config_info":
            labels = re.sub(r'([{,]block_size)="\d+"', rf'\1="{self.block_size}"', labels)
            labels = re.sub(r'num_gpu_blocks="\d+"', f'num_gpu_blocks="{self.blocks}"', labels)
        value = self._value(name, labels)
        return line if value is None else f"{name}{labels} {value}\n"

    def _value(self, name: str, labels: str) -> float | None:
        served = int((time.monotonic() - self.began_s) * self.rate_rps)
        histograms = {
            "vllm:time_to_first_token_seconds": self.ttft_s,
            "vllm:request_time_per_output_token_seconds": self.tpot_s,
            "vllm:inter_token_latency_seconds": self.tpot_s,
            "vllm:e2e_request_latency_seconds": self.e2e_s,
        }
        for histogram, latency_s in histograms.items():
            if name == f"{histogram}_bucket":
                return served if latency_s <= float(_LE.search(labels).group(1)) else 0
            if name == f"{histogram}_count":
                return served
            if name == f"{histogram}_sum":
                return served * latency_s
        if name == "vllm:request_success_total":
            return served if 'finished_reason="length"' in labels else 0
        return {
            "vllm:prompt_tokens_total": served * self.prompt_tokens,
            "vllm:generation_tokens_total": served * self.output_tokens,
            "vllm:prompt_tokens_cached_total": 0,
            "vllm:prefix_cache_queries_total": 0,
            "vllm:prefix_cache_hits_total": 0,
            "vllm:num_preemptions_total": 0,
            "vllm:num_requests_running": self.running,
            "vllm:num_requests_waiting": self.waiting,
            "vllm:kv_cache_usage_perc": self.kv_usage,
            "vllm:cache_config_info": 1.0,
            "process_start_time_seconds": 1.7e9 + self.began_s,
        }.get(name)
