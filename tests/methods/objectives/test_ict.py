"""iCT: zero on the consistency function of a point, a loss that knows no split, one dropout for both levels."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from temperament import parts
from temperament.bases.load import Base
from temperament.engine import consistency
from temperament.engine.denoise import Denoiser, Sampler, denoise
from temperament.engine.noise import process_of
from temperament.errors import UserError
from temperament.methods.objectives.consistency.ict import ICT
from temperament.nn import draws
from temperament.nn.context import context as within
from temperament.run.laws import distance
from tests.generators import CM, LCM, folder, pictures, unet
from tests.methods.drive import carried_out, fresh, killed
from tests.tiny import gradients, live, shake, views

pytest.importorskip("diffusers")
SCHEDULERS = pytest.mark.parametrize("scheduler", [LCM, CM], ids=["lcm", "cm"])
FIRST = {"first": 6, "last": 6}


class Knows(nn.Module):
    """What a network must say where every picture is the point m: f = the point on the boundary that the path leads to."""

    def __init__(self, m: torch.Tensor, process: Any):
        super().__init__()
        self.m, self.process, self.w = m, process, nn.Parameter(torch.zeros(()))
        self.t = None

    def forward(self, sample, timestep, return_dict=False):
        p = self.process
        t = torch.exp(timestep / 250).double() if hasattr(p, "low") else timestep
        wide = lambda v: v.to(sample).view(-1, 1, 1, 1)
        x = sample * (wide(t).square() + p.data**2).sqrt() if hasattr(p, "low") else sample
        a, s = (wide(v) for v in p.scales(t))
        a0, s0 = (wide(v) for v in p.scales(p.at(torch.tensor([p.sigmas[0]]).double())))
        f = a0 * self.m + s0 * (x - a * self.m) / s
        zero, one = torch.zeros_like(x), torch.ones_like(x)
        at_zero, slope = p.clean(zero, x, t), p.clean(one, zero, t) - p.clean(zero, zero, t)
        return ((f - at_zero) / torch.where(slope == 0, 1.0, slope) + self.w * 0,)


@SCHEDULERS
def test_the_loss_is_zero_where_all_pictures_are_one(scheduler):
    batch = pictures(6)
    batch.pixels[:] = batch.pixels[:1]
    process = process_of(scheduler)
    net = Knows(2 * batch.pixels[:1] - 1, process)
    it = live(Base("point", {"denoiser": net}, {"process": process}))
    exact = replace(ICT(**FIRST), weigh=False)
    got = exact.loss(batch, views(it))["consistency"].value
    lost = exact.loss(pictures(6), views(it))["consistency"].value
    assert float(got.abs()) < 1e-4 and float(lost) > 0.1
    sigma = torch.tensor([3.0]).double()
    t = process.at(sigma)
    a, _ = process.scales(t)
    x = torch.randn(1, 3, 8, 8)
    f = process.clean(net(process.given(a * x, t), process.asked(t))[0], a * x, t)
    least = process.sigmas[0]
    a0 = process.scales(process.at(torch.tensor([least]).double()))[0]
    torch.testing.assert_close(f / a0, net.m + least / 3.0 * (x - net.m), rtol=1e-3, atol=1e-4)


@SCHEDULERS
@pytest.mark.parametrize(
    "options", [{}, {"huber": None, "spread": None, "weigh": False}, {"solver": "base", "guidance": 2.0, "unsaid": 0.3}]
)
def test_one_by_one_is_all_at_once(scheduler, options):
    """Adapters with dropout: its draws, the noise and the level know the row, not its company."""
    it = shake(live(unet(scheduler), {"adapters.lora": {"rank": 2, "dropout": 0.3}}), 0.02)
    objective, batch = ICT(**FIRST, **options), pictures(5)
    one, got = gradients(it, objective, batch, 5)
    for micro in (1, 2):
        other, again = gradients(it, objective, batch, micro)
        assert distance(one, other)[0] < 1e-4
        assert again.loss == pytest.approx(got.loss, rel=1e-4) and again.counts == got.counts
    assert got.terms["levels"] == 7


def test_both_levels_meet_the_same_dropout():
    """At one and the same point student and teacher say the same, with dropout on: they draw by the row."""
    it = shake(live(unet(LCM), {"adapters.lora": {"rank": 4, "dropout": 0.5}}), 0.5)
    batch, apart = pictures(3), []

    class Same(ICT):
        def sigmas(self, denoiser, progress):
            return torch.ones(2, dtype=torch.float64)

        def distance(self, u):
            apart.append(float(u.detach().abs().max()))
            return ICT.distance(self, u)

    def said(rows):
        with within(draws=draws.Address(1, "forward", 2, rows)):
            denoiser = Denoiser.of(it)
            return denoiser(x, torch.full((3,), 400.0), denoiser.encode(batch.captions))

    x = torch.randn(3, 3, 8, 8)
    with within(draws=draws.Address(1, "forward", 2, torch.empty(0, dtype=torch.long))):
        Same(**FIRST, weigh=False, spread=None).loss(batch, views(it))
    assert apart[0] < 1e-5 and not torch.allclose(said(batch.examples), said(batch.examples + 1), atol=1e-3)


def test_the_teacher_is_the_network_itself_without_gradient():
    it, batch = live(unet(LCM)), pictures(4)
    objective = replace(ICT(**FIRST), weigh=False)
    denoiser, view = Denoiser.of(it), views(it)
    sigmas = objective.sigmas(denoiser, view.progress)
    two = consistency.pair(denoiser, denoiser.latents(batch.pixels), batch.examples, 0, sigmas,
                           consistency.chances(sigmas, objective.mean, objective.spread))  # fmt: skip
    torch.testing.assert_close(two.noisier / _a(denoiser, two.then) - two.cleaner / _a(denoiser, two.now),
                               two.apart.float().view(-1, 1, 1, 1) * _noise(batch), rtol=1e-3, atol=1e-3)  # fmt: skip
    told = denoiser.encode(batch.captions)
    u = denoiser.clean(two.noisier, two.then, told) - denoiser.clean(two.cleaner, two.now, told).detach()
    want = ((u.flatten(1).square().sum(1) + 0.00054**2 * 192).sqrt() - 0.00054 * 192**0.5).mean()
    wanted = torch.autograd.grad(want, [p.tensor for p in it.params.values()], allow_unused=True)
    got, out = gradients(it, objective, batch, 4)
    assert out.loss == pytest.approx(float(want.detach()), rel=1e-4)
    assert distance({n: g for n, g in zip(it.params, wanted, strict=True) if g is not None},
                    {n: g for n, g in got.items() if g.abs().sum() > 0})[0] < 1e-3  # fmt: skip


def _a(denoiser, t):
    return denoiser.process.scales(t)[0].view(-1, 1, 1, 1)


def _noise(batch):
    return draws.normal(0, "consistency/noise", 0, batch.examples, tuple(batch.pixels.shape[1:]))


def test_a_solver_that_knows_the_noise_is_training_by_noise():
    """Where the denoiser is right about the picture, its step of DDIM leads to the very point the same noise gives."""
    process, batch = process_of({**LCM, "prediction_type": "epsilon"}), pictures(4)
    x = 2 * batch.pixels - 1

    class Right(nn.Module):
        def forward(self, sample, timestep, return_dict=False):
            return (_noise(batch),)

    teacher = Denoiser(Base("right", {"denoiser": Right()}, {"process": process}))
    sigmas = consistency.levels(process, 9)
    two = consistency.pair(teacher, x, batch.examples, 0, sigmas, consistency.chances(sigmas, -1.1, 2.0))
    torch.testing.assert_close(consistency.led(teacher, two, {}, {}, 3.0).cleaner, two.cleaner, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_a_consistency_function_is_refused():
    from temperament.bases import train_diffusion as lab

    it = live(unet(lab.SCHEDULERS["unet"]))
    with pytest.raises(UserError, match="consistency model"):
        ICT(**FIRST).loss(pictures(2), views(it))
    with pytest.raises(ValueError, match="at most last"):
        ICT(first=20, last=10)


# ---- in a run --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [{}, {"teacher": "ema", "huber": None, "spread": None, "weigh": False}], ids=["ict", "ct"])
def test_killed_in_the_middle_of_its_curriculum_it_ends_in_the_same_bits(tmp_path, monkeypatch, first):
    like = folder(unet(LCM, 3), tmp_path / "base")
    monkeypatch.setitem(parts.index(), "data.test_pictures", "tests.generators:Pictures")
    train = {"source": "data.test_pictures", "objective": {"objectives.consistency.ict": {"first": 4, "last": 16, **first}},
             "trainable": {"adapters.lora": {"rank": 2, "dropout": 0.2, "targets": ["denoiser/.*to_[qv]"]}}, "batch": 4,
             "micro": 3, "steps": 7, "ema": 0.9, "optimizer": {"optim.adamw": {"lr": 1e-3}}}  # fmt: skip
    recipe = {"base": like, "seed": fresh(), "check": False, "steps": [{"name": "sft", "train": train}],
              "evaluation": {"items": 2, "keep": False, "diagnose": [], "suites": []}}  # fmt: skip
    one, two = carried_out(recipe, tmp_path / "one"), killed(recipe, tmp_path / "two", 4)
    assert one.json["delta"]["digest"] == two.json["delta"]["digest"]
    log = (tmp_path / "one" / "log.jsonl").read_text()
    assert all(f'"levels": {n}.0' in log for n in (5, 9, 17))


def test_it_samples_by_noising_anew():
    base = unet(CM)
    made = denoise(base, ["a red cross"] * 2, Sampler(3, 0.0, 1.0), record=True)
    assert made.chain.weights.tolist() == [[1, 1, 0]] * 2 and made.pixels.shape == (2, 3, 8, 8)
