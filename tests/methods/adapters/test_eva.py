"""EVA: the incremental PCA is the PCA, ranks go where variance is, the model starts as the base, one look is enough."""

from __future__ import annotations

import torch

from temperament.methods.adapters.init import eva
from temperament.methods.adapters.init.eva import EVA
from temperament.methods.adapters.lora import LoRA
from temperament.nn import forward
from temperament.nn.linalg import IncrementalPCA
from temperament.nn.taps import taps
from temperament.run.training import build_players
from tests.methods.drive import carried_out, fresh, killed, laws, recipe, tiny
from tests.train.rows import context, spec


def rows(n=90, d=11, rank=11):
    g = torch.Generator().manual_seed(fresh())
    scale = torch.logspace(0, -1.5, rank)
    turned = torch.linalg.qr(torch.randn(d, rank, generator=g)).Q
    return (torch.randn(n, rank, generator=g) * scale) @ turned.T + torch.randn(d, generator=g)


def test_incremental_pca_is_pca():
    X = rows().double()
    pca = IncrementalPCA(11)
    for part in X.split([7, 30, 1, 52]):
        pca.update(part)
    centred = X - X.mean(0)
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    assert torch.allclose(pca.mean, X.mean(0)) and torch.allclose(pca.values, S)
    assert torch.allclose((pca.components * Vh).sum(1).abs(), torch.ones(11).double())
    assert torch.allclose(pca.explained.sum(), torch.ones(()).double())


def test_it_is_exact_while_the_rows_have_no_more_directions_than_kept():
    X = rows(rank=4)
    pca = IncrementalPCA(6)
    for part in X.split(13):
        pca.update(part)
    Vh = torch.linalg.svd((X - X.mean(0)).double(), full_matrices=False).Vh[:4]
    assert torch.linalg.svdvals(pca.components[:4] @ Vh.T).min() > 1 - 1e-4


def test_rows_that_are_all_alike_explain_nothing():
    pca = IncrementalPCA(3)
    pca.update(torch.ones(5, 4))
    pca.update(torch.ones(5, 4))
    assert torch.equal(pca.explained, torch.zeros(3).double())


def look(base, places, keep, ctx, s):
    found = eva._Look(places, keep)
    for step in range(s.steps):
        tokens = s.source.open(ctx).batch(step)
        found.at(base, tokens, tokens.mask)
    return found


def test_components_are_those_of_all_inputs_and_shared_ones_are_one():
    base, s = tiny(), spec(steps=3)
    ctx = context(base)
    places = list(base.places.linear())
    found = look(base, places, 99, ctx, s)
    seen = {p.name: [] for p in places}
    for step in range(3):
        tokens = s.source.open(ctx).batch(step)
        with taps(base.components, base.places.linear(), at="input") as t, torch.no_grad():
            base.model(**forward.inputs(base.model, tokens))
        for name in seen:
            seen[name].append(t[name].reshape(-1, t[name].shape[-1])[tokens.mask.reshape(-1)])
    assert len(found.pca) == 2 * 4  # per block: qkv, o, gate and up, down
    for p in places:
        X = torch.cat(seen[p.name]).double()
        S = torch.linalg.svdvals(X - X.mean(0))
        assert torch.allclose(found.of(p).values, S[: len(found.of(p).values)], atol=1e-5)


def test_ranks_add_up_and_follow_the_variance():
    base, s = tiny(), spec(steps=3)
    places = list(base.places.linear())
    for rho in (1.0, 2.0):
        start = EVA(rho=rho)
        found = look(base, places, round(3 * rho), context(base), s)
        ranks = start.ranks(found, places, 3)
        assert sum(ranks.values()) == 3 * len(places) and max(ranks.values()) <= 3 * rho
        if rho == 1:
            assert set(ranks.values()) == {3}
    last = min(found.of(p).explained[ranks[p.name] - 1] for p in places if ranks[p.name])
    first = max((found.of(p).explained[ranks[p.name]] for p in places if ranks[p.name] < 6), default=0)
    assert last >= first


def test_an_input_of_few_dimensions_gets_so_many_ranks():
    base, s = tiny(), spec(steps=3)
    g = torch.Generator().manual_seed(fresh())
    thin = base.model.model.layers[0].self_attn.v_proj.weight  # what o_proj reads has rank 2 now
    with torch.no_grad():
        thin.copy_(torch.randn(thin.shape[0], 1, generator=g) @ torch.randn(1, thin.shape[1], generator=g))
    places = [p for p in base.places.linear() if p.role in ("o", "up")]
    found = look(base, places, 8, context(base), s)
    ranks = EVA().ranks(found, places, 4)
    real = int((found.of(places[0]).values > 1e-5 * found.of(places[0]).values[0]).sum())
    assert places[0].role == "o" and ranks[places[0].name] <= real < 8 and sum(ranks.values()) == 16


def test_it_starts_as_the_base_with_orthonormal_rows():
    base = tiny()
    s, ctx = spec(trainable=[LoRA(rank=3, init=EVA())]), context(base)
    ids = {"input_ids": torch.randint(5, 60, (2, 7))}
    before = base.model(**ids).logits
    live = build_players(s, ctx)[0].live
    assert torch.equal(base.model(**ids).logits, before)
    pieces = [piece for _, piece in live.parts[0].pieces.values()]
    assert sum(len(p.A) for p in pieces) == 3 * len(base.places.linear())
    for p in pieces:
        assert torch.allclose(p.A @ p.A.T, torch.eye(len(p.A)), atol=1e-5) and not p.B.any() and p.scale == 2.0


def test_the_exactness_law():
    laws(tiny(), trainable=[LoRA(rank=2, init=EVA())])


def test_a_killed_run_does_not_look_again(tmp_path, monkeypatch):
    plan = recipe({"adapters.lora": {"rank": 2, "init": {"adapters.init.eva": {"rows": 4}}}}, steps=4)
    whole = carried_out(plan, tmp_path / "whole")
    looks = []
    own = EVA.prepare
    monkeypatch.setattr(EVA, "prepare", lambda self, *a: looks.append(1) or own(self, *a))
    broken = killed(plan, tmp_path / "broken", after=2)
    assert len(looks) == 1 and whole.delta.digest == broken.delta.digest
    assert len({c.rank for c in whole.delta.changes.values()}) > 1
    assert (tmp_path / "whole" / "delta" / "adapter_config.json").exists()  # ranks differ by place, and PEFT can hold it
