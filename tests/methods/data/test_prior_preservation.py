"""DreamBooth: two kinds of rows with counts of their own, pictures the base makes once, rare words, what the ledger says."""

import secrets

import numpy as np
import pytest
import torch
from tiny import context, gradients, live, seed, shake, views

from temperament import parts
from temperament.bases import train_diffusion as lab
from temperament.bases.worlds import sprites
from temperament.engine.measure import System
from temperament.engine.rare import LONGEST, rare_ids, rare_words
from temperament.errors import UserError

pytest.importorskip("diffusers")
NAME = "data.prior_preservation"
QUICK = {"sample.sampler": {"steps": 2, "guidance": 1.0}}


@pytest.fixture(scope="module")
def base():
    return lab.fresh("unet", 3)


def source(**options):
    given = {"of": {"data.sprite_subject": {"sprite": 1}}, "noun": "cross", "count": 5, "sampler": QUICK, **options}
    return parts.build({NAME: given})


def stepping(base, tmp_path, s=None, **more):
    """The context of a step that is being done."""
    ctx = context(base, folder=tmp_path / "scratch", key="k", seed=s or seed(), **{"batch": 6, "micro": 3, **more})
    ctx.live = live(base, {"adapters.lora": {"rank": 2}})
    ctx.views = views(ctx.live, ctx.micro)
    return ctx


def test_a_batch_holds_both_kinds_and_the_base_paints_once(base, tmp_path):
    ctx, told = stepping(base, tmp_path), []
    ctx.tell = lambda event, **data: told.append(event)
    made = source().open(ctx)
    rows = made.batch(0)
    assert rows.prior.tolist() == [False] * 3 + [True] * 3 and len(rows.examples.unique()) == 6 and told == ["phase"]
    word = source().word(base)
    assert word in lab.RARE and all(c.startswith(f"a {word} cross at the ") for c in rows.captions[:3])
    assert set(rows.captions[3:]) == {"a cross"}
    shake(ctx.live)  # what the model has become since does not matter: the pictures are kept
    again = source().open(ctx)
    assert torch.equal(again.batch(4).pixels, made.batch(4).pixels) and told == ["phase"]
    shown = {tuple(p.flatten().tolist()) for k in range(4) for p in made.batch(k).pixels[3:]}
    assert len(shown) == 5  # in epochs of their own, each picture once
    ctx.key = "another"
    assert source().open(ctx).batch(0) is not None and told == ["phase"] * 2
    ctx.live.close()


def test_the_base_paints_as_it_was_however_the_model_has_changed(base, tmp_path):
    s = seed()
    one, two = stepping(base, tmp_path / "a", s), None
    first = source().open(one).batch(0)
    one.live.close()
    two = stepping(base, tmp_path / "b", s)
    shake(two.live)
    assert torch.equal(source(version="base").open(two).batch(0).pixels, first.pixels)
    two.live.close()


def test_without_a_step_the_subject_stands_in(base):
    """A plan and a check need rows like those to come, and no pictures."""
    stream = source(count=10_000).open(context(base, batch=4))
    rows, blank = stream.batch(0), stream.largest()
    assert rows.prior.tolist() == blank.prior.tolist() == [False, False, True, True] and set(rows.captions[2:]) == {"a cross"}
    with pytest.raises(UserError, match="rows of both kinds"):
        source().open(context(base, batch=1))
    alone = source(count=0).open(context(base, batch=3)).batch(0)
    assert not alone.prior.any() and len(alone) == 3


