"""Prompts that users bring as text: ShareGPT's conversations, and the custom data sets of `vllm bench`."""

import math
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fuel_ray.errors import ConfigError
from fuel_ray.workload.cells import count
from fuel_ray.workload.files import json_rows

_FEWEST_TOKENS, _MOST_PROMPT_TOKENS, _MOST_TOKENS = 4, 1024, 2048  # as `vllm bench serve` samples ShareGPT
_ASKS = frozenset(("human", "user", "prompter"))
_ANSWERS = frozenset(("gpt", "assistant", "chatgpt", "bing", "bard", "model"))
_TURNS, _ROLE, _TEXT = (
    ("conversations", "conversation", "messages"),
    ("from", "role"),
    ("value", "text", "content"),
)

# Characters per token: 4 of English by OpenAI (platform.openai.com/tokenizer); DeepSeek counts 0.6 tokens for
# a Chinese character (api-docs.deepseek.com, "Token usage"), older vocabularies up to 1.
_LATIN, _CJK, _OTHER = 4, 1.5, 2
_CJK_RANGES = (
    (0x1100, 0x11FF),  # Hangul
    (0x2E80, 0x9FFF),  # radicals, punctuation, Kana, Hangul, Han
    (0xA960, 0xA97F),
    (0xAC00, 0xD7FF),  # Hangul
    (0xF900, 0xFAFF),  # Han
    (0xFE30, 0xFE4F),
    (0xFF00, 0xFFEF),  # full and half width
    (0x20000, 0x3FFFF),  # Han
)
_LATIN_BELOW = 0x370


def load_sharegpt(path: Path, n: int, rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
    """First questions of ``n`` random conversations, and the lengths (n,) of the recorded answers in tokens.

    A system's turn is no question and is left out. Conversations are kept as `vllm bench serve` keeps them:
    at least 4 tokens each way, at most 1024 in the prompt, 2048 in all. Those of a short file are repeated.

    Raises:
        ConfigError: not a ShareGPT file, or no conversation of fitting length.
    """
    roles: Counter[str] = Counter()
    found = [_first_exchange(item, roles) for _, item in json_rows(path)]
    sized = [(q, estimated_tokens(q), estimated_tokens(a)) for q, a in filter(None, found)]
    fitting = [(question, output) for question, prompt, output in sized if _fits(prompt, output)]
    if not fitting:
        raise ConfigError(f"{path}: {_why_none(len(found), sized, roles)}")
    chosen = rng.choice(len(fitting), size=n, replace=n > len(fitting))
    return [fitting[i][0] for i in chosen], np.array([fitting[i][1] for i in chosen], np.int64)


def load_custom(path: Path, n: int, *, output_tokens: int) -> tuple[list[str], np.ndarray]:
    """The first ``n`` prompts of JSON lines {"prompt": ..., "output_tokens": ...}, and answers' lengths (n,).

    ``output_tokens`` are those of a prompt that names none. The prompts of a short file are repeated.

    Raises:
        ConfigError: there is no prompt, or what is wrong in which line.
    """
    texts, lengths = [], []
    for line, item in json_rows(path):
        prompt = item.get("prompt") if isinstance(item, dict) else None
        if not isinstance(prompt, str) or not isinstance(item, dict):
            raise ConfigError(f'{path}:{line}: no text "prompt" in {str(item)[:60]!r}')
        try:
            named = count(item.get("output_tokens"))
        except ValueError as error:
            raise ConfigError(f"{path}:{line}: output_tokens: {error}") from error
        texts.append(prompt)
        lengths.append(output_tokens if named is None else max(1, named))
        if len(texts) == n:
            break
    if not texts:
        raise ConfigError(f'{path}: has no line such as {{"prompt": ..., "output_tokens": ...}}')
    return [texts[i % len(texts)] for i in range(n)], np.resize(np.array(lengths, np.int64), n)


def estimated_tokens(text: str) -> int:
    """Tokens of a text, by its script: 4 characters a token of Latin, 1.5 of Chinese, Japanese and Korean."""
    codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)
    latin = int((codes < _LATIN_BELOW).sum())
    cjk = sum(
        int(((low <= codes) & (codes <= high)).sum()) for low, high in _CJK_RANGES if latin < len(codes)
    )
    return math.ceil(latin / _LATIN + cjk / _CJK + (len(codes) - latin - cjk) / _OTHER)


def _fits(prompt: int, output: int) -> bool:
    enough = min(prompt, output) >= _FEWEST_TOKENS
    return enough and prompt <= _MOST_PROMPT_TOKENS and prompt + output <= _MOST_TOKENS


def _why_none(items: int, sized: list[tuple[str, int, int]], roles: Counter[str]) -> str:
    if not sized:
        seen = ", ".join(f"{role!r}" for role, _ in roles.most_common(5)) or "none"
        wanted = f"a question is by {', '.join(sorted(_ASKS))}, its answer by {', '.join(sorted(_ANSWERS))}"
        none = f"no ShareGPT conversation with a question and its answer among {items}"
        return f"{none}; roles in it: {seen}; {wanted}"
    prompts, outputs = sorted(p for _, p, _ in sized), sorted(o for _, _, o in sized)
    return (
        f"no ShareGPT conversation of fitting length among {len(sized)}: prompts of {prompts[0]} to "
        f"{prompts[-1]} tokens, answers of {outputs[0]} to {outputs[-1]}; taken are at least "
        f"{_FEWEST_TOKENS} in each, at most {_MOST_PROMPT_TOKENS} in the prompt and {_MOST_TOKENS} in both"
    )


def _first_exchange(item: object, roles: Counter[str]) -> tuple[str, str] | None:
    """The first question that is answered, and its answer; a file without roles begins with the question."""
    turns = _of(item, _TURNS)
    if not isinstance(turns, list):
        return None
    said = [(_role(turn), _text(turn)) for turn in turns]
    roles.update(role for role, _ in said if role is not None)
    if all(role is None for role, _ in said):
        said = [("user" if place % 2 == 0 else "assistant", text) for place, (_, text) in enumerate(said)]
    turns_of_both = [(role in _ASKS, text) for role, text in said if role in _ASKS | _ANSWERS]
    for (asks, question), (asks_again, answer) in pairwise(turns_of_both):
        if asks and not asks_again and question and answer:
            return question, answer
    return None


def _role(turn: object) -> str | None:
    role = _of(turn, _ROLE)
    return role.strip().lower() if isinstance(role, str) else None


def _text(turn: object) -> str | None:
    """What a turn says; of several parts, those that are text."""
    content = _of(turn, _TEXT)
    if isinstance(content, list):
        parts: Iterable[Any] = (_of(part, ("text",)) for part in content)
        content = "\n".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else None


def _of(item: object, keys: Iterable[str]) -> Any:
    """The value of the first of these keys that an object has."""
    return next((item[key] for key in keys if key in item), None) if isinstance(item, dict) else None
