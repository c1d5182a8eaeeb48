"""CoPrompt: prompts in both encoders, a share of each feature replaced, and a consistency with the untouched model that is
nothing where there is nothing to differ in."""

import pytest
import torch
import torch.nn.functional as F
from tiny import context, gradients, images, live, seed, seeing, shake, views

from temperament import parts
from temperament.delta import Delta
from temperament.engine import see
from temperament.engine.augment import looked
from temperament.errors import UserError
from temperament.protocols import Progress

SAID = ["a red disc on navy", "a bar", "a blue striped cross at the top left on grey"]
SIX = {n: [f"a red {n} on navy", f"a {n} at the bottom left"] for n in ("disc", "frame", "cross", "triangle", "saltire", "bar")}


def both(base, rows) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([see.image_features(base.model, base, rows.pixels[:3]), see.text_features(base.model, base, SAID)])


# ---- the adapters ----------------------------------------------------------------------------------------------------------

ADAPTERS = [
    {"adapters.multimodal_prompt": {"tokens": 2}},
    {"adapters.multimodal_prompt": {"tokens": 3, "depth": 1, "spread": 1.0}},
    {"adapters.clip_residual_adapter": {"image": 0.4, "text": 0.7}},
]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_off_is_the_base_and_what_is_saved_is_what_was_trained(adapter, tmp_path):
    base, rows = seeing("clip"), images()
    pure = both(base, rows)
    it = shake(live(base, adapter), 0.3)
    tuned = both(base, rows)
    assert not torch.allclose(tuned[:3], pure[:3], atol=1e-3) and not torch.allclose(tuned[3:], pure[3:], atol=1e-3)
    with it.at("base"):
        assert torch.equal(both(base, rows), pure)
    it.mark("then")
    shake(it, 0.3)
    with it.at("then"):  # every tensor is found where it hangs
        assert torch.equal(both(base, rows), tuned)
    it.load_state_dict(it.state_dict() | {f"param/{n}": t for n, t in it.versions["then"].items()})
    delta = it.delta()
    it.close()
    assert torch.equal(both(base, rows), pure) and not delta.changes
    delta.save(tmp_path / "d")
    base.apply(Delta.load(tmp_path / "d"))
    assert torch.allclose(both(base, rows), tuned, atol=1e-6)
    base.reset()
    base.apply(delta, 0.0)
    assert torch.equal(both(base, rows), pure)
    base.reset()


def test_prompts_by_hand_in_a_model_of_one_block_each():
    """Depth 1 is: the captions' embeddings with the prompts and their positions behind the first token, the pictures' with
    their images under W at the end - computed here through transformers' own blocks."""
    base, rows = seeing("clip"), images()
    it = shake(live(base, {"adapters.multimodal_prompt": {"tokens": 2, "depth": 1}}), 0.3)
    tuned = both(base, rows)
    value = {n.rpartition("/")[2]: p.tensor.detach() for n, p in it.params.items()}
    with it.at("base") as model, torch.no_grad():
        text, vision = model.text_model, model.vision_model
        p = value["prompt"]
        got = []
        for caption in SAID:
            ids = base.tokenizer([caption], return_tensors="pt")["input_ids"]
            words = text.embeddings.token_embedding(ids)
            h = torch.cat([words[:, :1], p[None], words[:, 1:]], 1)
            h = h + text.embeddings.position_embedding.weight[: h.shape[1]]
            mask = torch.full((1, 1, h.shape[1], h.shape[1]), -torch.inf).triu(1)
            for block in text.encoder.layers:
                h = block(h, mask)
            end = int(ids.argmax()) + 2  # where transformers reads a CLIP whose end of text is 2
            got.append(F.normalize(model.text_projection(text.final_layer_norm(h)[:, end]), dim=-1))
        from temperament.engine.pictures import normalised

        h = vision.embeddings(normalised(base, rows.pixels[:3]))
        w = p @ value["couple.weight"].T + value["couple.bias"]
        h = vision.pre_layrnorm(torch.cat([h, w.expand(3, -1, -1)], 1))
        for block in vision.encoder.layers:
            h = block(h, None)
        seen = F.normalize(model.visual_projection(vision.post_layernorm(h[:, 0])), dim=-1)
    assert torch.allclose(tuned, torch.cat([seen, *got]), atol=1e-5)


