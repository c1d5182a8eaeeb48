"""LT-SFT: the mask is the top K of the first training, the rest stays, sparse changes compose, as steps of a recipe."""

from __future__ import annotations

import pytest
import torch

from temperament.delta import Delta, Sparse
from temperament.errors import UserError
from temperament.methods.optim.adamw import AdamW
from temperament.methods.regularizers.l1 import L1
from temperament.methods.select.full import Full
from temperament.methods.select.lottery_ticket import LotteryTicket
from temperament.run.recipe import read
from tests.methods.drive import carried_out, few, fresh, killed, step, steps, tiny
from tests.train.rows import context


def found(tmp_path, seed, **options):
    """A ticket: a short full training of a tiny base, kept as a step's artefact. (context maker, delta)"""
    base = tiny(seed=seed)
    player = steps(base, 2, trainable=[Full()], optimizer=AdamW(lr=1e-2), **options)
    delta = player.live.delta()
    delta.save(tmp_path / "full" / "delta")
    return lambda base: context(base, artefacts={"full": tmp_path / "full"}), delta


def test_the_mask_is_the_top_k_of_all_tensors_together(tmp_path):
    seed = fresh()
    ctx, first = found(tmp_path, seed)
    base = tiny(seed=seed)
    theta0 = {n: p.detach().clone() for n, p in base.parameters()}
    moved = {n: (first.changes[n].apply(theta0[n]) - theta0[n]).abs() for n in first.changes}
    K = 137
    player = steps(base, 3, ctx=ctx(base), trainable=[LotteryTicket("full", entries=K)], optimizer=AdamW(lr=1e-2))
    chosen = {n: p.entries for n, p in player.live.params.items()}
    assert sum(map(len, chosen.values())) == K
    assert {n: p.decay for n, p in player.live.params.items()} == {n: "norm" not in n for n in chosen}
    inside = torch.cat([moved[n].reshape(-1)[i] for n, i in chosen.items()])
    left = {n: ~torch.isin(torch.arange(m.numel()), chosen.get(n, torch.empty(0))) for n, m in moved.items()}
    outside = torch.cat([m.reshape(-1)[left[n]] for n, m in moved.items()])
    assert inside.min() >= outside.max()
    phi = player.live.delta()
    player.live.close()
    assert all(isinstance(c, Sparse) for c in phi.changes.values()) and sum(len(c.indices) for c in phi.changes.values()) <= K
    for name, now in base.parameters():  # theta0 + phi is theta2, bit for bit
        assert torch.equal(phi.changes[name].apply(theta0[name]) if name in phi.changes else theta0[name], now)


def test_a_ticket_for_everything_is_plain_training(tmp_path):
    seed = fresh()
    ctx, first = found(tmp_path, seed)
    one, two = tiny(seed=seed), tiny(seed=seed)
    steps(one, 3, ctx=ctx(one), trainable=[LotteryTicket("full", share=1.0)], optimizer=AdamW(lr=1e-2))
    steps(two, 3, trainable=[Full()], optimizer=AdamW(lr=1e-2))
    for (name, a), (_, b) in zip(one.parameters(), two.parameters(), strict=True):
        if name in first.changes:
            assert torch.allclose(a, b, atol=1e-6), name


def test_sparse_changes_compose_and_come_off():
    g = torch.Generator().manual_seed(fresh())
    W = torch.randn(8, 9, generator=g)
    at = torch.randperm(72, generator=g)
    phi, psi = (Delta({"lm/w": Sparse.at(torch.randn(8, 9, generator=g), at[k : k + 11])}) for k in (0, 11))
    both, other = (phi + psi).apply({"lm/w": W})["lm/w"], (psi + phi).apply({"lm/w": W})["lm/w"]
    assert torch.equal(both, other)
    one = phi.apply({"lm/w": W})["lm/w"]
    for k in at[:11]:  # disjoint masks do not meet
        assert torch.allclose(both.view(-1)[k], one.view(-1)[k])
    assert torch.allclose((phi + psi - psi).apply({"lm/w": W})["lm/w"], one)


def test_l1_pulls_to_the_start_and_its_gradient_is_the_sign():
    seed = fresh()
    base = tiny(seed=seed)
    grads = {}

    def look(player, done):
        if done == 1:
            live = player.live
            before = {n: t.detach().clone() for n, t in live.start.items()}
            term = L1(weight=0.7).loss(None, player.views)["l1"]
            n = sum(t.numel() for t in before.values())
            byhand = sum((live.params[k].tensor - before[k]).abs().sum() for k in before) / n
            assert torch.allclose(term.value, byhand) and term.weight == 0.7
            term.value.backward()
            for k, p in live.params.items():
                grads[k] = p.tensor.grad
                assert torch.allclose(p.tensor.grad, torch.sign(p.tensor.detach() - before[k]) / n, atol=1e-9)
                p.tensor.grad = None

    steps(base, 1, look=look, trainable=[Full()], regularizers=[L1()], optimizer=AdamW(lr=1e-2))
    assert grads


def recipe(seed=0):
    train = lambda trainable, **more: step(trainable, 4, regularizers=[{"regularizers.l1": {"weight": 0.1}}], **more)
    ticket = {"select.lottery_ticket": {"of": "find", "share": 0.03}}
    return {
        "base": "lab/lm", "seed": seed, "evaluation": few(),
        "steps": [
            {"name": "find", "train": train({"select.full": {"freeze": ["norm", "embed"]}}), "ledger": False},
            {"name": "task", "start": "base", "train": train(ticket)},
            {"name": "both", "merge": {"method": {"merge.linear": {"normalise": False}}, "of": ["task"]}, "ledger": False},
        ],
    }  # fmt: skip


def test_as_steps_of_a_recipe_killed_in_the_second(tmp_path):
    whole = carried_out(recipe(), tmp_path / "whole")
    broken = killed(recipe(), tmp_path / "broken", after=2, step="task")
    assert whole.delta.digest == broken.delta.digest
    task = Delta.load(tmp_path / "whole" / "steps" / "task" / "delta")
    assert all(isinstance(c, Sparse) for c in task.changes.values())
    assert any("not checked" in e for s in whole.json["check"]["steps"] for e in s["exempt"])


def test_a_step_that_is_not_there_is_refused_before_anything_is_loaded():
    plan = recipe()
    plan["steps"][1]["train"]["trainable"] = {"select.lottery_ticket": {"of": "fnd"}}
    with pytest.raises(UserError, match=r"select.lottery_ticket.*'fnd'.*'find'"):
        read(plan)
