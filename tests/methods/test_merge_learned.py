"""Merges that are trained: their gradients are autograd's, their ends are exact, and what they leave is what was measured."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from temperament import parts
from temperament.bases.load import Base
from temperament.delta import Delta, Dense, Sparse
from temperament.errors import UserError
from temperament.train.live import Live


def tiny(tied=True):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=2, tie_word_embeddings=tied)  # fmt: skip
    return Base("python", {"lm": LlamaForCausalLM(config).eval()})


@pytest.fixture
def setting():
    base = tiny()
    deltas = {n: Delta({k: Dense(0.05 * torch.randn(p.shape)) for k, p in base.parameters()}) for n in "abc"}
    return base, SimpleNamespace(delta=lambda name, field="of": deltas[name], seed=0), deltas


def loss(model, ids=torch.arange(24).view(2, 12)):
    return model(input_ids=ids, labels=ids).loss


def state(base):
    return {n: p.detach().clone() for n, p in base.parameters()}


@pytest.mark.parametrize("by", ["model", "layer"])
def test_soup_gradient_is_autograds(setting, by):
    base, ctx, deltas = setting
    pure = state(base)
    trained = parts.build({"merge.soup_learned": {"of": ["a", "b", "c"], "by": by}}).build(base, ctx)
    live = Live(base, [trained])
    s = trained.params[0].tensor
    with torch.no_grad():
        s.copy_(torch.randn(s.shape))
    trained.after_step(None)
    loss(base.model).backward()
    got = s.grad.clone()
    assert all(p.grad is None for _, p in base.parameters())
    # the same by autograd, through functional_call
    from temperament.delta.depth import block_of

    t = s.detach().clone().requires_grad_(True)
    keys = sorted({block_of(n) or "outside" for n in pure}, key=str) if by == "layer" else ["all"]
    row = lambda n: keys.index(block_of(n) or "outside") if by == "layer" else 0
    mixed = {
        n: pure[n] + sum(a * d.changes[n].d for a, d in zip(t.softmax(1)[row(n)], deltas.values(), strict=True)) for n in pure
    }
    bare = {n.split("/", 1)[1]: v for n, v in mixed.items()}
    ids = torch.arange(24).view(2, 12)
    torch.func.functional_call(base.model, bare, kwargs={"input_ids": ids, "labels": ids}, tie_weights=True).loss.backward()
    assert torch.allclose(got, t.grad, rtol=1e-3, atol=1e-6)
    # what it leaves is what stands in the model
    left = live.delta().apply({n: pure[n] for n in pure})
    assert all(torch.allclose(left[n], p, atol=1e-6) for n, p in base.parameters())
    live.close()
    base.reset()
    assert all(torch.equal(p, pure[n]) for n, p in base.parameters())


def test_soup_learns_to_prefer_the_better_model(setting):
    base, ctx, deltas = setting
    ids = torch.randint(0, 40, (4, 12))
    optimizer = torch.optim.SGD(base.model.parameters(), lr=0.5)
    pure = state(base)
    for _ in range(20):
        optimizer.zero_grad()
        loss(base.model, ids).backward()
        optimizer.step()
    deltas["b"] = Delta({n: Dense(p.detach() - pure[n]) for n, p in base.parameters()})
    with torch.no_grad():
        for n, p in base.parameters():
            p.copy_(pure[n])
            p.grad = None
    trained = parts.build({"merge.soup_learned": {"of": ["a", "b", "c"]}}).build(base, ctx)
    live = Live(base, [trained])
    adam = torch.optim.Adam([trained.params[0].tensor], lr=0.3)
    first = None
    for _ in range(25):
        value = loss(base.model, ids)
        first = first if first is not None else float(value)
        value.backward()
        adam.step()
        adam.zero_grad(set_to_none=True)
        trained.after_step(None)
    a = trained.params[0].tensor.detach().softmax(1)[0]
    assert int(a.argmax()) == 1 and a[1] > 0.6 and float(loss(base.model, ids)) < first
    live.close()


def test_graft_gradient_mask_and_ends(setting):
    base, ctx, deltas = setting
    pure = state(base)
    method = parts.build({"merge.graft": {"of": "a", "share": 0.05, "bias": 2.0}})
    trained = method.build(base, ctx)
    live = Live(base, [trained])
    before = live.delta()
    linear = [n for n in pure if "proj" in n]
    assert sorted(before.changes) == sorted(n for n in linear if len(before.changes[n].values) >= 0)
    kept = sum(len(c.values) for c in before.changes.values())
    assert kept == int(0.05 * sum(pure[n].numel() for n in linear) + 0.5)
    cut = min(float(c.values.abs().min()) for c in before.changes.values() if len(c.values))
    rest = max(float((deltas["a"].changes[n].d - before.changes[n].delta()).abs().max()) for n in linear)
    assert cut >= rest and all(isinstance(c, Sparse) for c in before.changes.values())
    name = linear[0]
    S = next(p.tensor for p in trained.params if p.name == f"{name}:mask")
    loss(base.model).backward()
    got = S.grad.clone()
    d, on = deltas["a"].changes[name].d, before.changes[name].delta() != 0
    t = torch.zeros_like(S, requires_grad=True)
    g0 = on.float()
    mask = g0 + (1 - 2 * g0) * torch.sigmoid(t - 2.0)
    bare = {n.split("/", 1)[1]: p.detach() for n, p in base.parameters()} | {name.split("/", 1)[1]: pure[name] + mask * d}
    ids = torch.arange(24).view(2, 12)
    torch.func.functional_call(base.model, bare, kwargs={"input_ids": ids, "labels": ids}, tie_weights=True).loss.backward()
    assert torch.allclose(got, t.grad, rtol=1e-3, atol=1e-7)
    with torch.no_grad():
        S += 100.0  # every entry flips: what was in is out
    trained.after_step(None)
    after = live.delta().changes[name].delta()
    assert torch.allclose(after, torch.where(on, 0.0, d))
    live.close()
    base.reset()


def test_they_start_from_the_base(setting):
    base, ctx, deltas = setting
    base.apply(deltas["a"])
    with pytest.raises(UserError, match="start: base"):
        parts.build({"merge.soup_learned": {"of": ["a", "b"]}}).build(base, ctx)
    base.reset()
    with pytest.raises(UserError, match="two steps"):
        parts.build({"merge.soup_learned": {"of": ["a"]}})