def test_deep_prompts_replace_and_the_strength_mixes():
    base, rows = seeing("clip"), images()
    pure = both(base, rows)
    it = shake(live(base, "adapters.multimodal_prompt"), 0.3)
    # What block 1 is given takes the place of what block 0 made of the first prompts: only words and patches have seen those.
    names = [n for n in it.params if "prompt.1" in n]
    assert names and len(it.params) == 2 * 3
    tuned = both(base, rows)
    with torch.no_grad():
        for n in names:
            it.params[n].tensor.mul_(1.5)
    assert not torch.allclose(both(base, rows), tuned, atol=1e-4)
    full, delta = both(base, rows), it.delta()
    it.close()
    base.apply(delta, 0.4)
    raw = lambda: see.image_features(base.model, base, rows.pixels[:3], unit=False)
    with torch.no_grad():
        some = raw()
        base.reset()
        none = raw()
        base.apply(delta)
        whole = raw()
    assert torch.allclose(both(base, rows), full, atol=1e-6)
    assert torch.allclose(some, none + 0.4 * (whole - none), atol=1e-5)
    base.reset()
    assert torch.equal(both(base, rows), pure)


def test_the_residual_by_its_formula():
    base, rows = seeing("clip"), images()
    it = shake(live(base, {"adapters.clip_residual_adapter": {"image": 0.0, "text": 0.3}}), 0.2)
    down, up = (next(p.tensor.detach() for n, p in it.params.items() if k in n) for k in ("down", "up"))
    tuned = both(base, rows)
    with it.at("base") as model, torch.no_grad():
        assert torch.equal(see.image_features(model, base, rows.pixels[:3]), tuned[:3])  # image 0 leaves pictures alone
        read = base.tokenizer(SAID, padding=True, return_tensors="pt")
        h = model.get_text_features(input_ids=read["input_ids"], attention_mask=read["attention_mask"])
        h = getattr(h, "pooler_output", h)
        h = 0.7 * h + 0.3 * F.relu(F.relu(h @ down.T) @ up.T)
    assert torch.allclose(F.normalize(h, dim=-1), tuned[3:], atol=1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS[1:])
def test_a_base_without_two_encoders_is_refused(adapter):
    with pytest.raises(UserError, match=r"lab/clip"):
        live(seeing("vit"), adapter)


def test_a_caption_without_room_is_refused():
    base = seeing("clip")
    live(base, {"adapters.multimodal_prompt": {"tokens": 200}})
    with pytest.raises(UserError, match="give fewer tokens"):
        see.text_features(base.model, base, SAID)


# ---- the consistency -------------------------------------------------------------------------------------------------------


def consistency(it, rows, step: int = 0, **options) -> dict:
    part, seeing_ = parts.build({"regularizers.feature_consistency": options}), views(it)
    seeing_.progress = Progress(step, 10)
    return {n: t for n, t in part.loss(rows, seeing_).items()}


def test_nothing_where_nothing_differs():
    """The same look, the description that is the template, a share of 0: the loss is 0."""
    base, rows = seeing("clip"), images()
    it = live(base, {"adapters.clip_residual_adapter": {"image": 1e-30, "text": 1e-30}})
    same = {n: [f"a {n}"] for n in SIX}
    terms = consistency(it, rows, descriptions=same, template="a {}", look=0.0)
    assert terms.keys() == {"consistency_image", "consistency_text"}
    assert all(abs(float(t.value.detach())) < 1e-4 for t in terms.values())
    other = consistency(it, rows, descriptions=SIX, template="a {}", look=1.0)
    assert all(0 < float(t.value.detach()) <= 2 * t.count for t in other.values())


def test_by_its_formula_and_blind_to_the_size_of_features():
    base, rows = seeing("clip"), images(6)
    it = shake(live(base, *ADAPTERS[1:]), 0.2)
    s, step = 0, 3
    terms = consistency(it, rows, step, descriptions=SIX, template="a {}", weight=2.5)
    v = see.image_features(base.model, base, looked(rows.pixels, rows.examples, s, "one"))
    t = see.text_features(base.model, base, [f"a {n}" for n in SIX])
    part = parts.build({"regularizers.feature_consistency": {"descriptions": SIX}})
    seen = views(it)
    seen.progress = Progress(step, 10)
    with it.at("base"), torch.no_grad():
        v0 = see.image_features(base.model, base, looked(rows.pixels, rows.examples, s, "two"))
        t0 = see.text_features(base.model, base, part.drawn(seen))
    want = (1 - (v * v0).sum(-1)).mean() + (1 - (t * t0).sum(-1)).mean()
    assert float(sum(t.value.detach() / t.count for t in terms.values())) == pytest.approx(float(want.detach()), rel=1e-4)
    assert {t.weight for t in terms.values()} == {2.5}
    mse = consistency(it, rows, step, descriptions=SIX, template="a {}", by="mse")
    size = lambda term: float(term.value.detach())
    assert all(size(mse[n]) == pytest.approx(2 * size(terms[n]), rel=1e-3) for n in mse)
    base = seeing("clip")
    alone = live(base, {"adapters.multimodal_prompt": {"spread": 0.5}})  # (a bottleneck would see other sizes)
    asked = lambda: float(consistency(alone, rows)["consistency_image"].value.detach())
    first = asked()
    with torch.no_grad():
        base.model.visual_projection.weight.mul_(7.0)
    assert asked() == pytest.approx(first, rel=1e-4)


