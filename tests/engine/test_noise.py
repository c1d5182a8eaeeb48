"""Noise processes that a consistency function may stand on: against diffusers, and their levels against each other."""

import math
from itertools import pairwise

import pytest
import torch

from temperament.engine import consistency
from temperament.engine.denoise import move
from temperament.engine.noise import Diffusion, Edm, Flow, karras, process_of
from temperament.errors import UserError
from tests.generators import CM, LCM

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_steps_of_a_consistency_model_are_those_of_diffusers(steps):
    theirs = diffusers.CMStochasticIterativeScheduler(**{k: v for k, v in CM.items() if k != "_class_name"})
    theirs.set_timesteps(steps)
    ours, times = process_of(theirs), process_of(CM).grid(steps)
    assert ours == process_of(CM) and ours.renoises
    torch.testing.assert_close(times.float(), theirs.sigmas, rtol=1e-5, atol=1e-6)
    x, out = torch.randn(2, 2, 3, 4, 4) * 3
    for i, (now, then) in enumerate(pairwise(times)):
        torch.testing.assert_close(ours.asked(now[None]).double(), theirs.timesteps[i : i + 1], rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(ours.given(x, now.expand(2)), theirs.scale_model_input(x, theirs.timesteps[i]))
        made = theirs.step(out, theirs.timesteps[i], x, generator=torch.manual_seed(i)).prev_sample
        noise = torch.randn(x.shape, generator=torch.manual_seed(i))
        mean, spread = move(ours, x, ours.clean(out, x, now.expand(2)), now, then, 0.0)
        torch.testing.assert_close(mean + spread * noise, made, rtol=1e-4, atol=1e-5)
    assert spread == 0 and torch.equal(ours.clean(out, x, torch.full((2,), 0.002, dtype=torch.float64)), x)


def test_a_step_of_edm_is_that_of_diffusers():
    theirs = diffusers.EDMEulerScheduler()
    theirs.set_timesteps(5)
    ours, (x, out) = process_of(theirs), torch.randn(2, 2, 3, 4, 4)
    times = ours.grid(5)
    torch.testing.assert_close(times.float(), theirs.sigmas, rtol=1e-5, atol=1e-6)
    for i in (0, 1):
        want = theirs.step(out, theirs.timesteps[i], x).prev_sample
        mean, spread = move(ours, x, ours.clean(out, x, times[i].expand(2)), times[i], times[i + 1], 0.0)
        torch.testing.assert_close(mean, want, rtol=1e-3, atol=1e-4)
        assert spread == 0


@pytest.mark.parametrize("process", [process_of(LCM), process_of(CM), Edm(boundary=False, scale=0.25), Flow()])
def test_a_level_is_noise_over_signal_everywhere(process):
    sigmas = consistency.levels(process, 30)
    a, s = process.scales(process.at(sigmas))
    torch.testing.assert_close((s / a).double(), sigmas, rtol=1e-5, atol=1e-7)
    assert (sigmas[0], sigmas[-1]) == process.sigmas and (sigmas.diff() > 0).all()
    x, n = torch.randn(2, 30, 3, 2, 2)
    wide = [v.float().view(-1, 1, 1, 1) for v in (a, s, sigmas)]
    torch.testing.assert_close((wide[0] * x + wide[1] * n) / wide[0], x + wide[2] * n, rtol=1e-4, atol=1e-5)


def test_what_edm_should_say_is_what_shows_the_picture():
    process, (x, n) = Edm(), torch.randn(2, 5, 3, 4, 4)
    t = process.times(torch.rand(5)).clamp(min=0.01)
    noised = x + t.view(-1, 1, 1, 1) * n
    torch.testing.assert_close(process.clean(process.target(x, n, t), noised, t), x, rtol=1e-3, atol=2e-3)


def test_the_boundary_is_what_it_is_given():
    for process in (process_of(LCM), process_of(CM)):
        least = consistency.levels(process, 11)[:1].expand(2)
        x, out = torch.randn(2, 2, 3, 4, 4)
        assert torch.equal(process.clean(out, x, process.at(least)), x)
    assert isinstance(process_of(LCM), Diffusion)


def test_levels_run_as_the_paper_writes_them():
    low, high, N = 0.002, 80.0, 19
    want = [(low ** (1 / 7) + i / (N - 1) * (high ** (1 / 7) - low ** (1 / 7))) ** 7 for i in range(N)]
    torch.testing.assert_close(karras(low, high, N), torch.tensor(want, dtype=torch.float64))
    sigmas = karras(low, high, N)
    p = consistency.chances(sigmas, -1.1, 2.0)
    normal = torch.distributions.Normal(torch.tensor(-1.1).double(), torch.tensor(2.0).double())
    mass = normal.cdf(sigmas[1:].log()) - normal.cdf(sigmas[:-1].log())
    torch.testing.assert_close(p, mass / mass.sum())
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    for first, last, total in ((10, 1280, 800), (2, 32, 997), (7, 7, 50)):
        seen = [consistency.doubled(k, total, first, last) for k in range(total)]
        assert seen[0] == first + 1 and seen == sorted(seen) and max(seen) <= last + 1
        assert len(set(seen)) == math.log2(last / first) + 1


def test_pseudo_huber_is_a_square_near_zero_and_a_distance_far_away():
    c = 0.03
    u = torch.randn(4, 3, 5, 5)
    tiny, far = u * 1e-5, u * 1e4
    square, norm = (u.flatten(1).square().sum(1), u.flatten(1).norm(dim=1))
    torch.testing.assert_close(consistency.pseudo_huber(tiny, c), 1e-10 * square / (2 * c), rtol=1e-4, atol=0)
    torch.testing.assert_close(consistency.pseudo_huber(far, c), 1e4 * norm - c, rtol=1e-6, atol=0)


def test_a_schedule_that_is_rescaled_to_pure_noise_is_refused_not_misread():
    plain = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    assert process_of(plain | {"rescale_betas_zero_snr": False}) == process_of(plain)
    with pytest.raises(UserError, match="rescale_betas_zero_snr"):
        process_of(plain | {"rescale_betas_zero_snr": True})
