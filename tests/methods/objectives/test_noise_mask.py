"""Learned noise masks: addressed Beta draws, a mask of light, two players in one step, and a gradient that is the expected
cost's."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import context, images, rng, seed, seeing

from temperament import parts
from temperament.engine import see
from temperament.engine.mask import blurred, masked
from temperament.errors import UserError
from temperament.methods.adapters.mask_policy import MaskPolicy
from temperament.nn import draws
from temperament.protocols import Progress
from temperament.run.recipe import PlayerSpec, Train
from temperament.run.training import build_players, quiet_training
from temperament.train.loop import prepared, run_batch, train
from tests.methods.drive import laws

# ---- draws -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a, b", [(0.2, 0.4), (0.7, 3.0), (1.0, 1.0), (6.0, 2.0), (80.0, 80.0)])
def test_beta_draws_are_of_that_distribution(a, b):
    n = 40_000
    full = lambda v: torch.full((n, 1), v)
    m = draws.beta(full(a), full(b), seed(), "test", 0, torch.arange(n))[:, 0].double().sort().values
    grid = torch.linspace(1e-9, 1 - 1e-9, 400_001, dtype=torch.float64)
    u = (grid[1:] + grid[:-1]) / 2
    log = (a - 1) * u.log() + (b - 1) * (1 - u).log() + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    cdf = (log.exp() * (grid[1] - grid[0])).cumsum(0)
    inside = (m > 0.02) & (m < 0.98)
    at = cdf[((m[inside] - grid[0]) / (grid[1] - grid[0])).long().clamp(0, len(cdf) - 1)]
    ranks = (torch.arange(n, dtype=torch.float64)[inside] + 0.5) / n
    shift = 1 - cdf[-1] if a < 1 else 0.0  # what the sum misses at the pole at 0
    assert float((at + shift - ranks).abs().max()) < 2.2 / math.sqrt(n) + 2e-3
    assert abs(float(m.mean()) - a / (a + b)) < 5 * math.sqrt(a * b / ((a + b) ** 2 * (a + b + 1)) / n)


def test_a_draw_is_addressed():
    s, a, b = seed(), 1 + 3 * torch.rand(6, 4, generator=rng()), 1 + 3 * torch.rand(6, 4, generator=rng())
    whole, pick = draws.beta(a, b, s, "p", 2, torch.arange(10, 16)), torch.tensor([5, 0, 3])
    again = draws.beta(a[pick], b[pick], s, "p", 2, torch.arange(10, 16)[pick])
    assert torch.allclose(again, whole[pick], rtol=2e-7, atol=0)  # a last place at most
    assert whole.unique().numel() == 24 and not torch.equal(draws.beta(a, b, s, "p", 3, torch.arange(10, 16)), whole)


# ---- masks -----------------------------------------------------------------------------------------------------------------


def test_the_mask_of_a_concentrated_beta_is_a_half_everywhere():
    rows = images(3)
    a = torch.full((3, 16), 25.0).exp()
    cells = draws.beta(a, a, seed(), "test", 0, rows.examples)
    assert torch.allclose(masked(rows.pixels, cells, 5, 2.0), 0.5 * rows.pixels, atol=1e-4)


def test_a_mask_by_hand():
    cells = torch.rand(2, 16, generator=rng())
    got = masked(torch.ones(2, 3, 16, 16), cells, 1, 0.0)
    for y, x in ((0, 0), (3, 4), (15, 11)):
        assert torch.equal(got[:, 1, y, x], cells[:, 4 * (y // 4) + x // 4])
    x = torch.rand(1, 1, 9, 7, generator=rng())
    w = torch.tensor([math.exp(-(d**2) / (2 * 0.8**2)) for d in (-1, 0, 1)])
    w = w / w.sum()
    wide = F.pad(x, (1, 1, 1, 1), mode="reflect")
    want = sum(w[i] * w[j] * wide[..., i : i + 9, j : j + 7] for i in range(3) for j in range(3))
    assert torch.allclose(blurred(x, 3, 0.8), want, atol=1e-6)


def test_the_score_function_gradient_is_that_of_the_expected_cost():
    """One cell, a cost of 1 above a level and -0.5 below: the mean of cost * grad log p against numbers by integration."""
    n, level, a, b = 60_000, 0.37, 0.4, -0.2
    x = torch.tensor([a, b], dtype=torch.float64, requires_grad=True)
    column = lambda v: torch.full((n, 1), math.exp(v))
    m = draws.beta(column(a), column(b), seed(), "test", 0, torch.arange(n))[:, 0].double()
    cost = torch.where(m > level, 1.0, -0.5).double()
    grads = []
    for k in (0, 1):
        up = torch.distributions.Beta(*(x.exp() + 0.0).unbind()).log_prob(m)
        one = torch.autograd.grad(up, x, grad_outputs=cost, retain_graph=True)[0][k] / n
        grads.append(float(one))
    # d/dk E[cost] = 1.5 d/dk P(m > level), by the midpoint rule
    points = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    points = level + (1 - level) * (1 - (1 - points) ** 3)  # dense where the density may be large
    weight = torch.diff(torch.cat([torch.tensor([level]).double(), points]))

    def above(p: float, q: float) -> float:
        mid = points - weight / 2
        density = torch.distributions.Beta(math.exp(p), math.exp(q)).log_prob(mid.clamp(max=1 - 1e-12)).exp()
        return float((density * weight).sum())

    h = 1e-3
    want = [1.5 * (above(a + h, b) - above(a - h, b)) / (2 * h), 1.5 * (above(a, b + h) - above(a, b - h)) / (2 * h)]
    assert grads == pytest.approx(want, abs=0.03)


# ---- two players -----------------------------------------------------------------------------------------------------------

MASK = {"grid": 4, "kernel": 3, "sigma": 1.0}


def spec(mode: str = "reinforce", **more) -> Train:
    part = lambda name, **o: parts.build({name: o})
    masker = PlayerSpec(
        objective={"Images": part("objectives.policy.noise_mask", mode=mode)},
        optimizer=part("optim.sgd", lr=0.1),
        trainable=[part("select.full"), part("adapters.mask_policy", grid=4, width=6)],
        on="start",
    )
    options = {
        "source": part("data.digits", rows=40),
        "objective": part("objectives.classify.noise_mask", mode=mode, **MASK),
        "trainable": [part("select.full"), part("adapters.class_head", of="data.digits", gain=1.0)],
        "optimizer": part("optim.sgd", lr=0.1),
        "steps": 3,
        "batch": 6,
        "micro": 6,
        "clip": None,
        "players": {"masker": masker},
    }
    return Train(**options | more)


def players(mode: str, micro: int = 6):
    base = seeing("resnet")
    quiet_training(base.model)
    one = spec(mode, micro=micro)
    return base, one, build_players(one, context(base, batch=6, micro=micro))


@pytest.mark.parametrize("mode", ["reinforce", "official"])
@pytest.mark.parametrize("micro", [6, 2])
def test_both_gradients_by_plain_autograd(mode, micro):
    """Of the official loss, mean(s) * CE with one backward for both nets, the two players take exactly each its own share."""
    base, _, (classifier, masker) = players(mode, micro)
    rows = images(6)
    rows.labels[2] = 9
    got = {}
    for player in (classifier, masker):
        run_batch(player, player.objectives["Images"], rows, Progress(0, 3), micro)
        got[player.name] = {n: p.tensor.grad for n, p in player.live.params.items()}
    policy = masker.live.heads["mask"]
    with masker.live.at("live"):
        a, b = policy.exponents(policy(see.features(base.model, base, rows.pixels))).exp().unbind(1)
        logp = torch.distributions.Beta(a, b).log_prob(rows.drawn)
        s = logp.logsumexp(1)
        theirs = lambda loss: torch.autograd.grad(loss, [p.tensor for p in masker.live.params.values()], allow_unused=True)
        with classifier.live.at("live"):
            x = masked(rows.pixels, rows.drawn, 3, 1.0)
            cost = F.cross_entropy(see.logits(base.model, base, x, "classes"), rows.labels, reduction="none")
            scale = s.mean().detach() if mode == "official" else 1.0
            own = list(classifier.live.params.values())
            want = torch.autograd.grad(scale * cost.mean(), [p.tensor for p in own], allow_unused=True)
        wanted = theirs(s.mean() * cost.mean().detach()) if mode == "official" else theirs(
            ((cost.detach() - cost.detach().mean()) * logp.mean(1)).mean())  # fmt: skip
    for name, found in (("policy", want), ("masker", wanted)):
        size = math.sqrt(sum(float(w.square().sum()) for w in found if w is not None))
        assert size > 0
        for mine, w in zip(got[name].values(), found, strict=True):
            away = [t for t in (mine, w) if t is not None]
            assert not away or float((away[0] - away[1] if len(away) == 2 else away[0]).norm()) < 2e-4 * size


def test_the_masks_are_those_of_the_policy_and_its_trunk_is_its_own():
    base, one, (classifier, masker) = players("reinforce")
    stream = one.source.open(context(base, batch=6, live=classifier.live))
    before = {p.name: {n: t.tensor.detach().clone() for n, t in p.live.params.items()} for p in (classifier, masker)}
    policy = masker.live.heads["mask"]
    calmed = policy.calmed.clone()
    assert not calmed.requires_grad and (calmed >= 0).all() and (calmed <= 1).all()
    whole, seen = stream.batch(0), {}

    class Once:
        steps_per_epoch = 1

        def batch(self, step, progress):
            with torch.no_grad(), masker.live.at("live"):
                seen["raw"] = policy(see.features(base.model, base, whole.pixels)).mean(0)
            return whole

    train([classifier, masker], Once(), 1, micro=6)
    assert torch.allclose(policy.calmed, 0.99 * calmed + 0.01 * seen["raw"], atol=1e-5)
    assert policy.mean[1] == 1 and torch.allclose(policy.mean[0], whole.cost.mean())
    for p in (classifier, masker):
        moved = [n for n, t in p.live.params.items() if not torch.equal(t.tensor, before[p.name][n])]
        assert any("encoder" in n for n in moved)
    trunk = [n for n in classifier.live.params if n in masker.live.params]
    assert trunk and any(not torch.equal(classifier.live.params[n].tensor, masker.live.params[n].tensor) for n in trunk)
    kept = masker.live.state_dict()
    with torch.no_grad():
        policy.calmed.zero_(), policy.mean.zero_()
    masker.live.load_state_dict(kept)
    assert torch.allclose(policy.calmed, 0.99 * calmed + 0.01 * seen["raw"], atol=1e-5) and policy.mean[1] == 1


def test_gradient_flows_only_through_the_small_part():
    head = MaskPolicy(5, 4, 9, 0.9, seed())
    h = torch.randn(3, 5, generator=rng())
    raw = head(h)
    assert torch.allclose(head.exponents(raw), 0.9 * head.calmed + 0.1 * raw)
    (g,) = torch.autograd.grad(head.exponents(raw).sum(), raw)
    assert torch.allclose(g, torch.full_like(g, 0.1))


def test_uniform_masks_need_no_player_and_a_masker_needs_masks():
    base, _, (classifier, masker) = players("reinforce")
    rows = images(6)
    with pytest.raises(UserError, match=r"classify\.noise_mask"):
        prepared(masker, masker.objectives["Images"], rows, Progress(0, 1))
    alone = parts.build({"objectives.classify.noise_mask": {"masker": None, **MASK}})
    got = run_batch(classifier, alone, rows, Progress(0, 1), 6)
    x = masked(rows.pixels, draws.uniform(classifier.views.seed, "mask", 0, rows.examples, (16,)), 3, 1.0)
    with classifier.live.at("live"):
        want = F.cross_entropy(see.logits(base.model, base, x, "classes"), rows.labels)
    assert got.loss == pytest.approx(float(want.detach()), rel=1e-5)


def test_the_laws_hold_for_both_players():
    one = spec()
    laws(seeing("resnet"), **{k: getattr(one, k) for k in ("source", "objective", "trainable", "players")})


def test_a_cue_is_on_training_pictures_alone():
    from temperament.bases.worlds import sprites

    base = seeing()
    told = parts.build({"data.sprites": {"figures": 4, "rows": 60, "cue": 1.0}})
    ground = lambda p: tuple(round(float(v), 2) for v in p.pixels((16, 16))[:, 0, 7])
    rows = told.open(context(base)).pictures
    colours = [tuple(round(v, 2) for v in c) for c in sprites.BACKGROUNDS.values()]
    share = lambda some: sum(ground(p) == colours[p.label % 4] for p in some) / len(some)
    assert share(rows) > 0.8 and share(told.held(base)) < 0.5
