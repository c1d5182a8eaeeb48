"""The script that makes the lab's consistency model, at the smallest scale: it trains, and saves what loads."""

import pytest
import torch

from temperament.bases import train_consistency as script
from temperament.bases.load import load
from temperament.engine.denoise import Denoiser, Sampler, denoise
from tests.generators import WORDS, folder, unet

pytest.importorskip("diffusers")


def test_it_trains_and_leaves_a_base(tmp_path):
    from temperament.bases import train_diffusion as lab

    of = folder(unet(lab.SCHEDULERS["unet"], side=16), tmp_path / "unet")
    base, teacher = script.start(of)
    assert Denoiser.of(base).process.renoises and not Denoiser.of(teacher).process.renoises
    before = [p.clone() for p in base.components["denoiser"].parameters()]
    script.train(base, teacher, script.Plan(steps=3, rows=2, scenes=8, first=2, last=4), lambda line: None)
    assert any(not torch.equal(a, b) for a, b in zip(before, base.components["denoiser"].parameters(), strict=True))
    got = {k: {"all": 0.5, "away": 0.1} for k in (1, 2, 4)}
    script.save(base, "lab/unet", tmp_path / "made", got, script.Plan())
    made = load(str(tmp_path / "made"))
    assert Sampler.usual(Denoiser.of(made).process) == Sampler(4, 0.0, 1.0)
    assert denoise(made, WORDS).pixels.shape == (3, 3, 16, 16)
    assert "2 steps: all 50 %, away 0.100" in (tmp_path / "made" / "README.md").read_text()


def test_a_diffusion_base_under_a_boundary_says_the_same_beyond_it(tmp_path):
    from temperament.bases import train_diffusion as lab

    of = folder(unet(lab.SCHEDULERS["unet"]), tmp_path / "unet")
    one, two = (Denoiser.of(load(str(f))) for f in (of, script.as_consistency(of, tmp_path / "start")))
    x, t, told = torch.randn(2, 3, 8, 8), torch.tensor([40.0, 900.0]), one.encode(WORDS[:2])
    with torch.no_grad():
        torch.testing.assert_close(two.clean(x, t, told), one.clean(x, t, told), rtol=1e-3, atol=1e-3)
        assert torch.equal(two.clean(x, t * 0, told), x)
