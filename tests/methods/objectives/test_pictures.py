"""Objectives on pictures by their formulas, computed by hand from the model's own outputs."""

import pytest
import torch
import torch.nn.functional as F
from tiny import gradients, images, live, seeing, shake

from temperament import parts
from temperament.engine import see
from temperament.errors import UserError


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_cross_entropy_by_hand_and_rows_without_a_label_add_nothing(kind, smoothing):
    base, rows = seeing(kind), images(7)
    it = shake(live(base), 0.02)
    rows.labels[2] = -1
    part = parts.build({"objectives.classify.cross_entropy": {"label_smoothing": smoothing}})
    got, told = gradients(it, part, rows, 3)
    logits = see.logits(base.model, base, rows.pixels)
    q = F.one_hot(rows.labels.clamp(min=0), 5) * (1 - smoothing) + smoothing / 5
    known = rows.labels >= 0
    loss = -(q * logits.log_softmax(-1)).sum(1)[known].mean()
    want = torch.autograd.grad(loss, [p.tensor for p in it.params.values()], allow_unused=True)
    assert told.terms["cross_entropy"] == pytest.approx(float(loss), rel=1e-4)
    assert told.terms["accuracy"] == pytest.approx(float((logits.argmax(-1) == rows.labels)[known].float().mean()))
    for mine, theirs in zip(got.values(), want, strict=True):
        assert torch.allclose(mine, theirs if theirs is not None else torch.zeros(()), atol=1e-5)


def test_a_head_that_was_added_is_the_one_trained():
    base, rows = seeing(), images()
    it = live(base, {"adapters.class_head": {"of": "data.digits"}})
    rows.labels += 5
    got, told = gradients(it, parts.build("objectives.classify.cross_entropy"), rows, 5)
    assert told.terms["cross_entropy"] == pytest.approx(torch.tensor(10.0).log().item(), rel=1e-5)  # every digit is as likely
    assert all(g.norm() > 0 for g in got.values()) and len(got) == 2
    with pytest.raises(UserError, match=r"tells 5 classes.*class_head"):
        gradients(live(seeing()), parts.build("objectives.classify.cross_entropy"), rows, 5)
    rows.labels = None
    with pytest.raises(UserError, match="no labels"):
        gradients(it, parts.build("objectives.classify.cross_entropy"), rows, 5)


@pytest.mark.parametrize(
    "options",
    [
        {"objectives.classify.cross_entropy": {}},
        {"objectives.classify.noise_mask": {"masker": None, "grid": 4, "kernel": 3}},
        {"objectives.robust.rmt": {"contrast": 0.0}},
    ],
)
def test_a_class_that_the_head_does_not_have_is_a_sentence(options):
    rows = images()
    rows.labels[-1] = 5
    with pytest.raises(UserError, match=r"class 5.*tells 5 classes.*class_head"):
        gradients(live(seeing()), parts.build(options), rows, 5)


def test_clip_is_transformers_own_where_captions_differ():
    base, rows = seeing("clip"), images(6)
    rows.captions = list(dict.fromkeys(rows.captions + images(20).captions))[:6]
    it = shake(live(base), 0.01)
    part = parts.build("objectives.contrastive.clip")
    got, told = gradients(it, part, rows, 2)
    read = base.tokenizer(rows.captions, padding=True, return_tensors="pt")
    words = {k: read[k] for k in ("input_ids", "attention_mask")}
    from temperament.engine.pictures import normalised

    out = base.model(**words, pixel_values=normalised(base, rows.pixels), return_loss=True)
    want = torch.autograd.grad(out.loss, [p.tensor for p in it.params.values()], allow_unused=True)
    assert told.terms["clip"] == pytest.approx(float(out.loss), rel=1e-4)
    size = sum(float(w.square().sum()) for w in want if w is not None) ** 0.5
    for mine, theirs in zip(got.values(), want, strict=True):
        assert float((mine - (theirs if theirs is not None else 0)).norm()) < 1e-4 * size
    assert any(n.endswith("logit_scale") and got[n].abs() > 0 for n in got)


def test_captions_that_come_twice_are_as_right():
    base, rows = seeing("clip"), images(6)
    rows.captions = [rows.captions[0]] * 6
    _, told = gradients(live(base), parts.build("objectives.contrastive.clip"), rows, 6)
    assert told.terms["found"] == 1.0
    assert told.terms["clip"] >= torch.tensor(6.0).log().item() - 1e-4  # nothing tells them apart: log of the rows at best
    rows.captions[2] = ""
    with pytest.raises(UserError, match="no captions"):
        gradients(live(base), parts.build("objectives.contrastive.clip"), rows, 6)