def test_no_gradient_reaches_the_teacher():
    base, rows = seeing("clip"), images(4)
    it = shake(live(base, "select.full"), 0.02)
    objective = parts.build({"objectives.classify.class_texts": {"of": "data.sprites", "template": "a {}"}})
    part = parts.build({"regularizers.feature_consistency": {"descriptions": SIX, "template": "a {}"}})
    with_it, _ = gradients(it, objective, rows, 2, [part])
    without, _ = gradients(it, objective, rows, 2)
    v = see.image_features(base.model, base, looked(rows.pixels, rows.examples, 0, "one"))
    t = see.text_features(base.model, base, [f"a {n}" for n in SIX])
    with it.at("base"), torch.no_grad():
        v0 = see.image_features(base.model, base, looked(rows.pixels, rows.examples, 0, "two"))
        t0 = see.text_features(base.model, base, part.drawn(views(it)))
    loss = 8 * ((1 - (v * v0).sum(-1)).mean() + (1 - (t * t0).sum(-1)).mean())
    want = torch.autograd.grad(loss, [p.tensor for p in it.params.values()], allow_unused=True)
    for n, w in zip(it.params, want, strict=True):
        mine = with_it[n] - without[n]
        assert torch.allclose(mine, w if w is not None else torch.zeros(()), atol=1e-3)


def test_descriptions_are_drawn_by_step_alone():
    base = seeing("clip")
    it = live(base, ADAPTERS[2])
    many = {n: [f"{n} {i}" for i in range(50)] for n in SIX}
    part, seen = parts.build({"regularizers.feature_consistency": {"descriptions": many}}), views(it)
    found = []
    for step in (0, 1, 0):
        seen.progress = Progress(step, 5)
        found.append(part.drawn(seen))
    assert found[0] == found[2] != found[1] and all(d in many[n] for n, d in zip(SIX, found[0], strict=True))


# ---- a few pictures of some classes ----------------------------------------------------------------------------------------


def test_few_of_some_classes_and_the_loss_of_their_words():
    base = seeing("clip")
    some = ["bar", "disc", "cross"]
    source = parts.build({"data.few_shot": {"of": "data.sprites", "only": some, "shots": 4, "seed": seed()}})
    rows = source.open(context(base, batch=12)).batch(0)
    assert rows.labels.bincount().tolist() == [4, 4, 4]
    assert all(some[k] in c for k, c in zip(rows.labels.tolist(), rows.captions, strict=True))
    it = shake(live(base, ADAPTERS[0]), 0.1)
    part = parts.build({"objectives.classify.class_texts": {"of": source, "template": "a {}", "look": 0.7}})
    _, told = gradients(it, part, rows, 5)
    v = see.image_features(base.model, base, looked(rows.pixels, rows.examples, 0, "one", 0.7))
    z = see.scale(base.model) * v @ see.text_features(base.model, base, [f"a {n}" for n in some]).T
    assert told.terms["cross_entropy"] == pytest.approx(float(F.cross_entropy(z, rows.labels).detach()), rel=1e-4)
    rows.labels[0] = 4
    with pytest.raises(UserError, match="tells 3 classes apart"):
        gradients(it, part, rows, 5)
    for wrong, said in (({"shots": 10**6}, "ask for fewer"), ({"only": ["bar", "disk"]}, r"did you mean 'disc'")):
        with pytest.raises(UserError, match=said):
            parts.build({"data.few_shot": {"of": "data.sprites"} | wrong}).open(context(base))


def test_the_exactness_law_holds():
    from tests.methods.drive import laws

    some = {"data.few_shot": {"of": {"data.sprites": {"rows": 100}}, "only": ["bar", "disc"], "shots": 4}}
    laws(
        seeing("clip"),
        source=parts.build(some),
        objective=parts.build({"objectives.classify.class_texts": {"of": some, "template": "a {}"}}),
        trainable=[parts.build(a) for a in ADAPTERS[1:]],
        regularizers=[parts.build({"regularizers.feature_consistency": {"descriptions": SIX, "template": "a {}"}})],
    )
