"""Parts that look at pictures through a frozen encoder, and demonstrations of the world of control."""

from __future__ import annotations

import secrets
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from temperament import parts
from temperament.bases.frozen import frozen
from temperament.bases.load import load
from temperament.bases.worlds import control


@pytest.fixture
def pixels():
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(secrets.randbits(30))).requires_grad_()


def by_hand(name: str, pixels: torch.Tensor):
    """A CLIP model's embeddings by transformers, of length 1."""
    base = frozen(name, "cpu", "test")
    config = base.processors["image"] if "image" in getattr(base, "processors", {}) else None
    mean, std = (torch.tensor(getattr(config, k))[:, None, None] for k in ("image_mean", "image_std"))
    model = base.model
    seen = model.visual_projection(model.vision_model(pixel_values=(pixels - mean) / std).pooler_output)
    return base, F.normalize(seen, dim=-1)


def test_features_are_the_encoders_own_of_length_one(pixels):
    base, want = by_hand("lab/clip-b", pixels)
    got = parts.build({"aides.encoder": {"model": "lab/clip-b", "batch": 2}}).ask(pixels)
    assert torch.allclose(got, want, atol=1e-5) and torch.allclose(got.norm(dim=1), torch.ones(5), atol=1e-5)
    got.sum().backward()
    assert float(pixels.grad.abs().max()) > 0 and all(p.grad is None for p in base.model.parameters())


def test_similarity_is_the_cosine_of_picture_and_caption(pixels):
    captions = ["a red disc", "a green cross at the top left", "a red disc", "a blue bar", "a"]
    base, seen = by_hand("lab/clip", pixels)
    words = base.tokenizer(captions, padding=True, return_tensors="pt")
    said = base.model.get_text_features(**{k: words[k] for k in ("input_ids", "attention_mask")})
    said = F.normalize(getattr(said, "pooler_output", said), dim=-1)
    got = parts.build("rewards.similarity").value(pixels, captions)
    assert torch.allclose(got, (seen * said).sum(1), atol=1e-5) and float(got.detach().abs().max()) <= 1 + 1e-6
    got.sum().backward()
    assert float(pixels.grad.abs().max()) > 0


@pytest.mark.parametrize("task, options", [("insert", {}), ("rest", {"aim": 0.2}), ("reach", {"aim": 0.0, "shake": 0.0})])
def test_doing_what_was_shown_leads_where_it_led(task, options):
    base, first = load("lab/policy"), secrets.randbelow(10**6)
    part = parts.build({"data.demonstrations": {"task": task, "episodes": 12, "first": first, **options}})
    shown = part.open(SimpleNamespace(base=base, batch=12, seed=0)).whole
    world = control.make(base.model.config.world, task, first + torch.arange(12))
    seen, solved = world.reset()[0], torch.zeros(12, dtype=torch.bool)
    for t in range(shown.observations.shape[1]):
        assert torch.equal(shown.weights[:, t] > 0, ~solved)
        assert torch.allclose(seen[~solved], shown.observations[~solved, t])
        seen, _, solved, *_ = world.step(shown.decisions[:, t].unflatten(1, (-1, 2))[:, 0])
    assert task != "reach" or bool(solved.all())  # who sees the goal as it is, with a steady hand, gets there
