"""The lab's generators as shipped: of captions no training saw, their pictures show what was asked, by two judges."""

import numpy as np
import pytest
import torch

from temperament.bases.load import load
from temperament.bases.train_diffusion import named, right
from temperament.bases.worlds import sprites

pytest.importorskip("diffusers")


@pytest.mark.parametrize("name", ["unet", "flow", "consistency"])
def test_it_paints_what_it_is_asked(name):
    found = right(load(f"lab/{name}"), 48)
    assert found["named"] >= 0.9 and found["all"] >= 0.9, found


def test_the_judge_knows_renders_and_tells_them_from_other_captions():
    asked = sprites.scenes("test", 60, 7)
    pixels = torch.from_numpy(np.stack([sprites.render(s) for s in asked]))
    assert named(asked, pixels) >= 0.95
    assert named(asked[1:] + asked[:1], pixels) <= 0.1
