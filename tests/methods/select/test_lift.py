"""LIFT: which entries; nothing else moves; moments move with the mask; a killed run goes on to the same bits."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from temperament.delta import Sparse
from temperament.methods.optim.adamw import AdamW
from temperament.methods.select.full import Full
from temperament.methods.select.lift import Lift
from temperament.nn import linalg
from temperament.train.packed import repack, values_at
from temperament.train.trained import Param
from tests.methods.drive import carried_out, fresh, killed, laws, recipe, steps, tiny

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def chosen(lift: Lift, W: torch.Tensor) -> set[int]:
    return set(lift.choose(W, "w", 0).tolist())


def test_whole_rank_is_magnitude_selection():
    W = torch.randn(24, 17, generator=torch.Generator().manual_seed(fresh()))
    assert chosen(Lift(rank=17, share=0.2), W) == chosen(Lift(by="magnitude", share=0.2), W)


def test_rank_one_depends_on_the_factors_alone():
    g = torch.Generator().manual_seed(fresh())
    a, b = torch.randn(13, generator=g), torch.randn(19, generator=g)
    expected = set(linalg.largest(a.abs()[:, None] * b.abs(), 40).tolist())
    found = Lift(rank=1, share=40 / (13 * 19)).choose(torch.outer(a, b), "w", 0)
    assert len(expected & set(found.tolist())) >= 39  # a tie of rounding at the edge


def test_budget_counts_as_a_lora_of_that_rank():
    W = torch.randn(30, 20)
    assert len(chosen(Lift(budget=3), W)) == (30 + 20) * 3
    assert len(chosen(Lift(budget=99), W)) == 30 * 20
    assert len(chosen(Lift(by="random", share=0.25), W)) == 150


def test_randomised_svd_agrees_with_the_exact(monkeypatch):
    g = torch.Generator().manual_seed(fresh())
    W = torch.randn(60, 5, generator=g) @ torch.randn(5, 70, generator=g) + 1e-3 * torch.randn(60, 70, generator=g)
    exact = linalg.singular(W, 5)
    monkeypatch.setattr(linalg, "EXACT", 0)
    near = linalg.singular(W, 5, 3, "w")
    again = linalg.singular(W, 5, 3, "w")
    low = lambda t: (t[0] * t[1]) @ t[2].T
    assert torch.allclose(low(near), low(exact), atol=1e-3) and all(map(torch.equal, near, again))


def test_exactly_k_entries_move_and_nothing_else():
    base = tiny()
    before = {n: p.detach().clone() for n, p in base.parameters()}
    player = steps(base, 4, trainable=[Lift(rank=4, share=0.1, refresh=0)], optimizer=AdamW(lr=1e-2))
    delta = player.live.delta()
    player.live.close()
    for name, now in base.parameters():
        moved = int((now != before[name]).sum())
        if name.split(".")[-2] in LINEAR:
            assert moved == int(0.1 * now.numel() + 0.5) and isinstance(delta.changes[name], Sparse)
            assert torch.equal(delta.changes[name].apply(before[name]), now)
        else:
            assert moved == 0


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_mask_of_everything_is_the_dense_optimizer(decay):
    seed = fresh()
    one, two = tiny(seed=seed), tiny(seed=seed)
    optimizer = AdamW(lr=3e-3, weight_decay=decay)
    steps(one, 4, trainable=[Lift(share=1.0, refresh=2)], optimizer=optimizer, micro=2)
    steps(two, 4, trainable=[Full(only=LINEAR)], optimizer=optimizer, micro=2)
    for (name, a), (_, b) in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


def test_state_is_packed_and_the_dense_gradient_is_gone():
    base = tiny()
    seen = []

    def look(player, done):
        for p in player.live.params.values():
            assert p.dense.grad is None
            for value in player.stepper.state.get(p.tensor, {}).values():
                assert value.numel() in (1, len(p.entries))
                seen.append(value.numel())

    steps(base, 3, look=look, trainable=[Lift(share=0.05, refresh=2)], optimizer=AdamW(lr=1e-2), micro=1)
    assert seen


@pytest.mark.parametrize("moves", ["carry", "reset"])
def test_moments_move_with_the_mask(moves):
    g = torch.Generator().manual_seed(fresh())
    W = torch.nn.Parameter(torch.randn(6, 7, generator=g))
    old, new = torch.randperm(42, generator=g)[:10].sort().values, torch.randperm(42, generator=g)[:10].sort().values
    p = Param("lm/w", values_at(W, old), dense=W, entries=old, moves=moves)
    moment = torch.randn(10, generator=g)
    state = {p.tensor: {"exp_avg": moment.clone(), "step": torch.tensor(5.0)}}
    repack(p, new, state)
    kept = dict(zip(old.tolist(), moment.tolist(), strict=True)) if moves == "carry" else {}
    assert state[p.tensor]["exp_avg"].tolist() == [kept.get(i, 0.0) for i in new.tolist()]
    assert state[p.tensor]["step"] == 5 and torch.equal(p.tensor, W.view(-1)[new])


def test_the_mask_follows_the_weights_and_the_count_runs_on():
    masks = []
    lift = Lift(rank=2, share=0.1, refresh=2)

    def look(player, done):
        live = player.live
        masks.append({n: p.entries.clone() for n, p in live.params.items()})
        for n, p in live.params.items():
            if done == 2:
                assert torch.equal(p.entries, lift.choose(p.dense, n, 0))
            if done:
                assert float(player.stepper.state[p.tensor]["step"]) == done
                assert torch.equal(p.tensor, p.dense.reshape(-1)[p.entries])

    player = steps(tiny(), 4, look=look, trainable=[lift], optimizer=AdamW(lr=5e-2))
    same = [all(torch.equal(a[n], b[n]) for n in a) for a, b in pairwise(masks)]
    assert same == [True, False, True, True]  # the last step is never followed by a choice
    name, p = next(iter(player.live.params.items()))
    left = set(masks[0][name].tolist()) - set(p.entries.tolist())
    assert left <= set(player.live.delta().changes[name].indices.tolist())  # what left the mask keeps what it learnt


def test_versions_hold_whole_weights():
    base = tiny()
    before = {n: p.detach().clone() for n, p in base.parameters()}
    player = steps(base, 2, trainable=[Lift(share=0.2, refresh=1)], optimizer=AdamW(lr=1e-2))
    name = next(iter(player.live.params))
    slot = base.slots(name)[0]
    with player.live.at("start"):
        assert torch.equal(slot[0][slot[1]], before[name])
    assert not torch.equal(slot[0][slot[1]], before[name])


def test_a_killed_run_goes_on_to_the_same_bits_while_the_mask_moves(tmp_path):
    plan = recipe({"select.lift": {"rank": 8, "share": 0.05, "refresh": 2}}, steps=5)
    whole = carried_out(plan, tmp_path / "whole")
    broken = killed(plan, tmp_path / "broken", after=3)
    assert whole.delta.digest == broken.delta.digest
    assert all(isinstance(c, Sparse) for c in whole.delta.changes.values())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_exactness_law(name):
    laws(tiny(name), trainable=[Lift(rank=4, share=0.2)])
