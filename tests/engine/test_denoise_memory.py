"""What is done to save memory or time changes nothing else: recomputed activations, fused attention."""

import pytest
import torch

from temperament.bases import train_diffusion as lab
from temperament.engine.denoise import Denoiser, Sampler, covered, denoise
from temperament.methods.objectives.diffusion.denoise import Denoise
from temperament.nn.attention import Edit, attend
from temperament.nn.batch import Images
from temperament.nn.context import checkpointing, context

CAPTIONS = ["a red cross at the top left on navy", "a blue disc on black"]


@pytest.fixture(params=["unet", "flow"])
def base(request):
    base = lab.fresh(request.param, 5)
    base.components["denoiser"].train()
    return base


def gradients(base):
    """Of the generator's own loss, of every parameter."""
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    batch = Images(pixels, torch.tensor([3, 9]), captions=CAPTIONS)
    denoiser = Denoiser.of(base)
    row = covered(denoiser, batch, 2)
    for _, p in base.parameters():
        p.grad = None
    (denoiser(row.x, row.t, denoiser.encode(row.captions)) - row.target).square().mean().backward()
    return {n: p.grad for n, p in base.parameters() if p.grad is not None}


def same(a, b, tolerance=1e-5):
    assert a.keys() == b.keys() and a
    size = max(float(g.norm()) for g in a.values())
    for n in a:
        assert float((a[n] - b[n]).norm()) <= tolerance * max(float(a[n].norm()), 0.1 * size), n


def kept(base, run):
    """Bytes of activations that the graph holds on to."""
    held = {}

    def pack(t):
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    return sum(held.values()), out


def test_recomputed_activations_change_nothing_but_memory(base):
    plain = gradients(base)
    denoiser = Denoiser.of(base)
    x, t = torch.randn(2, 3, 16, 16), denoiser.process.times(torch.tensor([0.4, 0.6]))
    call = lambda: denoiser(x, t, denoiser.encode(CAPTIONS))
    before, one = kept(base, call)
    checkpointing(base.components["denoiser"])
    after, two = kept(base, call)
    same(plain, gradients(base), 1e-6)
    assert torch.equal(one, two) and after < 0.8 * before, (after, before)
    checkpointing(base.components["denoiser"], False)
    assert kept(base, call)[0] == before


def test_recomputation_sees_what_the_forward_saw(base):
    """An open attention and what is known of the rows are the same the second time, after their `with` has ended."""
    scale = torch.tensor(0.3, requires_grad=True)
    edit = Edit(heads=lambda out, at: out * scale)

    def gradient():
        denoiser = Denoiser.of(base)
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))
        with context(ids=torch.tensor([1, 2])), attend(base.components, "attention", edit):
            out = denoiser(x, denoiser.process.times(torch.tensor([0.4, 0.6])), denoiser.encode(CAPTIONS))
        return torch.autograd.grad(out.square().mean(), [scale, next(base.components["denoiser"].parameters())])

    plain = gradient()
    checkpointing(base.components["denoiser"])
    for a, b in zip(plain, gradient(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_fused_attention_is_attention(base):
    """Against the scores written out, by diffusers' own slow processor (U-Net) or by an opened map (both)."""
    plain, how = gradients(base), Sampler(3, 0.0, 2.0)
    painted = denoise(base, CAPTIONS, how).pixels
    with attend(base.components, "attention", Edit(map=lambda m, at: m * 1.0)):  # asks for the map: no fused kernel
        same(plain, gradients(base), 1e-4)
        torch.testing.assert_close(denoise(base, CAPTIONS, how).pixels, painted, rtol=1e-3, atol=1e-3)
    if base.id == "lab/unet":
        from diffusers.models.attention_processor import AttnProcessor

        base.components["denoiser"].set_attn_processor(AttnProcessor())
        same(plain, gradients(base), 1e-4)


def test_the_objective_is_the_same_under_recomputation(base):
    """As a train step calls it."""
    from types import SimpleNamespace

    batch = Images(torch.rand(2, 3, 16, 16), torch.tensor([3, 9]), captions=CAPTIONS, prior=torch.tensor([True, False]))
    views = SimpleNamespace(live=base, seed=1)
    loss = lambda: {n: t.value for n, t in Denoise().loss(batch, views).items()}
    plain = loss()
    checkpointing(base.components["denoiser"])
    for name, value in loss().items():
        torch.testing.assert_close(value, plain[name], rtol=1e-6, atol=1e-6)
