"""What is done to save memory or time changes nothing else in networks that see: recomputed activations, fused attention."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from temperament.engine import see
from temperament.errors import UserError
from temperament.nn.attention import Edit, attend
from temperament.nn.context import checkpointing, context

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import images, seeing

ATTEND = ["vit", "clip"]


def gradients(base, batch):
    """Of the loss that the base is trained with, of every parameter, as a train step calls it: in training mode."""
    base.model.train()
    for p in base.model.parameters():
        p.grad = None
    with context(ids=batch.examples):
        if see.dual(base):
            seen = see.image_features(base.model, base, batch.pixels)
            logits = 4 * seen @ see.text_features(base.model, base, batch.captions).T
            see.cost(logits, torch.arange(len(batch))).mean().backward()
        else:
            see.cost(see.logits(base.model, base, batch.pixels), batch.labels).mean().backward()
    return {n: p.grad for n, p in base.model.named_parameters() if p.grad is not None}


def same(a, b, tolerance=1e-5):
    """Each gradient within the tolerance of its own size, or of a tenth of the largest one's where it is next to nothing."""
    assert a.keys() == b.keys() and len(a) > 20
    size = max(float(g.norm()) for g in a.values())
    assert size > 1e-4
    for n in a:
        assert float((a[n] - b[n]).norm()) <= tolerance * max(float(a[n].norm()), 0.1 * size), n


def kept(run):
    """Bytes of activations that the graph holds on to."""
    held = {}

    def pack(t):
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    return sum(held.values()), out


@pytest.mark.parametrize("name", ATTEND)
def test_recomputed_activations_change_nothing_but_memory(name):
    base, batch = seeing(name), images()
    plain = gradients(base, batch)
    call = lambda: see.features(base.model, base, batch.pixels)
    before, one = kept(call)
    checkpointing(base.model)
    after, two = kept(call)
    same(plain, gradients(base, batch))
    assert torch.equal(one, two) and after < 0.8 * before, (after, before)
    checkpointing(base.model, False)
    assert kept(call)[0] == before


def test_a_network_that_cannot_recompute_says_so_and_is_left_alone():
    base, batch = seeing("resnet"), images()
    counted = {n: b.clone() for n, b in base.model.named_buffers()}
    plain = gradients(base, batch)
    base.model.load_state_dict(counted, strict=False)  # the running statistics, as they were
    with pytest.raises(UserError, match="gradient_checkpointing"):
        checkpointing(base.model)
    same(plain, gradients(base, batch), 1e-6)


@pytest.mark.parametrize("name", ATTEND)
def test_fused_attention_is_attention(name):
    """Eager, fused, and either with its map opened, which no fused kernel can give."""
    base, batch = seeing(name), images()
    grads = {}
    for how in ("eager", "sdpa"):
        base.model.set_attn_implementation(how)
        grads[how] = gradients(base, batch)
        with attend(base.components, "attention", Edit(map=lambda m, at: m * 1.0)):
            same(grads[how], gradients(base, batch))
    same(grads["eager"], grads["sdpa"])


@pytest.mark.parametrize("name", ATTEND)
def test_recomputation_sees_an_opened_attention(name):
    """The second time too, after its `with` has ended."""
    base, batch = seeing(name), images()
    scale = torch.tensor(0.3, requires_grad=True)

    def gradient():
        with attend(base.components, "attention", Edit(heads=lambda out, at: out * scale)):
            out = see.features(base.model.train(), base, batch.pixels)
        return torch.autograd.grad(out.square().mean(), scale)[0]

    plain = gradient()
    checkpointing(base.model)
    torch.testing.assert_close(gradient(), plain, rtol=1e-5, atol=1e-8)
    assert float(plain) != 0
