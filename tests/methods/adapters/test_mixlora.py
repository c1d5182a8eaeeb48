"""MixLoRA: the dense model at the start, known cases, the balance term exact under any split, an addition that loads again."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from temperament.bases.load import load
from temperament.delta import Delta
from temperament.errors import UserError
from temperament.methods.adapters.lora import LoRA
from temperament.methods.adapters.mixlora import Balance, MixLoRA
from temperament.methods.objectives.preference.dpo import DPO
from temperament.methods.objectives.sft.cross_entropy import CrossEntropy
from temperament.methods.regularizers.kl import KL
from temperament.protocols import Progress
from temperament.run.training import build_players
from temperament.train.live import Live
from temperament.train.loop import run_batch
from tests.methods.drive import carried_out, fresh, killed, laws, recipe, tiny
from tests.train.rows import Rows, context, spec, tokens

IDS = {"input_ids": torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(fresh()))}


def logits(base):
    with torch.no_grad():
        return base.model(**IDS).logits


def attached(base, shaken=True, **options):
    live = Live(base, [MixLoRA(**{"experts": 4, "rank": 3, **options}).build(base, context(base, seed=fresh()))])
    if shaken:
        with torch.no_grad():
            for p in live.params.values():
                p.tensor.add_(0.1 * torch.randn(p.tensor.shape))
    return live, [m for _, m in live.parts[0].around.values()]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_starts_as_the_dense_model(name):
    base = tiny(name)
    before = logits(base)
    live, _ = attached(base, shaken=False)
    assert torch.allclose(logits(base), before, atol=1e-5)
    with live.at("base"):
        assert torch.equal(logits(base), before)


def test_one_expert_is_lora_on_the_mlp():
    one, base = tiny(seed=7), tiny(seed=7)
    _, mixtures = attached(one, experts=1, k=1)
    lora = Live(base, [LoRA(rank=3, targets=["mlp"]).build(base, context(base))])
    for name, p in lora.params.items():
        layer, role = int(name.split("layers.")[1].split(".")[0]), name.split("_proj")[0].rpartition(".")[2]
        p.tensor.data = mixtures[layer].tensors[f"{role}_{name[-1]}"][0].detach().clone()
    assert torch.allclose(logits(one), logits(base), atol=1e-5)


def test_shared_products_are_the_naive_path_and_equal_logits_the_mean():
    base = tiny()
    _, mixtures = attached(base, k=4)
    mixture, mlp = mixtures[0], base.model.model.layers[0].mlp
    mixture.tensors["router"].data.zero_()
    x = torch.randn(5, 32)

    def expert(e):
        t, s = mixture.tensors, mixture.scale
        W = {r: getattr(mlp, f"{r}_proj").weight + s * t[f"{r}_B"][e] @ t[f"{r}_A"][e] for r in ("gate", "up", "down")}
        return (torch.nn.functional.silu(x @ W["gate"].T) * (x @ W["up"].T)) @ W["down"].T

    naive = sum(expert(e) for e in range(4)) / 4
    assert torch.allclose(mlp(x), naive, atol=1e-5)


def test_balance_is_a_times_k_at_uniform_use():
    balance = Balance(1, 4, 1.0)
    balance.load = torch.full((1, 4), 2 / 4)  # top 2 of 4, every expert as often
    p = torch.full((6, 4), 0.25)
    value = 4 * (p @ balance.load[0]).sum() / 6
    assert torch.allclose(value, torch.tensor(2.0))


def gradients(base, kind, micro, extra=(), objective=None, batch=None, mark=None):
    trainable = MixLoRA(experts=4, k=2, rank=2, balance=0.5, std=1.0)
    objective = objective or CrossEntropy()
    s = spec(trainable=[trainable], source=Rows(kind), batch=6, micro=micro, regularizers=list(extra), objective=objective)
    ctx = context(base, batch=6, micro=micro)
    player = build_players(s, ctx)[0]
    g = torch.Generator().manual_seed(5)
    for p in player.live.params.values():
        p.tensor.data += 0.1 * torch.randn(p.tensor.shape, generator=g)
    if mark:
        player.live.mark(mark)
    batch = s.source.open(ctx).batch(0) if batch is None else batch
    got = run_batch(player, next(iter(player.objectives.values())), batch, Progress(0, 1), micro)
    found = {n: p.tensor.grad for n, p in player.live.params.items()}
    player.live.close()
    return got, found


@pytest.mark.parametrize("kind", ["Tokens", "Pairs"])
def test_the_balance_of_a_batch_does_not_depend_on_its_split(kind):
    base = tiny()
    objective, extra = (DPO(), ()) if kind == "Pairs" else (CrossEntropy(), (KL(weight=0.3),))
    (one, a), (two, b) = (gradients(base, kind, micro, extra, objective) for micro in (6, 1))
    assert abs(one.terms["balance"] - two.terms["balance"]) < 1e-5
    assert all(torch.allclose(a[n], b[n], atol=1e-6) for n in a)


@dataclass(frozen=True)
class BesideItsMean(CrossEntropy):
    """The plain loss, with a forward of the running mean in it."""

    def loss(self, micro, views):
        with torch.no_grad():
            views.view("ema")(input_ids=micro.ids)
        return super().loss(micro, views)


def test_a_forward_of_another_version_counts_for_nothing():
    base, rows = tiny(), tokens(6, fresh())
    alone, a = gradients(base, "Tokens", 3, batch=rows)
    beside, b = gradients(base, "Tokens", 3, objective=BesideItsMean(), batch=rows, mark="ema")
    assert beside.terms == alone.terms and all(torch.equal(a[n], b[n]) for n in a)


def test_the_term_is_the_definition_over_real_tokens():
    base, rows = tiny(), tokens(6, fresh())
    got, _ = gradients(base, "Tokens", 2, batch=rows)
    seen = []
    live, mixtures = attached(base, shaken=False, k=2, std=1.0)
    live.close()
    # by hand: the same routers, every row alone and without padding
    trainable = MixLoRA(experts=4, k=2, rank=2, balance=0.5, std=1.0)
    live = Live(base, [trainable.build(base, context(base))])
    g = torch.Generator().manual_seed(5)
    for p in live.params.values():
        p.tensor.data += 0.1 * torch.randn(p.tensor.shape, generator=g)
    mixtures = [m for _, m in live.parts[0].around.values()]
    for m in mixtures:
        own = m.route
        m.route = lambda x, own=own, m=m: seen.append((m, *own(x)[:2])) or own(x)
    with torch.no_grad():
        for i in range(6):
            base.model(input_ids=rows.ids[i : i + 1, : int(rows.mask[i].sum())])
    n, value = int(rows.mask.sum()), 0.0
    for m in mixtures:
        P = torch.cat([p for k, p, _ in seen if k is m]).sum(0) / n
        slots = torch.cat([e for k, _, e in seen if k is m]).reshape(-1).bincount(minlength=4) / n
        value += float(4 * (P * slots).sum())
    assert abs(got.terms["balance"] - value) < 1e-4


def test_it_is_saved_and_built_again(tmp_path):
    base = tiny()
    before = logits(base)
    live, _ = attached(base)
    on, delta = logits(base), live.delta()
    live.close()
    assert set(delta.merges.values()) == {"never"}
    delta.save(tmp_path / "d")
    base.apply(Delta.load(tmp_path / "d"))
    assert torch.equal(logits(base), on)
    base.reset()
    base.apply(delta * 0.0)
    assert torch.allclose(logits(base), before, atol=1e-6)


def test_the_exactness_law():
    laws(tiny(), trainable=[MixLoRA(experts=3, rank=2), LoRA(rank=2, targets=["attention"])])


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    stack = [{"adapters.mixlora": {"experts": 3, "rank": 2}}, {"adapters.lora": {"rank": 2, "targets": ["attention"]}}]
    plan = recipe(stack, steps=3, micro=2)
    whole, broken = carried_out(plan, tmp_path / "a"), killed(plan, tmp_path / "b", after=2)
    assert whole.delta.digest == broken.delta.digest
    assert torch.equal(load(tmp_path / "a").model(**IDS).logits, whole.model(**IDS).logits)


def test_a_second_mixture_on_one_mlp_is_refused():
    """It would run the MLP's own maps and so leave the first one out."""
    base = tiny()
    live, _ = attached(base)
    delta = live.delta()
    live.close()
    base.apply(delta)
    with pytest.raises(UserError, match="start: base"):
        MixLoRA(experts=2).build(base, context(base))
    base.reset()
    assert MixLoRA(experts=2).build(base, context(base)).around
