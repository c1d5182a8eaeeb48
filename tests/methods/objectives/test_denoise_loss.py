"""A generator's loss against its formula, and whatever way its rows are split."""

from types import SimpleNamespace

import pytest
import torch

from temperament import parts
from temperament.bases import train_diffusion as lab
from temperament.engine.denoise import Denoiser, covered
from temperament.engine.noise import Diffusion, Edm, Flow
from temperament.nn.batch import Images
from temperament.protocols import Progress
from temperament.run.training import quiet_training
from temperament.train.live import Live
from temperament.train.loop import Player, Views, run_batch
from temperament.train.world import World
from tests.methods.drive import fresh


@pytest.fixture(scope="module", params=["unet", "flow"])
def base(request):
    return lab.fresh(request.param, 1)


def rows(n: int = 6) -> Images:
    captions = ["a red cross at the top left on navy", "", "a white bar on black"] * (n // 3)
    return Images(torch.rand(n, 3, 16, 16), torch.randint(0, 10**6, (n,)), captions=captions, prior=torch.arange(n) % 3 == 0)


def gradient(base, objective, whole, micro, seed=0):
    from temperament.methods.adapters.lora import LoRA
    from tests.train.rows import context

    for module in base.components.values():
        quiet_training(module)
    live = Live(base, [LoRA(rank=4, dropout=0.2).build(base, context(base))])
    for p in live.params.values():
        p.tensor.data.normal_(std=0.1, generator=torch.Generator().manual_seed(4))
    player = Player("policy", live, None, None, {}, [], Views(live, World(), micro, seed))
    try:
        out = run_batch(player, objective, whole, Progress(0, 2), micro)
        return out, {n: p.tensor.grad for n, p in live.params.items()}
    finally:
        live.close()


def test_any_split_has_the_same_gradient(base):
    whole, objective = rows(), parts.build({"objectives.diffusion.denoise": {"unsaid": 0.3, "prior": 0.7}})
    one, a = gradient(base, objective, whole, 6)
    two, b = gradient(base, objective, whole, 1)
    order = torch.randperm(6)
    _, c = gradient(base, objective, whole.select(order), 4)
    for name in a:
        for other in (b, c):
            torch.testing.assert_close(a[name], other[name], rtol=1e-4, atol=1e-6)
    assert one.terms.keys() == {"mse", "prior"} and one.terms == pytest.approx(two.terms, rel=1e-4)


def test_the_two_terms_are_two_losses_of_their_own(base):
    """Concatenated rows: the mean over the subject's, and prior times the mean over the base's own."""
    whole, lam = rows(), 0.3
    both, _ = gradient(base, parts.build({"objectives.diffusion.denoise": {"prior": lam}}), whole, 6)
    plain = parts.build("objectives.diffusion.denoise")
    one, _ = gradient(base, plain, whole.select((~whole.prior).nonzero()[:, 0]), 6)
    two, _ = gradient(base, plain, whole.select(whole.prior.nonzero()[:, 0]), 6)
    assert both.loss == pytest.approx(one.loss + lam * two.loss, rel=1e-4)


def test_it_is_the_formula(base):
    """E |f(x_t) - y|^2 / d by hand, with y as the scheduler says."""
    whole, seed = rows(), fresh()
    player = Views(Live(base, []), World(), 6, seed)
    objective = parts.build({"objectives.diffusion.denoise": {"min_snr": 5.0}})
    got = objective.loss(whole, player)
    denoiser = Denoiser.of(base)
    row = covered(denoiser, whole, seed)
    a, s = denoiser.process.scales(row.t)
    snr = (a / s) ** 2
    x = denoiser.latents(whole.pixels)  # both say velocities: n - x of a flow, a n - s x of a diffusion
    wide = lambda v: v.view(-1, 1, 1, 1)
    target = row.noise - x if base.id == "lab/flow" else wide(a) * row.noise - wide(s) * x
    with torch.no_grad():
        error = (denoiser(row.x, row.t, denoiser.encode(whole.captions)) - target).square().flatten(1).mean(1)
    want = error * torch.minimum(snr, torch.tensor(5.0)) * s**2
    torch.testing.assert_close(got["mse"].value, want[~whole.prior].sum(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got["prior"].value, want[whole.prior].sum(), rtol=1e-4, atol=1e-5)
    assert got["prior"].count == 2


BETAS = tuple(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).tolist())
STEPS = torch.tensor([1.0, 30.0, 200.0, 500.0, 800.0, 990.0])
PROCESSES = [
    *((Diffusion(BETAS, says), STEPS) for says in ("epsilon", "v_prediction", "sample")),
    (Diffusion(BETAS, boundary=True), STEPS),
    (Flow(), STEPS / 1000),
    (Edm(boundary=False), STEPS / 20),
    (Edm(), STEPS / 20),
]


@pytest.mark.parametrize("process, t", PROCESSES)
def test_min_snr_is_one_weight_on_the_error_of_the_picture_whatever_the_network_says(process, t):
    """min(snr, gamma) |x^ - x|^2."""
    g = torch.Generator().manual_seed(fresh())
    x, n, wrong = (torch.randn(6, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(3))
    objective = parts.build({"objectives.diffusion.denoise": {"min_snr": 5.0}})
    a, s = (v.double() for v in process.scales(t))
    x_t, right = a.view(-1, 1, 1, 1) * x + s.view(-1, 1, 1, 1) * n, process.target(x, n, t)
    picture = (process.clean(right + wrong, x_t, t) - process.clean(right, x_t, t)).square().flatten(1).mean(1)
    got = wrong.square().flatten(1).mean(1) * objective._weight(SimpleNamespace(process=process), t)
    torch.testing.assert_close(got, (a / s).square().clamp(max=5.0) * picture, rtol=1e-4, atol=1e-10)
    if not getattr(process, "boundary", False) or isinstance(process, Edm):  # what it should say shows the picture
        torch.testing.assert_close(process.clean(right, x_t, t), x, rtol=1e-4, atol=1e-4)
