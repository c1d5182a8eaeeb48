from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from temperament.bases.worlds import sprites
from temperament.parts import part


@part("aides.sprite_eye", modalities=("image",))
@dataclass(frozen=True)
class SpriteEye:
    """The sprite world's own eye as features: which figure a picture shows, a 1 among zeros.

    The cosine of two pictures is 1 where both show the same shape or sprite, else 0: a likeness that is never wrong. It knows
    the six shapes and the sprites it is told of, and takes every picture for the nearest scene of one."""

    role: ClassVar = "features"
    sure: ClassVar = True  # alike or not, nothing between
    known: list[int] = field(default_factory=lambda: [0])  # sprites held out of training that it knows, by number

    def ask(self, requests: Tensor) -> Tensor:
        """(rows, 3, 16, 16) in 0..1 -> (rows, shapes and sprites), one 1 in each."""
        names = sprites.sprites("test", max(self.known) + 1) if self.known else []
        more = [names[i] for i in self.known]
        figures = [*sprites.SHAPES, *more]
        seen = [scene.subjects[0].shape for scene, _ in sprites.recognise(requests.cpu().numpy(), more)]
        return torch.nn.functional.one_hot(torch.tensor([figures.index(s) for s in seen]), len(figures)).float()
