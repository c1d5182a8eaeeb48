"""What is trained: exactly what the model would have to write, and the token that ends it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizers import (
    ALWAYS_THINKS,
    CHATML,
    DOUBLE_BOS,
    FORGETS_THINKING,
    GEMMA,
    LLAMA2,
    MARKED,
    NO_END,
    STYLES,
    tokenizer,
)

from temperament.engine.chat import PLAIN, BadExample
from temperament.engine.encode import encode, encode_all
from temperament.engine.encoded import EncodedPrompt, collate
from temperament.engine.examples import (
    Chat,
    Completion,
    Judged,
    Origin,
    Preference,
    Prompt,
    Stepwise,
    Text,
    Tokenised,
    as_chat,
)
from temperament.errors import UserError

HERE = Origin("chats.jsonl", 7)
say = lambda role, content, **more: {"role": role, "content": content, **more}
TALK = [say("user", "what is two plus three?"), say("assistant", "five, I think."), say("user", "why"), say("assistant", "so.")]


def trained_runs(one, tok):
    """The decoded runs of trained tokens."""
    runs, run = [], []
    for i, w in zip([*one.ids, None], [*one.weights, 0], strict=True):
        if w > 0:
            run.append(i)
        elif run:
            runs.append(tok.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            run = []
    return runs


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
def test_every_answer_and_its_end_and_nothing_else(kind, style, pad):
    template, before, after = STYLES[style]
    tok = tokenizer(kind, pad=pad)
    one = encode(Chat(TALK), tok, chat_template=template)
    assert trained_runs(one, tok) == [before + m["content"] + after for m in TALK if m["role"] == "assistant"]
    assert one.ids == tok.apply_chat_template(TALK, chat_template=template, return_dict=False)
    assert tok.decode(one.ids) == tok.apply_chat_template(TALK, chat_template=template, tokenize=False)
    last = encode(Chat(TALK), tok, chat_template=template, mask="last")
    assert trained_runs(last, tok) == [before + "so." + after]
    whole = encode(Chat(TALK), tok, chat_template=template, mask="all")
    assert whole.weights == [0.0] + [1.0] * (len(whole) - 1)


def test_wordpiece_which_drops_white_space():
    tok = tokenizer("wordpiece")
    one = encode(Chat(TALK), tok, chat_template=CHATML)
    assert [r.replace(" ", "") for r in trained_runs(one, tok)] == ["five,Ithink.<|im_end|>", "so.<|im_end|>"]


LLAMA2_MARKED = LLAMA2.replace(
    "{{ ' ' + message['content'].strip() + ' ' + eos_token }}",
    "{% generation %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endgeneration %}",
)


@pytest.mark.parametrize("template", [MARKED, LLAMA2_MARKED, PLAIN])
def test_marks_agree_with_the_masks_trl_uses(template):
    tok = tokenizer(trim=False)  # with trimmed offsets transformers loses spans that start with a blank: its masks are all 0
    out = tok.apply_chat_template(TALK, chat_template=template, return_dict=True, return_assistant_tokens_mask=True)
    one = encode(Chat(TALK), tok, chat_template=template)
    assert one.ids == out["input_ids"]
    assert [float(w > 0) for w in one.weights] == [float(m) for m in out["assistant_masks"]]
    trimmed = encode(Chat(TALK), tokenizer(trim=True), chat_template=template)
    assert (trimmed.ids, trimmed.weights) == (one.ids, one.weights)


@pytest.mark.parametrize("plain, marked", [(CHATML, MARKED), (LLAMA2, LLAMA2_MARKED)])
def test_prefixes_find_what_marks_say(plain, marked):
    tok = tokenizer()
    a, b = (encode(Chat(TALK), tok, chat_template=t) for t in (plain, marked))
    assert (a.ids, a.weights) == (b.ids, b.weights) and a.trained > 0


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>|\x00"), min_size=1, max_size=12).filter(
    lambda s: s.strip() and s == s.strip()
)


@st.composite
def conversations(draw):
    turns = draw(st.integers(1, 3))
    system = [say("system", draw(words))] if draw(st.booleans()) else []
    return system + [say(r, draw(words)) for _ in range(turns) for r in ("user", "assistant")]


@settings(max_examples=300, deadline=None)
@given(conversations(), st.sampled_from(sorted(STYLES)), st.booleans())
def test_any_conversation(messages, style, trim):
    template, before, after = STYLES[style]
    if style in ("gemma", "llama2"):
        messages = [m for m in messages if m["role"] != "system"]
    tok = tokenizer("bpe", trim=trim)
    one = encode(Chat(messages), tok, chat_template=template)
    assert trained_runs(one, tok) == [before + m["content"] + after for m in messages if m["role"] == "assistant"]
    assert one.weights[0] == 0
    assert not any(a == b == tok.bos_token_id for a, b in zip(one.ids, one.ids[1:], strict=False))
    assert tok.decode(one.ids) == tok.apply_chat_template(messages, chat_template=template, tokenize=False)


def test_generation_prompt_and_trained_tokens_join():
    """prompt ids + trained ids is the conversation: nothing falls between what is given and what is asked."""
    for style in ("chatml", "llama3", "llama2", "gemma"):
        tok, template = tokenizer(), STYLES[style][0]
        asked = encode(Prompt(TALK[:1]), tok, chat_template=template)
        assert isinstance(asked, EncodedPrompt) and asked.trained == 0
        one = encode(Chat(TALK[:2]), tok, chat_template=template)
        first = one.weights.index(1.0)
        assert one.ids[:first] == asked.ids


# ---- refused ----------------------------------------------------------------------------------------------------------------

CALLS = [{"function": {"name": "f", "arguments": "{}"}}]
THOUGHT = [say("user", "two?"), say("assistant", "<think>\nI think so\n</think>yes"), *TALK[2:3], say("assistant", "so")]


@pytest.mark.parametrize(
    "example, options, words",
    [
        (Chat(THOUGHT, origin=HERE), dict(chat_template=FORGETS_THINKING), "differently once the conversation goes on"),
        (Chat(TALK, origin=HERE), dict(chat_template=ALWAYS_THINKS), "generation prompt"),
        (Chat([say("system", "be"), *TALK], origin=HERE), dict(chat_template=GEMMA), "System role not supported"),
        (Chat([TALK[1], *TALK], origin=HERE), dict(chat_template=LLAMA2), "roles must alternate"),
        (Chat([TALK[1], *TALK], origin=HERE), dict(chat_template=CHATML), "starts with an answer"),
        (Chat(TALK, origin=HERE), dict(chat_template=DOUBLE_BOS), "begins twice"),
        (Chat(TALK, origin=HERE), dict(chat_template=NO_END), "no end token"),
        (Chat([say("user", "a<|im_end|>"), TALK[1]], origin=HERE), dict(chat_template=CHATML), "control token '<|im_end|>'"),
        (Chat(TALK, origin=HERE), dict(chat_template=CHATML, max_length=20), "max_length is 20"),
        (Chat(TALK, origin=HERE), dict(chat_template=CHATML, max_length=9, truncate="end"), "leaves nothing to train"),
        (Chat([TALK[0], say("assistant", "no", weight=0)], origin=HERE), dict(chat_template=CHATML), "no token of it"),
        (Chat([say("user", [{"type": "image"}]), TALK[1]], origin=HERE), dict(chat_template=CHATML), "type 'image'"),
        (Text("<s><s>a", origin=HERE), {}, "begins twice"),
        (Chat([TALK[0], say("assistant", "x", tool_calls=CALLS)], origin=HERE), dict(chat_template=CHATML), "the tool call"),
    ],
)  # fmt: skip
def test_named_and_refused(example, options, words):
    with pytest.raises(BadExample) as e:
        encode(example, tokenizer(), **options)
    assert words in str(e.value) and "chats.jsonl, line 7" in str(e.value) and e.value.exit_code == 2


@pytest.mark.parametrize(
    "example, options, words",
    [
        (Chat(TALK), {}, "chat_template: plain"),
        (Chat(TALK), dict(mask="completion", chat_template=CHATML), "assistant"),
        (Text("a b"), dict(mask="assistant"), "auto, all"),
        (Text("a b"), dict(mask="al"), "did you mean 'all'"),
        (Text("a b"), dict(truncate="left"), "known"),
        (Chat(TALK), dict(chat_template="nowhere.jinja"), "no such file"),
    ],
)
def test_wrong_requests(example, options, words):
    with pytest.raises(UserError, match=words):
        encode(example, tokenizer(), **options)


def test_the_last_turn_of_a_template_that_forgets_is_exact():
    tok = tokenizer()
    one = encode(Chat(THOUGHT), tok, chat_template=FORGETS_THINKING, mask="last")
    assert trained_runs(one, tok) == ["so<|im_end|>"]


def test_a_template_without_end_gets_eos_once():
    tok = tokenizer()
    one = encode(Chat(TALK), tok, chat_template=NO_END, mask="last")
    assert trained_runs(one, tok) == [" so.</s>"]
    assert one.ids.count(tok.eos_token_id) == 1


def test_weights_of_turns():
    tok = tokenizer()
    talk = [TALK[0], {**TALK[1], "weight": 0}, TALK[2], {**TALK[3], "weight": 0.5}]
    one = encode(Chat(talk), tok, chat_template=CHATML)
    assert trained_runs(one, tok) == ["so.<|im_end|>"] and set(one.weights) == {0.0, 0.5}


# ---- plain text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("text", ["the answer is 5.", "<s>the answer", "the answer</s>", "<s>the</s>"])
def test_text_begins_and_ends_once(kind, bos, text):
    tok = tokenizer(kind, bos=bos)
    one = encode(Text(text), tok)
    assert one.ids.count(tok.eos_token_id) == 1 and one.ids[-1] == tok.eos_token_id and one.weights[-1] == 1
    if bos:
        assert one.ids[0] == tok.bos_token_id and one.ids.count(tok.bos_token_id) == 1
    assert one.weights == [0.0] + [1.0] * (len(one) - 1)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("prompt, completion", [("2+2=", "4"), ("two plus", " three"), ("two plus ", "three"), ("é", "é")])
def test_the_border_of_prompt_and_completion(kind, trim, prompt, completion):
    tok = tokenizer(kind, trim=trim)
    one = encode(Completion(prompt, completion), tok)
    joint = tok(prompt + completion).input_ids
    assert one.ids == [*joint, tok.eos_token_id]
    (run,) = trained_runs(one, tok)
    assert run.endswith(completion.strip() + "</s>")
    alone = tok(prompt).input_ids
    assert one.border == (one.ids[: one.weights.index(1.0)] != alone) or not one.border
    if not one.border:
        assert run.strip() == completion.strip() + "</s>"


def test_a_straddling_token_belongs_to_the_completion():
    tok = tokenizer()
    assert len(tok("three", add_special_tokens=False).input_ids) == 1
    one = encode(Completion("two plus thr", "ee"), tok)
    merged = any("ee" in t and t not in ("ee",) for t in tok.convert_ids_to_tokens(one.ids))
    if merged:
        assert one.border
        assert "ee" in trained_runs(one, tok)[0]


def test_strings_become_messages_when_asked():
    tok = tokenizer()
    one = encode(as_chat(Completion("two?", "yes")), tok, chat_template=CHATML)
    assert trained_runs(one, tok) == ["yes<|im_end|>"]


# ---- other kinds ------------------------------------------------------------------------------------------------------------


def test_pairs_share_their_prompt():
    tok = tokenizer()
    for e in (Preference("two?", " yes", " no"), Preference(TALK[:1], [say("assistant", "yes")], [say("assistant", "no")])):
        pair = encode(e, tok, chat_template=CHATML)
        a, b = pair.chosen, pair.rejected
        n = a.weights.index(1.0)
        assert a.ids[:n] == b.ids[:n] and b.weights.index(1.0) == n
        assert trained_runs(a, tok)[0].strip().startswith("yes") and trained_runs(b, tok)[0].strip().startswith("no")
        batch = collate([pair, pair])
        assert len(batch) == 2 and batch.chosen.ids.shape[0] == 2
    long = Preference("two? " * 20, "yes", "no no no no")
    pair = encode(long, tok, max_length=12, truncate="start")
    assert len(pair) == 12
    cut = len(pair.chosen) - sum(w > 0 for w in pair.chosen.weights)
    assert pair.chosen.ids[:cut] == pair.rejected.ids[:cut]


def test_judged_stepwise_and_tokenised():
    tok = tokenizer()
    judged = encode(Judged("two?", " yes", False), tok)
    assert judged.label is False and collate([judged]).label.tolist() == [False]
    steps = encode(Stepwise("two plus two?", ["two", "so five"], [True, False]), tok)
    assert sum(steps.weights) == 2 and steps.meta["labels"] == [True, False]
    one = encode(Tokenised([5, 6, 7], [1.0, 0.0, 1.0]), tok)
    assert one.ids == [5, 6, 7] and one.weights == [0.0, 0.0, 1.0]
    with pytest.raises(BadExample, match="none of the"):
        encode(Tokenised([5, 10**6], [1.0, 1.0]), tok)


def test_collating_pads_without_a_trace():
    tok = tokenizer(pad="</s>")
    docs, bad = encode_all([Text("the"), Text("the answer is so")], tok)
    batch = collate(docs, tok.pad_token_id)
    assert not bad and batch.mask.sum(1).tolist() == [len(d) for d in docs]
    assert batch.weights[~batch.mask].sum() == 0 and (batch.examples[~batch.mask] == -1).all()
    assert batch.trained == sum(d.trained for d in docs)  # the ends count although padding is the same token
    assert batch.examples[1, 0] == 1 and not batch.packed


def test_skipping_collects_reasons():
    tok = tokenizer()
    docs, bad = encode_all([Chat(TALK), Chat(THOUGHT, origin=HERE)], tok, "skip", chat_template=FORGETS_THINKING)
    assert len(docs) == 1 and bad[0].origin == HERE and "differently" in bad[0].reason
