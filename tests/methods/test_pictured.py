"""Sources of pictures and what is measured on them: what they hold by their worlds, and scores by the model's own outputs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import images, live, seed, seeing, shake

from temperament import parts
from temperament.bases.worlds import sprites
from temperament.engine import see
from temperament.engine.measure import System
from temperament.engine.pictures import png, thumbnail
from temperament.errors import UserError
from temperament.methods.evaluate.pictures import NONE
from temperament.report.html import html
from temperament.run.ledger import Ledger
from temperament.run.outcome import SkillResult


def asking(base, items=9):
    return SimpleNamespace(base=base, items=items, seed=0)


# ---- sources ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", sprites.FACTORS)
def test_a_label_is_what_the_caption_says(label):
    source = parts.build({"data.sprites": {"label": label, "seed": seed(), "rows": 40}})
    for p in [*source._pictures("train", 40), *source.held()[:40]]:
        value = source.classes()[p.label]
        assert value in p.caption or value == "plain"
        assert p.alternatives[p.label] == p.caption and len(p.alternatives) == len(source.classes())
    assert {p.label for p in source.held()} == set(range(len(source.classes())))


def test_figures_are_of_no_training_and_some_are_held_out():
    source = parts.build({"data.sprites": {"figures": 4, "rows": 60, "seed": seed()}})
    train, held = source._pictures("train", 60), source.held()[:60]
    assert source.classes() == sprites.sprites("test", 4) and {p.label for p in train} == set(range(4))
    assert not set(sprites.sprites("train", 50)) & set(source.classes())
    key = lambda p: (p.label, np.asarray(p.image).tobytes())
    assert not {key(p) for p in train} & {key(p) for p in held}


def test_a_domain_is_the_same_scenes_seen_otherwise():
    s = seed()
    of = lambda **o: parts.build({"data.sprites": {"rows": 5, "seed": s, **o}})._pictures("train", 5)
    for plain, shifted, foggy in zip(of(), of(domain="shifted"), of(domain="fog", severity=4), strict=True):
        assert plain.label == shifted.label == foggy.label and plain.caption == foggy.caption
        assert np.array_equal(shifted.image, sprites.shift_colours(plain.image))
        assert np.array_equal(foggy.image, sprites.corrupt(plain.image, "fog", 4, None))
    noisy = [p.image for p in of(domain="noise")]
    assert all(np.array_equal(a, b) for a, b in zip(noisy, [p.image for p in of(domain="noise")], strict=True))
    for bad in ({"severity": 6}, {"subjects": [3]}, {"figures": 2, "subjects": [2]}):
        with pytest.raises(UserError, match=next(iter(bad))):
            parts.build({"data.sprites": bad})


def test_a_folder_has_classes_by_sub_folder_or_column_in_the_order_of_the_base(tmp_path):
    image = pytest.importorskip("PIL.Image")
    base = seeing()
    for i in range(12):
        (tmp_path / ("cat", "dog", "eel")[i % 3]).mkdir(exist_ok=True)
        image.new("RGB", (20, 16), (20 * i, 0, 0)).save(tmp_path / ("cat", "dog", "eel")[i % 3] / f"{i}.png")
    source = parts.build({"data.folder_images": {"path": str(tmp_path), "holdout": 0.25}})
    assert source.classes(base) == ["cat", "dog", "eel"] and source.called == tmp_path.name
    held = source.held(base)
    assert len(held) == 3 and all(p.id.startswith(source.classes(base)[p.label]) for p in held)
    base.model.config.id2label = dict(enumerate(["eel", "cat", "owl", "dog", "ant"]))
    assert [source.classes(base)[p.label] for p in source.held(base)] == [p.id.split("/")[0] for p in held]
    rows = [f'{{"file_name": "cat/{i}.png", "label": {i % 2}}}\n' for i in (0, 3, 6, 9)]
    (tmp_path / "metadata.jsonl").write_text("".join(rows))
    named = parts.build({"data.folder_images": {"path": str(tmp_path), "holdout": 0.0}})
    assert named.classes() == ["0", "1"] and named.suites() == [] and named.read()[0].text == "0"
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "cat" / "0.txt").write_text("the first cat")
    told = parts.build({"data.folder_images": {"path": str(tmp_path), "caption": "an animal"}})
    assert sorted({e.text for e in told.read()}) == ["an animal", "the first cat"] and told.suites() == []
    with pytest.raises(UserError, match="no classes"):
        told.classes(base)


def tuned(base, *trainables, by):
    """The base with a random change of this kind applied."""
    it = shake(live(base, *trainables), by)
    delta = it.delta()
    it.close()
    for _, p in base.parameters():
        p.requires_grad_(False)
    base.reset()
    base.apply(delta)


# ---- what is measured ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_scores_likelihood_and_divergence_by_the_models_own_outputs(kind):
    base = seeing(kind)
    base.model.config.id2label = dict(enumerate([*sprites.SHAPES][:5]))
    suite = parts.build({"evaluate.pictures": {"of": "data.digits"}})
    skill = suite.skills(asking(base))[0]
    bare = skill.measure(System(base, batch=4))
    assert [o.score for o in bare] == [0.0] * 9 and {o.output for o in bare} == {NONE} and all(o.nll is None for o in bare)
    tuned(base, "select.full", {"adapters.class_head": {"of": "data.digits"}}, by=0.05)
    pixels = torch.stack([p.pixels((16, 16)) for p in skill.pictures])
    want = see.logits(base.model, base, pixels, "classes").log_softmax(-1)
    got = skill.measure(System(base, batch=4))
    for o, w, p in zip(got, want, skill.pictures, strict=True):
        assert o.output == str(int(w.argmax())) and o.expected == str(p.label) and o.score == float(w.argmax() == p.label)
        assert o.nll == pytest.approx(-float(w[p.label]), abs=1e-4) and o.kl is None  # the base has no such head
        assert o.extra["image"] == png(p.pixels((16, 16)))
    base.reset()
    assert [o.output for o in skill.measure(System(base))] == [NONE] * 9


@torch.no_grad()
def test_the_divergence_from_the_base_on_its_own_classes():
    base = seeing()
    base.model.config.id2label = dict(enumerate([*sprites.TEXTURES, "x", "y"]))
    skill = parts.build({"evaluate.pictures": {"of": {"data.sprites": {"label": "texture"}}}}).skills(asking(base))[0]
    skill = type(skill)(skill.name, skill.pictures, tuple(see.own_classes(base)))
    assert all(o.kl == 0 for o in skill.measure(System(base)))
    pixels = torch.stack([p.pixels((16, 16)) for p in skill.pictures])
    was = see.logits(base.model, base, pixels).log_softmax(-1)
    tuned(base, {"adapters.lora": {"rank": 2}}, by=0.3)
    now = see.logits(base.model, base, pixels).log_softmax(-1)
    got = skill.measure(System(base, batch=4))
    assert [o.kl for o in got] == pytest.approx((was.exp() * (was - now)).sum(-1).tolist(), abs=1e-4)
    assert max(o.kl for o in got) > 0


@torch.no_grad()
def test_a_model_of_words_chooses_among_captions():
    base = seeing("clip")
    skills = {s.name: s for s in parts.build("evaluate.pictures").skills(asking(base, 6))}
    assert list(skills) == [*sprites.FACTORS, "caption"] and all(s.role == "retained" for s in skills.values())
    for name, skill in skills.items():
        pixels = torch.stack([p.pixels((16, 16)) for p in skill.pictures])
        want = see.fits(base.model, base, pixels, [p.alternatives for p in skill.pictures]).argmax(-1)
        got = skill.measure(System(base, batch=4))
        names = [list(p.alternatives if name == "caption" else skill.classes) for p in skill.pictures]
        assert [o.output for o in got] == [n[k] for n, k in zip(names, want.tolist(), strict=True)]
        assert len({p.id for p in skill.pictures}) == 6
    captions = skills["caption"].pictures
    assert all(len(set(p.alternatives)) == 16 and p.alternatives[p.label] == p.caption for p in captions)
    with pytest.raises(UserError, match="not of the sprite world"):
        parts.build("evaluate.pictures").skills(asking(seeing()))


def test_the_report_shows_the_picture_that_was_asked(tmp_path):
    base = seeing()
    base.model.config.id2label = dict(enumerate([*sprites.SHAPES][:5]))
    skill = parts.build({"evaluate.pictures": {"of": "data.digits"}}).skills(asking(base, 3))[0]
    before = skill.measure(System(base))
    tuned(base, {"adapters.class_head": {"of": "data.digits"}}, by=0.5)
    after = skill.measure(System(base))
    results = [{"digits": SkillResult("digits", "target", "accuracy", tuple(o))} for o in (before, after)]
    ledger = Ledger({"base": results[0], "taught": results[1]})
    items = ledger.items("digits")
    assert all(i["image"].startswith("data:image/png;base64,") and "image_before" not in i for i in items)
    page = html({"status": "done", "ledger": ledger.to_json(), "items": {"digits": items}})
    assert all(i["image"] in page for i in items)
    items[0]["image"] = 'https://example.org/x.png" onload="alert(1)'
    page = html({"status": "done", "ledger": ledger.to_json(), "items": {"digits": items}})
    assert "example.org" not in page and items[1]["image"] in page
    large = thumbnail(torch.rand(3, 300, 200))
    assert large.shape == (3, 96, 64) and thumbnail(images(1).pixels[0]).shape == (3, 16, 16)
