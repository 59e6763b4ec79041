"""Prompts to send: token ids of exact length, or the conversations of ShareGPT."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fuel_ray.errors import ConfigError
from fuel_ray.record import read_json
from fuel_ray.types import Requests

_CHARACTERS_PER_TOKEN = 4  # of English text with today's tokenizers, roughly
_FEWEST_TOKENS, _MOST_PROMPT_TOKENS, _MOST_TOKENS = 4, 1024, 2048  # as `vllm bench serve` samples ShareGPT


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
    """Requests with exponential gaps, of fixed lengths or of a ShareGPT file's."""

    dataset_name: Literal["sharegpt", "random"] = "random"
    """sharegpt: prompts and answer lengths of a ShareGPT file. random: token ids of fixed lengths."""
    dataset_path: Path | None = None
    """ShareGPT JSON file."""
    num_prompts: int = 100
    """Requests to send."""
    request_rate: float = 10.0
    """Requests per second; inter-arrival times are exponential."""
    random_input_len: int = 512
    """Prompt tokens of the random dataset."""
    random_output_len: int = 128
    """Output tokens of the random dataset."""
    vocab_size: int = 1000
    """Token ids of the random dataset are below this."""
    seed: int = 0
    """Seed of arrivals and prompts."""

    def draw(self) -> tuple[Requests, list[str] | TokenPrompts]:
        """The requests and their prompts; ConfigError where ``load_sharegpt`` finds none."""
        n, rng = self.num_prompts, np.random.default_rng(self.seed)
        arrival_s = np.cumsum(rng.exponential(1 / self.request_rate, n))
        lengths = np.full(n, self.random_input_len), np.full(n, self.random_output_len)
        unshared = np.full(n, -1), np.zeros(n, np.int64)
        if self.dataset_name == "random":
            requests = Requests(arrival_s, *lengths, *unshared)
            return requests, TokenPrompts(requests, vocab_size=self.vocab_size, rng=rng)
        if self.dataset_path is None:
            raise ConfigError("--dataset-name sharegpt needs --dataset-path")
        texts, answer_tokens = load_sharegpt(self.dataset_path, n, rng)
        as_counted_there = np.ones(n, np.int64)  # the server counts a text's tokens
        return Requests(arrival_s, as_counted_there, answer_tokens, *unshared), texts


def load_sharegpt(path: Path, n: int, rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
    """First questions of ``n`` random conversations, and the lengths (n,) of the recorded answers in tokens.

    Conversations are kept as `vllm bench serve` keeps them: at least 4 tokens each way, at most 1024 in the
    prompt and 2048 in all. Those of a short file are repeated.

    Raises:
        ConfigError: not a ShareGPT file, or no conversation of fitting length.
    """
    pairs = [pair for pair in map(_first_turns, _conversations(path)) if pair is not None]
    sized = [(question, _tokens(question), _tokens(answer)) for question, answer in pairs]
    fitting = [(question, output) for question, prompt, output in sized if _fits(prompt, output)]
    if not fitting:
        raise ConfigError(f"{path}: no ShareGPT conversation of fitting length among {len(pairs)}")
    chosen = rng.choice(len(fitting), size=n, replace=n > len(fitting))
    return [fitting[i][0] for i in chosen], np.array([fitting[i][1] for i in chosen], np.int64)


def _tokens(text: str) -> int:
    return math.ceil(len(text) / _CHARACTERS_PER_TOKEN)


def _fits(prompt: int, output: int) -> bool:
    enough = min(prompt, output) >= _FEWEST_TOKENS
    return enough and prompt <= _MOST_PROMPT_TOKENS and prompt + output <= _MOST_TOKENS


def _conversations(path: Path) -> list[object]:
    items = read_json(path)
    if not isinstance(items, list):
        raise ConfigError(f"{path}: not a list of ShareGPT conversations")
    return items


def _first_turns(item: object) -> tuple[str, str] | None:
    turns = item.get("conversations") if isinstance(item, dict) else None
    if not isinstance(turns, list) or len(turns) < 2:
        return None
    question, answer = (turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2])
    return (question, answer) if isinstance(question, str) and isinstance(answer, str) else None