def test_the_two_terms_are_two_losses(base, tmp_path):
    """One batch of both kinds is two separate losses; at weight 0 it is plain training on the subject."""
    ctx = stepping(base, tmp_path)
    rows = source().open(ctx).batch(0)
    ctx.live.close()
    it = live(base, {"adapters.lora": {"rank": 2}})
    shake(it)
    loss = lambda **o: parts.build({"objectives.diffusion.denoise": o})
    try:
        both, got = gradients(it, loss(prior=0.7), rows, 4)
        assert got.counts == {"mse": 3, "prior": 3}
        subject, kept = rows.select([0, 1, 2]), rows.select([3, 4, 5])
        one, two = (gradients(it, loss(), part, 3)[0] for part in (subject, kept))
        plain = gradients(it, loss(prior=0.0), rows, 2)[0]
        for n, g in both.items():
            torch.testing.assert_close(g, one[n] + 0.7 * two[n], rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(plain[n], one[n], rtol=1e-3, atol=1e-6)
    finally:
        it.close()


def test_at_its_own_samples_a_perfect_denoiser_has_nothing_to_learn():
    """x ~ N(m, v): the best estimate of the noise is linear, and the gradient of the loss at it is 0 in expectation."""
    m, v, rows = float(torch.randn(())), 0.5 + float(torch.rand(())), 200_000
    process = lab.Denoiser(lab.fresh("unet", 1)).process
    t = torch.tensor([37.0, 400.0, 901.0])[torch.randint(3, (rows,))]
    a, s = process.scales(t)
    x, n = m + v**0.5 * torch.randn(rows), torch.randn(rows)
    given = a * x + s * n
    w = (s / (a * a * v + s * s)).clone().requires_grad_(True)
    said = w * (given - a * m)
    (g,) = torch.autograd.grad((said - n).square().mean() * rows, w)
    assert abs(float(g.mean())) < 6 * float(g.std()) / rows**0.5


def test_captions_must_name_the_subject(base, tmp_path):
    from temperament.engine.pictures import png_bytes

    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png_bytes(torch.rand(3, 20, 17)))
    folder = lambda **o: {"data.folder_images": {"path": str(tmp_path), **o}}
    made = source(of=folder(caption="a {identifier} {noun}"), noun="dog", identifier="zwx")
    shown = made.pictures(context(base))
    assert [p.caption for p in shown] == ["a zwx dog"] * 3 and shown[0].pixels((16, 16)).shape == (3, 16, 16)
    with pytest.raises(UserError, match="never name the subject"):
        source(of=folder(caption="a dog")).pictures(context(base))
    with pytest.raises(UserError, match="caption"):
        source(of=folder()).pictures(context(base))  # no caption anywhere
    for bad in ({"share": 1.0}, {"count": -1}, {"prior": []}):
        with pytest.raises(UserError, match=next(iter(bad))):
            source(**bad)


# ---- rare words ------------------------------------------------------------------------------------------------------------


def clip_like(words: int = 600):
    """CLIP's scheme, byte pairs with an end of word, over merges of this test."""
    import itertools
    import string

    from transformers import CLIPTokenizer

    chars = string.ascii_lowercase
    vocab = {c: i for i, c in enumerate([*chars, *(c + "</w>" for c in chars)])}
    merges = []
    for a, b in itertools.islice(itertools.product(chars, chars), words):
        merges.append((a, b + "</w>"))
        vocab[f"{a}{b}</w>"] = len(vocab)
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocab[token] = len(vocab)
    return CLIPTokenizer(vocab, merges)


@pytest.mark.parametrize("made", [lab.tokenizer, clip_like])
def test_rare_words_obey_the_rule_and_nothing_else_is_returned(made):
    tokenizer = made()
    found = rare_ids(tokenizer)
    quarter = 3 * len(tokenizer) // 4
    assert found
    for word, i in found.items():
        assert i >= quarter and i not in tokenizer.all_special_ids
        assert 0 < len(word) <= LONGEST and word.isalpha() and word == word.lower()
        assert tokenizer(word, add_special_tokens=False)["input_ids"] == [i]
        inside = tokenizer(f"a {word} dog", add_special_tokens=False)["input_ids"]
        assert inside.count(i) == 1
    s = secrets.randbits(20)
    few = rare_words(tokenizer, 2, s)
    assert few == rare_words(tokenizer, 2, s) and len(set(few)) == 2 and set(few) <= set(found)
    with pytest.raises(UserError, match="rare short words"):
        rare_words(tokenizer, 10_000)


def test_lab_tokenizers_hold_rare_words():
    found = set(rare_ids(lab.tokenizer()))
    assert {"sks", "zwx", "qvo"} <= found and not found & set(sprites.vocabulary())


# ---- what is measured --------------------------------------------------------------------------------------------------------


class Painter:
    """A system whose pictures are given."""

    def __init__(self, pixels):
        self.pixels = pixels

    def paint(self, captions, ids=None):
        return self.pixels[: len(captions)]


def skills(base, features, **options):
    ctx = context(base)
    ctx.items = 8
    made = parts.build({"evaluate.subject": {"of": source(), "prior": ["a cross"], "features": features, **options}})
    return {s.name: s for s in made.skills(ctx)}, ctx


def test_the_eye_tells_the_subject_from_its_class(base):
    made, _ = skills(base, {"aides.sprite_eye": {"known": [1]}})
    subject = parts.build({"data.sprite_subject": {"sprite": 1}})
    of_it = [sprites.render(s) for s in subject.scenes()[4:8]]
    others = [sprites.render(s) for s in sprites.scenes("train", 4, seed())]
    pixels = torch.from_numpy(np.stack(of_it + others))
    scores = lambda name: [o.score for o in made[name].measure(Painter(pixels))]
    assert scores("subject") == [1.0] * 4 + [0.0] * 4 and scores("class") == [0.0] * 4 + [1.0] * 4
    assert made["subject"].role == "target" and made["class"].how == {"passes": 0.5}
    assert made["subject"].measure(Painter(pixels))[0].extra["image"].startswith("data:image/png")
    assert made["subject"].key() != skills(base, "aides.pixels")[0]["subject"].key()


