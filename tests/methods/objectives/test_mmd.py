"""MMD: against the double loop, zero between equals, a closed form; through the whole sampler, whatever the split."""

from itertools import product

import numpy as np
import pytest
import torch

from temperament import parts
from temperament.bases import train_diffusion as lab
from temperament.engine.denoise import Denoiser, Sampler, denoise
from temperament.engine.discrepancy import gram, mmd, weighted
from temperament.engine.measure import System, content_key
from temperament.engine.pictures import Picture
from temperament.errors import UserError
from temperament.methods.evaluate.kid import KidSkill
from temperament.methods.objectives.diffusion.mmd import MMD
from temperament.run.laws import distance
from temperament.run.outcome import set_level
from tests.generators import WORDS, pictures, unet
from tests.tiny import gradients, live, shake, views

pytest.importorskip("diffusers")
DDIM = lab.SCHEDULERS["unet"]


@pytest.mark.parametrize("kernel", ["polynomial", "linear", "rbf"])
def test_it_is_the_double_loop(kernel):
    x, y = torch.randn(5, 7).double(), 1 + torch.randn(4, 7).double()
    k = {"polynomial": lambda u, v: (float(u @ v) / 7 + 1) ** 3, "linear": lambda u, v: float(u @ v),
         "rbf": lambda u, v: float(torch.exp(-(u - v).square().sum() / 14))}[kernel]  # fmt: skip
    pairs = lambda a: [k(a[i], a[j]) for i, j in product(range(len(a)), repeat=2) if i != j]
    across = [k(u, v) for u, v in product(x, y)]
    want = np.mean(pairs(x)) + np.mean(pairs(y)) - 2 * np.mean(across)
    assert float(mmd(x, y, kernel)) == pytest.approx(float(want), rel=1e-9, abs=1e-12)


def test_between_equals_it_is_zero_on_average():
    found = torch.stack([mmd(torch.randn(8, 4), torch.randn(8, 4)) for _ in range(500)])
    assert abs(float(found.mean())) < 3.5 * float(found.std()) / 500**0.5


def test_of_a_linear_kernel_it_is_the_distance_of_means_less_what_chance_makes_of_it():
    x, y = torch.randn(6, 5).double(), 2 * torch.randn(9, 5).double() + 1
    far = (x.mean(0) - y.mean(0)).square().sum()
    want = far - torch.cov(x.T).trace() / 6 - torch.cov(y.T).trace() / 9
    torch.testing.assert_close(mmd(x, y, "linear"), want)


def test_a_resample_is_that_of_its_rows_without_twins():
    x, y = torch.randn(6, 5), torch.randn(4, 5)
    known = gram(x, x), gram(y, y), gram(x, y)
    torch.testing.assert_close(weighted(*known, torch.ones(6).double()), mmd(x, y))
    times = torch.tensor([2.0, 0, 1, 1, 0, 2]).double()
    rows = [0, 0, 2, 3, 5, 5]
    pairs = [known[0][a, b] for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j and a != b]
    own = torch.stack(pairs).mean()
    theirs = mmd(x, y) - mmd(x, y) + (known[1].sum() - known[1].diagonal().sum()) / 12
    want = own + theirs - 2 * known[2][rows].mean()
    torch.testing.assert_close(weighted(*known, times), want)


@pytest.mark.parametrize("options", [{}, {"eta": 1.0, "guidance": 2.0, "kernel": "rbf"}])
def test_any_split_has_the_gradient_of_the_whole_set(options):
    """And it is that of the sampler run with a graph, without recomputation."""
    it = shake(live(unet(DDIM), {"adapters.lora": {"rank": 2, "targets": ["denoiser/.*to_[qv]"]}}), 0.1)
    objective, batch = MMD(**{"steps": 3, "guidance": 1.0, **options}), pictures(5)
    one, got = gradients(it, objective, batch, 5)
    for micro in (1, 2):
        other, again = gradients(it, objective, batch, micro)
        assert distance(one, other)[0] < 1e-3 and again.loss == pytest.approx(got.loss, rel=1e-3, abs=1e-5)
    eyes = parts.build("aides.random_features")
    denoiser, sampler = Denoiser.of(it), objective.sampler(Denoiser.of(it))
    made = denoise(denoiser, batch.captions, sampler, seed=0, draw=1, ids=batch.examples, keep=3)
    want = mmd(eyes.ask(made.pixels), eyes.ask(batch.pixels), objective.kernel)
    grads = torch.autograd.grad(want, [p.tensor for p in it.params.values()])
    assert got.loss == pytest.approx(float(want.detach()), rel=1e-3, abs=1e-5)
    assert distance(dict(zip(it.params, grads, strict=True)), one)[0] < 1e-3


def test_real_pictures_have_no_gradient():
    batch, it = pictures(4), live(unet(DDIM))
    batch.pixels.requires_grad_(True)
    rows = MMD(steps=2, guidance=1.0, recompute=False).statistics(batch, views(it))
    rows.retain_grad()
    MMD().couple(rows)["mmd"].value.backward()
    assert batch.pixels.grad is None and rows.grad[:, 0].abs().sum() > 0 and (rows.grad[:, 1] == 0).all()


def test_what_has_no_set_or_no_eyes_is_refused():
    with pytest.raises(UserError, match="at least 2"):
        MMD().counts(pictures(1))
    with pytest.raises(UserError, match="features"):
        parts.build({"objectives.diffusion.mmd": {"features": "aides.match"}})


class Held:
    def held(self, base):
        return [Picture(p, caption=WORDS[i % 3]) for i, p in enumerate(torch.rand(12, 3, 8, 8).numpy())]


def test_kid_is_one_number_of_the_set_with_its_bootstrap():
    base, features = unet(DDIM), parts.build("aides.random_features")
    real = torch.stack([p.pixels((8, 8)) for p in Held().held(base)])
    skill = KidSkill("kid", tuple(WORDS * 3), real, features, "retained")
    outcomes = skill.measure(System(base, [parts.build({"sample.sampler": {"steps": 2, "guidance": 1.0}})]))
    assert len(outcomes) == 9 and all(o.score is None for o in outcomes)
    found = set_level("kid", "retained", "KID", outcomes, skill.of_set(outcomes), **skill.how)
    ids = torch.arange(9) + int(content_key("kid")[:6], 16)
    made = denoise(base, WORDS * 3, Sampler(2, 0.0, 1.0), ids=ids).pixels
    assert found.value == pytest.approx(float(mmd(features.ask(made), features.ask(real))), rel=1e-3, abs=1e-5)
    assert found.kind == "set" and not found.higher_is_better and np.std(found.draws) > 0
    mixed = KidSkill("kid", tuple(WORDS * 3), made, features, "retained")
    assert float(mixed.of_set(outcomes)(np.arange(9))) < found.value
