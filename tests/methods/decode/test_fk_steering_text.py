"""FK steering of text: rows that take others' places say what they would have said, and the limits of the method."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from temperament.engine.tokens import Sampling, generate
from temperament.methods.decode.fk_steering import APART, FKSteering
from temperament.nn import forward
from tests.models import MODELS, VOCAB

SEED = int(torch.seed() % 10**6)
G = torch.Generator().manual_seed(SEED)
DRAWN = Sampling(max_new=10, temperature=1.0)
BASE = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids))))


@dataclass(frozen=True)
class Low:
    """How small the numbers are that were said."""

    def score(self, prompt, outputs, row):
        return [-sum(map(int, o.split())) / (VOCAB * max(len(o.split()), 1)) for o in outputs]


def prompts(n=3):
    return [torch.randint(5, VOCAB, (int(k),), generator=G).tolist() for k in torch.randint(1, 7, (n,), generator=G)]


def rescored(model, prompt, ids):
    with torch.no_grad():
        z = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
    return torch.stack([z[len(prompt) + i - 1, t] for i, t in enumerate(ids)])


def run(part, model, asked, sampling=DRAWN, **how):
    return part.loop({"model": model}, asked, sampling, seed=SEED, hooks=part.hooks(BASE), **how)


@pytest.mark.parametrize("batch", [4, 64])
def test_rows_may_take_each_others_places_at_any_time(batch):
    """Random moves after every token, over ends of texts: each row's tokens and likelihoods are those of what it now says."""
    model, k = MODELS["llama"].build(SEED), 4
    asked = [p for p in prompts() for _ in range(k)]
    seen = []

    class Shuffle:
        def on_token(self, state):
            known = state.scratch.setdefault("said", {row: [] for row in state.everything()})
            for row, ids in state.everything().items():
                if row in state.rows:
                    known[row].append(ids[-1])
            seen.append({row: (list(known[row]), ids) for row, ids in state.everything().items()})
            groups = {row // k for row in state.everything()}
            moves = {g * k + j: g * k + int(torch.randint(k, (), generator=G)) for g in groups for j in range(k)}
            state.take(moves)

    ends = tuple(range(0, VOCAB, 5))  # many tokens end a text
    made = generate(model, asked, DRAWN, seed=SEED, hooks=[Shuffle()], eos=ends, batch=batch)
    for prompt, ids, logp, why in zip(asked, made.ids, made.logp, made.finished, strict=True):
        torch.testing.assert_close(logp, rescored(model, prompt, ids), rtol=1e-3, atol=1e-3)
        assert all(t not in ends for t in ids[:-1]) and (why == "eos") == (ids[-1] in ends)
        assert len(ids) == 10 or why == "eos"
    assert all(known == ids for step in seen for known, ids in step.values())  # what a hook remembers goes along
    if batch == 64:
        assert len({tuple(i) for i in made.ids}) > 3  # copies part again


def test_one_particle_is_the_plain_completion():
    model, asked = MODELS["llama"].build(SEED), prompts()
    plain = generate(model, asked, DRAWN, seed=SEED)
    got = run(FKSteering(Low(), particles=1), model, asked)
    assert got.ids == plain.ids and got.finished == plain.finished


def test_weighed_only_at_the_end_it_is_best_of_k():
    model, asked, k = MODELS["llama"].build(SEED), prompts(), 4
    got = run(FKSteering(Low(), particles=k, every=0), model, asked, Sampling(max_new=10))
    drafts = [generate(model, asked, DRAWN, seed=SEED, examples=[i + APART * j for i in range(3)]).ids for j in range(k)]
    text = lambda ids: BASE.tokenizer.decode(ids)
    for i in range(3):
        scores = Low().score("", [text(d[i]) for d in drafts], {})
        assert got.ids[i] == drafts[scores.index(max(scores))][i]


@pytest.mark.parametrize("give", ["best", "draw"])
def test_what_it_gives_is_what_the_model_said(give):
    model, asked = MODELS["llama"].build(SEED), prompts()
    part = FKSteering(Low(), particles=5, every=2, strength=30.0, ess=0.9, give=give)
    got = run(part, model, asked, batch=7)
    assert len(got.ids) == 3 and forward.kind(model) == "decoder"
    for prompt, ids, logp in zip(asked, got.ids, got.logp, strict=True):
        torch.testing.assert_close(logp, rescored(model, prompt, ids), rtol=1e-3, atol=1e-3)


def test_steering_raises_the_reward_it_steers_for():
    model, asked = MODELS["llama"].build(SEED), [[5, 6, 7]] * 60
    mean = lambda made: sum(Low().score("", [BASE.tokenizer.decode(i) for i in made.ids], {})) / 60
    plain = mean(generate(model, asked, DRAWN, seed=SEED))
    best = mean(run(FKSteering(Low(), every=0), model, asked))
    steered = mean(run(FKSteering(Low(), every=2, strength=40.0, potential="diff"), model, asked))
    assert plain < best < steered
