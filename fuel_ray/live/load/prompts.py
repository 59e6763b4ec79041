"""Prompts to send: token ids of exact length, or the texts of a user's file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fuel_ray.errors import ConfigError
from fuel_ray.live.load.texts import load_custom, load_sharegpt
from fuel_ray.types import Requests


class TokenPrompts:
    """Random token ids for each of ``requests``; equal prefix ids share their first tokens.

    Ids are below ``vocab_size``. Prompt ``i`` depends on the seed and ``i``, not on the order of reading.
    """

    def __init__(self, requests: Requests, *, vocab_size: int, rng: np.random.Generator) -> None:
        self._requests = requests
        self._vocab_size = vocab_size
        self._seed = int(rng.integers(2**62))
        self._prefixes: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, index: int) -> list[int]:
        request = self._requests[index]
        prefix = self._prefix(request.prefix_id, request.prefix_tokens)
        own = self._ids(request.prompt_tokens - len(prefix), (0, index))
        return prefix.tolist() + own.tolist()

    def _prefix(self, prefix_id: int | None, tokens: int) -> np.ndarray:
        if prefix_id is None:
            return np.empty(0, np.int64)
        if prefix_id not in self._prefixes:
            longest = int(self._requests.prefix_tokens[self._requests.prefix_id == prefix_id].max())
            self._prefixes[prefix_id] = self._ids(longest, (1, prefix_id))
        return self._prefixes[prefix_id][:tokens]

    def _ids(self, count: int, stream: tuple[int, int]) -> np.ndarray:
        return np.random.default_rng((self._seed, *stream)).integers(self._vocab_size, size=count)


@dataclass(frozen=True, kw_only=True)
class DrawnLoad:
    """Requests with exponential gaps, of fixed lengths or of those in a file."""

    dataset_name: Literal["sharegpt", "custom", "random"] = "random"
    """Source of the prompts. random: random token IDs of fixed lengths. sharegpt: a ShareGPT file, with its
    answer lengths. custom: JSON lines with prompt and output_tokens, as for `vllm bench`."""
    dataset_path: Path | None = None
    """File of the sharegpt (JSON) or custom (JSON lines) dataset."""
    num_prompts: int = 100
    """Requests to send."""
    request_rate: float = 10.0
    """Requests per second, with exponential gaps between arrivals. inf: all at once."""
    random_input_len: int = 512
    """Prompt tokens per request of the random dataset."""
    random_output_len: int = 128
    """Output tokens per request of the random dataset, and of custom prompts without output_tokens."""
    vocab_size: int = 1000
    """Token IDs of the random dataset are below this."""
    seed: int = 0
    """Seed of arrivals and prompts."""

    def draw(self) -> tuple[Requests, list[str] | TokenPrompts]:
        """The requests and their prompts; ConfigError where the file has none."""
        n, rng = self.num_prompts, np.random.default_rng(self.seed)
        arrival_s = np.cumsum(rng.exponential(1 / self.request_rate, n))
        lengths = np.full(n, self.random_input_len), np.full(n, self.random_output_len)
        unshared = np.full(n, -1), np.zeros(n, np.int64)
        if self.dataset_name == "random":
            requests = Requests(arrival_s, *lengths, *unshared)
            return requests, TokenPrompts(requests, vocab_size=self.vocab_size, rng=rng)
        if self.dataset_path is None:
            raise ConfigError(f"--dataset-name {self.dataset_name} needs --dataset-path")
        if self.dataset_name == "custom":
            texts, answer_tokens = load_custom(self.dataset_path, n, output_tokens=self.random_output_len)
        else:
            texts, answer_tokens = load_sharegpt(self.dataset_path, n, rng)
        as_counted_there = np.ones(n, np.int64)  # the server counts a text's tokens
        return Requests(arrival_s, as_counted_there, answer_tokens, *unshared), texts
