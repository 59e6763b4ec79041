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
    """When a policy is overruled; None and 0 leave a rule out. Raising the clock is never held back."""

    max_wait_s: float | None = None
    """Shield: maximum performance while a request has waited longer than this, in s."""
    max_waiting: int | None = None
    """Shield: the same while more requests than this wait."""
    latency: bool = False
    """Shield: the same while twice as many latency limits are missed as the SLO allows."""
    release_s: float = 10.0
    """Seconds of calm after which the shield lets the policy go on."""
    drift: bool = False
    """Fallback while the load is outside the range that the policy was trained on."""
    fallback: str | None = None
    """LIMIT@MHZ without telemetry and under drift, as a tuned static 48@1350; None: maximum performance."""
    floor_mhz: int | None = None
    """No lower clock than this, in MHz."""
    max_step_mhz: int | None = None
    """Largest fall of the clock per window, in MHz."""
    dwell_s: float = 0.0
    """Seconds after a change before the clock may fall."""
    switches_per_minute: int | None = None
    """Changes of the clock per minute; once spent, it may only rise."""

    def rules(self, slo: Slo, spec: NodeSpec) -> Rules:
        """For a node and its SLO.

        Raises:
            ConfigError: the fallback is malformed or not one of the node's settings.
        """
        fallback = self.fallback
        if fallback is not None and len(spec.gpu_clocks_mhz) == 1:
            fallback = fallback.partition("@")[0]  # the clock is not ours to set
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
    """Model folder or name, as vllm serve takes it."""
    server: str | None = None
    """URL of a running server to attach to, which is not stopped; None: start one per block size."""
    served_model: str | None = None
    """Name under which the server serves the model, where it serves several; None: the one that fits."""
    limit_file: Path | None = None
    """FUEL_RAY_LIMIT_FILE of the running server; None: its batch limit is left alone."""
    vllm: str = "vllm"
    """Command that runs vLLM; several words as in a shell."""
    flags: str = ""
    """More flags of vllm serve, as in a shell: --live.flags="--dtype half"."""
    gpu_ids: tuple[str, ...] = ()
    """GPUs that the server runs on, by nvidia-smi's index or by UUID (GPU-... or MIG-..., or its beginning);
    none given: the first that CUDA_VISIBLE_DEVICES shows, as many as --live.flags make the server use."""
    clock_control: Literal["on", "off"] = "on"
    """off: observe-only; clocks are left alone and policies have one clock to choose."""
    max_num_batched_tokens: int | None = None
    """Tokens per step of a running server, for traces; None: what can be found out, else vLLM's default."""
    vocab_size: int = 1000
    """Prompts are random token ids below this."""
    request_timeout_s: float = 120.0
    """Seconds after which a request is given up."""
    start_timeout_s: float = 600.0
    """Seconds in which the server has to answer."""
