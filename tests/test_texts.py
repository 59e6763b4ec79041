"""Texts to send: whose turn is the question, and how many tokens a text has."""

import json

import numpy as np
import pytest

from fuel_ray.cli import main
from fuel_ray.errors import ConfigError
from fuel_ray.live.load.prompts import DrawnLoad
from fuel_ray.live.load.texts import estimated_tokens, load_custom, load_sharegpt

ASKED, SAID = "What is rain made of, really?", "Of water, and of the dust that it meets on its way."


def loaded(path, content):
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    texts, lengths = load_sharegpt(path, 1, np.random.default_rng(0))
    return texts[0], int(lengths[0])


def turns(*said, role="from", text="value", key="conversations"):
    return {key: [{role: who, text: what} for who, what in said]}


@pytest.mark.parametrize(
    "item",
    [
        turns(("human", ASKED), ("gpt", SAID)),
        turns(("system", "You are helpful."), ("human", ASKED), ("gpt", SAID)),
        turns(("gpt", "Hello, how can I help?"), ("human", ASKED), ("gpt", SAID)),
        turns(("human", "Ignored."), ("human", ASKED), ("tool", "x"), ("gpt", SAID), ("human", "More?")),
        turns(("Human", ASKED), ("ChatGPT", SAID)),
        turns(("user", ASKED), ("bing", SAID), text="text"),
        turns(("developer", "Be kind."), ("user", ASKED), ("assistant", SAID), role="role", text="content"),
        turns(("user", ASKED), ("assistant", SAID), role="role", text="content", key="messages"),
        turns(("user", [{"type": "text", "text": ASKED}]), ("model", SAID), role="role", text="content"),
        {"conversations": [{"value": ASKED}, {"value": SAID}]},
    ],
)
def test_the_question_is_the_humans(tmp_path, item):
    assert loaded(tmp_path / "s.json", [{"conversations": []}, item]) == (ASKED, 13)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_may_have_a_byte_order_mark(tmp_path, encoding):
    item = turns(("human", ASKED), ("gpt", SAID))
    assert loaded(tmp_path / "s.json", json.dumps([item], indent=1).encode(encoding))[0] == ASKED
    assert loaded(tmp_path / "s.jsonl", (json.dumps(item) + "\n").encode(encoding))[0] == ASKED


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", 0),
        ("q" * 40, 10),
        ("Wie geht es dir, mein Schätzchen?", 9),
        ("请" * 30, 20),
        ("こんにちは、世界。", 6),
        ("안녕하세요 세계", 5),
        ("Привет, мир", 5),
        ("請 tell me", 3),
        ("\ud800", 1),
    ],
)
def test_tokens_are_counted_by_script(text, tokens):
    assert estimated_tokens(text) == tokens


def test_a_prompt_that_is_too_long_in_its_script_is_not_sent(tmp_path, capsys):
    path = tmp_path / "s.json"
    path.write_text(json.dumps([turns(("human", "请" * 4000), ("gpt", "好" * 4000))]), encoding="utf-8")
    argv = ["benchmark", "--model", "m", "--dataset-name", "sharegpt", "--dataset-path", str(path)]
    assert main(argv) == 2
    assert "prompts of 2667 to 2667 tokens" in capsys.readouterr().err


def test_unknown_roles_are_named(tmp_path):
    with pytest.raises(
        ConfigError, match=r"among 1; roles in it: 'alice', 'bob'; a question is by human, .*gpt"
    ):
        loaded(tmp_path / "s.json", [turns(("alice", ASKED), ("bob", SAID))])


def test_custom_prompts_keep_their_order_and_repeat(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"prompt": "a", "output_tokens": 10.0}\n{"prompt": "b"}\n', encoding="utf-8-sig")
    texts, lengths = load_custom(path, 3, output_tokens=128)
    assert texts == ["a", "b", "a"] and lengths.tolist() == [10, 128, 10]
    drawn = DrawnLoad(dataset_name="custom", dataset_path=path, num_prompts=1, random_output_len=7).draw()
    assert drawn[1] == ["a"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "no line"),
        ('{"prompt": "a"}\n{"promt": "b"}\n', ':2: no text "prompt"'),
        ('{"prompt": [1, 2]}\n', ':1: no text "prompt"'),
        ('{"prompt": "a", "output_tokens": -3}\n', ":1: output_tokens: -3"),
        ("prompt\n", ":1: 'prompt' is not JSON"),
    ],
)
def test_a_file_without_custom_prompts_is_refused_with_its_line(tmp_path, text, part):
    (tmp_path / "c.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=part):
        load_custom(tmp_path / "c.jsonl", 2, output_tokens=1)


def test_a_dataset_needs_its_file():
    with pytest.raises(ConfigError, match="--dataset-name custom needs --dataset-path"):
        DrawnLoad(dataset_name="custom").draw()
