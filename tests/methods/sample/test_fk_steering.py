"""FK steering of pictures: what is left when it has nothing to do, best-of-k by hand, and a Gaussian tilted by its reward."""

from dataclasses import dataclass

import pytest
import torch
from methods.sample.toy import gaussian, small

from temperament.engine.denoise import Hook, Sampler, denoise
from temperament.errors import UserError
from temperament.methods.sample.fk_steering import APART, FKSteering
from temperament.parts import build
from temperament.protocols import Decode

CAPTIONS = ["a red cross at the top left on navy", "a blue disc on black", "a white bar on grey"]
DRAWN = Sampler(5, 1.0, 1.0)


@dataclass(frozen=True)
class Value:
    """The latent itself, (rows, 1, 1, 1)."""

    def value(self, pixels, captions):
        return 2 * pixels.flatten(1)[:, 0] - 1


def steered(base, how=DRAWN, captions=CAPTIONS, seed=2, **options):
    part = build({"sample.fk_steering": {"reward": "rewards.brightness", **options}}, Decode)
    return denoise(base, captions, how, seed=seed, hooks=part.hooks(base), record=True)


def test_one_particle_is_the_sampler_itself():
    base = small("unet", 1)
    assert torch.equal(steered(base, particles=1).pixels, denoise(base, CAPTIONS, DRAWN, seed=2).pixels)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_weighed_only_at_the_end_it_is_best_of_k(eta):
    base, k, how = small("unet", 1), 3, Sampler(4, eta, 1.0)
    got = steered(base, how, particles=k, times=0)
    ids = [torch.arange(3) + APART * j for j in range(k)]
    drafts = torch.stack([denoise(base, CAPTIONS, how, seed=2, ids=i).pixels for i in ids])  # (k, rows, ...)
    values = torch.stack([build("rewards.brightness").value(d, CAPTIONS) for d in drafts])
    want = drafts[values.argmax(0), torch.arange(3)]
    torch.testing.assert_close(got.pixels, want, rtol=1e-4, atol=1e-4)


def test_what_is_given_is_the_end_of_its_own_way():
    """The recorded chain of the chosen particle ends in the picture, each step beginning where the one before ended."""
    made = steered(small("flow", 2), Sampler(6, 1.0, 2.0), particles=4, strength=200.0, times=3)
    chain = made.chain
    assert chain.captions == CAPTIONS and torch.equal(chain.decisions[:, -1], made.latents)
    assert torch.equal(chain.before[:, 1:], chain.decisions[:, :-1])


def test_pictures_of_one_caption_do_not_know_the_others():
    base = small("unet", 3)
    together, k = steered(base, particles=3, strength=50.0), 1
    part = build({"sample.fk_steering": {"reward": "rewards.brightness", "particles": 3, "strength": 50.0}})
    alone = denoise(base, CAPTIONS[k : k + 1], DRAWN, seed=2, ids=torch.tensor([k]), hooks=part.hooks(base))
    torch.testing.assert_close(alone.pixels[0], together.pixels[k], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["diff", "max", "sum"])
@pytest.mark.parametrize("ess", [None, 0.6])
def test_a_gaussian_is_tilted_by_its_reward(kind, ess):
    """p N(0, 1), r(x) = x, strength b: the target is N(b, 1); what a plain sampler of as many steps gives has its own variance
    v, and is tilted to mean b v."""
    base, how, n, b = gaussian(0.0), Sampler(12, 1.0, 1.0), 4000, 0.6
    plain = denoise(base, [""] * n, how, seed=8).latents.flatten()
    part = FKSteering(Value(), particles=n, strength=b, potential=kind, ess=ess, give="draw")
    hook = part.hooks(base)[0]

    class Look(Hook):
        def end(self, state):
            self.x, self.w = state.x.flatten().double(), None

    look = Look()
    denoise(base, [""], how, seed=9, hooks=[look, hook])
    w = hook.crowd.share()[0]
    mean = float((w * look.x).sum())
    assert mean == pytest.approx(b * float(plain.var()), abs=0.12)
    assert float((w * (look.x - mean).square()).sum()) == pytest.approx(float(plain.var()), abs=0.2)


def test_steering_raises_the_reward_it_steers_for():
    base = gaussian(0.0)
    hook = lambda **o: FKSteering(Value(), **{"particles": 4, **o}).hooks(base)
    means = [float(denoise(base, [""] * 200, Sampler(20, 1.0, 1.0), seed=1, hooks=h).latents.mean())
             for h in ([], hook(times=0), hook(strength=4.0))]  # fmt: skip
    assert means[0] < means[1] < means[2], means


def test_copies_that_cannot_part_are_refused():
    with pytest.raises(UserError, match="never part"):
        steered(small("unet", 1), Sampler(4, 0.0, 1.0))
    for bad in ({"first": 0.9, "last": 0.1}, {"ess": 0.0}, {"potential": "min"}, {"particles": 0}):
        with pytest.raises(UserError):
            build({"sample.fk_steering": {"reward": "rewards.brightness", **bad}})
