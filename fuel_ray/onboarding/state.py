"""An onboarding that is under way: its folder, its settings, its server, what its stages have found."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from fuel_ray.build.live import LiveServer, node_facts, server_endpoint
from fuel_ray.build.nodes import described
from fuel_ray.errors import ConfigError, NodeError
from fuel_ray.live.vllm.facts import ASSUMED, assumed
from fuel_ray.live.vllm.kv_monitor import MetricsClient
from fuel_ray.live.vllm.server import served_model
from fuel_ray.onboarding.config import SERVED, OnboardConfig
from fuel_ray.onboarding.journal import Journal
from fuel_ray.progress import Bar
from fuel_ray.record import new_folder
from fuel_ray.sim.pack import load_pack

_SAME = ("model", "engine", "gpu_name", "kv_block_size")


class Onboarding:
    """What the stages share. A server that is started lives from its first use to ``close``."""

    def __init__(self, config: OnboardConfig, bar: Bar) -> None:
        self.bar = bar
        self.folder = config.resume or new_folder(config.out, "onboard")
        self.config = replace(config, out=self.folder)
        self.journal = Journal(self.folder, config)
        self._server: LiveServer | None = None
        self._size: int = config.block_sizes[0]

    @property
    def facts(self) -> dict[str, Any]:
        """What the server is."""
        return self.journal.found("server")

    @property
    def kv_block_size(self) -> int:
        """Tokens."""
        return int(self.facts["kv_block_size"])

    @property
    def pack_path(self) -> Path:
        """Where the fitted pack is."""
        return self.folder / "pack.json"

    @property
    def workload(self) -> str:
        """The user's load."""
        return str(self.journal.found("load")["workload"])

    @property
    def sets_clocks(self) -> bool:
        """Whether the server's clocks can be set."""
        return len(self.facts["gpu_clocks_mhz"]) > 1

    @property
    def sets_limits(self) -> bool:
        """Whether its batch limit is."""
        lowest, highest = self.facts["batch_limits"]
        return bool(lowest < highest)

    def serving(self) -> OnboardConfig:
        """Settings whose nodes are on the server, which is started if it is ours to start.

        Raises:
            ConfigError: it is not the one that the onboarding began with.
        """
        if self.config.node == "sim":
            return self.config
        if self._server is None:
            config = self._attachable()
            if config.live.server is None:
                print(f"starting the server, log in {self.folder}", flush=True)
            self._server = LiveServer(config, config.block_sizes[0])
            self._check_same()
        return self._server.config  # type: ignore[return-value]

    def twin(self, **changes: Any) -> OnboardConfig:
        """Settings of the fitted twin under the user's load."""
        facts = self.facts
        own: dict[str, Any]
        own = {"pack": str(self.pack_path), "workload": self.workload, "node": "sim", "backend": "sim"}
        size, blocks = self.kv_block_size, facts["num_kv_blocks"]
        own |= {"block_sizes": (size,), "max_num_seqs": facts["batch_limits"][-1], "resume": None}
        own |= {"gpu_clocks_mhz": self._common_clocks_mhz()}
        own |= {"limit_control": "on" if self.sets_limits else "off"}
        own |= {"kv_tokens": None if blocks is None else blocks * size}
        return replace(self.config, **(own | changes))

    def look(self) -> dict[str, Any]:
        """What the server is, by itself and by its GPUs."""
        config = self.serving()
        spec, engine, longest = described(config, config.block_sizes[0])
        name = spec.model
        if config.node == "live":
            name = served_model(
                server_endpoint(config.live), name=config.live.served_model, like=config.live.model
            ).name
        server = spec.server
        return {
            "origin": "measured" if config.node == "live" else f"modelled, pack {config.pack}",
            "url": self.config.live.server,
            "model": name,
            "engine": engine,
            "gpu_name": spec.gpu_name,
            "gpu_uuids": spec.gpu_uuids,
            "kv_block_size": spec.kv_block_size,
            "num_kv_blocks": spec.num_kv_blocks,
            "batch_limits": spec.batch_limits,
            "gpu_clocks_mhz": spec.gpu_clocks_mhz,
            "max_model_len": longest,
            "max_num_batched_tokens": config.max_num_batched_tokens
            or (server and server.max_num_batched_tokens),
            "prefix_caching": server and server.prefix_caching,
            "assumed": [] if server is None else assumed(server),
        }

    def close(self) -> None:
        """Stop a server that was started; safe to call twice."""
        server, self._server = self._server, None
        if server is not None:
            server.close()

    def _check_same(self) -> None:
        before = self.facts
        found = self.look() if before else {}
        if other := [name for name in _SAME if found.get(name) != before.get(name)]:
            said = ", ".join(f"{name} {found[name]}, not {before[name]}" for name in other)
            raise ConfigError(f"--resume {self.folder}: the server has changed since; it now has {said}")

    def _common_clocks_mhz(self) -> tuple[int, ...]:
        """Clocks of the twin: those that the server has too; all of the pack's if none of its may be set."""
        if not self.sets_clocks:
            return ()
        pack = load_pack(str(self.pack_path))
        if common := {*pack.gpu_clocks_mhz} & {*self.facts["gpu_clocks_mhz"]}:
            return tuple(sorted(common))
        raise ConfigError(f"the GPU supports none of the clocks in {self.pack_path}; start a new onboarding")

    def _attachable(self) -> OnboardConfig:
        """With what a running server says of itself: its block size and its model."""
        live = self.config.live
        if live.server is None:
            return self.config
        endpoint = server_endpoint(live)
        with contextlib.closing(MetricsClient(endpoint)) as client:
            cache = client.scrape().cache_config
        if cache is None:
            raise NodeError(f"{live.server} does not report its KV block size on /metrics")
        model = live.model
        if model == SERVED:
            model = served_model(endpoint, name=live.served_model).root
        config = replace(self.config, block_sizes=(cache.block_size,), live=replace(live, model=model))
        return replace(config, max_num_seqs=config.max_num_seqs or _told_capacity(config))


def _told_capacity(config: OnboardConfig) -> int | None:
    """The running server's --max-num-seqs, where its flags or its pages tell it."""
    facts = node_facts(config, config.block_sizes[0])[0].server
    told = facts is not None and not dict(facts.sources).get("max_num_seqs", ASSUMED).startswith(ASSUMED)
    return facts.max_num_seqs if facts is not None and told else None
