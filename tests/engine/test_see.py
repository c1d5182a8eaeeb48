"""Calling models on pictures: the same numbers as transformers', for every kind, and heads beside the base's own."""

import pytest
import torch
from tiny import context, images, live, seeing, shake

from temperament import parts
from temperament.engine import see
from temperament.engine.pictures import normalised
from temperament.errors import UserError
from temperament.nn.classes import heads

KINDS = ["vit", "resnet"]


def by_hand(base, pixels):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.4, 0.5, 0.6], [0.3, 0.2, 0.25]))
    return base.model(pixel_values=(pixels - mean) / std)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_what_they_are_read_from(kind):
    base, rows = seeing(kind), images()
    got, pooled = see.logits(base.model, base, rows.pixels), see.features(base.model, base, rows.pixels)
    assert torch.equal(got, by_hand(base, rows.pixels).logits)
    last = next(m for m in base.model.classifier.modules() if isinstance(m, torch.nn.Linear))
    assert torch.equal(last(pooled), got) and pooled.shape == (5, see.width(base))
    assert see.own_classes(base) == [f"LABEL_{i}" for i in range(5)]
    assert not see.dual(base) and see.names_pictures(base)
    with pytest.raises(UserError, match=r"lab/clip"):
        see.image_features(base.model, base, rows.pixels)


@torch.no_grad()
def test_pictures_and_captions_in_one_space():
    base, rows = seeing("clip"), images(6)
    u, v = see.image_features(base.model, base, rows.pixels), see.text_features(base.model, base, rows.captions)
    read = base.tokenizer(rows.captions, padding=True, return_tensors="pt")
    words = {k: read[k] for k in ("input_ids", "attention_mask")}
    want = base.model(**words, pixel_values=normalised(base, rows.pixels))
    assert torch.allclose(see.scale(base.model) * u @ v.T, want.logits_per_image, atol=1e-4)
    asked = [[c, rows.captions[0]] for c in rows.captions]
    fit = see.fits(base.model, base, rows.pixels, asked)
    assert torch.allclose(fit[:, 0], want.logits_per_image.diagonal(), atol=1e-4)
    assert torch.allclose(fit[:, 1], want.logits_per_image[:, 0], atol=1e-4)
    assert see.own_classes(base) == [] and see.features(base.model, base, rows.pixels).shape == (6, see.width(base))
    with pytest.raises(UserError, match="no classes of its own"):
        see.logits(base.model, base, rows.pixels)


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, "clip"])
def test_a_head_stands_beside_and_off_is_the_base(kind):
    base, rows = seeing(kind), images()
    pure = see.said(base.model, base, rows)
    names = ["one", "two", "three"]
    it = shake(live(base, {"adapters.class_head": {"classes": names, "name": "mine"}}))
    assert torch.equal(see.said(base.model, base, rows), pure)  # what the base says is its own
    head, pooled = heads(base.model)["mine"], see.features(base.model, base, rows.pixels)
    assert torch.equal(see.logits(it.view(), base, rows.pixels, "mine"), head.linear(pooled))
    assert see.head_for(it.view(), base, names) == "mine" and see.head_for(it.view("base"), base, names) is None
    assert see.head_for(it.view("base"), base, see.own_classes(base) or ["?"]) == ("" if kind != "clip" else None)
    with pytest.raises(UserError, match=r"did you mean 'mine'"):
        see.logits(base.model, base, rows.pixels, "mime")
    with it.at("base"):
        assert not heads(base.model)


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, "clip"])
def test_a_head_is_saved_reloaded_and_dialled(kind, tmp_path):
    from temperament.delta import Delta

    base, rows = seeing(kind), images()
    it = shake(live(base, "select.full", {"adapters.class_head": {"of": "data.digits", "gain": 1.0}}), 0.02)
    want, own = see.logits(base.model, base, rows.pixels, "classes"), see.said(base.model, base, rows)
    delta = it.delta()
    it.close()
    for _, p in base.parameters():
        p.requires_grad_(False)
    base.reset()
    assert not heads(base.model) and not torch.allclose(see.said(base.model, base, rows), own)
    delta.save(tmp_path / "d")
    base.apply(Delta.load(tmp_path / "d"))
    assert torch.allclose(see.logits(base.model, base, rows.pixels, "classes"), want, atol=1e-5)
    assert torch.allclose(see.said(base.model, base, rows), own, atol=1e-5)
    assert heads(base.model)["classes"].classes == tuple("0123456789")
    base.reset()
    base.apply(delta.restrict(list(delta.additions)), 0.5)  # the head alone, at half strength
    again = see.features(base.model, base, rows.pixels)
    tensors = next(iter(delta.additions.values())).tensors
    half = 0.5 * (again @ tensors["linear.weight"].T + tensors["linear.bias"])
    assert torch.allclose(see.logits(base.model, base, rows.pixels, "classes"), half, atol=1e-5)
    with pytest.raises(UserError, match="an earlier step"):
        parts.build({"adapters.class_head": {"classes": ["a", "b"]}}).build(base, context(base))
    base.reset()
    assert "_pieces" not in base.model.__dict__


def test_labels_that_no_head_knows_are_refused():
    base = seeing()
    source = parts.build({"data.sprites": {"rows": 4}})
    with pytest.raises(UserError, match=r"disc, frame.*LABEL_0.*adapters\.class_head"):
        source.open(context(base, live=live(base)))
    with_head = live(base, {"adapters.class_head": {"of": "data.sprites"}})
    assert source.open(context(base, live=with_head)).batch(0).labels is not None
