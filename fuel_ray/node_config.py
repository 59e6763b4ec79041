"""Settings of a node: its server and GPUs, and what may overrule the policy on it."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from fuel_ray.address import Access
from fuel_ray.codec import parse_knobs
from fuel_ray.guard import Rules
from fuel_ray.types import NodeSpec, Slo


@dataclass(frozen=True)
class GuardConfig:
    """When the guard overrules the policy. None or 0 turns a rule off; no rule delays a rise of the clock."""

    max_wait_s: float | None = None
    """Shield: maximum performance while a request has waited longer than this for its first token, in s."""
    max_waiting: int | None = None
    """Shield: maximum performance while more requests than this wait."""
    latency: bool = False
    """Shield: maximum performance while twice as many latency limits are missed as the SLO allows."""
    release_s: float = 10.0
    """Seconds without a reason for the shield after which the policy is in control again."""
    drift: bool = False
    """Use the fallback while the load is outside the range that the policy was trained on."""
    fallback: str | None = None
    """LIMIT@MHZ, such as 48@1350, to use without telemetry and outside the trained range. None: maximum
    performance; for `fuel-ray deploy` the tuned static pair of the policy, if it has one."""
    floor_mhz: int | None = None
    """Lowest clock that may be set, in MHz."""
    max_step_mhz: int | None = None
    """Largest fall of the clock per window, in MHz."""
    dwell_s: float = 0.0
    """Seconds after a change of the clock before it may fall."""
    switches_per_minute: int | None = None
    """Changes of the clock per minute; after that many it may only rise."""

    def rules(self, slo: Slo, spec: NodeSpec) -> Rules:
        """For a node and its SLO.

        Raises:
            ConfigError: the fallback is malformed or not one of the node's settings.
        """
        fallback = self.fallback
        if fallback is not None and len(spec.gpu_clocks_mhz) == 1:
            fallback = fallback.partition("@")[0]  # the clock cannot be set
        same = {f.name for f in fields(Rules)} - {"slo", "fallback"}
        return Rules(
            slo=slo if self.latency else None,
            fallback=None if fallback is None else parse_knobs(fallback, spec),
            **{name: getattr(self, name) for name in same},
        )


@dataclass(frozen=True)
class LiveConfig(Access):
    """The server and the GPUs of a live node."""

    model: str = ""
    """Model to serve, a name or a folder, as `vllm serve` takes it."""
    server: str | None = None
    """URL of a running server, which is never stopped. None: start one for each block size."""
    served_model: str | None = None
    """Model name to request from a server that has several. None: the one that matches --live.model."""
    limit_file: Path | None = None
    """The server's FUEL_RAY_LIMIT_FILE. None: its batch limit is not changed."""
    vllm: str = "vllm"
    """Command that runs vLLM; quote it if it has several words."""
    flags: str = ""
    """More flags for `vllm serve`, in quotes: --live.flags="--dtype half"."""
    gpu_ids: tuple[str, ...] = ()
    """GPUs of the server: nvidia-smi's indices, or UUIDs. The beginning of a UUID (GPU-4f2, MIG-4f2) is
    enough. By default the first of CUDA_VISIBLE_DEVICES, as many as --live.flags make the server use."""
    clock_control: Literal["on", "off"] = "on"
    """off: never set clocks, so that policies choose the batch limit only."""
    max_num_batched_tokens: int | None = None
    """Tokens per step of a running server, for traces. None: what the server reports, else vLLM's default."""
    vocab_size: int = 1000
    """Prompts are random token IDs below this."""
    request_timeout_s: float = 120.0
    """Seconds after which a request is given up."""
    start_timeout_s: float = 600.0
    """Seconds that a server may take to start."""
