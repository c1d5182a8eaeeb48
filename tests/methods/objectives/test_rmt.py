"""RMT: its losses against loops and formulas, the coupled gradient against plain autograd, BatchNorm declared, and the stream
that says what it sees before it learns from it."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import context, gradients, images, live, rng, seed, seeing, shake, views

from temperament import parts
from temperament.bases.load import Base
from temperament.engine import record, see
from temperament.engine.augment import looked
from temperament.engine.measure import System
from temperament.engine.pictures import size_of
from temperament.errors import UserError
from temperament.methods.objectives.robust.rmt import contrast, symmetric
from temperament.protocols import Progress
from temperament.run.recipe import Recipe, Step, Train
from temperament.run.training import build_players, must_be_whole, quiet_training
from temperament.train.loop import train
from temperament.train.world import World

SPRITES = ("disc", "frame", "cross", "triangle", "saltire", "bar")


def named(kind: str = "resnet") -> Base:
    """A random base whose own classes are the world's six shapes."""
    base = seeing(kind)
    config = base.model.config
    config.id2label = dict(enumerate(SPRITES))
    head = torch.nn.Linear(see.width(base), 6)
    if isinstance(base.model.classifier, torch.nn.Linear):
        base.model.classifier = head
    else:
        base.model.classifier[1] = head
    return Base(f"tiny/{kind}", base.components, base.processors)


# ---- the losses ------------------------------------------------------------------------------------------------------------


def test_symmetric_cross_entropy():
    u, v = torch.randn(7, 5, generator=rng()) * 3, torch.randn(7, 5, generator=rng()) * 3
    assert torch.allclose(symmetric(u, v), symmetric(v, u), atol=1e-5)
    p = u.softmax(-1)
    assert torch.allclose(symmetric(u, u + 2.5), -2 * (p * p.log()).sum(-1), atol=1e-4)
    assert torch.allclose(symmetric(u, v, 0.0), F.cross_entropy(u, v.softmax(-1), reduction="none"), atol=1e-5)


def test_contrast_against_a_loop():
    rows, T = 5, 0.3
    z = F.normalize(torch.randn(rows, 3, 4, generator=rng()), dim=-1)
    want = []
    for b in range(rows):
        for i in range(3):
            others = [(c, k) for c in range(rows) for k in range(3) if (c, k) != (b, i)]
            total = sum(math.exp(float(z[b, i] @ z[c, k]) / T) for c, k in others)
            pulls = [math.log(math.exp(float(z[b, i] @ z[b, k]) / T) / total) for k in range(3) if k != i]
            want.append(-sum(pulls) / 2)
    assert torch.allclose(contrast(z, T), torch.tensor(want), atol=1e-5)


def test_contrast_is_least_where_views_coincide_and_rows_are_apart():
    apart = F.normalize(torch.eye(4)[:, None].expand(4, 3, 4) - 0.25, dim=-1)  # a simplex: as far apart as four can be
    best = contrast(apart, 0.1).mean()
    for _ in range(20):
        other = F.normalize(apart + 0.3 * torch.randn(4, 3, 4, generator=rng()), dim=-1)
        assert contrast(other, 0.1).mean() > best


# ---- the objective -------------------------------------------------------------------------------------------------------


def taught(kind: str = "vit"):
    """A student away from its teacher, with a projection and prototypes."""
    base = seeing(kind)
    projecting = {"adapters.projection_head": {"prototypes": "data.digits", "width": 6}}
    it = live(base, "select.full", projecting, prepared={"prototypes": torch.randn(4, see.width(base), generator=rng())})
    shake(it, 0.05).mark("ema")
    return base, shake(it, 0.05)


