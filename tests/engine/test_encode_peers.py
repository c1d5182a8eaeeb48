"""The chat templates models are published with, as trl ships them, each beside trl's rewritten "training" template.

On the published template, without marks, we must train no token that trl does not train on its rewriting, and all that the
model has to write: the answer and the end of the turn. (trl also trains line ends after the end of the turn, and headers that
the generation prompt has already written.)
"""

import re
from functools import lru_cache
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from temperament.engine.chat import BadExample
from temperament.engine.encode import encode
from temperament.engine.examples import Chat

trl = pytest.importorskip("trl")
FOLDER = Path(trl.__file__).parent / "chat_templates"
SPECIAL = re.compile(
    r"<\|[A-Za-z0-9_]+\|?>|<｜[^｜<>{}]+｜>|<(?:start|end)_of_turn>|<end_of_utterance>|<turn\|>|<[A-Z_]+>|\[/?[A-Z_]{3,}\]"
)
TWICE = [("user", "two?"), ("assistant", "yes, five"), ("user", "why"), ("assistant", "so")]
TWICE = [{"role": r, "content": c} for r, c in TWICE]


@lru_cache
def read(name):
    path = FOLDER / f"{name}.jinja"
    return path.read_text(encoding="utf-8") if path.exists() else None


@lru_cache
def tokenizer(name):
    """One token a byte, and every control token of the template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    control = set(SPECIAL.findall(read(name) + (read(f"{name}_training") or "")))
    fast.add_tokens([AddedToken(t, special=True) for t in sorted(control)])
    return fast


names = sorted(p.stem for p in FOLDER.glob("*.jinja") if not p.stem.endswith("_training"))


def test_there_are_many():
    assert len(names) > 25


@pytest.mark.parametrize("mask", ["auto", "last"])
@pytest.mark.parametrize("name", names)
def test_published_templates(name, mask):
    tok = tokenizer(name)
    try:
        one = encode(Chat(TWICE), tok, chat_template=read(name), mask=mask)
    except BadExample as e:
        assert re.search("differently once|otherwise than its own generation prompt|no end token", str(e)), str(e)
        return
    trained = tok.decode([i for i, w in zip(one.ids, one.weights, strict=True) if w > 0])
    assert "so" in trained and ("yes, five" in trained) == (mask == "auto")
    assert "two?" not in trained and "why" not in trained
    runs = sum(a == 0 < b for a, b in zip(one.weights, one.weights[1:], strict=False))
    assert runs == (2 if mask == "auto" else 1)
    ends = [i for i, w, after in zip(one.ids, one.weights, [*one.weights[1:], 0], strict=True) if w > 0 == after]
    shown = [tok.decode(i) for i in ends]
    assert all(SPECIAL.fullmatch(s) or s in ("</s>", "\n") for s in shown), shown
    theirs = read(f"{name}_training")
    if theirs is None or mask == "last" or "content.text" in theirs or name in ("idefics3", "smolvlm", "llava_next"):
        return  # without parts for content, trl's templates for vision lose the words
    out = tok.apply_chat_template(TWICE, chat_template=theirs, return_dict=True, return_assistant_tokens_mask=True)
    if out["input_ids"] == one.ids:
        assert all(m for m, w in zip(out["assistant_masks"], one.weights, strict=True) if w > 0)


@pytest.mark.parametrize("name", [n for n in names if read(f"{n}_training") and n not in ("idefics3", "smolvlm", "llava_next")])
def test_rewritten_templates(name):
    """With trl's marks we train what trl trains, and at most the rest of the end of the turn."""
    tok, theirs = tokenizer(name), read(f"{name}_training")
    out = tok.apply_chat_template(TWICE, chat_template=theirs, return_dict=True, return_assistant_tokens_mask=True)
    one = encode(Chat(TWICE), tok, chat_template=theirs)
    assert one.ids == out["input_ids"]
    assert [float(w > 0) for w in one.weights] == [float(m) for m in out["assistant_masks"]]


def test_the_header_of_the_next_turn_may_end_one():
    tok, template = tokenizer("glm4moe"), read("glm4moe")
    with pytest.raises(BadExample, match="no end token"):
        encode(Chat(TWICE), tok, chat_template=template)
    one = encode(Chat(TWICE), tok, chat_template=template, ends=["<|user|>"])
    text = tok.decode([i for i, w in zip(one.ids, one.weights, strict=True) if w > 0])
    assert text.count("yes, five<|user|>") == 1 and text.endswith("so</s>")


CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": SCHEMA}}]
CALLING = [TWICE[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "5"}, TWICE[1]]


@pytest.mark.parametrize("name", [*names, "phi3_training", "qwen3_training"])
def test_tool_calls_are_trained_whole_or_refused(name):
    tok = tokenizer(name.removesuffix("_training"))
    try:
        one = encode(Chat(CALLING, tools=TOOLS), tok, chat_template=read(name))
    except BadExample:
        return
    trained = tok.decode([i for i, w in zip(one.ids, one.weights, strict=True) if w > 0])
    assert "add" in trained and "yes, five" in trained and '\\"a\\"' not in trained
    assert "two?" not in trained
