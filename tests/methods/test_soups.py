"""Soups of models that name pictures: heads are averaged with the weights, candidates are scored as they will be used, and the
statistics of batch norms belong to the weights they are measured with."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny import images, live, rng, seeing, shake
from torch import nn

from temperament import parts
from temperament.delta import Delta
from temperament.engine import see
from temperament.engine.pictures import normalised
from temperament.errors import UserError
from temperament.run.tune import tune
from temperament.train.live import Live

HEAD = {"adapters.class_head": {"classes": list("abc")}}


def tuned(base, *trainables, by: float = 0.05) -> Delta:
    it = shake(live(base, *trainables), by)
    delta = it.delta()
    it.close()
    base.reset()
    return delta


@torch.no_grad()
def said(base, delta: Delta, rows, head="classes") -> torch.Tensor:
    base.reset()
    base.apply(delta)
    out = see.logits(base.model, base, rows.pixels, head)
    base.reset()
    return out


def test_a_soup_of_probes_is_their_ensemble():
    base, rows = seeing(), images()
    made = [tuned(base, HEAD, by=0.5) for _ in range(3)]
    each = torch.stack([said(base, d, rows) for d in made])
    for method in ("merge.soup_uniform", "merge.linear", "merge.soup_greedy"):
        assert torch.allclose(said(base, parts.build(method).merge(base, made), rows), each.mean(0), atol=1e-5)
    uneven = parts.build({"merge.linear": {"weights": [3.0, 1.0, 0.0]}}).merge(base, made)
    assert torch.allclose(said(base, uneven, rows), 0.75 * each[0] + 0.25 * each[1], atol=1e-5)
    alone = parts.build("merge.soup_uniform").merge(base, [made[0], made[0]])
    assert torch.allclose(said(base, alone, rows), each[0], atol=1e-6)


def test_trunk_and_head_are_both_the_mean():
    base = seeing()
    for kind in ("select.full", {"adapters.lora": {"rank": 2}}):
        made = [tuned(base, kind, HEAD) for _ in range(2)]
        soup = parts.build("merge.linear").merge(base, made)
        for name, p in base.parameters():
            if name in soup.changes:
                mean = sum(d.change(name).delta(p.detach()) for d in made) / 2
                assert torch.allclose(soup.change(name).delta(p.detach()), mean, atol=1e-6)
        (name,) = soup.additions
        for key, t in soup.additions[name].tensors.items():
            assert torch.allclose(t, sum(d.additions[name].tensors[key] for d in made) / 2)
        assert soup.additions[name].strength == 1 and soup.strength == 1


def test_heads_for_other_classes_do_not_average():
    base = seeing()
    a, b = tuned(base, HEAD), tuned(base, {"adapters.class_head": {"classes": list("abd")}})
    for method in ("merge.soup_uniform", "merge.linear"):
        with pytest.raises(UserError, match="same options average"):
            parts.build(method).merge(base, [a, b])
    kept = parts.build("merge.soup_uniform").merge(base, [a, tuned(base)])  # of one alone: as it is
    (name,) = kept.additions
    assert all(torch.equal(t, a.additions[name].tensors[k]) for k, t in kept.additions[name].tensors.items())


@pytest.mark.parametrize("by", ["model", "layer"])
def test_a_learned_soup_mixes_heads_and_its_gradient_is_autograds(by):
    base, rows = seeing(), images(6)
    rows.labels %= 3
    deltas = {n: tuned(base, "select.full", HEAD, by=0.1) for n in "ab"}
    ctx = SimpleNamespace(delta=lambda name, field="of": deltas[name], seed=0)
    trained = parts.build({"merge.soup_learned": {"of": ["a", "b"], "by": by}}).build(base, ctx)
    it = Live(base, [trained])
    s = trained.params[0].tensor
    with torch.no_grad():
        s.copy_(torch.randn(s.shape, generator=rng()))
    trained.after_step(None)
    loss = F.cross_entropy(see.logits(base.model, base, rows.pixels, "classes"), rows.labels)
    loss.backward()
    got, eps = s.grad.clone(), 1e-2
    for place in [(0, 0), (len(s) - 1, 1)]:
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                s[place] += sign * eps
                trained.after_step(None)
                ends.append(float(F.cross_entropy(see.logits(base.model, base, rows.pixels, "classes"), rows.labels)))
                s[place] -= sign * eps
        assert (ends[0] - ends[1]) / (2 * eps) == pytest.approx(float(got[place]), rel=0.03, abs=2e-5)
    trained.after_step(None)
    with torch.no_grad():
        now = see.logits(base.model, base, rows.pixels, "classes")
    left = it.delta()
    it.close()
    assert torch.allclose(said(base, left, rows), now, atol=1e-5)


# ---- batch norms -----------------------------------------------------------------------------------------------------------

PICTURES = {"data.sprites": {"rows": 40}}


def statistics(base) -> dict[str, torch.Tensor]:
    return {n: b.clone() for n, b in base.buffers() if "running" in n}


def test_statistics_are_measured_with_the_merged_weights_and_the_base_has_its_own_back(tmp_path):
    base, rows = seeing("resnet"), images()
    made, own = [tuned(base, "select.full", HEAD, by=0.2) for _ in range(2)], statistics(base)
    pure = said(base, Delta(), rows, None)
    method = parts.build({"merge.norm_statistics": {"data": PICTURES, "batches": 3, "rows": 8}})
    plain, soup = parts.build("merge.linear").merge(base, made), method.merge(base, made)
    assert soup.buffers and not plain.buffers and all(torch.equal(b, own[n]) for n, b in statistics(base).items())
    # by hand, of the first norm: the mean over batches of what it is given
    base.apply(plain)
    norm, given = next(m for m in base.model.modules() if isinstance(m, nn.BatchNorm2d)), []
    hook = norm.register_forward_pre_hook(lambda m, args: given.append(args[0].detach()))
    with torch.no_grad():
        for batch in method.pictures(base):
            base.model(pixel_values=normalised(base, batch.pixels))
    hook.remove()
    first = next(n for n, m in base.model.named_modules() if m is norm)
    base.reset()
    mean = torch.stack([x.mean((0, 2, 3)) for x in given]).mean(0)
    spread = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in given]).mean(0)
    at = lambda which: soup.buffers[f"image_encoder/{first}.running_{which}"].apply(own[f"image_encoder/{first}.running_mean"])
    assert torch.allclose(at("mean"), mean, atol=1e-5) and torch.allclose(at("var"), spread, rtol=1e-4, atol=1e-6)
    # they travel, and go as they came
    soup.save(tmp_path / "d")
    base.apply(Delta.load(tmp_path / "d"))
    assert all(torch.allclose(b, soup.buffers[n].apply(own[n])) for n, b in statistics(base).items())
    with base.at("base"), torch.no_grad():
        assert torch.equal(see.logits(base.model, base, rows.pixels), pure)
    base.reset()
    assert all(torch.equal(b, own[n]) for n, b in statistics(base).items())
    base.apply(soup, 0.0)
    assert all(torch.equal(b, own[n]) for n, b in statistics(base).items())
    base.reset()
    assert torch.equal(said(base, Delta(), rows, None), pure)


def test_every_candidate_is_scored_with_statistics_of_its_own():
    base, scored = seeing("resnet"), []
    made = [tuned(base, "select.full", by=0.1) for _ in range(3)]
    how = {"data": PICTURES, "batches": 1, "rows": 8, "of": "merge.soup_greedy"}
    soup, tried = parts.build({"merge.norm_statistics": how}).search(base, made, lambda d: scored.append(d) or 1.0)
    assert len(scored) == 5 and all(d.buffers for d in scored) and soup.buffers and tried["kept"] == [0, 1, 2]
    vit = seeing()
    two = [tuned(vit, "select.full") for _ in range(2)]
    assert not parts.build({"merge.norm_statistics": {"data": PICTURES}}).merge(vit, two).buffers  # it has none to measure


def test_the_greedy_soup_of_a_recipe(tmp_path):
    """Evaluation inside a merge: scored on pictures, heads and all, its score never falls."""
    source = {"data.sprites": {"rows": 20}}
    step = lambda rate: {"source": source, "objective": "objectives.classify.cross_entropy",
                         "trainable": ["select.full", {"adapters.class_head": {"of": source}}], "steps": 2, "batch": 4,
                         "optimizer": {"optim.adamw": {"lr": rate}}}  # fmt: skip
    steps = [{"name": f"s{k}", "start": "base", "train": step(r)} for k, r in enumerate((1e-3, 1e-2))]
    steps.append({"name": "soup", "merge": {"method": "merge.soup_greedy", "of": ["s0", "s1"]}})
    suites = [{"evaluate.pictures": {"of": source, "items": 6}}]
    document = {"base": "lab/vit", "check": False, "steps": steps,
                "evaluation": {"suites": suites, "keep": False, "base": False, "diagnose": [], "items": 6}}  # fmt: skip
    run = tune(document, tmp_path / "run", base=seeing())
    assert run.json["status"] == "done" and list(run.delta.additions) == ["image_encoder/head.classes"]
