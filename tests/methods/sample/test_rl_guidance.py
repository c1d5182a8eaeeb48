"""RLG: the ends of its scale to the bit, the same in any parametrisation, and the Gaussian of which it is exact."""

import pytest
import torch
from methods.sample.toy import gaussian, moved, small

from temperament.delta import Delta, Dense
from temperament.engine.denoise import Sampler, denoise
from temperament.engine.measure import Pure, System
from temperament.parts import build
from temperament.protocols import Decode

CAPTIONS = ["a red cross at the top left on navy", "a blue disc on black"]


def painted(base, *inference, seed=3, model=None):
    parts = [build(p, Decode) for p in inference]
    return System(base, parts, seed=seed, model=model).paint(CAPTIONS)


@pytest.mark.parametrize("kind", ["unet", "flow"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_its_ends_are_the_base_and_the_tuned_model_to_the_bit(kind, guidance):
    how = {"sample.sampler": {"steps": 3, "guidance": guidance, "eta": 1.0}}
    base = moved(small(kind, 5), ("denoiser/", "text_encoder/"), 0.03)
    at = lambda w, **more: painted(base, how, {"sample.rl_guidance": {"weight": w, **more}})
    tuned, pure = painted(base, how), painted(base, how, model=Pure(base))
    assert not torch.allclose(tuned, pure, atol=1e-3)
    assert torch.equal(at(1.0), tuned) and torch.equal(at(0.0), pure)
    assert torch.equal(at(2.0, alone=3), tuned) and not torch.equal(at(2.0, alone=2), tuned)
    assert not torch.allclose(at(2.0), tuned, atol=1e-3)


def test_guidance_comes_first_and_each_reads_with_its_own_encoder():
    """Against the formula by hand, one step: two captions, two networks, two text encoders."""
    base, g, w = moved(small("unet", 2), ("denoiser/", "text_encoder/"), 0.03), 3.0, 1.7
    part = build({"sample.rl_guidance": {"weight": w}})
    got = denoise(base, CAPTIONS, Sampler(1, 0.0, g), seed=1, hooks=part.hooks(base)).latents
    said = {}
    for name, model in (("tuned", base), ("base", Pure(base))):
        for scale in (1.0, 0.0):  # the estimates with and without the caption
            captions = CAPTIONS if scale else [""] * 2
            said[name, scale] = denoise(model, captions, Sampler(1, 0.0, 1.0), seed=1).latents
        said[name] = said[name, 0.0] + g * (said[name, 1.0] - said[name, 0.0])
    # an estimate of the picture is affine in what the network says, so it may be combined instead
    torch.testing.assert_close(got, said["base"] + w * (said["tuned"] - said["base"]), rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("weight", [0.5, 2.3])
@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
def test_a_gaussian_is_moved_by_exactly_so_much(predicts, weight, eta):
    """p_base N(0, 1), reward a x under a KL penalty b: p_tuned N(a/b, 1), and guided N(w a/b, 1), under noise at every time."""
    shift = float(torch.randn(()))
    base = gaussian(0.0, predicts)
    base.apply(Delta({"denoiser/mean": Dense(torch.tensor([shift]))}))
    how = Sampler(12, eta, 1.0)
    hooks = build({"sample.rl_guidance": {"weight": weight}}).hooks(base)
    got = denoise(base, [""] * 64, how, seed=4, hooks=hooks).latents
    want = denoise(gaussian(weight * shift), [""] * 64, how, seed=4).latents
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_without_a_change_it_changes_nothing():
    base = small("unet", 1)
    assert torch.allclose(painted(base), painted(base, {"sample.rl_guidance": {"weight": 2.0}}), atol=1e-6)
