"""The world's eye sees what was painted; a skill scores what it sees."""

import numpy as np
import pytest
import torch

from temperament import parts
from temperament.bases import train_diffusion as lab
from temperament.bases.worlds import sprites
from temperament.engine.measure import System
from temperament.errors import UserError
from tests.methods.drive import fresh, tiny


def test_the_eye_sees_every_scene_also_under_noise():
    asked, noise = sprites.scenes("test", 60, fresh()), np.random.default_rng(fresh()).standard_normal((60, 3, 16, 16))
    seen = sprites.recognise(np.stack([sprites.render(s) for s in asked]) + 0.1 * noise)
    assert [sprites.factors(s) for s, _ in seen] == [sprites.factors(s) for s in asked]
    assert all(abs(away - 0.1) < 0.02 for _, away in seen)


class Painter(System):
    """Paints what is asked, but discs in the wrong colour."""

    def paint(self, captions, ids=None):
        painted = [next(s for s in self.scenes if s.caption() == c) for c in captions]
        return torch.from_numpy(np.stack([sprites.render(s) for s in painted]))


def test_right_is_right():
    base = lab.fresh("unet", 0)
    suite = parts.build(
        {"evaluate.renders": {"wanted": ["shape", "place"], "shapes": ["disc", "bar"], "items": 5, "seed": fresh()}}
    )
    for skill in suite.skills(type("Ctx", (), {"base": base, "items": 9})()):
        system = Painter(base)
        system.scenes = skill.scenes
        outcomes = skill.measure(system)
        assert [o.score for o in outcomes] == [1.0] * 5 and all(o.output == o.expected for o in outcomes)
        assert outcomes[0].extra["image"].startswith("data:image/png;base64,")


def test_a_sampler_of_the_recipe_is_used():
    base = lab.fresh("flow", 0)
    parts_ = [parts.build({"sample.sampler": {"steps": 2, "guidance": 1.0}})]
    calls = []
    net = base.components["denoiser"]
    handle = net.register_forward_hook(lambda *a: calls.append(1))
    pixels = System(base, parts_).paint(["a red bar"] * 3)
    handle.remove()
    assert len(System(base, parts_).paint([])) == 0
    assert len(calls) == 2 and pixels.shape == (3, 3, 16, 16) and 0 <= pixels.min() <= pixels.max() <= 1


def test_a_language_model_paints_nothing():
    with pytest.raises(UserError, match="makes no pictures"):
        parts.build("evaluate.renders").skills(type("Ctx", (), {"base": tiny(), "items": 2})())