def test_variety_is_the_mean_distance_of_pairs_and_belongs_to_the_set(base):
    made, _ = skills(base, None)
    pixels = torch.rand(8, 3, 16, 16)
    outcomes = made["variety"].measure(Painter(pixels))
    small = torch.nn.functional.avg_pool2d(pixels, 2).flatten(1)
    far = [float((small[i] - small[j]).square().mean().sqrt()) for i in range(8) for j in range(8) if i != j]
    value = made["variety"].of_set(outcomes)
    whole = value(np.arange(8))
    assert whole == pytest.approx(np.mean(far), abs=1e-3) and whole == pytest.approx(np.mean([o.score for o in outcomes]))
    assert value(np.zeros(8, dtype=int)) == 0.0  # one picture again and again is no variety
    same = made["variety"].measure(Painter(pixels[:1].expand(8, -1, -1, -1)))
    assert made["variety"].of_set(same)(np.arange(8)) == 0.0
    from temperament.run.skills import _result

    result = _result(made["variety"], tuple(outcomes))
    assert result.kind == "set" and result.mean == pytest.approx(value(np.arange(8))) and len(result.draws) == 400


def test_features_of_pixels_are_of_length_1_and_know_the_same_picture():
    aide, x = parts.build("aides.pixels"), torch.rand(5, 3, 17, 12)
    found = aide.ask(x)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
    assert (found @ found.T).argmax(1).tolist() == list(range(5))


# ---- a run -----------------------------------------------------------------------------------------------------------------


def test_a_run_resumes_to_the_bit_in_the_middle(base, tmp_path):
    """Killed between two steps, taken up again: the same trained bits, and no picture is made twice."""
    from temperament.run.tune import tune

    recipe = {
        "base": "lab/unet", "check": False, "evaluation": {"items": 2, "keep": False, "base": False, "diagnose": []},
        "steps": [{"name": "dream", "ledger": False, "train": {
            "source": {NAME: {"of": {"data.sprite_subject": {}}, "noun": "cross", "count": 3, "sampler": QUICK}},
            "objective": "objectives.diffusion.denoise", "trainable": {"adapters.lora": {"rank": 2}},
            "optimizer": {"optim.adamw": {"lr": 1e-3}}, "batch": 4, "micro": 4, "steps": 4}}],
    }  # fmt: skip
    from temperament.errors import Interrupted

    def stop(event, **data):
        if event == "step" and data["step"] == 2:
            import signal

            signal.raise_signal(signal.SIGINT)

    whole = tune(recipe, tmp_path / "whole", base=lab.fresh("unet", 3))
    with pytest.raises(Interrupted):
        tune(recipe, tmp_path / "cut", base=lab.fresh("unet", 3), tell=stop)
    painted = []
    hear = lambda event, **data: painted.append(data) if event == "phase" and data.get("name") == "prior" else None
    again = tune(recipe, tmp_path / "cut", base=lab.fresh("unet", 3), resume=True, tell=hear)
    assert whole.delta.digest == again.delta.digest and not painted


def test_what_a_generator_keeps_is_measured_on_its_own_pictures(base):
    from temperament.parts import build

    ctx = context(base)
    (skill,) = build({"evaluate.keep_pictures": {"items": 4, "captions": ["a red cross on navy", "no such words"]}}).skills(ctx)
    assert set(skill.captions) == {"a red cross on navy"} and skill.made.shape == (4, 3, 16, 16)
    system = System(base, seed=ctx.seed)
    assert [o.score for o in skill.measure(system)] == [1.0] * 4  # the base keeps all of itself
    far = Painter(skill.made.roll(1, 0))
    assert np.mean([o.score for o in skill.measure(far)]) < 0.5  # another picture of the same caption keeps little
    flat = skill.made.flatten(1)
    pairs = [float((flat[i] - flat[j]).square().mean()) for i in range(4) for j in range(4) if i != j]
    assert skill.spread == pytest.approx(np.mean(pairs), rel=1e-3)
    assert skill.some(2).key() != skill.key()


def test_rewards_are_measured_as_they_are(base):
    ctx = context(base)
    ctx.items = 8
    reward, variety = parts.build({"evaluate.rewarded": {"reward": "rewards.brightness", "captions": ["a", "b"]}}).skills(ctx)
    pixels = torch.rand(8, 3, 16, 16)
    said = [o.score for o in reward.measure(Painter(pixels))]
    assert said == pytest.approx(parts.build("rewards.brightness").value(pixels, [""] * 8).tolist())
    assert reward.role == "target" and variety.captions == ("a", "b") * 4