@pytest.mark.parametrize("options", [{}, {"reverse": 0.0, "contrast": 0.0, "look": 0.0}, {"temperature": 0.5, "contrast": 0.3}])
def test_the_whole_loss_by_plain_autograd_in_any_split(options):
    base, it = taught()
    part, rows = parts.build({"objectives.robust.rmt": options}), images(7)
    rows.labels[[0, 2, 3, 6]] = -1
    new, known = (rows.labels < 0).nonzero()[:, 0], (rows.labels >= 0).nonzero()[:, 0]
    x = rows.pixels[new]
    u, h = see.both(base.model, base, x)
    other, h_other = see.both(base.model, base, looked(x, rows.examples[new], 0, "rmt", part.look))
    with it.at("ema"), torch.no_grad():
        v = see.logits(base.model, base, x)
    loss = (symmetric(u, v, part.reverse) + symmetric(other, v, part.reverse)).mean() / 2
    loss = loss + F.cross_entropy(see.logits(base.model, base, rows.pixels[known]), rows.labels[known])
    if part.contrast:
        head = it.heads["projection"]
        near = head.prototypes[F.cosine_similarity(h[:, None], head.prototypes[None], dim=-1).argmax(1)]
        z = torch.stack([head(t) for t in (near, h, h_other)], 1)
        loss = loss + part.contrast * contrast(z, part.temperature).mean()
    want = torch.autograd.grad(loss, [p.tensor for p in it.params.values()], allow_unused=True)
    size = math.sqrt(sum(float(w.square().sum()) for w in want if w is not None))
    for micro in (7, 3, 1):
        got, told = gradients(it, part, rows, micro)
        assert told.loss == pytest.approx(float(loss.detach()), rel=1e-4)
        for mine, theirs in zip(got.values(), want, strict=True):
            assert float((mine - (theirs if theirs is not None else 0)).norm()) < 1e-4 * size


def test_the_plain_mean_teacher_and_a_teacher_that_is_the_student():
    """Without contrast, reverse and look it is the cross-entropy to the teacher; where that is the student himself, his
    entropy, without a gradient."""
    base, it = taught()
    it.mark("ema")
    part, rows = parts.build({"objectives.robust.rmt": {"contrast": 0.0, "reverse": 0.0, "look": 0.0}}), images(5)
    rows.labels.fill_(-1)
    got, told = gradients(it, part, rows, 2)
    p = see.logits(base.model, base, rows.pixels).softmax(-1)
    assert told.loss == pytest.approx(float(-(p * p.log()).sum(-1).mean().detach()), rel=1e-4)
    assert all(g.abs().max() < 1e-5 for g in got.values())


def test_what_it_lacks_is_said():
    _, it = taught()
    rows = images(3)
    rows.labels.fill_(-1)
    alone = live(seeing())
    alone.mark("ema")
    with pytest.raises(UserError, match=r"projection.*a part that brings one"):
        gradients(alone, parts.build("objectives.robust.rmt"), rows, 3)
    it.heads["projection"].prototypes = None
    with pytest.raises(UserError, match=r"data\.sprites"):
        gradients(it, parts.build("objectives.robust.rmt"), rows, 3)


def test_a_prototype_is_the_mean_of_its_class_each_picture_once():
    """Five pictures in batches of four: the second one goes on with pictures of the next epoch."""
    base, shown = seeing(), {"data.sprites": {"rows": 5, "label": "colour"}}
    part, ctx = parts.build({"adapters.projection_head": {"prototypes": shown}}), replace(context(base), batch=4)
    got = part.prepare(base, ctx, None)["prototypes"]
    with torch.no_grad():
        pictures = part.prototypes._pictures("train", 5)
        pixels = torch.stack([p.pixels(size_of(base)) for p in pictures])
        h = see.features(base.model, base, pixels)
    labels = torch.tensor([p.label for p in pictures])
    want = torch.stack([h[labels == k].mean(0) for k in labels.unique()])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_entropy_by_its_formula():
    base = seeing()
    it, rows = shake(live(base), 0.05), images(5)
    got, told = gradients(it, parts.build("objectives.robust.entropy_min"), rows, 2)
    p = see.logits(base.model, base, rows.pixels).softmax(-1)
    loss = -(p * p.log()).sum(-1).mean()
    want = torch.autograd.grad(loss, [p.tensor for p in it.params.values()], allow_unused=True)
    assert told.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got.values(), want, strict=True) if b is not None)


def test_looks_are_addressed_and_none_is_the_picture():
    rows, s = images(6), seed()
    one = looked(rows.pixels, rows.examples, s, "a")
    pick = torch.tensor([4, 1])
    assert torch.equal(looked(rows.pixels[pick], rows.examples[pick], s, "a"), one[pick])
    assert torch.equal(looked(rows.pixels, rows.examples, s, "a", 0.0), rows.pixels)
    assert not torch.equal(looked(rows.pixels, rows.examples, s, "b"), one) and one.min() >= 0 and one.max() <= 1
    near = looked(rows.pixels, rows.examples, s, "a", 1e-4)
    assert torch.allclose(near, rows.pixels, atol=1e-2) and not torch.equal(near, rows.pixels)


