"""Emulated fine-tuning: identities of the combination, and running ahead says what stepping says."""

from __future__ import annotations

import pytest
import torch

from temperament.engine.speculate import speculate
from temperament.engine.tokens import Sampling, choose, generate
from temperament.errors import UserError
from temperament.methods.decode.eft import EFT
from tests.models import MODELS, VOCAB

SEED = int(torch.seed() % 10**6)
G = torch.Generator().manual_seed(SEED)
NAMES = ("model", "tuned", "reference", "also")


def logits(vocabulary=7, rows=3):
    return {n: 3 * torch.randn(rows, vocabulary, generator=G) for n in NAMES}


def test_identities_of_the_combination():
    z = logits()
    three = {n: z[n] for n in NAMES[:3]}
    p = lambda part, z: part.combine(z).softmax(-1)
    eft = EFT("t", "r")
    assert torch.equal(eft.combine(three | {"tuned": z["reference"]}), z["model"])  # an untuned pair: the base itself
    assert torch.allclose(p(eft, three | {"model": z["reference"]}), z["tuned"].softmax(-1), atol=1e-6)
    want = (z["model"].softmax(-1) * z["tuned"].softmax(-1) / z["reference"].softmax(-1)).double()
    assert torch.allclose(p(eft, three).double(), want / want.sum(-1, keepdim=True), atol=1e-5)
    for n in three:
        assert torch.allclose(p(eft, three), p(eft, three | {n: z[n] + 4.2}), atol=1e-6)
    blend = EFT("t", "r", also="a", mix=0.3)
    assert torch.allclose(p(blend, z | {"also": z["tuned"]}), p(eft, three), atol=1e-6)
    with pytest.raises(ValueError, match="mix must not be 1"):
        EFT("t", "r", also="a")
    assert torch.allclose(p(EFT("t", "r", "a", mix=0.0), z), p(eft, three | {"tuned": z["also"]}), atol=1e-6)
    barred = p(EFT("t", "r", nucleus=0.5), three)
    top = z["model"].softmax(-1)
    for row, keep in zip(barred, top, strict=True):
        order = keep.argsort(descending=True)
        n = int((keep[order].cumsum(0) < 0.5).sum()) + 1
        assert set(row.nonzero()[:, 0].tolist()) == set(order[:n].tolist())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("ahead", [1, 3])
def test_running_ahead_says_the_same(temperature, ahead):
    models = {n: MODELS["llama"].build(SEED + i) for i, n in enumerate(NAMES[:3])}
    prompts = [torch.randint(5, VOCAB, (int(n),), generator=G).tolist() for n in torch.randint(1, 9, (6,), generator=G)]
    sampling, part = Sampling(max_new=12, temperature=temperature), EFT("t", "r", draft=ahead)
    plain = generate(models, prompts, sampling, seed=SEED, hooks=EFT("t", "r").hooks(None), batch=4)
    calls = []
    count = models["model"].register_forward_pre_hook(lambda *_: calls.append(1))
    fast = part.loop(models, prompts, sampling, seed=SEED, batch=4)
    count.remove()
    assert fast.ids == plain.ids and fast.finished == plain.finished and fast.tokens == plain.tokens
    for i in range(len(prompts)):
        assert torch.allclose(fast.logp[i], plain.logp[i], atol=1e-4)
        assert torch.allclose(fast.sampling_logp[i], plain.sampling_logp[i], atol=1e-4)


def test_a_draft_that_is_always_right_saves_the_most():
    """tuned = reference = model: the large model is asked once for ahead + 1 tokens."""
    one = MODELS["llama"].build(SEED)
    big = MODELS["llama"].build(SEED)
    calls = []
    big.register_forward_pre_hook(lambda *_: calls.append(1))
    prompts = [[5, 6, 7], [8, 9, 10]]
    models = {"model": big, "tuned": one, "reference": one}
    generate(big, prompts, Sampling(max_new=2), eos=())  # the way it decodes is measured before anything is counted
    calls.clear()
    EFT("t", "r", draft=4).loop(models, prompts, Sampling(max_new=16, temperature=1.0), seed=SEED, eos=())
    assert len(calls) == 1 + 3  # the prompt, then 3 x 5 tokens after the first


def test_the_distribution_is_the_targets_by_enumeration():
    """Five tokens, a fine grid of draws: the share of draws that give a token is its probability under the target, whatever the
    draft says."""
    z = logits(5, 1)
    target = EFT("t", "r").combine({n: z[n] for n in NAMES[:3]})
    u = (torch.arange(20000) + 0.5) / 20000
    said, _ = choose(target.expand(20000, -1), Sampling(temperature=1.0), u)
    guess, _ = choose(z["tuned"].expand(20000, -1), Sampling(temperature=1.0), u)
    final = torch.where(guess == said, guess, said)
    share = torch.bincount(final, minlength=5) / 20000
    assert float((share - target.softmax(-1)[0]).abs().max()) < 2e-4


def test_other_hooks_are_refused():
    with pytest.raises(UserError, match="draft"):
        speculate({}, [], Sampling(), draft="x", ahead=2, combine=lambda z: z, hooks=[object()])
