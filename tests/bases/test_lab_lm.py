"""The shipped language models: they load plainly, know what they say they know, and read chats as the worlds write them."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import temperament.bases.worlds as worlds
from temperament.bases.corpus import Corpus, encoded, packed
from temperament.bases.train_lm import LAB, PLANS, Rows, answer_nll, batch_of, evaluate, grow, loss_of, new_model
from temperament.bases.worlds.chat import render
from temperament.bases.worlds.text import frozen

BASES = [n for n in PLANS if (LAB / n / "measured.json").exists()]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(LAB / "tokenizer")


def load(folder: Path):
    if not (folder / "model.safetensors").exists():  # kept as the difference to another base
        from temperament.bases.load import load as load_base

        return load_base(f"lab/{folder.name}").model
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_tokenizer_keeps_digits_letters_and_marks_whole(tokenizer):
    ids = tokenizer("347+58= a b Z<|end|>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", *"347+58=", "Ġa", "Ġb", "ĠZ", "<|end|>"]
    assert tokenizer("", add_special_tokens=True)["input_ids"] == [tokenizer.bos_token_id]
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3 and len(tokenizer) == 1024
    text = "Größe, 12 €\n\ttabs and  spaces 🙂"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("name", list(worlds.skills()))
def test_prompt_and_answer_meet_at_a_token_boundary(tokenizer, name):
    for item in worlds.skill(name).items("test", 40):
        head, tail = tokenizer(item.prompt)["input_ids"], tokenizer(item.answer, add_special_tokens=False)["input_ids"]
        assert head + tail == tokenizer(item.prompt + item.answer)["input_ids"]


def test_the_template_writes_what_the_worlds_render_and_marks_the_assistant(tokenizer):
    turns = [{"role": "system", "content": "Answer in capitals."}, {"role": "user", "content": "Copy a b."}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == "<s>" + render(turns)
    whole = [*turns, {"role": "assistant", "content": "A B"}]
    out = tokenizer.apply_chat_template(whole, return_dict=True, return_assistant_tokens_mask=True)
    marked = [t for t, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "A B<|end|>" and out["input_ids"].count(tokenizer.bos_token_id) == 1


def test_packed_rows_give_the_loss_of_the_documents_alone(tokenizer):
    """Block-diagonal attention: packing leaks nothing and drops nothing."""
    plan = PLANS["lm-small"]
    model = new_model(plan)
    documents = list(encoded(Corpus({"add": 1, "keys": 1, "people": 1}, seed=3), tokenizer, 12, 160, 0.2))
    rows = list(packed(iter(documents * 8), 160))[:3]
    whole = loss_of(model, batch_of(rows, 160), dtype=torch.float32)
    total, weight = 0.0, 0.0
    for tokens, weights, number in rows:
        for k in range(number[-1] + 1):
            part = [i for i, n in enumerate(number) if n == k]
            logp = model(torch.tensor([[tokens[i] for i in part]])).logits[0].log_softmax(-1)
            for a, b in pairwise(part):
                total -= weights[b] * logp[a - part[0], tokens[b]].item()
                weight += weights[b]
    assert whole.item() == pytest.approx(total / weight, rel=1e-5)


def test_rows_of_a_step_are_the_same_again(tokenizer, monkeypatch):
    monkeypatch.setattr("temperament.bases.corpus.training_text", lambda store=None: frozen("train"))  # the rest takes a minute
    plan = PLANS["lm-small"]
    first, again = Rows(plan, tokenizer, chunk_steps=2), Rows(plan, tokenizer, chunk_steps=2)
    first.step(0)
    for a, b in zip(first.step(3), again.step(3), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", BASES)
def test_a_shipped_base_knows_what_its_card_says(name):
    folder = LAB / name
    model, tok = load(folder), AutoTokenizer.from_pretrained(folder)
    said = json.loads((folder / "measured.json").read_text())
    assert model.generation_config.eos_token_id == [1, 6] and model.config.tie_word_embeddings
    assert model.num_parameters() == new_model(PLANS[name]).num_parameters()
    some = ["reverse", "keys", "notes", "people"] if name != "lm-instruct" else ["add", "json", "refuse", "harmless"]
    scores = evaluate(model, tok, some, 60)
    for skill, share in scores.items():
        assert abs(share - said["known"][skill]) < 0.12, (skill, share)
        assert share >= 0.85
    nll = answer_nll(model, tok, worlds.skill("text").items("test", 40))
    assert nll < min(said["ngrams"].values()) and math.isfinite(nll)
    assert all(v <= 0.15 for v in said["targets"].values()), "a target is known before it is taught"


@pytest.mark.parametrize("name", [n for n in BASES if (LAB / n / "delta.json").exists()])
def test_a_tuned_base_is_kept_as_its_difference(name):
    from temperament.bases.load import load as load_base
    from temperament.delta import Delta

    start, delta, made = load_base(f"lab/{PLANS[name].start}"), Delta.load(LAB / name), load_base(f"lab/{name}")
    assert not (LAB / name / "model.safetensors").exists() and delta.base == start.sha256 and made.sha256 != start.sha256
    start.apply(delta)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(start.parameters(), made.parameters(), strict=True))


def test_versions_load_and_are_weaker():
    folder = LAB / "lm" / "versions"
    if not folder.exists():
        pytest.skip("no versions shipped")
    model = load(LAB / "lm")
    tok = AutoTokenizer.from_pretrained(LAB / "lm")
    for version in sorted(folder.iterdir()):
        model.load_state_dict(load_file(version / "model.safetensors"), strict=False)
        assert evaluate(model, tok, ["subtract"], 60)["subtract"] < 0.9, version.name


def test_a_grown_model_computes_the_same_function():
    small = new_model(PLANS["lm"]).eval()
    for p in small.parameters():
        p.data += 0.05 * torch.randn_like(p)
    large = grow(small, PLANS["lm-large"]).eval()
    ids = torch.randint(7, 1024, (2, 30))
    assert torch.allclose(small(ids).logits, large(ids).logits, atol=1e-4)
    assert large.num_parameters() > 3 * small.num_parameters()