# ---- BatchNorm, declared ---------------------------------------------------------------------------------------------------


def test_batch_statistics_are_torchs_own_and_kept_is_the_base():
    base, rows = seeing("resnet"), images(6)
    pure, held = see.said(base.model, base, rows), [b.clone() for b in base.model.buffers()]
    it = live(base, "select.full", "adapters.batch_statistics")
    got = see.said(base.model, base, rows)
    mine = torch.autograd.grad(got.square().sum(), [p.tensor for p in it.params.values()])
    with it.at("base"):
        assert torch.equal(see.said(base.model, base, rows), pure)
    delta = it.delta()
    assert not delta.changes and {a.ship for a in delta.additions.values()} == {False}
    it.close()
    assert all(torch.equal(a, b) for a, b in zip(base.model.buffers(), held, strict=True))
    base.apply(delta)
    assert torch.equal(see.said(base.model, base, rows), pure)  # it served training alone
    for kept, want in ((1.0, pure), (0.3, None)):
        again = live(base, {"adapters.batch_statistics": {"kept": kept}})
        said = see.said(base.model, base, rows)
        assert torch.allclose(said, want, atol=1e-5) if want is not None else not torch.allclose(said, pure, atol=1e-3)
        again.close()
    base.model.requires_grad_(True).train()
    theirs = see.said(base.model, base, rows)
    assert torch.allclose(theirs, got, atol=1e-4)
    for a, b in zip(mine, torch.autograd.grad(theirs.square().sum(), list(base.model.parameters())), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()) + 1e-5)
    with pytest.raises(UserError, match="leave this part out"):
        live(seeing("vit"), "adapters.batch_statistics")


STREAM = {
    "domains": [
        *({"data.sprites": {"domain": d, "severity": 5}} for d in ("fog", "noise")),
        {"data.sprites": {"domain": "shifted"}},
    ],
    "rows": 10,
}


PROJECTING = {"adapters.projection_head": {"prototypes": {"data.sprites": {"rows": 20}}}}


def spec(batch: int = 4, **more) -> Train:
    options = {
        "source": parts.build({"rollout.test_stream": STREAM | more.pop("stream", {})}),
        "objective": parts.build("objectives.robust.rmt"),
        "trainable": [parts.build(t) for t in ("select.full", "adapters.batch_statistics", PROJECTING)],
        "optimizer": parts.build({"optim.adamw": {"lr": 0.01}}),
        "ema": 0.9,
        "epochs": 1,
        "batch": batch,
        "micro": batch,
    }
    return Train(**options | more)


def test_a_batch_that_is_coupled_must_be_whole_and_the_check_knows():
    from temperament.run.check import check_step

    for wrong, processes in ((2, 1), (4, 2)):
        with pytest.raises(UserError, match=r"batch_statistics couples.*micro to 4"):
            must_be_whole(spec(micro=wrong), processes)
    one = Step("one", train=spec())
    found, exempt = check_step(one, named(), World(), Recipe("tiny", [one]))
    laws = {law.name: law for law in found}
    assert all(law.ok for law in found) and "couples the batch" in laws["rows together = one by one"].detail
    assert laws["off = base"].deviation == 0 and any("adapts at test time" in e for e in exempt)


# ---- predict, record, adapt ------------------------------------------------------------------------------------------------


