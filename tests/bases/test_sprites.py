"""The sprite world says the truth about its pictures, and what is held out is not shown."""

import numpy as np
import pytest
from tiny import seed

from temperament.bases.worlds import sprites as world
from temperament.bases.worlds.draw import Draw


def test_pictures_are_what_captions_masks_and_boxes_say():
    for scene in world.scenes("train", 60, seed=seed(), subjects=(1, 2)):
        image, masks, boxes = world.render(scene), world.masks(scene), world.boxes(scene)
        outside = ~masks.any(0)
        assert image.shape == (3, 16, 16) and image.dtype == np.float32 and image.min() >= 0 and image.max() <= 1
        assert np.allclose(image[:, outside].T, world.BACKGROUNDS[scene.background])
        assert masks.sum(0).max() == 1 or len(scene.subjects) == 1  # subjects do not overlap
        for subject, mask, (x0, y0, x1, y1) in zip(scene.subjects, masks, boxes, strict=True):
            assert mask[y0:y1, x0:x1].sum() == mask.sum() and mask[y0].any() and mask[:, x1 - 1].any()
            row, column = world.PLACES[subject.place]
            assert y0 // 8 == row and x0 // 8 == column
            seen = {tuple(np.round(c, 3)) for c in image[:, mask].T}
            assert tuple(np.round(np.float32(world.COLOURS[subject.colour]), 3)) in seen
            assert len(seen) == (1 if subject.texture == "plain" else 2)
            assert all(word in world.vocabulary() for word in scene.caption().split())


def test_scenes_are_a_function_of_the_seed_and_splits_are_apart():
    s = seed()
    assert world.scenes("test", 20, s, (1, 2)) == world.scenes("test", 20, s, (1, 2)) != world.scenes("test", 20, s + 1, (1, 2))
    shown = {(x.shape, x.colour, scene.background) for scene in world.scenes("train", 2000, s) for x in scene.subjects}
    held = {(x.shape, x.colour, scene.background) for scene in world.scenes("test", 300, s) for x in scene.subjects}
    assert not shown & held and len(held) > 5
    assert {x for x, *_ in held} <= {x for x, *_ in shown}  # every factor alone is known
    assert not set(world.sprites("train", 50)) & set(world.sprites("test", 10))


def test_every_figure_differs_from_every_other():
    names = [*world.SHAPES, *world.sprites("train", 30), *world.sprites("test", 10)]
    figures = [world._figure(n) > 0 for n in names]
    assert min(np.sum(a != b) for i, a in enumerate(figures) for b in figures[:i]) >= 4
    assert all((f == f[:, ::-1]).all() for f in figures)


def test_an_edit_changes_one_factor_and_says_which():
    for i, scene in enumerate(world.scenes("train", 40, seed=seed(), subjects=(1, 2))):
        words, after = world.edit(scene, Draw("edit", i))
        old, new = scene.subjects[0], after.subjects[0]
        changed = [k for k in ("shape", "colour", "texture", "place") if getattr(old, k) != getattr(new, k)]
        changed += ["background"] * (scene.background != after.background)
        assert len(changed) == 1 and scene.subjects[1:] == after.subjects[1:]
        value = after.background if changed[0] == "background" else getattr(new, changed[0])
        assert words.endswith(value)


@pytest.mark.parametrize("kind", world.CORRUPTIONS)
def test_corruptions_grow(kind):
    image = world.render(world.scenes("train", 1, seed=seed())[0])
    far = [float(np.abs(world.corrupt(image, kind, k, Draw("c", 1)) - image).mean()) for k in (1, 3, 5)]
    assert 0 < far[0] < far[1] < far[2]
    assert np.array_equal(world.corrupt(image, kind, 2, Draw("c", 2)), world.corrupt(image, kind, 2, Draw("c", 2)))
