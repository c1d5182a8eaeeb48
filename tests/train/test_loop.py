"""The loop against brute force: terms and counts, coupled losses, regularizers, clipping, averages, schedules, versions,
precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from temperament.errors import UserError, WorkFailed
from temperament.methods.adapters.lora import LoRA, LoRAPiece
from temperament.methods.objectives.sft.cross_entropy import CrossEntropy
from temperament.methods.optim.adamw import AdamW
from temperament.methods.optim.sgd import SGD
from temperament.methods.schedules.linear import Linear
from temperament.methods.select.full import Full
from temperament.nn.logprobs import kl, label, score
from temperament.protocols import Progress, Term
from temperament.run.laws import distance, gradient
from temperament.run.recipe import PlayerSpec
from temperament.run.training import build_players
from temperament.train.live import Live
from temperament.train.loop import _average, grad_norm, run_batch, train, update
from tests.train.rows import Rows, base_of, context, spec, tokens

NOW = Progress(0, 10)


def player_of(base=None, **options):
    base = base or base_of("llama_tied")
    ctx = context(base)
    (player,) = build_players(spec(**options), ctx)
    return player


def grads(player):
    return {n: p.tensor.grad.clone() for n, p in player.live.params.items() if p.tensor.grad is not None}


# ---- terms and counts
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 2, 3, 8])
def test_loss_is_the_sum_over_the_whole_batch_divided_once(micro):
    player, batch = player_of(), tokens(8, 11)
    loss = -(score(player.live.model, batch)["label"] * batch.weights).sum() / batch.weights.sum()
    loss.backward()
    want = grads(player)
    got, value = gradient(player, CrossEntropy(), batch, micro)
    assert distance(want, got)[0] < 1e-5 and value == pytest.approx(float(loss), rel=1e-6)


@dataclass(frozen=True)
class Two:
    """Two terms with weights and counts of their own, one of them empty in some rows, and a metric."""

    batch: ClassVar = ("Tokens",)

    def counts(self, whole):
        return {"a": whole.trained, "b": float((whole.examples.max(1).values % 2).sum()), "seen": len(whole), "none": 0.0}

    def loss(self, micro, views):
        logp = score(views.model, micro)["label"]
        odd = micro.examples.max(1).values % 2
        return {
            "a": Term(-logp * micro.weights, micro.trained, weight=0.7),
            "b": Term((logp**2 * micro.weights).sum(1) * odd, float(odd.sum()), weight=0.3),
            "seen": Term(torch.ones(len(micro)), len(micro), weight=0),
            "none": Term(logp.sum() * float("nan"), 0.0),
        }


@pytest.mark.parametrize("micro", [1, 3, 6])
def test_every_term_is_divided_by_its_own_count(micro):
    player, batch = player_of(), tokens(6, 5)
    logp, odd = score(player.live.model, batch)["label"], batch.examples.max(1).values % 2
    a = -(logp * batch.weights).sum() / batch.weights.sum()
    b = ((logp**2 * batch.weights).sum(1) * odd).sum() / odd.sum()
    (0.7 * a + 0.3 * b).backward()
    want = grads(player)
    for p in player.live.params.values():
        p.tensor.grad = None
    got = run_batch(player, Two(), batch, NOW, micro)
    assert distance(want, grads(player))[0] < 1e-5
    assert got.terms == pytest.approx({"a": float(a), "b": float(b), "seen": 1.0}, rel=1e-5)
    assert got.loss == pytest.approx(float(0.7 * a + 0.3 * b), rel=1e-5)


@dataclass(frozen=True)
class InfoNCE:
    """A coupled loss: every row against all others; statistics are unit vectors of hidden states."""

    batch: ClassVar = ("Tokens",)
    temperature: float = 0.2

    def counts(self, whole):
        return {"nce": len(whole), "spread": len(whole)}

    def statistics(self, micro, views):
        out = views.model(input_ids=micro.ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
        mean = (out * micro.mask[..., None]).sum(1) / micro.mask.sum(1, keepdim=True)
        return F.normalize(mean, dim=-1)

    def couple(self, rows):
        near = rows @ rows.T / self.temperature
        pair = torch.arange(len(rows)) ^ 1  # rows 2k and 2k + 1 belong together
        own = torch.eye(len(rows), dtype=torch.bool)
        loss = F.cross_entropy(near.masked_fill(own, -1e9), pair, reduction="sum")
        return {"nce": Term(loss, len(rows)), "spread": Term(near.std().detach() * len(rows), len(rows), weight=0)}


@pytest.mark.parametrize("micro", [1, 2, 3, 5, 8])
def test_coupled_loss_is_exact_under_any_split(micro):
    player, batch, loss = player_of(), tokens(8, 7), InfoNCE()
    terms = loss.couple(loss.statistics(batch, player.views))
    value = terms["nce"].value / 8
    value.backward()
    want = grads(player)
    got, whole = gradient(player, loss, batch, micro)
    assert distance(want, got)[0] < 1e-5 and whole == pytest.approx(float(value), rel=1e-5)


@dataclass(frozen=True)
class Decay:
    """A penalty of the weights: once a step, whatever the batch."""

    per: ClassVar = "step"
    weight: float = 0.5

    def loss(self, micro, views):
        assert micro is None
        return {"decay": Term(sum((p.tensor**2).sum() for p in views.live.params.values()), 1, weight=self.weight)}


@pytest.mark.parametrize("micro", [1, 2, 8])
def test_a_step_regularizer_counts_once(micro):
    plain, batch = player_of(), tokens(8, 2)
    without, low = gradient(plain, CrossEntropy(), batch, micro)
    player = player_of(regularizers=[Decay()])
    got, loss = gradient(player, CrossEntropy(), batch, micro)
    want = {n: g + player.live.params[n].tensor.detach() for n, g in without.items()}
    penalty = 0.5 * float(sum((p.tensor.detach() ** 2).sum() for p in player.live.params.values()))
    assert distance(want, got)[0] < 1e-5 and loss == pytest.approx(low + penalty, rel=1e-5)


# ---- the update
# ----------------------------------------------------------------------------------------------------------------


def test_clipping_scales_the_whole_gradient():
    player = player_of(optimizer=SGD(lr=1.0), clip=0.01)
    before = {n: p.tensor.detach().clone() for n, p in player.live.params.items()}
    run_batch(player, CrossEntropy(), tokens(4, 1), NOW, 4)
    g, norm = grads(player), grad_norm(player)
    assert norm == pytest.approx(float(torch.cat([x.flatten() for x in g.values()]).norm()), rel=1e-5) and norm > 0.01
    assert update(player, NOW, norm) == 1.0
    moved = torch.cat([(before[n] - p.tensor.detach()).flatten() for n, p in player.live.params.items()])
    want = torch.cat([g[n].flatten() for n in player.live.params]) * 0.01 / norm
    assert torch.allclose(moved, want, atol=1e-7) and all(p.tensor.grad is None for p in player.live.params.values())


def test_rates_follow_their_schedule_and_factors():
    seen = []
    player = player_of(optimizer=AdamW(lr=Linear(start=1e-2, end=1e-3)), trainable=[LoRA(rank=2, lr_factor_B=16.0)])
    stream = Rows().open(context(player.live.base))
    done = train([player], stream, 10, micro=4, record=seen.append)
    assert done == 10 and [r["step"] for r in seen] == list(range(1, 11))
    assert [r["lr"] for r in seen] == pytest.approx([1e-2 - 9e-3 * k / 9 for k in range(10)])
    assert sorted({g["lr_factor"] for g in player.stepper.param_groups}) == [1.0, 16.0]
    assert all(g["lr"] == pytest.approx(1e-3 * g["lr_factor"]) for g in player.stepper.param_groups)


def test_ema_is_the_running_mean():
    player = player_of(optimizer=SGD(lr=0.1), ema=0.9)
    stream, mean = Rows().open(context(player.live.base)), None
    name = next(iter(player.live.params))

    def after(done):
        nonlocal mean
        now = player.live.params[name].tensor.detach().clone()
        mean = 0.9 * (player.live.start[name] if mean is None else mean) + 0.1 * now  # from the step's start
        return False

    train([player], stream, 6, micro=4, after=after)
    assert torch.allclose(player.live.versions["ema"][name], mean, atol=1e-6)
    assert not torch.equal(mean, player.live.params[name].tensor.detach())
    assert callable(_average)


def test_training_twice_gives_equal_bits_and_any_split_nearly_so():
    def run(micro):
        player = player_of(optimizer=AdamW(lr=1e-3), trainable=[Full()])
        train([player], Rows().open(context(player.live.base)), 5, micro=micro)
        return {n: p.tensor.detach().clone() for n, p in player.live.params.items()}

    a, b, c = run(4), run(4), run(1)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert all(torch.allclose(a[n], c[n], atol=2e-4) for n in a)


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched():
    player = player_of(base_of("llama"), optimizer=AdamW(lr=1e-3))
    before = {n: p.tensor.detach().clone() for n, p in player.live.params.items()}
    good = tokens(4, 1)

    class Bad(CrossEntropy):
        def loss(self, micro, views):
            term = super().loss(micro, views)["nll"]
            return {"nll": Term(term.value * (float("nan") if (micro.examples == 2).any() else 1.0), term.count)}

    stream = type("S", (), {"batch": lambda self, step, progress=None: good})()
    player.objectives = {"Tokens": Bad()}
    with pytest.raises(
        WorkFailed, match=r"loss became nan at step 1; .*row 2 \(example 2\); likely cause.*temper data"
    ) as problem:
        train([player], stream, 3, micro=4)
    assert problem.value.exit_code == 1
    assert all(torch.equal(before[n], p.tensor) for n, p in player.live.params.items())


# ---- versions
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", [Full(), LoRA(rank=2)], ids=["full", "lora"])
def test_versions_are_switched_by_pointer(trainable):
    base, batch = base_of("llama_tied"), tokens(3, 4)
    at_first = score(base.model, batch)["label"]
    live = Live(base, [trainable.build(base, context(base))])

    def move(by):
        with torch.no_grad():
            for p in live.params.values():
                p.tensor.add_(by * torch.ones_like(p.tensor))

    said = lambda version: score(live.view(version), batch)["label"].detach()
    move(0.01)
    one = said("live")
    live.mark("teacher")
    where = {n: p.tensor.data_ptr() for n, p in live.params.items()}
    move(0.01)
    two = said("live")
    assert torch.equal(said("base"), at_first) and torch.equal(said("start"), at_first)
    assert torch.equal(said("teacher"), one) and torch.equal(said("live"), two)
    assert not torch.equal(one, two) and not torch.equal(one, at_first)
    assert where == {n: p.tensor.data_ptr() for n, p in live.params.items()}, "a version was copied into live parameters"
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
    with live.at("base"), live.at("teacher"):  # nested: the inner one is what runs
        pass
    assert torch.equal(said("live"), two)
    with pytest.raises(UserError, match="teacher"), live.at("pupil"):
        pass
    live.close()


def test_several_views_in_one_graph():
    """d/dw of KL(version || live) + a likelihood, both in one backward: the version gives no gradient, the live tensors all of
    it."""
    player, batch = player_of(trainable=[LoRA(rank=2)]), tokens(3, 9)
    live = player.live
    with torch.no_grad():
        for p in live.params.values():
            p.tensor.add_(0.03 * torch.randn_like(p.tensor))
    live.mark("teacher")
    with torch.no_grad():
        for p in live.params.values():
            p.tensor.add_(0.03 * torch.randn_like(p.tensor))
    found = score(live.model, batch, label(), kl(live.view("teacher")), kl(live.view("base"), "reverse", name="back"))
    ((found["kl"] + found["back"] - found["label"]) * batch.weights).sum().backward()
    got = grads(player)
    for p in live.params.values():
        p.tensor.grad = None
    logits = lambda version: live.view(version)(input_ids=batch.ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    with torch.no_grad():
        q, b = logits("teacher"), logits("base")
    p = logits("live")
    w = batch.weights[:, 1:]
    nll = -p.gather(-1, batch.ids[:, 1:, None])[..., 0]
    ((q.exp() * (q - p)).sum(-1) * w + (p.exp() * (p - b)).sum(-1) * w + nll * w).sum().backward()
    assert distance(grads(player), got)[0] < 1e-5


# ---- precision
# -----------------------------------------------------------------------------------------------------------------


def test_fp32_master_weights_move_where_bf16_ones_stand_still():
    """A step of 1e-5 on weights of size 0.05 is below half a bf16 spacing (2^-13 = 1.2e-4)."""
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        base = base_of("llama")
        base.model.to(dtype)
        name = "lm/model.layers.0.mlp.up_proj.weight"
        with torch.no_grad():
            dict(base.parameters())[name].fill_(0.05)
        player = player_of(base, optimizer=AdamW(lr=1e-5), clip=None)
        before = player.live.params[name].tensor.detach().clone()
        train([player], Rows().open(context(base)), 3, micro=4)
        moved[dtype] = float((player.live.params[name].tensor.detach() - before).abs().float().mean())
    assert moved[torch.float32] > 1e-5 and moved[torch.bfloat16] == 0.0


def test_autocast_computes_in_bf16_and_keeps_fp32_gradients():
    from temperament.train.world import World

    world = World("bf16")
    try:
        base = base_of("llama")
        ctx = context(base)
        ctx.world = world
        (player,) = build_players(spec(), ctx)
        batch = tokens(4, 3)
        rough, _ = gradient(player, CrossEntropy(), batch, 4)
        exact, _ = gradient(player_of(base_of("llama")), CrossEntropy(), batch, 4)
        assert all(g.dtype == torch.float32 for g in rough.values())
        assert 1e-5 < distance(exact, rough)[0] < 0.2
    finally:
        World("fp32")


def test_players_that_are_refused_leave_nothing_on_the_base():
    """The first is attached when a later one cannot be: a base that is used on must not keep its piece."""
    base = base_of("llama")
    late = PlayerSpec(objective={"Tokens": CrossEntropy()}, optimizer=AdamW(1e-3), trainable=[LoRA(rank=2)], on="nobody")
    with pytest.raises(UserError, match="nobody"):
        build_players(spec(trainable=[LoRA(rank=2)], players={"late": late}), context(base))
    assert not any("_pieces" in vars(m) for m in base.model.modules())


@dataclass(frozen=True)
class Near(CrossEntropy):
    """Reads another player as it began."""

    needs: ClassVar = ("late:start",)


def test_a_part_may_read_how_another_player_began(monkeypatch):
    """Where its pieces begin elsewhere than at nothing that is kept, though the one who reads it is built first."""
    monkeypatch.setattr(LoRAPiece, "starts_at_zero", False)
    late = PlayerSpec(objective={"Tokens": CrossEntropy()}, optimizer=AdamW(1e-3), trainable=[LoRA(rank=2)])
    asked = spec(objective=Near(), trainable=[LoRA(rank=2)], players={"late": late})
    policy, late = build_players(asked, context(base_of("llama")))
    assert not policy.live.versions and list(late.live.versions) == ["start"]
    began = {n: p.held.detach().clone() for n, p in late.live.params.items()}
    with torch.no_grad():
        for p in late.live.params.values():
            p.tensor.add_(1)
    with policy.views.at("late:start"):
        held = late.live.versions["start"]
        assert all(torch.equal(held[n], w) for n, w in began.items())
    for player in (policy, late):
        player.live.close()
