"""What `temper data` shows is what is trained, also without colours, and nothing in a file can steer the terminal."""

import io
import json

import pytest
from rich.console import Console

from temperament.bases.load import load
from temperament.engine.describe import describe
from temperament.engine.rows import read_rows
from temperament.report.tokens_view import tokens_view, visible

TALK = [{"role": "user", "content": "two\n  plus"}, {"role": "assistant", "content": "five é 日本"}]


@pytest.fixture(scope="module")
def tok():
    return load("lab/lm").tokenizer


def shown(described, notes=()):
    console = Console(file=io.StringIO(), width=110)
    console.print(tokens_view(described, notes))
    return console.file.getvalue()


def test_tokens_put_together_are_the_text(tok):
    rows = read_rows([{"messages": TALK}, {"messages": TALK}])
    described = describe(rows, tok)
    json.dumps(described)
    (side,) = described["shown"][0]["sides"]
    assert "".join(t for t, *_ in side["tokens"]) == tok.apply_chat_template(TALK, tokenize=False)
    assert "".join(t for t, _, w, _ in side["tokens"] if w) == "five é 日本<|end|>"
    roles = {r for _, _, _, r in side["tokens"]}
    assert {"user", "assistant", "end", "template"} == roles
    t = described["totals"]
    assert (t["examples"], t["duplicates"], t["trained"]) == (2, 1, 2 * side["trained"])
    assert sum(n for _, n in t["histogram"]) == 2


def test_the_view(tok):
    control = [TALK[0], {"role": "assistant", "content": "x<|end|>"}]
    rows = read_rows([{"messages": m} for m in (TALK, control, [])], on_bad="skip")
    described = describe(rows, tok, bad=rows.bad)
    text = shown(described, ["a note"])
    assert "[[five·é·日本<|end|>]]" in text.replace("▫", "") and "two↵" in text and "··plus" in text
    assert "a note" in text and "2 rows cannot be used" in text and "control token" in text and "no messages" in text
    pairs = describe(read_rows([{"prompt": "a?", "chosen": " b", "rejected": " c"}]), tok)
    text = shown(pairs)
    assert "chosen" in text and "[[·b" in text and "[[·c" in text


def test_nothing_steers_the_terminal():
    assert visible("a\x1b[31m\u202e\x07\u00a0b\r") == "a␛[31m⟨202E⟩␇⟨00A0⟩b␍"