def test_what_is_recorded_was_said_before_the_update(tmp_path):
    base, s = named(), seed()
    ctx = context(base, seed=s, batch=4, micro=4, folder=tmp_path / "scratch", key="this")
    one = spec(stream={"repeats": 2})
    quiet_training(base.model)
    (player,) = build_players(one, ctx)
    stream, kept, batches = one.source.open(ctx), [], []

    class Watched:
        steps_per_epoch = stream.steps_per_epoch

        def batch(self, step, progress):
            held = [{n: p.held.detach() for n, p in player.live.params.items()}, player.live.versions["ema"]]
            kept.append([{n: t.clone() for n, t in v.items()} for v in held])
            batches.append(stream.batch(step, progress))
            return batches[-1]

        def feedback(self, given, row):
            return stream.feedback(given, row)

    rows = []
    train([player], Watched(), stream.steps_per_epoch, micro=4, record=rows.append)
    assert [len(b[0]) for b in batches] == [4, 4, 2] * 6 and all((b[0].labels == -1).all() for b in batches)
    domains = ("shape, fog 5", "shape, noise 5", "shape, shifted")
    assert [r["domain"] for r in rows] == [n for n in domains for _ in range(3)] * 2
    found = record.kept(tmp_path / "scratch", "this")["said"]
    assert record.kept(tmp_path / "scratch", "other") is None and found.shape == (60, 6)
    met = 0
    for versions, (batch,) in zip(kept, batches, strict=True):
        total = 0
        for version in versions:
            player.live.versions["then"] = version
            with player.live.at("then"), torch.no_grad():
                total = total + see.logits(base.model, base, batch.pixels)
        assert torch.allclose(found[met : met + len(batch)], total.log_softmax(-1), atol=1e-5)
        met += len(batch)
    with pytest.raises(UserError, match="met once, in 18 steps"):
        stream.batch(18)
    again = one.source.open(ctx)
    again.load_state_dict(stream.state_dict())
    assert torch.equal(again.said, stream.said)
    player.live.close()
    base.reset()


def test_the_suite_reads_the_record_of_its_own_step_and_asks_anyone_else(tmp_path):
    base = named()
    source = parts.build({"rollout.test_stream": STREAM | {"repeats": 2}})
    suite = parts.build(source.suites()[0])  # evaluate.prequential
    skills = suite.skills(context(base))
    assert [s.name for s in skills] == ["shape, fog 5, adapting", "shape, noise 5, adapting", "shape, shifted, adapting"]
    assert [len(s.pictures) for s in skills] == [20] * 3 and sorted(p for s in skills for p in s.places) == list(range(60))
    said = torch.randn(60, 6, generator=rng()).log_softmax(-1)
    record.keep(tmp_path / "scratch", "mine", {"said": said})
    for skill in skills:
        mine = skill.measure(System(base, folder=tmp_path, key="mine"))
        other = skill.measure(System(base, folder=tmp_path, key="other"))
        assert [o.id for o in mine] == [o.id for o in other]
        for o, place, p in zip(mine, skill.places, skill.pictures, strict=True):
            assert o.output == SPRITES[int(said[place].argmax())] and o.nll == pytest.approx(-float(said[place, p.label]))
        x = torch.stack([p.pixels((16, 16)) for p in skill.pictures])
        stands = see.logits(base.model, base, x).argmax(-1)
        assert [o.output for o in other] == [SPRITES[k] for k in stands.tolist()]


def test_what_a_step_that_was_ended_early_did_not_meet_counts_for_nothing(tmp_path):
    base = named()
    source = parts.build({"rollout.test_stream": STREAM | {"repeats": 2}})
    said = torch.randn(60, 6, generator=rng()).log_softmax(-1)
    said[45:] = torch.nan
    record.keep(tmp_path / "scratch", "mine", {"said": said})
    for skill in parts.build(source.suites()[0]).skills(context(base)):
        for o, place in zip(skill.measure(System(base, folder=tmp_path, key="mine")), skill.places, strict=True):
            assert (o.score is None and o.nll is None) if place >= 45 else o.output == SPRITES[int(said[place].argmax())]


def test_prototypes_are_the_mean_features_of_the_classes():
    base = named()
    source = parts.build({"data.sprites": {"rows": 32}})
    head = parts.build({"adapters.projection_head": {"prototypes": source}})
    found = head.prepare(base, context(base, batch=8), iter(()))["prototypes"]
    rows = [source.open(context(base, batch=32)).batch(0)][0]
    h = see.features(base.model, base, rows.pixels).detach()
    want = torch.stack([h[rows.labels == k].mean(0) for k in range(6) if (rows.labels == k).any()])
    assert torch.allclose(found, want, atol=1e-5)


def test_replay_is_a_batch_of_its_own_and_views_exist():
    base = named()
    it = live(base)
    it.mark("ema")
    ctx = context(base, batch=4, live=it, views=views(it))
    source = parts.build({"rollout.test_stream": STREAM | {"replay": {"data.sprites": {"rows": 9}}}})
    new, known = source.open(ctx).batch(0, Progress(0, 3))
    assert (new.labels == -1).all() and (known.labels >= 0).all() and new.captions is None
